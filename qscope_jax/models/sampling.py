"""Choosing the next token: greedy, temperature, top-k, top-p, repetition penalty, a seed for every row."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from qscope_jax.errors import InputError

MAX_STOP_TOKENS = 16


@dataclass(frozen=True)
class SamplingConfig:
    """How a continuation is drawn. The defaults are greedy."""

    max_new_tokens: int = 64
    """Tokens generated at most, the stop token included."""
    temperature: float = 0.0
    """0 takes the most probable token; otherwise logits are divided by it."""
    top_k: int = 0
    """Keep the k most probable tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of most probable tokens whose probability reaches p; 1 keeps all."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens that the row has seen (Keskar et al. 2019); 1 does nothing."""
    seed: int = 0
    """Row i of a batch draws from the seed folded with i, so its sample does not depend on its neighbours."""
    stop_token_ids: tuple[int, ...] | None = None
    """Tokens that end a row; None takes the model's own, an empty tuple none."""

    def __post_init__(self):
        """Check ranges."""
        bad = [
            (self.max_new_tokens < 1, "max_new_tokens", "at least 1"),
            (not 0 <= self.temperature < float("inf"), "temperature", "0 or a positive number"),
            (self.top_k < 0, "top_k", "0 or a positive integer"),
            (not 0 < self.top_p <= 1, "top_p", "above 0 and at most 1"),
            (not 0 < self.repetition_penalty < float("inf"), "repetition_penalty", "a positive number"),
            (not 0 <= self.seed < 2**32, "seed", "0 to 4294967295"),
            (len(self.stop_token_ids or ()) > MAX_STOP_TOKENS, "stop_token_ids", f"at most {MAX_STOP_TOKENS} tokens"),
        ]
        for wrong, name, expected in bad:
            if wrong:
                raise InputError(f"{name} is {getattr(self, name)}, expected {expected}")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampler:
    """A `SamplingConfig` as arrays, so that changing it compiles nothing."""

    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]
    penalty: Float[Array, ""]
    stop_ids: Int[Array, " 16"]
    keys_B: Key[Array, " B"]

    @classmethod
    def make(cls, config: SamplingConfig, default_stops: tuple[int, ...], batch: int, row_seeds: Sequence[int] | None = None) -> "Sampler":
        """Arrays for `batch` rows; `default_stops` are the model's own stop tokens, `row_seeds` what is folded into each row's seed.

        Raises:
            InputError: the model has more stop tokens than there is room for, or row seeds for another number of rows.
        """
        stops = default_stops if config.stop_token_ids is None else config.stop_token_ids
        if len(stops) > MAX_STOP_TOKENS:
            raise InputError(f"the model has {len(stops)} stop tokens; choose at most {MAX_STOP_TOKENS} with stop_token_ids")
        table = np.full(MAX_STOP_TOKENS, -1, np.int32)
        table[: len(stops)] = stops
        if row_seeds is not None and len(row_seeds) != batch:
            raise InputError(f"{len(row_seeds)} row seeds for {batch} prompts; give one for each")
        rows = jnp.asarray(range(batch) if row_seeds is None else row_seeds, jnp.int32)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(config.seed), rows)
        return cls(
            jnp.float32(config.temperature), jnp.int32(config.top_k), jnp.float32(config.top_p), jnp.float32(config.repetition_penalty),
            jnp.asarray(table), keys,
        )  # fmt: skip


def sample(
    logits_BV: Float[Array, "B V"], seen_BV: Bool[Array, "B V"], sampler: Sampler, step: Int[Array, ""] | Int[Array, " B"]
) -> Int[Array, " B"]:
    """Draw one token a row, its `step`-th. What a setting does not ask for is not computed: the sort of top-k and top-p is skipped without them."""
    logits_BV = jax.lax.cond(sampler.penalty != 1, lambda x: penalise(x, seen_BV, sampler.penalty), lambda x: x, logits_BV)

    def draw(logits: Array) -> Array:
        scaled = logits / sampler.temperature
        keys = jax.vmap(jax.random.fold_in)(sampler.keys_B, jnp.broadcast_to(step, sampler.keys_B.shape))
        restricted = (sampler.top_k > 0) | (sampler.top_p < 1)
        return jax.lax.cond(restricted, lambda x: _draw_restricted(x, keys, sampler), lambda x: jax.vmap(jax.random.categorical)(keys, x), scaled)

    return jax.lax.cond(sampler.temperature > 0, draw, lambda x: jnp.argmax(x, axis=-1), logits_BV).astype(jnp.int32)


def log_probabilities(logits_BV: Float[Array, "B V"], tokens_B: Int[Array, " B"], temperature: Float[Array, ""]) -> Float[Array, " B"]:
    """Log-probability of each row's token in `softmax(logits / temperature)` (of the logits themselves where greedy), in float32.

    Before top-k, top-p and the repetition penalty: the distribution that a trainer computes from its own logits.
    """
    scaled_BV = logits_BV.astype(jnp.float32) / jnp.where(temperature > 0, temperature, jnp.float32(1))
    return jnp.take_along_axis(scaled_BV, tokens_B[:, None], axis=1)[:, 0] - jax.nn.logsumexp(scaled_BV, axis=1)


def penalise(logits_BV: Float[Array, "B V"], seen_BV: Bool[Array, "B V"], penalty: Float[Array, ""]) -> Float[Array, "B V"]:
    """Push the logits of seen tokens down by the factor `penalty`."""
    return jnp.where(seen_BV, jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty), logits_BV)


def keep_probable(scaled_BV: Float[Array, "B V"], sampler: Sampler) -> tuple[Float[Array, "B V"], Int[Array, "B V"]]:
    """What top-k and then top-p leave of logits: sorted, -inf where nothing is left, with the tokens that they are of.

    Ties at the edge are kept in vocabulary order.
    """
    vocabulary = scaled_BV.shape[-1]
    order_BV = jnp.argsort(-scaled_BV, axis=-1)
    sorted_BV = jnp.take_along_axis(scaled_BV, order_BV, axis=-1)
    count = jnp.where(sampler.top_k > 0, jnp.minimum(sampler.top_k, vocabulary), vocabulary)
    sorted_BV = jnp.where(jnp.arange(vocabulary, dtype=jnp.int32) < count, sorted_BV, -jnp.inf)
    probabilities = jax.nn.softmax(sorted_BV, axis=-1)
    before_BV = jnp.cumsum(probabilities, axis=-1) - probabilities
    return jnp.where((before_BV < sampler.top_p) | (sampler.top_p >= 1), sorted_BV, -jnp.inf), order_BV


def _draw_restricted(scaled_BV: Array, keys_B: Array, sampler: Sampler) -> Array:
    """Draw from the tokens that top-k and top-p leave."""
    kept_BV, order_BV = keep_probable(scaled_BV, sampler)
    choice_B = jax.vmap(jax.random.categorical)(keys_B, kept_BV)
    return jnp.take_along_axis(order_BV, choice_B[:, None], axis=-1)[:, 0]
