"""The programs behind `RolloutSampler`: prompts are read once, rows begin anew while others go on, tokens come with their log-probabilities.

Of a prompt all tokens but the last are read, and kept; each member of its group gets a copy and reads the last token itself, as the first of its
steps. So a token is drawn in one place only, members share their prompt though some are steered, and a row's tokens lie in the first slots of its
cache: what it computes does not depend on when it began or beside whom.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt

from qscope_jax.models.cache import Cache, align_left, copy_rows, init_cache, keep_cache_rows
from qscope_jax.models.config import ModelConfig
from qscope_jax.models.decoder import Decoder
from qscope_jax.models.edits import Edit, OnRows
from qscope_jax.models.sampling import Sampler, log_probabilities, sample
from qscope_jax.parallel.rules import keep_rows


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PromptStates:
    """Prompts that have been read, but for their last tokens.

    Attributes:
        cache: With a slot for each prompt, its next.
        last_B: The last tokens.
        seen_BV: Tokens of each prompt, for the repetition penalty.
    """

    cache: Cache
    last_B: Int[Array, " B"]
    seen_BV: Bool[Array, "B V"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RolloutState:
    """Rows under way.

    Attributes:
        cache: The decoder's state, with a slot for each row.
        next_B: Token that each row reads next.
        counts_B: Tokens drawn in each row, its stop token included.
        done_B: Rows that have met a stop token or their limit, or have not begun.
        keys_B: Each row's own.
        steered_B: Rows that feel the edits.
        seen_BV: Tokens that each row has read or drawn, for the repetition penalty.
    """

    cache: Cache
    next_B: Int[Array, " B"]
    counts_B: Int[Array, " B"]
    done_B: Bool[Array, " B"]
    keys_B: Key[Array, " B"]
    steered_B: Bool[Array, " B"]
    seen_BV: Bool[Array, "B V"]


class Drawn(NamedTuple):
    """What some steps drew; a row's tokens stand at the front, as many as its count grew."""

    tokens_BT: Int[Array, "B T"]
    logprobs_BT: Float[Array, "B T"]


@partial(jax.jit, static_argnames=("config", "rows", "slots"))
def no_rollouts(config: ModelConfig, rows: int, slots: int) -> RolloutState:
    """Rows of which none has begun."""
    cache = init_cache(config, rows, slots)
    zeros, none = jnp.zeros((rows,), jnp.int32), jnp.zeros((rows,), bool)
    keys = jax.vmap(jax.random.key)(zeros.astype(jnp.uint32))
    return _kept(RolloutState(replace(cache, slot=zeros), zeros, zeros, ~none, keys, none, jnp.zeros((rows, config.vocab_size), bool)))


@jax.jit
def read_prompts(
    decoder: Decoder,
    tokens_BT: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    last_B: Int[Array, " B"],
    edits: tuple[Edit, ...],
    steered_B: Bool[Array, " B"],
) -> PromptStates:
    """Read prompts.

    Args:
        decoder: The model.
        tokens_BT: All but each prompt's last token, padded on the left.
        segment_ids: 1 at tokens, 0 at padding.
        last_B: The last tokens.
        edits: Interventions that are felt while prompts are read.
        steered_B: Prompts that feel them.
    """
    batch, length = tokens_BT.shape
    vocabulary = decoder.config.vocab_size
    # The last token belongs to the prompt: positions counted from its end mean the end of the whole.
    cache = replace(init_cache(decoder.config, batch, length), prompt_lengths_B=jnp.sum(segment_ids, axis=1, dtype=jnp.int32) + 1)
    felt = tuple(OnRows(edit, steered_B) for edit in edits)
    out = decoder(tokens_BT, segment_ids=segment_ids, cache=cache, edits=felt, logits="last")
    assert out.cache is not None
    rows = jnp.arange(batch, dtype=jnp.int32)
    seen_BV = jnp.zeros((batch, vocabulary + 1), bool).at[rows[:, None], jnp.where(segment_ids > 0, tokens_BT, vocabulary)].set(True)[:, :-1]
    return PromptStates(keep_cache_rows(align_left(out.cache)), last_B, keep_rows(seen_BV.at[rows, last_B].set(True)))


@partial(jax.jit, donate_argnames="state")
def begin_rows(
    state: RolloutState,
    prompts: PromptStates,
    chosen_B: Int[Array, " B"],
    seed: UInt[Array, ""],
    seeds_B2: UInt[Array, "B 2"],
    steered_B: Bool[Array, " B"],
) -> RolloutState:
    """Let rows begin.

    Args:
        state: Rows under way.
        prompts: Prompts that have been read.
        chosen_B: Prompt with which each row begins; negative for rows that go on as they are.
        seed: Of all rows.
        seeds_B2: What is folded into it for each row, one number after the other.
        steered_B: Whether a row that begins feels the edits.
    """
    new_B, from_B = chosen_B >= 0, jnp.maximum(chosen_B, 0)
    keys_B = jax.vmap(lambda pair: jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), pair[0]), pair[1]))(seeds_B2)
    return _kept(
        RolloutState(
            cache=copy_rows(state.cache, prompts.cache, chosen_B),
            next_B=jnp.where(new_B, prompts.last_B[from_B], state.next_B),
            counts_B=jnp.where(new_B, 0, state.counts_B),
            done_B=state.done_B & ~new_B,
            keys_B=jnp.where(new_B, keys_B, state.keys_B),
            steered_B=jnp.where(new_B, steered_B, state.steered_B),
            seen_BV=jnp.where(new_B[:, None], prompts.seen_BV[from_B], state.seen_BV),
        )
    )


@partial(jax.jit, static_argnames="steps", donate_argnames="state")
def draw(
    decoder: Decoder,
    state: RolloutState,
    sampler: Sampler,
    edits: tuple[Edit, ...],
    limit: Int[Array, ""],
    enough: Int[Array, ""],
    *,
    steps: int,
) -> tuple[RolloutState, Drawn]:
    """Let every row that is not done read its next token and draw one more, until `enough` rows are done.

    Args:
        decoder: The model.
        state: Rows under way.
        sampler: How to draw; its keys are not used, each row has its own.
        edits: Interventions, felt by the rows that are steered.
        limit: Tokens that a row draws at most.
        enough: Rows done, at which the loop ends.
        steps: Steps at which it ends in any case.
    """
    felt = tuple(OnRows(edit, state.steered_B) for edit in edits)
    sampler = replace(sampler, keys_B=state.keys_B)
    rows = jnp.arange(len(state.done_B), dtype=jnp.int32)

    def step(carry: tuple[RolloutState, Drawn, Array]) -> tuple[RolloutState, Drawn, Array]:
        state, drawn, number = carry
        alive_B = ~state.done_B
        # A row that is done feeds padding, so that its cache and positions stand still.
        out = decoder(state.next_B[:, None], segment_ids=alive_B.astype(jnp.int32)[:, None], cache=state.cache, edits=felt, logits="last")
        assert out.logits is not None and out.cache is not None
        logits_BV = out.logits[:, 0]
        tokens_B = sample(logits_BV, state.seen_BV, sampler, state.counts_B)
        logprobs_B = log_probabilities(logits_BV, tokens_B, sampler.temperature)
        counts_B = state.counts_B + alive_B.astype(jnp.int32)
        stops_B = jnp.any(tokens_B[:, None] == sampler.stop_ids, axis=1) | (counts_B >= limit)
        seen_BV = state.seen_BV.at[rows, tokens_B].set(state.seen_BV[rows, tokens_B] | alive_B)
        state = replace(state, cache=out.cache, next_B=tokens_B, counts_B=counts_B, done_B=state.done_B | stops_B, seen_BV=seen_BV)
        new = (jax.lax.dynamic_update_slice(old, x_B[:, None], (0, number)) for old, x_B in zip(drawn, (tokens_B, logprobs_B), strict=True))
        return _kept(state), Drawn(*new), number + 1

    def unfinished(carry: tuple[RolloutState, Drawn, Array]) -> Array:
        state, _, number = carry
        return (number < steps) & (jnp.sum(state.done_B, dtype=jnp.int32) < enough)

    nothing = Drawn(keep_rows(jnp.zeros((len(rows), steps), jnp.int32)), keep_rows(jnp.zeros((len(rows), steps), jnp.float32)))
    state, drawn, _ = jax.lax.while_loop(unfinished, step, (state, nothing, jnp.int32(0)))
    return state, drawn


def _kept(state: RolloutState) -> RolloutState:
    """The state with its rows where they are, so that no call moves them and none compiles anew for a new layout."""
    rest = {name: keep_rows(getattr(state, name)) for name in ("next_B", "counts_B", "done_B", "keys_B", "steered_B", "seen_BV")}
    return RolloutState(cache=keep_cache_rows(state.cache), **rest)
