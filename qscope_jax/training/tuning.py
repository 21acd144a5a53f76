"""What fine-tuning recipes share: rates, the parameters that are trained (all weights, or adapters), and one optimiser step of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array

from qscope_jax.errors import ConfigError
from qscope_jax.models.decoder import Decoder
from qscope_jax.models.language_model import LanguageModel
from qscope_jax.parallel.processes import is_first
from qscope_jax.parallel.rules import PARAMETER_AXES, leaf_name, parameter_sharding, replicated
from qscope_jax.training.lora import TARGETS, attach, init_adapters, merge, save_adapters

SCHEDULES = ("cosine", "linear", "constant")


@dataclass(frozen=True, kw_only=True)
class TuningConfig:
    """Rates of a run, and what is trained."""

    steps: int
    """Optimiser steps; the schedule ends here."""
    micro_batches: int = 1
    """Parts in which a step's rows are worked through, one after the other; changes no gradient."""
    learning_rate: float = 1e-5
    """Peak rate of AdamW."""
    schedule: str = "cosine"
    """How the rate falls after the warm-up: `cosine` or `linear` to 0, or `constant`."""
    warmup_steps: int = 100
    """Steps of linear warm-up, at most half of the run."""
    weight_decay: float = 0.1
    """Decay of matrices; norms and biases are spared."""
    beta1: float = 0.9
    """Of Adam's first moment."""
    beta2: float = 0.95
    """Of its second."""
    clip: float = 1.0
    """Largest global gradient norm."""
    lora_rank: int = 0
    """Rank of adapters that are trained in the place of the weights; 0 trains all weights."""
    lora_alpha: float = 32.0
    """Adapters count alpha / rank times."""
    lora_targets: tuple[str, ...] = TARGETS
    """Weights that get adapters."""
    master_dtype: str = "float32"
    """Of the trained parameters and Adam's moments; the passes compute in the model's own dtype."""
    remat: bool = True
    """Compute each layer anew in the backward pass instead of keeping its activations."""
    head_chunk: int = 0
    """Positions of a row whose vocabulary scores are held at a time; 0 holds all."""
    seed: int = 0
    """Of the order of conversations, and of adapters."""

    def __post_init__(self):
        """Check ranges."""
        for name in ("steps", "micro_batches"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.schedule not in SCHEDULES:
            raise ConfigError(f"schedule is {self.schedule}, expected one of {', '.join(SCHEDULES)}")
        if self.master_dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"master_dtype is {self.master_dtype}, expected float32 or bfloat16")
        if not (self.learning_rate > 0 and self.clip > 0 and self.weight_decay >= 0 and self.warmup_steps >= 0 and self.lora_rank >= 0):
            raise ConfigError("learning_rate and clip must be positive; weight_decay, warmup_steps and lora_rank at least 0")
        if self.head_chunk < 0:
            raise ConfigError(f"head_chunk is {self.head_chunk}, expected 0 or more")

    @property
    def updates(self) -> int:
        """Times that the optimiser is called in the run."""
        return self.steps

    def rate(self) -> optax.Schedule:
        """Learning rate at an update."""
        warmup = min(self.warmup_steps, self.updates // 2)
        rest = max(self.updates - warmup, 1)
        after = {
            "cosine": optax.cosine_decay_schedule(self.learning_rate, rest),
            "linear": optax.linear_schedule(self.learning_rate, 0.0, rest),
            "constant": optax.constant_schedule(self.learning_rate),
        }[self.schedule]
        # The ramp begins above 0: the first step is not lost.
        return optax.join_schedules([optax.linear_schedule(self.learning_rate / (warmup + 1), self.learning_rate, warmup), after], [warmup])

    def optimizer(self) -> optax.GradientTransformation:
        """Clipping and AdamW along the schedule."""
        adam = optax.adamw(self.rate(), b1=self.beta1, b2=self.beta2, weight_decay=self.weight_decay, mask=_is_matrix)
        return optax.chain(optax.clip_by_global_norm(self.clip), adam)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TunedState:
    """What is trained, a decoder or adapters, and the optimiser's state."""

    parameters: Any
    optimizer: Any


class Tuning:
    """The trained parameters of a model: where they lie, how a decoder is made of them, how a gradient moves them, what is saved."""

    def __init__(self, model: LanguageModel, config: TuningConfig):
        """Describe them.

        Args:
            model: Where training begins; stays as it is. Its arrays may be descriptions, to plan a run.
            config: Rates, and whether adapters are trained.

        Raises:
            ConfigError: an adapter that fits no weight.
        """
        self.model, self.config, self.optimizer = model, config, config.optimizer()
        places = self.places()
        self._begin = jax.jit(self._first_state, out_shardings=places)

    @property
    def scale(self) -> float:
        """What adapters are multiplied by."""
        return self.config.lora_alpha / max(self.config.lora_rank, 1)

    @property
    def frozen(self) -> Decoder | None:
        """The weights that adapters are added to; None where all weights are trained."""
        return self.model.decoder if self.config.lora_rank else None

    def init(self) -> TunedState:
        """The model's own weights as master copies, or adapters that change nothing yet."""
        with jax.set_mesh(self.model.mesh):
            return self._begin(self.model.decoder, jax.random.key(self.config.seed))

    def abstract_state(self) -> TunedState:
        """Shapes, dtypes and shardings of a state."""
        mesh = self.model.mesh

        def place(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            try:
                sharding = parameter_sharding(leaf_name(path), leaf.shape, mesh)
            except StopIteration:  # a count of the optimiser
                sharding = replicated(mesh)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        like = jax.eval_shape(lambda decoder: self._first_state(decoder, jax.random.key(0)), self.model.decoder)
        return jax.tree_util.tree_map_with_path(place, like)

    def places(self) -> Any:
        """Shardings of a state, to hold a jitted step to; None on one device."""
        state = self.abstract_state()  # said even where it is not needed: adapters that fit nothing are found now
        return None if self.model.mesh.size == 1 else jax.tree.map(lambda leaf: leaf.sharding, state)

    def assemble(self, parameters: Any, frozen: Decoder | None) -> Decoder:
        """The decoder that a pass runs, in the model's dtype. Can be traced."""
        if frozen is not None:
            decoder = attach(frozen, parameters, self.scale)
        else:
            # Cast once, before weights are gathered, not in every product.
            decoder = jax.tree.map(lambda leaf: leaf.astype(self.model.config.dtype), parameters)
        decoder.config = replace(self.model.config, remat=self.config.remat)
        return decoder

    def update(self, state: TunedState, gradient: Any) -> tuple[TunedState, dict[str, Array]]:
        """Move the parameters; a gradient that is not finite counts as one of 0. Can be traced.

        Metrics: `gradient_norm`, and `skipped`, 1 where it was not finite.
        """
        norm = optax.tree.norm(gradient)
        ok = jnp.isfinite(norm)
        gradient = jax.tree.map(lambda g: jnp.where(ok, g, jnp.zeros_like(g)), gradient)
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to the power of its int32 step
            updates, opt_state = self.optimizer.update(gradient, state.optimizer, state.parameters)
            parameters = optax.apply_updates(state.parameters, updates)
        return TunedState(parameters, opt_state), {"gradient_norm": norm, "skipped": 1 - ok.astype(jnp.float32)}

    def export(self, state: TunedState) -> Decoder:
        """The fine-tuned decoder in the model's dtype, adapters merged."""
        with jax.set_mesh(self.model.mesh):
            return jax.jit(self._exported)(state.parameters, self.model.decoder)

    def tuned(self, state: TunedState) -> LanguageModel:
        """The fine-tuned model, with the tokenizer of the one that it began as."""
        mine = self.model
        return LanguageModel(self.export(state), mine.source, mine.mesh, mine.__dict__.get("tokenizer"))

    def save(self, state: TunedState, folder: Path) -> Path:
        """Write the fine-tuned model as a Hugging Face folder, and adapters by themselves in `adapters` beside it, as PEFT has them.

        In a run of several processes all call this, and the first writes the adapters.

        Raises:
            SourceError: the folder cannot be written.
        """
        self.tuned(state).save(folder)
        if self.config.lora_rank and is_first():
            save_adapters(folder.parent / "adapters", state.parameters, self.model.config, alpha=self.config.lora_alpha, base=self.model.name)
        return folder

    def _first_parameters(self, decoder: Decoder, key: Array) -> Any:
        if self.config.lora_rank:
            return init_adapters(decoder, self.config.lora_rank, self.config.lora_targets, key)
        # Copies even where the dtype stays: a step writes over its state.
        return jax.tree.map(lambda leaf: jnp.copy(leaf.astype(self.config.master_dtype)), decoder)

    def _first_state(self, decoder: Decoder, key: Array) -> TunedState:
        parameters = self._first_parameters(decoder, key)
        return TunedState(parameters, self.optimizer.init(parameters))

    def _exported(self, parameters: Any, decoder: Decoder) -> Decoder:
        if self.config.lora_rank:
            return merge(decoder, parameters, self.scale)
        return jax.tree.map(lambda trained, first: trained.astype(first.dtype), parameters, decoder)


def accumulate(function: Callable[..., Any], parameters: Any, arrays: Sequence[Array], parts: int) -> tuple[Any, Any]:
    """Sums of what `function` adds up, and of its gradient, over parts of a batch worked through one after the other. Can be traced.

    Args:
        function: `function(parameters, arrays) -> (value, sums)`, whose value is differentiated: a part's share of the whole step's loss.
        parameters: What the gradient is of.
        arrays: The batch, rows first.
        parts: How many; row r goes to part r % parts, so that every device keeps its own rows.
    """
    gradient_of = jax.value_and_grad(function, has_aux=True)
    if parts == 1:
        (_, sums), gradient = gradient_of(parameters, list(arrays))
        return sums, gradient
    dealt = [jnp.moveaxis(rows.reshape(rows.shape[0] // parts, parts, *rows.shape[1:]), 1, 0) for rows in arrays]

    def add(carry: Any, part: list[Array]) -> tuple[Any, None]:
        (_, sums), gradient = gradient_of(parameters, part)
        return jax.tree.map(jnp.add, carry, (sums, gradient)), None

    described = jax.eval_shape(lambda part: function(parameters, part)[1], [rows[0] for rows in dealt])
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), described), jax.tree.map(jnp.zeros_like, parameters)
    (sums, gradient), _ = jax.lax.scan(add, zeros, dealt)
    return sums, gradient


def check_rows(rows: int, parts: int, mesh: Mesh, what: str) -> None:
    """Check that a step's rows lie evenly over the micro-batches and the mesh.

    Raises:
        ConfigError: they do not.
    """
    if rows % parts:
        raise ConfigError(f"{what} {rows} cannot be split into {parts} micro_batches; expected a multiple of them")
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if (rows // parts) % shards:
        raise ConfigError(
            f"a micro-batch of {rows // parts} rows does not lie over data and fsdp, {shards} shards; choose another {what}, micro_batches or mesh"
        )


def _is_matrix(tree: Any) -> Any:
    """True at matrices, adapters included. The number of dimensions does not tell: layers are stacked, so their norms have two."""
    return jax.tree_util.tree_map_with_path(lambda path, _: len(PARAMETER_AXES[leaf_name(path)]) >= 2, tree)
