"""Supervised fine-tuning on conversations: the recipe behind `qscope sft train`.

Cross-entropy on answers alone, a mean over all tokens of the optimiser step; an auxiliary loss, such as SASFT's, may be added to it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from qscope_jax.data.batches import BatchConfig
from qscope_jax.data.chat_batches import ChatBatch, pad_chat
from qscope_jax.data.chat_tokens import ChatRow
from qscope_jax.errors import ConfigError, InputError
from qscope_jax.models.decoder import Decoder
from qscope_jax.models.language_model import LanguageModel
from qscope_jax.parallel.rules import batch_sharding, place_rows, replicated
from qscope_jax.training.auxiliary import Auxiliary, Batch
from qscope_jax.training.losses import head_losses, predicted_mask
from qscope_jax.training.tokens import ChatStream
from qscope_jax.training.tuning import TunedState, Tuning, TuningConfig, accumulate, check_rows


@dataclass(frozen=True, kw_only=True)
class SFTConfig(TuningConfig):
    """Sizes and rates of a run."""

    batch_size: int = 32
    """Rows of a step."""
    length: int = 1024
    """Tokens of a row; conversations are packed."""

    def __post_init__(self):
        """Check ranges."""
        super().__post_init__()
        for name in ("batch_size", "length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.batch_size % self.micro_batches:
            raise ConfigError(f"batch_size {self.batch_size} cannot be split into {self.micro_batches} micro_batches; expected a multiple of them")
        if self.head_chunk and self.length % self.head_chunk:
            raise ConfigError(f"head_chunk is {self.head_chunk}, expected 0 or a divisor of length {self.length}")


class SFT:
    """Recipe: fine-tune all weights of a model, or adapters beside them."""

    name = "SFT"
    unit = "tokens"

    def __init__(
        self,
        model: LanguageModel,
        rows: Sequence[ChatRow],
        config: SFTConfig,
        *,
        auxiliary: Auxiliary | None = None,
        languages: Sequence[str] = (),
        held_out: Sequence[ChatRow] = (),
        lanes: int = 1,
    ):
        """Describe a run.

        Args:
            model: Where it begins; stays as it is.
            rows: Conversations to learn from.
            config: Sizes and rates.
            auxiliary: A loss beside cross-entropy; what weighs 0 should not be given at all.
            languages: Labels of the rows' languages, in the auxiliary loss' order.
            held_out: Conversations to evaluate on.
            lanes: Independent streams of conversations, on a mesh a multiple of its data axis.

        Raises:
            InputError: no rows, or with an auxiliary loss a row whose language is not among `languages`.
            ConfigError: rows that the mesh does not divide, or an adapter that fits no weight.
        """
        if not len(rows):
            raise InputError("there are no conversations to learn from; give at least one")
        if auxiliary is not None:
            for conversations in (rows, held_out):
                _check_languages(conversations, languages)
            for layer in auxiliary.layers:
                model.check_layer(layer)
        check_rows(config.batch_size, config.micro_batches, model.mesh, "batch_size")
        self.model, self.rows, self.config, self.lanes = model, rows, config, lanes
        self.auxiliary = auxiliary if auxiliary is None or model.mesh.size == 1 else _everywhere(auxiliary, model.mesh)
        self.languages, self.held_out = tuple(languages), held_out
        self.tuning = Tuning(model, config)
        self._step = jax.jit(self._run, donate_argnums=0, out_shardings=(self.tuning.places(), None))
        self._sums = jax.jit(self._measure)

    def init(self) -> TunedState:
        """The model's own weights as master copies, or adapters that change nothing yet."""
        return self.tuning.init()

    def lower(self) -> jax.stages.Lowered:
        """The optimiser step, lowered without any array: to look at, or to compile for machines elsewhere."""
        mesh, shape = self.model.mesh, (self.config.batch_size, self.config.length)
        rows = batch_sharding(mesh, 2)
        dtypes = (jnp.int32, jnp.int32, jnp.bool_, jnp.int32)
        described: list[Any] = [jax.ShapeDtypeStruct(shape, dtype, sharding=rows) for dtype in dtypes]
        batch = Batch(*described)
        state = self.tuning.abstract_state()
        with jax.set_mesh(mesh):
            return self._step.lower(state, self.tuning.frozen, batch, self.auxiliary)

    def stream(self) -> ChatStream:
        """Packed conversations, endless."""
        batches = BatchConfig(self.config.batch_size, self.config.length, seed=self.config.seed)
        return ChatStream(self.rows, self.languages, batches, lanes=self.lanes, mesh=self.model.mesh if self.model.mesh.size > 1 else None)

    def step(self, state: TunedState, batch: ChatBatch) -> tuple[TunedState, Mapping[str, Any]]:
        """One optimiser step.

        Metrics: `loss`, nats a trained token; `auxiliary`, its mean before its weight; `tokens`, trained ones; `gradient_norm`; `skipped`, 1 where
        the gradient was not finite and counted as 0.
        """
        with jax.set_mesh(self.model.mesh):
            return self._step(state, self.tuning.frozen, self._placed(batch), self.auxiliary)

    def units(self, batch: ChatBatch) -> int:
        """Tokens of a batch."""
        return int((batch.segment_ids_BT > 0).sum())

    def evaluate(self, state: TunedState) -> Mapping[str, Any]:
        """`loss` on the held-out conversations, nats a token of their answers, and `auxiliary` there."""
        if not len(self.held_out):
            return {}
        rows, sums = self.config.batch_size // self.config.micro_batches, np.zeros(4)
        for start in range(0, len(self.held_out), rows):
            part = [self.held_out[index] for index in range(start, min(start + rows, len(self.held_out)))]
            padding = [ChatRow(np.zeros(0, np.int32), np.zeros(0, bool), "")] * (rows - len(part))
            batch = pad_chat([*part, *padding], self.languages, length=self.config.length)
            with jax.set_mesh(self.model.mesh):
                sums += np.array(self._sums(state.parameters, self.tuning.frozen, self._placed(batch), self.auxiliary), np.float64)
        found = {"held_out": True, "loss": float(sums[0] / max(sums[1], 1))}
        return found if self.auxiliary is None else {**found, "auxiliary": float(sums[2] / max(sums[3], 1))}

    def export(self, state: TunedState) -> Decoder:
        """The fine-tuned decoder in the model's dtype, adapters merged."""
        return self.tuning.export(state)

    def save(self, state: TunedState, folder: Path) -> Path:
        """Write the fine-tuned model, and adapters by themselves; see `Tuning.save`."""
        return self.tuning.save(state, folder)

    def _placed(self, batch: ChatBatch) -> Batch:
        arrays = (batch.tokens_BT, batch.segment_ids_BT, batch.trained_BT, batch.languages_BT)
        if self.model.mesh.size == 1:
            return Batch(*map(jnp.asarray, arrays))
        return Batch(*(place_rows(array, self.model.mesh) for array in arrays))

    def _run(self, state: TunedState, frozen: Decoder | None, batch: Batch, auxiliary: Auxiliary | None) -> tuple[TunedState, dict[str, Array]]:
        tokens, counted = _counts(batch, auxiliary)

        def loss(parameters: Any, arrays: list[Array]) -> tuple[Array, tuple[Array, Array]]:
            total, extra = losses(self.tuning.assemble(parameters, frozen), Batch(*arrays), auxiliary, self.config.head_chunk)
            whole = total / jnp.maximum(tokens, 1)
            if auxiliary is not None:
                whole += auxiliary.weight * extra / jnp.maximum(counted, 1)
            return whole, (total, extra)

        (total, extra), gradient = accumulate(loss, state.parameters, jax.tree.leaves(batch), self.config.micro_batches)
        state, metrics = self.tuning.update(state, gradient)
        metrics = {"loss": total / jnp.maximum(tokens, 1), "tokens": tokens, **metrics}
        if auxiliary is not None:
            metrics["auxiliary"] = extra / jnp.maximum(counted, 1)
        return state, metrics

    def _measure(self, parameters: Any, frozen: Decoder | None, batch: Batch, auxiliary: Auxiliary | None) -> Float[Array, " 4"]:
        """Sums and counts of both losses."""
        total, extra = losses(self.tuning.assemble(parameters, frozen), batch, auxiliary, self.config.head_chunk)
        tokens, counted = _counts(batch, auxiliary)
        return jnp.stack([total, tokens, extra, counted])


def losses(decoder: Decoder, batch: Batch, auxiliary: Auxiliary | None, chunk: int) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sum of the cross-entropy over answers, and the auxiliary loss' sum, of a (micro-)batch."""
    last = decoder.config.num_layers - 1
    layers = () if auxiliary is None else auxiliary.layers
    tapped = tuple(dict.fromkeys((*layers, last)))
    out = decoder(batch.tokens_BT, segment_ids=batch.segment_ids, taps=np.asarray(tapped, np.int32), stop_after=last)
    assert out.residuals is not None
    predicted_BT = predicted_mask(batch.trained_BT, batch.segment_ids)
    unwanted = None if auxiliary is None else auxiliary.unwanted
    found = head_losses(decoder, out.residuals[tapped.index(last)], batch.tokens_BT, predicted_BT, unwanted, chunk=chunk)
    zero = jnp.zeros((), jnp.float32)
    extra = zero if auxiliary is None else auxiliary.total([out.residuals[place] for place in range(len(layers))], found.penalty_BT, batch)
    return jnp.sum(found.cross_entropy_BT), extra


def _counts(batch: Batch, auxiliary: Auxiliary | None) -> tuple[Array, Array]:
    """What the two sums are divided by."""
    tokens = jnp.sum(predicted_mask(batch.trained_BT, batch.segment_ids), dtype=jnp.float32)
    return tokens, jnp.ones((), jnp.float32) if auxiliary is None else auxiliary.count(batch)


def _everywhere(auxiliary: Auxiliary, mesh: Mesh) -> Auxiliary:
    """The loss' arrays on every device; descriptions of arrays stay."""
    return jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jax.device_put(leaf, replicated(mesh)), auxiliary)


def _check_languages(rows: Sequence[ChatRow], languages: Sequence[str]) -> None:
    known = set(languages)
    unknown: dict[str, int] = {}
    for index in range(len(rows)):
        if (language := rows[index].language) not in known:
            unknown[language] = unknown.get(language, 0) + 1
    if unknown:
        most = max(unknown, key=lambda language: unknown[language])
        said = f"have language {most!r}" if most else "have no language"
        raise InputError(
            f"{unknown[most]} of {len(rows)} conversations {said}, for which no feature level is known; known are {', '.join(languages)}: "
            "label the rows, leave them out, or estimate levels for their language too"
        )
