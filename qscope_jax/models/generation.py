"""Jitted generation: one prefill, then a loop of cached decoding steps that runs on the device until all rows have stopped."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from qscope_jax.models.cache import Cache, init_cache
from qscope_jax.models.decoder import Decoder
from qscope_jax.models.edits import Edit
from qscope_jax.models.sampling import Sampler, sample


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GenerationState:
    """A generation under way.

    Attributes:
        cache: The decoder's state.
        tokens_BT: Generated tokens; beyond a row's count the content is void.
        counts_B: Tokens generated in each row, its stop token included.
        done_B: Rows that have met a stop token.
        seen_BV: Tokens that each row has read or written, for the repetition penalty.
        step: Steps taken.
    """

    cache: Cache
    tokens_BT: Int[Array, "B T"]
    counts_B: Int[Array, " B"]
    done_B: Bool[Array, " B"]
    seen_BV: Bool[Array, "B V"]
    step: Int[Array, ""]


@partial(jax.jit, static_argnames="new_tokens")
def prefill(
    decoder: Decoder,
    tokens_BT: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    sampler: Sampler,
    edits: tuple[Edit, ...],
    *,
    new_tokens: int,
) -> GenerationState:
    """Read left-padded prompts and draw each row's first token.

    Args:
        decoder: The model.
        tokens_BT: Prompts, padded on the left.
        segment_ids: 1 at tokens, 0 at padding.
        sampler: How to draw.
        edits: Interventions.
        new_tokens: Room for generated tokens.
    """
    batch, length = tokens_BT.shape
    vocabulary = decoder.config.vocab_size
    cache = init_cache(decoder.config, batch, length + new_tokens)
    out = decoder(tokens_BT, segment_ids=segment_ids, cache=cache, edits=edits, logits="last")
    assert out.logits is not None and out.cache is not None
    rows = jnp.arange(batch, dtype=jnp.int32)[:, None]
    seen_BV = jnp.zeros((batch, vocabulary + 1), bool).at[rows, jnp.where(segment_ids > 0, tokens_BT, vocabulary)].set(True)[:, :-1]
    state = GenerationState(
        out.cache, jnp.zeros((batch, new_tokens), jnp.int32), jnp.zeros((batch,), jnp.int32), jnp.zeros((batch,), bool), seen_BV, jnp.int32(0)
    )
    return _write(state, out.logits[:, 0], sampler)


@partial(jax.jit, donate_argnames="state")
def decode(decoder: Decoder, state: GenerationState, sampler: Sampler, edits: tuple[Edit, ...], limit: Int[Array, ""]) -> GenerationState:
    """Generate until `limit` steps have been taken in all or every row has stopped; called in slices, it streams."""

    def step(state: GenerationState) -> GenerationState:
        last_B1 = jax.lax.dynamic_slice_in_dim(state.tokens_BT, state.step - 1, 1, axis=1)
        # A finished row feeds padding, so that its cache and positions stand still.
        alive = (~state.done_B).astype(jnp.int32)[:, None]
        out = decoder(last_B1, segment_ids=alive, cache=state.cache, edits=edits, logits="last")
        assert out.logits is not None and out.cache is not None
        state = GenerationState(out.cache, state.tokens_BT, state.counts_B, state.done_B, state.seen_BV, state.step)
        return _write(state, out.logits[:, 0], sampler)

    return jax.lax.while_loop(lambda s: (s.step < limit) & ~jnp.all(s.done_B), step, state)


def _write(state: GenerationState, logits_BV: Array, sampler: Sampler) -> GenerationState:
    """Draw a token for every row that goes on, and note it."""
    tokens_B = jnp.where(state.done_B, jnp.int32(0), sample(logits_BV, state.seen_BV, sampler, state.step))
    rows = jnp.arange(tokens_B.shape[0], dtype=jnp.int32)
    return GenerationState(
        cache=state.cache,
        tokens_BT=jax.lax.dynamic_update_slice(state.tokens_BT, tokens_B[:, None], (0, state.step)),
        counts_B=state.counts_B + (~state.done_B).astype(jnp.int32),
        done_B=state.done_B | jnp.any(tokens_B[:, None] == sampler.stop_ids, axis=1),
        seen_BV=state.seen_BV.at[rows, tokens_B].set(state.seen_BV[rows, tokens_B] | ~state.done_B),
        step=state.step + 1,
    )
