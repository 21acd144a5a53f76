"""Supervised fine-tuning on conversations: the recipe behind `qscope sft train`.

Cross-entropy on answers alone, a mean over all tokens of the optimiser step; an auxiliary loss, such as SASFT's, may be added to it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from qscope_jax.data.batches import BatchConfig
from qscope_jax.data.chat_batches import ChatBatch, pad_chat
from qscope_jax.data.chat_tokens import ChatRow
from qscope_jax.errors import ConfigError, InputError
from qscope_jax.models.decoder import Decoder
from qscope_jax.models.language_model import LanguageModel
from qscope_jax.parallel.processes import is_first
from qscope_jax.parallel.rules import PARAMETER_AXES, batch_sharding, leaf_name, parameter_sharding, place_rows, replicated
from qscope_jax.training.auxiliary import Auxiliary, Batch
from qscope_jax.training.lora import TARGETS, attach, init_adapters, merge, save_adapters
from qscope_jax.training.losses import head_losses, predicted_mask
from qscope_jax.training.tokens import ChatStream

SCHEDULES = ("cosine", "linear", "constant")


@dataclass(frozen=True)
class SFTConfig:
    """Sizes and rates of a run."""

    steps: int
    """Optimiser steps; the schedule ends here."""
    batch_size: int = 32
    """Rows of a step."""
    length: int = 1024
    """Tokens of a row; conversations are packed."""
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
        for name in ("steps", "batch_size", "length", "micro_batches"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.schedule not in SCHEDULES:
            raise ConfigError(f"schedule is {self.schedule}, expected one of {', '.join(SCHEDULES)}")
        if self.master_dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"master_dtype is {self.master_dtype}, expected float32 or bfloat16")
        if self.batch_size % self.micro_batches:
            raise ConfigError(f"batch_size {self.batch_size} cannot be split into {self.micro_batches} micro_batches; expected a multiple of them")
        if self.head_chunk < 0 or (self.head_chunk and self.length % self.head_chunk):
            raise ConfigError(f"head_chunk is {self.head_chunk}, expected 0 or a divisor of length {self.length}")
        if not (self.learning_rate > 0 and self.clip > 0 and self.weight_decay >= 0 and self.warmup_steps >= 0 and self.lora_rank >= 0):
            raise ConfigError("learning_rate and clip must be positive; weight_decay, warmup_steps and lora_rank at least 0")

    def rate(self) -> optax.Schedule:
        """Learning rate at a step."""
        warmup = min(self.warmup_steps, self.steps // 2)
        rest = max(self.steps - warmup, 1)
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
class SFTState:
    """What is trained, a decoder or adapters, and the optimiser's state."""

    parameters: Any
    optimizer: Any


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
        shards = model.mesh.shape["data"] * model.mesh.shape["fsdp"]
        if (config.batch_size // config.micro_batches) % shards:
            raise ConfigError(
                f"a micro-batch of {config.batch_size // config.micro_batches} rows does not lie over data and fsdp, {shards} shards; "
                "choose another batch_size, micro_batches or mesh"
            )
        self.model, self.rows, self.config, self.lanes = model, rows, config, lanes
        self.auxiliary = auxiliary if auxiliary is None or model.mesh.size == 1 else _everywhere(auxiliary, model.mesh)
        self.languages, self.held_out = tuple(languages), held_out
        self.optimizer = config.optimizer()
        like = self.abstract_state()
        places = None if model.mesh.size == 1 else jax.tree.map(lambda leaf: leaf.sharding, like)
        self._begin = jax.jit(self._first_state, out_shardings=places)
        self._step = jax.jit(partial(_step, self.optimizer, self._assemble, config), donate_argnums=0, out_shardings=(places, None))
        self._measure = jax.jit(partial(_measure, self._assemble, config))

    @property
    def scale(self) -> float:
        """What adapters are multiplied by."""
        return self.config.lora_alpha / max(self.config.lora_rank, 1)

    def init(self) -> SFTState:
        """The model's own weights as master copies, or adapters that change nothing yet."""
        with jax.set_mesh(self.model.mesh):
            return self._begin(self.model.decoder, jax.random.key(self.config.seed))

    def abstract_state(self) -> SFTState:
        """Shapes, dtypes and shardings of a state; the model's own arrays may be abstract, too."""
        mesh = self.model.mesh

        def place(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            try:
                sharding = parameter_sharding(leaf_name(path), leaf.shape, mesh)
            except StopIteration:  # a count of the optimiser
                sharding = replicated(mesh)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        return jax.tree_util.tree_map_with_path(
            place, jax.eval_shape(lambda decoder: self._first_state(decoder, jax.random.key(0)), self.model.decoder)
        )

    def lower(self) -> jax.stages.Lowered:
        """The optimiser step, lowered without any array: to look at, or to compile for machines elsewhere."""
        mesh, shape = self.model.mesh, (self.config.batch_size, self.config.length)
        rows = batch_sharding(mesh, 2)
        batch = Batch(*(jax.ShapeDtypeStruct(shape, dtype, sharding=rows) for dtype in (jnp.int32, jnp.int32, jnp.bool_, jnp.int32)))
        state = self.abstract_state()
        with jax.set_mesh(mesh):
            return self._step.lower(state, self._frozen(), batch, self.auxiliary)

    def stream(self) -> ChatStream:
        """Packed conversations, endless."""
        batches = BatchConfig(self.config.batch_size, self.config.length, seed=self.config.seed)
        return ChatStream(self.rows, self.languages, batches, lanes=self.lanes, mesh=self.model.mesh if self.model.mesh.size > 1 else None)

    def step(self, state: SFTState, batch: ChatBatch) -> tuple[SFTState, Mapping[str, Any]]:
        """One optimiser step.

        Metrics: `loss`, nats a trained token; `auxiliary`, its mean before its weight; `tokens`, trained ones; `gradient_norm`; `skipped`, 1 where
        the gradient was not finite and counted as 0.
        """
        with jax.set_mesh(self.model.mesh):
            return self._step(state, self._frozen(), self._placed(batch), self.auxiliary)

    def units(self, batch: ChatBatch) -> int:
        """Tokens of a batch."""
        return int((batch.segment_ids_BT > 0).sum())

    def evaluate(self, state: SFTState) -> Mapping[str, Any]:
        """`loss` on the held-out conversations, nats a token of their answers, and `auxiliary` there."""
        if not len(self.held_out):
            return {}
        rows, sums = self.config.batch_size // self.config.micro_batches, np.zeros(4)
        for start in range(0, len(self.held_out), rows):
            part = [self.held_out[index] for index in range(start, min(start + rows, len(self.held_out)))]
            padding = [ChatRow(np.zeros(0, np.int32), np.zeros(0, bool), "")] * (rows - len(part))
            batch = pad_chat([*part, *padding], self.languages, length=self.config.length)
            with jax.set_mesh(self.model.mesh):
                sums += np.array(self._measure(state.parameters, self._frozen(), self._placed(batch), self.auxiliary), np.float64)
        found = {"held_out": True, "loss": float(sums[0] / max(sums[1], 1))}
        return found if self.auxiliary is None else {**found, "auxiliary": float(sums[2] / max(sums[3], 1))}

    def export(self, state: SFTState) -> Decoder:
        """The fine-tuned decoder in the model's dtype, adapters merged."""
        with jax.set_mesh(self.model.mesh):
            return jax.jit(self._exported)(state.parameters, self.model.decoder)

    def save(self, state: SFTState, folder: Path) -> Path:
        """Write the fine-tuned model as a Hugging Face folder, and adapters by themselves in `adapters` beside it, as PEFT has them.

        In a run of several processes all call this, and the first writes the adapters.

        Raises:
            SourceError: the folder cannot be written.
        """
        tuned = LanguageModel(self.export(state), self.model.source, self.model.mesh)
        tuned.save(folder)
        if self.config.lora_rank and is_first():
            save_adapters(folder.parent / "adapters", state.parameters, self.model.config, alpha=self.config.lora_alpha, base=self.model.name)
        return folder

    def _first_parameters(self, decoder: Decoder, key: Array) -> Any:
        if self.config.lora_rank:
            return init_adapters(decoder, self.config.lora_rank, self.config.lora_targets, key)
        # Copies even where the dtype stays: a step writes over its state.
        return jax.tree.map(lambda leaf: jnp.copy(leaf.astype(self.config.master_dtype)), decoder)

    def _first_state(self, decoder: Decoder, key: Array) -> SFTState:
        parameters = self._first_parameters(decoder, key)
        return SFTState(parameters, self.optimizer.init(parameters))

    def _frozen(self) -> Decoder | None:
        return self.model.decoder if self.config.lora_rank else None

    def _assemble(self, parameters: Any, frozen: Decoder | None) -> Decoder:
        """The decoder that a pass runs, in the model's dtype."""
        if frozen is not None:
            decoder = attach(frozen, parameters, self.scale)
        else:
            # Cast once, before weights are gathered, not in every product.
            decoder = jax.tree.map(lambda leaf: leaf.astype(self.model.config.dtype), parameters)
        decoder.config = replace(self.model.config, remat=self.config.remat)
        return decoder

    def _exported(self, parameters: Any, decoder: Decoder) -> Decoder:
        if self.config.lora_rank:
            return merge(decoder, parameters, self.scale)
        return jax.tree.map(lambda trained, first: trained.astype(first.dtype), parameters, decoder)

    def _placed(self, batch: ChatBatch) -> Batch:
        arrays = (batch.tokens_BT, batch.segment_ids_BT, batch.trained_BT, batch.languages_BT)
        if self.model.mesh.size == 1:
            return Batch(*map(jnp.asarray, arrays))
        return Batch(*(place_rows(array, self.model.mesh) for array in arrays))


def losses(decoder: Decoder, batch: Batch, auxiliary: Auxiliary | None, chunk: int) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sum of the cross-entropy over answers, and the auxiliary loss' sum, of a (micro-)batch."""
    last = decoder.config.num_layers - 1
    layers = () if auxiliary is None else auxiliary.layers
    tapped = tuple(dict.fromkeys((*layers, last)))
    out = decoder(batch.tokens_BT, segment_ids=batch.segment_ids, taps=jnp.asarray(tapped, jnp.int32), stop_after=last)
    assert out.residuals is not None
    predicted_BT = predicted_mask(batch.trained_BT, batch.segment_ids)
    unwanted = None if auxiliary is None else auxiliary.unwanted
    found = head_losses(decoder, out.residuals[tapped.index(last)], batch.tokens_BT, predicted_BT, unwanted, chunk=chunk)
    zero = jnp.zeros((), jnp.float32)
    extra = zero if auxiliary is None else auxiliary.total([out.residuals[place] for place in range(len(layers))], found.penalty_BT, batch)
    return jnp.sum(found.cross_entropy_BT), extra


def _step(
    optimizer: optax.GradientTransformation,
    assemble: Callable[[Any, Decoder | None], Decoder],
    config: SFTConfig,
    state: SFTState,
    frozen: Decoder | None,
    batch: Batch,
    auxiliary: Auxiliary | None,
) -> tuple[SFTState, dict[str, Array]]:
    tokens = jnp.sum(predicted_mask(batch.trained_BT, batch.segment_ids), dtype=jnp.float32)
    counted = jnp.ones((), jnp.float32) if auxiliary is None else auxiliary.count(batch)

    def loss(parameters: Any, part: Batch) -> tuple[Array, tuple[Array, Array]]:
        total, extra = losses(assemble(parameters, frozen), part, auxiliary, config.head_chunk)
        whole = total / jnp.maximum(tokens, 1)
        if auxiliary is not None:
            whole += auxiliary.weight * extra / jnp.maximum(counted, 1)
        return whole, (total, extra)

    gradient_of = jax.value_and_grad(loss, has_aux=True)
    if config.micro_batches == 1:
        (_, (total, extra)), gradient = gradient_of(state.parameters, batch)
    else:

        def add(sums: Any, part: list[Array]) -> tuple[Any, None]:
            (_, found), gradient = gradient_of(state.parameters, Batch(*part))
            return jax.tree.map(jnp.add, sums, (found, gradient)), None

        zeros = (jnp.zeros((), jnp.float32),) * 2, jax.tree.map(jnp.zeros_like, state.parameters)
        parts = [_dealt(rows, config.micro_batches) for rows in jax.tree.leaves(batch)]
        ((total, extra), gradient), _ = jax.lax.scan(add, zeros, parts)
    norm = optax.tree.norm(gradient)
    ok = jnp.isfinite(norm)
    gradient = jax.tree.map(lambda g: jnp.where(ok, g, jnp.zeros_like(g)), gradient)
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to the power of its int32 step
        updates, opt_state = optimizer.update(gradient, state.optimizer, state.parameters)
        parameters = optax.apply_updates(state.parameters, updates)
    metrics = {"loss": total / jnp.maximum(tokens, 1), "tokens": tokens, "gradient_norm": norm, "skipped": 1 - ok.astype(jnp.float32)}
    if auxiliary is not None:
        metrics["auxiliary"] = extra / jnp.maximum(counted, 1)
    return SFTState(parameters, opt_state), metrics


def _dealt(rows: Array, count: int) -> Array:
    """Rows of a batch in `count` stacked parts; row r goes to part r % count, so that every device keeps its own rows."""
    return jnp.moveaxis(rows.reshape(rows.shape[0] // count, count, *rows.shape[1:]), 1, 0)


def _measure(
    assemble: Callable[[Any, Decoder | None], Decoder],
    config: SFTConfig,
    parameters: Any,
    frozen: Decoder | None,
    batch: Batch,
    auxiliary: Auxiliary | None,
) -> Float[Array, " 4"]:
    """Sums and counts of both losses."""
    total, extra = losses(assemble(parameters, frozen), batch, auxiliary, config.head_chunk)
    tokens = jnp.sum(predicted_mask(batch.trained_BT, batch.segment_ids), dtype=jnp.float32)
    counted = jnp.ones((), jnp.float32) if auxiliary is None else auxiliary.count(batch)
    return jnp.stack([total, tokens, extra, counted])


def _everywhere(auxiliary: Auxiliary, mesh: Mesh) -> Auxiliary:
    """The loss' arrays on every device; descriptions of arrays stay."""
    return jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jax.device_put(leaf, replicated(mesh)), auxiliary)


def _is_matrix(tree: Any) -> Any:
    """True at matrices, adapters included. The number of dimensions does not tell: layers are stacked, so their norms have two."""
    return jax.tree_util.tree_map_with_path(lambda path, _: len(PARAMETER_AXES[leaf_name(path)]) >= 2, tree)


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
