"""Train a small causal language model from random weights: the recipe behind the embedded model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from qscope_jax.data.batches import BatchConfig, TokenBatch, pad_batch
from qscope_jax.models.config import ModelConfig
from qscope_jax.models.decoder import Decoder
from qscope_jax.models.scoring import next_token_loss
from qscope_jax.parallel.rules import PARAMETER_AXES, leaf_name
from qscope_jax.training.tokens import TokenStream


@dataclass(frozen=True)
class CausalLMConfig:
    """Sizes and rates of a run."""

    batch_size: int = 32
    """Rows a step."""
    length: int = 128
    """Tokens a row; documents are packed."""
    steps: int = 2000
    """Optimiser steps; the schedule ends here."""
    learning_rate: float = 3e-3
    """Peak rate of AdamW, after a linear warm-up and before a cosine decay to a tenth."""
    warmup_steps: int = 100
    """Steps of warm-up."""
    weight_decay: float = 0.1
    """Decay of matrices; norms are spared."""
    clip: float = 1.0
    """Largest global gradient norm."""
    seed: int = 0
    """Of the weights and the order of documents."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CausalLMState:
    """Parameters and optimiser state."""

    decoder: Decoder
    optimizer: Any


class CausalLM:
    """Recipe: next-token cross-entropy, AdamW, packed documents."""

    name = "causal LM"
    unit = "tokens"

    def __init__(
        self,
        model: ModelConfig,
        config: CausalLMConfig,
        documents: Sequence[str],
        tokenize: Callable[[str], Sequence[int]],
        held_out: Sequence[Sequence[int]] = (),
    ):
        """Describe a run.

        Args:
            model: Shape of the decoder.
            config: Sizes and rates.
            documents: Training texts.
            tokenize: Token ids of a text, with whatever ends a document.
            held_out: Token ids of texts for evaluation, cut to a row's length.
        """
        self.model, self.config, self.documents, self.tokenize = model, config, documents, tokenize
        self.held_out = [list(ids)[: config.length] for ids in held_out]
        schedule = optax.warmup_cosine_decay_schedule(
            0.0, config.learning_rate, min(config.warmup_steps, config.steps // 2), config.steps, end_value=0.1 * config.learning_rate
        )
        self.optimizer = optax.chain(
            optax.clip_by_global_norm(config.clip),
            optax.adamw(schedule, b1=0.9, b2=0.98, weight_decay=config.weight_decay, mask=_is_matrix),
        )
        self._init = jax.jit(lambda key: Decoder(model, key))
        self._step = jax.jit(partial(_step, self.optimizer), donate_argnums=0)

    def init(self) -> CausalLMState:
        """Random parameters from the seed."""
        decoder = self._init(jax.random.key(self.config.seed))
        return CausalLMState(decoder, self.optimizer.init(decoder))  # pyright: ignore[reportArgumentType]

    def stream(self) -> TokenStream:
        """Packed batches, endless."""
        config = BatchConfig(self.config.batch_size, self.config.length, seed=self.config.seed)
        return TokenStream(self.documents, self.tokenize, config)

    def step(self, state: CausalLMState, batch: TokenBatch) -> tuple[CausalLMState, Mapping[str, Any]]:
        """One step; metrics are the loss in nats a token and the gradient's norm."""
        return self._step(state, batch.tokens_BT, batch.segment_ids_BT)

    def units(self, batch: TokenBatch) -> int:
        """Tokens of a batch."""
        return int((batch.segment_ids_BT > 0).sum())

    def evaluate(self, state: CausalLMState) -> Mapping[str, float]:
        """Held-out cross-entropy in nats a token."""
        if not self.held_out:
            return {}
        total = weight = 0.0
        for start in range(0, len(self.held_out), self.config.batch_size):
            batch = pad_batch(self.held_out[start : start + self.config.batch_size], length=self.config.length)
            loss, count = _evaluate(state.decoder, batch.tokens_BT, batch.segment_ids_BT)
            total, weight = total + float(loss), weight + float(count)
        return {"held_out_loss": total / max(weight, 1.0)}


def _loss(decoder: Decoder, tokens_BT: Int[Array, "B T"], segment_ids: Int[Array, "B T"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    out = decoder(tokens_BT, segment_ids=segment_ids)
    assert out.logits is not None
    return next_token_loss(out.logits, tokens_BT, segment_ids)


_evaluate = jax.jit(_loss)


def _step(
    optimizer: optax.GradientTransformation, state: CausalLMState, tokens_BT: Array, segment_ids: Array
) -> tuple[CausalLMState, dict[str, Array]]:
    (total, weight), gradient = jax.value_and_grad(_loss, has_aux=True)(state.decoder, tokens_BT, segment_ids)
    # A batch of documents of one token each predicts nothing, and must not divide by 0.
    gradient = jax.tree.map(lambda g: g / jnp.maximum(weight, 1), gradient)
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to the power of its int32 step
        updates, opt_state = optimizer.update(gradient, state.optimizer, state.decoder)  # pyright: ignore[reportArgumentType]
    decoder = optax.apply_updates(state.decoder, updates)  # pyright: ignore[reportArgumentType]
    metrics = {"loss": total / jnp.maximum(weight, 1), "gradient_norm": optax.tree.norm(gradient), "tokens": weight}
    return CausalLMState(decoder, opt_state), metrics  # pyright: ignore[reportArgumentType]


def _is_matrix(tree: Any) -> Any:
    """True at matrices. The number of dimensions does not tell: layers are stacked, so their norms have two."""
    return jax.tree_util.tree_map_with_path(lambda path, _: len(PARAMETER_AXES[leaf_name(path)]) >= 2, tree)
