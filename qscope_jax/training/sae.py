"""Train SAEs on a model's residual streams: the recipe behind `qscope train-sae`.

Loss, AuxK, initialisation and rates follow Gao et al. 2024 (arXiv 2406.04093) and dictionary_learning, as far as the Qwen-Scope report
(section 2.2) discloses its own; every default that the report leaves open is stated on its field.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qscope_jax.models.language_model import LanguageModel
from qscope_jax.parallel.processes import is_first
from qscope_jax.sae.arrays import SAEArrays
from qscope_jax.sae.autoencoder import SparseAutoencoder, replace_params
from qscope_jax.sae.formats.own_format import write_folder
from qscope_jax.sae.layer_sae import LayerSAE
from qscope_jax.sae.metrics import evaluate_sae
from qscope_jax.sae.selection import largest_features
from qscope_jax.sae.sparse import combine_rows
from qscope_jax.training.activations import geometric_median, mean_squared_norm
from qscope_jax.training.loop import Stream
from qscope_jax.training.sae_config import SAEConfig
from qscope_jax.training.sae_step import SAEState, compiled_step, exported, new_sae

_EVALUATED = 8
_SAMPLE = 256  # tokens that the encoder's first size is chosen on


class ActivationSource(Stream, Protocol):
    """A stream of batches [M, N, D] that shows what it holds before the first: `ActivationStream` or `CachedActivations`."""

    def peek(self) -> Float[Array, "M N D"]:
        """Many tokens, for statistics."""
        ...

    @property
    def counts(self) -> Mapping[str, int]:
        """Tokens read and left out so far, for the metrics."""
        ...


class SAETraining:
    """Recipe: SAEs for several layers, and several seeds, at once."""

    name = "SAE"
    unit = "tokens"

    def __init__(
        self,
        model: LanguageModel,
        layers: Sequence[int],
        activations: Callable[[], ActivationSource],
        config: SAEConfig,
        held_out: Sequence[str] = (),
    ):
        """Describe a run.

        Args:
            model: Whose residual streams are explained; its mesh is where the SAEs are trained.
            layers: Their layers, in the order of the batches.
            activations: Makes the stream of batches, from its beginning.
            config: Size and training of the SAEs.
            held_out: Texts for evaluation.

        Raises:
            InputError: the model lacks a layer.
            ConfigError: the mesh does not fit the SAEs.
        """
        for layer in layers:
            model.check_layer(layer)
        self.model, self.layers, self.activations, self.config, self.held_out = model, tuple(layers), activations, config, held_out
        self.step_program = compiled_step(config, config.aux_slots(model.config.d_model), model.mesh if model.mesh.size > 1 else None)
        self._first: ActivationSource | None = None
        self._stream: ActivationSource | None = None

    def init(self) -> SAEState:
        """One state a layer and seed, stacked: unit random directions, an encoder along them, b_dec at the geometric median of the first buffer."""
        self._first = self.activations()
        x_MND = self._first.peek()
        moments = [_moments(x_MND, np.int32(place)) for place in range(len(self.layers))]
        layers, seeds = zip(*self._places(), strict=True)
        scale_S, b_dec_SD = (jnp.repeat(jnp.stack(found), self.config.num_seeds, axis=0) for found in zip(*moments, strict=True))
        return self.step_program.build(self._first_state, len(layers), (np.asarray(layers), np.asarray(seeds), scale_S, b_dec_SD, x_MND[:, :_SAMPLE]))

    def stream(self) -> ActivationSource:
        """Activations from the beginning; the buffer that `init` looked at is not made twice."""
        self._stream, self._first = self._first or self.activations(), None
        return self._stream

    def step(self, state: SAEState, batch: Float[Array, "M N D"]) -> tuple[SAEState, Mapping[str, Any]]:
        """One step of every SAE; each is what it would be alone.

        Metrics are lists over layers (and seeds), `loss` their mean, and the counts of the stream that was begun last.
        """
        state, metrics = self.step_program(state, batch)
        return state, {"loss": jnp.mean(metrics["fvu"]), **metrics, **(self._stream.counts if self._stream else {})}

    def units(self, batch: Float[Array, "M N D"]) -> int:
        """Tokens of a batch."""
        return batch.shape[1]

    def evaluate(self, state: SAEState) -> Mapping[str, Any]:
        """Held-out metrics of the first seed, a list over layers each."""
        if not self.held_out:
            return {}
        places = range(0, len(self.layers) * self.config.num_seeds, self.config.num_seeds)
        results: dict[int, dict[str, float]] = {}
        for start in range(0, len(places), _EVALUATED):  # a few at a time: exported SAEs are copies
            saes = [self.export_one(state, place) for place in places[start : start + _EVALUATED]]
            results |= evaluate_sae(self.model, saes, self.held_out, splice=False)
        names = ("fvu", "l0", "cossim", "dead_fraction", "fvu_all")
        return {"held_out": True, **{name: [results[layer][name] for layer in self.layers] for name in names}}

    def export(self, state: SAEState) -> list[LayerSAE]:
        """All SAEs in raw units, by layer and seed; see `export_one`."""
        return [self.export_one(state, place) for place in range(len(self.layers) * self.config.num_seeds)]

    def export_one(self, state: SAEState, place: int) -> LayerSAE:
        """The SAE at a place of the stack, in raw units: the input scale is folded into the biases, directions keep unit norm."""
        layer, seed = list(self._places())[place]
        one = _at(state, np.int32(place))
        metadata = {
            "format": "qscope_jax",
            "source": "trained here",
            "model_name": self.model.name,
            "unit_norm_decoder": True,
            "folds": ["input scale"],
            "layer": layer,
            "hook_name": f"model.layers.{layer}",
        }
        if self.config.num_seeds > 1:
            metadata["seed"] = seed
        return LayerSAE(fold_scale(exported(one, self.config), one.scale), layer, metadata)

    def save(self, state: SAEState, folder: Path) -> list[Path]:
        """Write all SAEs in the project's own format, one after the other; returns the folder, or one inside it for each seed.

        In a run of several processes all call this, and the first writes.

        Raises:
            SourceError: the folder cannot be written, or a parameter is not finite.
        """
        seeds = self.config.num_seeds
        folders = [folder] if seeds == 1 else [folder / f"seed-{self.config.seed + number}" for number in range(seeds)]
        for number, path in enumerate(folders):
            arrays = _Exports(self, state, number)
            if is_first():
                path.parent.mkdir(parents=True, exist_ok=True)
                write_folder(path, arrays)
            else:
                for layer in sorted(arrays):
                    _ = arrays[layer]
        return folders

    def _places(self) -> Iterator[tuple[int, int]]:
        """Layer and seed of each SAE of the stack."""
        return ((layer, self.config.seed + number) for layer in self.layers for number in range(self.config.num_seeds))

    def _first_state(self, place: Array, layers_S: Array, seeds_S: Array, scale_S: Array, b_dec_SD: Array, sample_MND: Array) -> SAEState:
        key = jax.random.fold_in(jax.random.key(seeds_S[place]), layers_S[place])
        scale, b_dec_D = scale_S[place], b_dec_SD[place]
        W_dec = jax.random.normal(key, (self.config.num_features, b_dec_D.shape[0]), jnp.float32)
        W_dec /= jnp.linalg.norm(W_dec, axis=1, keepdims=True)
        W_enc = W_dec * first_encoder_norm(sample_MND[place // self.config.num_seeds].astype(jnp.float32) / scale - b_dec_D, W_dec, self.config.k)
        # The encoder is the tied one of x - b_dec, written in the released form, which sees x itself.
        b_enc = -jnp.matmul(W_enc, b_dec_D, precision=jax.lax.Precision.HIGHEST)
        return self.step_program.new_state(new_sae(W_enc, W_dec, b_enc, b_dec_D, self.config), scale)


class _Exports(Mapping[int, SAEArrays]):
    """Host arrays of one seed's SAEs by layer, made when they are asked for."""

    def __init__(self, recipe: SAETraining, state: SAEState, number: int):
        self._recipe, self._state, self._number = recipe, state, number

    def __getitem__(self, layer: int) -> SAEArrays:
        place = self._recipe.layers.index(layer) * self._recipe.config.num_seeds + self._number
        return self._recipe.export_one(self._state, place).to_arrays()

    def __iter__(self) -> Iterator[int]:
        return iter(self._recipe.layers)

    def __len__(self) -> int:
        return len(self._recipe.layers)


def first_encoder_norm(x_ND: Float[Array, "N D"], directions_FD: Float[Array, "F D"], k: int) -> Float[Array, ""]:
    """Norm of encoder rows along unit directions at which the k largest features of tokens rebuild them with the least squared error.

    With rows of norm 1 the k directions nearest to a token resemble each other, and their sum is several times as long as it. OpenAI's
    sparse_autoencoder divides the encoder by the mean norm of what it makes of random tokens, for the same reason.
    """
    values_NK, indices_NK = largest_features(x_ND, directions_FD, jnp.zeros((directions_FD.shape[0],)), k)
    rebuilt_ND = combine_rows(jnp.maximum(values_NK, 0), indices_NK, directions_FD)
    along, length = jnp.sum(x_ND * rebuilt_ND), jnp.sum(jnp.square(rebuilt_ND))
    return jnp.where(along > 0, along / jnp.where(length > 0, length, 1), jnp.float32(1))


def fold_scale(sae: SparseAutoencoder, scale: Float[Array, ""]) -> SparseAutoencoder:
    """An SAE of x / scale as one of x: biases and thresholds times the scale, matrices as they are, activations in raw units."""
    names = [name for name in ("b_enc", "b_dec", "threshold") if hasattr(sae, name)]
    return replace_params(sae, {name: getattr(sae, name)[...] * scale for name in names})


@jax.jit
def _moments(x_MND: Float[Array, "M N D"], place: Any) -> tuple[Array, Array]:
    """Root mean squared norm of a layer's stream, and the geometric median of what is left when it is divided by it."""
    x_ND = jax.lax.dynamic_index_in_dim(x_MND, place, keepdims=False)
    scale = jnp.sqrt(mean_squared_norm(x_ND))
    return scale, geometric_median(x_ND.astype(jnp.float32) / scale)


@jax.jit
def _at(state: SAEState, place: Any) -> SAEState:
    return jax.tree.map(lambda leaf: leaf[place], state)
