"""Train top-k SAEs on a model's residual streams: the recipe behind `qscope train-sae`.

Loss, AuxK, initialisation and rates follow Gao et al. 2024 (arXiv 2406.04093) and dictionary_learning, as far as the Qwen-Scope report
(section 2.2) discloses its own; every default that the report leaves open is stated on its field.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from qscope_jax.errors import ConfigError
from qscope_jax.models.language_model import LanguageModel
from qscope_jax.sae.autoencoder import SparseAutoencoder, SparseCode
from qscope_jax.sae.layer_sae import LayerSAE
from qscope_jax.sae.metrics import evaluate_sae
from qscope_jax.sae.sparse import sparse_decode
from qscope_jax.training.activations import ActivationConfig, ActivationStream, geometric_median, mean_squared_norm
from qscope_jax.training.tokens import TokenStream

_COUNTER_LIMIT = 2_000_000_000


@dataclass(frozen=True)
class SAEConfig:
    """Size and training of the SAEs; one set for all layers of a run."""

    num_features: int
    """F; the release uses 16 or 64 times the model's width."""
    k: int
    """Active features a token."""
    steps: int
    """Optimiser steps; the schedule ends here."""
    learning_rate: float | None = None
    """Peak rate of Adam; default 2e-4 / sqrt(F / 2^14)."""
    warmup_steps: int = 1000
    """Steps of linear warm-up, at most a tenth of the run."""
    decay_share: float = 0.2
    """Share of the run, at its end, over which the rate falls linearly to 0."""
    aux_weight: float = 1 / 32
    """Weight of AuxK."""
    aux_k: int | None = None
    """Dead features that AuxK may use a token; default half the model's width."""
    dead_after_tokens: int = 10_000_000
    """A feature is dead when it has not fired for so many tokens."""
    clip: float = 1.0
    """Largest gradient norm, after the decoder's projection; each SAE by itself."""
    seed: int = 0
    """Of the directions."""

    def __post_init__(self):
        """Check ranges."""
        if not 1 <= self.k <= self.num_features:
            raise ConfigError(f"k is {self.k}, expected 1 to num_features = {self.num_features}")
        if self.steps < 1 or not 0 <= self.decay_share <= 1 or self.dead_after_tokens < 1:
            raise ConfigError("steps and dead_after_tokens must be positive, decay_share between 0 and 1")
        if self.aux_k is not None and self.aux_k < 1:
            raise ConfigError(f"aux_k is {self.aux_k}, expected at least 1; leave AuxK out with aux_weight: 0")

    def schedule(self) -> optax.Schedule:
        """Warm-up, plateau, linear decay to 0."""
        peak = 2e-4 / math.sqrt(self.num_features / 2**14) if self.learning_rate is None else self.learning_rate
        warmup = min(self.warmup_steps, max(self.steps // 10, 1))
        decay = max(int(self.steps * self.decay_share), 1)
        parts = [optax.linear_schedule(0.0, peak, warmup), optax.constant_schedule(peak), optax.linear_schedule(peak, 0.0, decay)]
        return optax.join_schedules(parts, [warmup, max(self.steps - decay, warmup)])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SAEState:
    """Training state of one SAE.

    Attributes:
        sae: Parameters, of inputs scaled to unit mean squared norm.
        optimizer: Adam's moments and step.
        tokens_since_fired: Tokens since each feature last fired, saturating.
        scale: Root mean squared norm of the layer's stream: inputs are divided by it.
    """

    sae: SparseAutoencoder
    optimizer: Any
    tokens_since_fired: Int[Array, " F"]
    scale: Float[Array, ""]


class SAETraining:
    """Recipe: TopK SAEs for several layers at once, from activations made on the fly."""

    name = "SAE"
    unit = "tokens"

    def __init__(
        self,
        model: LanguageModel,
        tokens: Callable[[], TokenStream],
        activations: ActivationConfig,
        config: SAEConfig,
        held_out: Sequence[str] = (),
    ):
        """Describe a run.

        Args:
            model: Whose residual streams are explained.
            tokens: Makes the token stream, from its beginning.
            activations: Layers, filter, buffer and batch size.
            config: Size and training of the SAEs.
            held_out: Texts for evaluation.
        """
        for layer in activations.layers:
            model.check_layer(layer)
        self.model, self.tokens, self.activations, self.config, self.held_out = model, tokens, activations, config, held_out
        self.aux_k = min(max(model.config.d_model // 2, 1) if config.aux_k is None else config.aux_k, config.num_features)
        self._first: ActivationStream | None = None
        self._step = _compiled_step(config, self.aux_k)

    def init(self) -> tuple[SAEState, ...]:
        """One state a layer: unit random directions, tied encoder, b_dec at the geometric median of the first buffer."""
        self._first = self._begin()
        first = self._first.peek()
        return tuple(
            self._init(x, jax.random.fold_in(jax.random.key(self.config.seed), layer))
            for layer, x in zip(self.activations.layers, first, strict=True)
        )

    def stream(self) -> ActivationStream:
        """Activations from the beginning; the buffer that `init` looked at is not made twice."""
        stream, self._first = self._first or self._begin(), None
        return stream

    def step(self, state: tuple[SAEState, ...], batch: Float[Array, "M N D"]) -> tuple[tuple[SAEState, ...], Mapping[str, Any]]:
        """One step of every layer's SAE; each is what it would be alone. Metrics are lists over layers, `loss` their mean."""
        pairs = [self._step(one, x) for one, x in zip(state, batch, strict=True)]
        metrics = {name: jnp.stack([m[name] for _, m in pairs]) for name in pairs[0][1]}
        return tuple(one for one, _ in pairs), {"loss": jnp.mean(metrics["fvu"]), **metrics}

    def units(self, batch: Float[Array, "M N D"]) -> int:
        """Tokens of a batch."""
        return batch.shape[1]

    def evaluate(self, state: tuple[SAEState, ...]) -> Mapping[str, Any]:
        """Held-out metrics, a list over layers each."""
        if not self.held_out:
            return {}
        results = evaluate_sae(self.model, self.export(state), self.held_out, splice=False)
        names = ("fvu", "l0", "cossim", "dead_fraction", "fvu_all")
        return {"held_out": True, **{name: [results[layer][name] for layer in self.activations.layers] for name in names}}

    def export(self, state: tuple[SAEState, ...]) -> list[LayerSAE]:
        """SAEs in raw units: the input scale is folded into the biases, directions keep unit norm (`4.4b` of the usual algebra)."""
        metadata = {
            "format": "qscope_jax",
            "source": "trained here",
            "model_name": self.model.name,
            "unit_norm_decoder": True,
            "folds": ["input scale"],
        }
        return [
            LayerSAE(fold_scale(one.sae, one.scale), layer, {**metadata, "layer": layer, "hook_name": f"model.layers.{layer}"})
            for layer, one in zip(self.activations.layers, state, strict=True)
        ]

    def _begin(self) -> ActivationStream:
        return ActivationStream(self.model.decoder, self.tokens(), self.activations)

    def _init(self, x_ND: Array, key: Array) -> SAEState:
        scale = jnp.sqrt(mean_squared_norm(x_ND))
        shape = (self.config.num_features, x_ND.shape[-1])
        directions = jax.random.normal(key, shape, jnp.float32)
        directions /= jnp.linalg.norm(directions, axis=1, keepdims=True)
        b_dec = geometric_median(x_ND.astype(jnp.float32) / scale)
        # The encoder is the tied one of x - b_dec, written in the released form, which sees x itself.
        b_enc = -jnp.matmul(directions, b_dec, precision=jax.lax.Precision.HIGHEST)
        sae = SparseAutoencoder(directions, jnp.array(directions), b_enc, b_dec, k=self.config.k)
        counters = jnp.zeros((self.config.num_features,), jnp.int32)
        return SAEState(sae, self._step.optimizer.init(sae), counters, scale)  # pyright: ignore[reportArgumentType]


class SAEStep:
    """The optimiser of a config and `sae_step` jitted, its state donated.

    On a CPU the gradients stay in the same memory from step to step: the system clears every page of a fresh array, which costs a tenth
    of the step. What that memory holds is never read.
    """

    def __init__(self, config: SAEConfig, aux_k: int):
        """Describe the program; it compiles when first called.

        Args:
            config: Size and training.
            aux_k: Slots of AuxK's code.
        """
        self.optimizer = optax.adam(config.schedule())
        program = partial(_step_and_gradients, self.optimizer, config, aux_k)
        self._program = jax.jit(program, donate_argnums=(0, 2), keep_unused=True)
        self._memory: SparseAutoencoder | None = None

    def __call__(self, state: SAEState, x_ND: Float[Array, "N D"]) -> tuple[SAEState, dict[str, Array]]:
        """See `sae_step`."""
        memory, self._memory = self._memory, None
        if memory is None and jax.default_backend() == "cpu":
            memory = jax.tree.map(jnp.zeros_like, state.sae)
        state, metrics, self._memory = self._program(state, x_ND, memory)
        return state, metrics


_compiled_step = cache(SAEStep)  # recipes of one config share the program


def sae_step(
    optimizer: optax.GradientTransformation, config: SAEConfig, aux_k: int, state: SAEState, x_ND: Float[Array, "N D"]
) -> tuple[SAEState, dict[str, Array]]:
    """One optimiser step on a batch of residual streams.

    The decoder's gradient loses its part along each direction before clipping, and directions are renormalised after the step.
    """
    state, metrics, _ = _step_and_gradients(optimizer, config, aux_k, state, x_ND, None)
    return state, metrics


def _step_and_gradients(
    optimizer: optax.GradientTransformation, config: SAEConfig, aux_k: int, state: SAEState, x_ND: Array, memory: SparseAutoencoder | None
) -> tuple[SAEState, dict[str, Array], SparseAutoencoder | None]:
    """`sae_step`, and the gradients as they were before projection where there is `memory` (donated, of their shapes) to leave them in."""
    x = x_ND.astype(jnp.float32) / state.scale
    code = jax.lax.stop_gradient(state.sae.encode(x))
    fired_F = jnp.zeros((config.num_features,), bool).at[code.indices].max(code.values > 0)
    since_F = jnp.where(fired_F, 0, jnp.minimum(state.tokens_since_fired + x.shape[0], _COUNTER_LIMIT))
    dead_F = since_F >= config.dead_after_tokens

    def gradient(with_aux: bool) -> Callable[[SparseAutoencoder], Any]:
        loss = partial(sae_loss, code=code, x_ND=x, dead_F=dead_F if with_aux else None, aux_k=aux_k, aux_weight=config.aux_weight)
        return lambda sae: jax.grad(loss, has_aux=True)(sae)

    # With no dead feature AuxK is exactly 0: its branch is not run, nor are its gradients written.
    grads, (fvu, aux) = jax.lax.cond(jnp.any(dead_F), gradient(True), gradient(False), state.sae)
    kept = None if memory is None else grads
    rows_FD = state.sae.W_dec[...]
    along_F = jnp.sum(grads.W_dec[...] * rows_FD, axis=1)
    # Pythagoras with unit directions, so that the projected gradient is made only where it is used.
    norm = jnp.sqrt(jnp.maximum(optax.tree.norm(grads, squared=True) - jnp.sum(jnp.square(along_F)), 0))
    grads = replace_param(grads, "W_dec", grads.W_dec[...] - along_F[:, None] * rows_FD)
    grads = jax.tree.map(lambda g: g * jnp.minimum(1.0, config.clip / jnp.maximum(norm, 1e-12)), grads)
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to the power of its int32 step
        updates, opt_state = optimizer.update(grads, state.optimizer, state.sae)  # pyright: ignore[reportArgumentType]
    sae: Any = optax.apply_updates(state.sae, updates)  # pyright: ignore[reportArgumentType]
    # The condition always holds. Without it XLA's CPU compiler makes one call of the update and the sums over its rows, in arrays of their own.
    sae = replace_param(sae, "W_dec", jax.lax.cond(since_F[0] >= 0, _normalise, lambda rows: rows, sae.W_dec[...]))
    l0, dead = jnp.mean(jnp.sum(code.values > 0, axis=1, dtype=jnp.float32)), jnp.mean(dead_F, dtype=jnp.float32)
    metrics = {"fvu": fvu, "aux": aux, "l0": l0, "dead": dead, "gradient_norm": norm}
    return SAEState(sae, opt_state, since_F, state.scale), metrics, kept


def sae_loss(
    sae: SparseAutoencoder,
    *,
    code: SparseCode,
    x_ND: Float[Array, "N D"],
    dead_F: Bool[Array, " F"] | None,
    aux_k: int,
    aux_weight: float,
) -> tuple[Float[Array, ""], tuple[Float[Array, ""], Float[Array, ""]]]:
    """`FVU + aux_weight * L_aux`, and both parts.

        FVU   = sum |x - xhat|^2 / sum |x - mean x|^2
        L_aux = sum |e - a_aux W_dec|^2 / sum |e - mean e|^2,  e = stop_gradient(x - xhat),
                a_aux = relu(top aux_k of z among dead features), no b_dec

    A quotient whose denominator is 0 is 0.

    Args:
        sae: Parameters.
        code: Their code of the batch, computed outside.
        x_ND: The batch.
        dead_F: Dead features, or None to leave AuxK out.
        aux_k: Slots of the auxiliary code.
        aux_weight: Its weight.
    """
    error = x_ND - sae.decode(sae.at(code, x_ND))
    fvu = _unexplained(error, x_ND)
    if dead_F is None:
        return fvu, (fvu, jnp.float32(0))
    target = jax.lax.stop_gradient(error)
    aux_code = sae.encode(x_ND, k=aux_k, allowed_F=dead_F)
    aux = _unexplained(target - sparse_decode(aux_code.values, aux_code.indices, sae.W_dec[...]), target)
    return fvu + aux_weight * aux, (fvu, aux)


def fold_scale(sae: SparseAutoencoder, scale: Float[Array, ""]) -> SparseAutoencoder:
    """An SAE of x / scale as one of x: biases and thresholds times the scale, matrices as they are, activations in raw units."""
    for name in ("b_enc", "b_dec", "threshold"):
        if hasattr(sae, name):
            sae = replace_param(sae, name, getattr(sae, name)[...] * scale)
    return sae


def replace_param(sae: Any, name: str, value: Array) -> Any:
    """A copy of a module with one parameter replaced."""

    def swap(path: Any, leaf: Array) -> Array:
        return value if any(getattr(key, "name", None) == name for key in path) else leaf

    return jax.tree_util.tree_map_with_path(swap, sae)


def _normalise(rows_FD: Array) -> Array:
    return rows_FD / (jnp.linalg.norm(rows_FD, axis=1, keepdims=True) + 1e-8)


def _unexplained(error_ND: Array, x_ND: Array) -> Array:
    """Sum of squares of the error as a share of that of x about its mean; 0, with no gradient, where all rows of x are equal."""
    spread = jnp.sum(jnp.square(x_ND - jnp.mean(x_ND, axis=0)))
    return jnp.where(spread > 0, jnp.sum(jnp.square(error_ND)) / jnp.where(spread > 0, spread, 1), jnp.float32(0))
