"""Residual streams as training data: made on the fly by the model, filtered, mixed in a buffer on the device, served in batches.

One model pass feeds the SAEs of all tapped layers, and one permutation mixes them: each sees what it would see alone, less the tokens that
are outliers in another layer.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from qscope_jax.data.batches import TokenBatch
from qscope_jax.errors import ConfigError, InputError, SourceError
from qscope_jax.models.decoder import Decoder
from qscope_jax.models.language_model import forward
from qscope_jax.sae.filtering import MAX_NORM_MULTIPLE, first_tokens, ordinary_tokens
from qscope_jax.training.checkpoint import StreamState
from qscope_jax.training.tokens import TokenStream

EMPTY_BATCHES = 50


@dataclass(frozen=True)
class ActivationConfig:
    """How activations are filtered, mixed and served."""

    layers: tuple[int, ...]
    """Tapped layers, 0-based."""
    batch_tokens: int = 2048
    """Tokens of a training batch."""
    buffer_batches: int = 16
    """Batches that the buffer holds: neighbouring tokens resemble each other, so it should hold many documents."""
    mix: float = 0.5
    """Share of the buffer kept back at a refill, to be mixed with what is new."""
    max_norm_multiple: float = MAX_NORM_MULTIPLE
    """Tokens are dropped whose norm exceeds this multiple of the median of their model batch; 0 keeps all."""
    drop_first: bool = True
    """Drop the first token of every document."""
    seed: int = 0
    """Of the mixing."""

    def __post_init__(self):
        """Check ranges."""
        if not self.layers or len(set(self.layers)) != len(self.layers):
            raise ConfigError(f"layers is {self.layers}, expected one or more, none of them twice")
        if self.batch_tokens < 1 or self.buffer_batches < 2 or not 0 <= self.mix < 1:
            found = f"batch_tokens {self.batch_tokens}, buffer_batches {self.buffer_batches}, mix {self.mix}"
            raise ConfigError(f"{found}: expected at least 1, at least 2, and 0 to below 1")


class ActivationStream:
    """Batches of residual streams [M, N, D] of the tapped layers, endless and resumable to the bit."""

    def __init__(self, decoder: Decoder, tokens: TokenStream, config: ActivationConfig):
        """Nothing is computed before the first batch.

        Args:
            decoder: The model.
            tokens: Source of `TokenBatch`es.
            config: Filter, buffer and batch sizes.
        """
        self.decoder, self.tokens, self.config = decoder, tokens, config
        self.capacity = config.batch_tokens * config.buffer_batches
        self._buffer: Array | None = None
        # Rows of the buffer that hold tokens, rows of it already served, and refills so far.
        self._filled, self._served, self._refills = 0, 0, 0
        self.seen_tokens, self.dropped_tokens, self.damaged_tokens = 0, 0, 0

    def __next__(self) -> Float[Array, "M N D"]:
        """The next batch, in the model's dtype."""
        size = self.config.batch_tokens
        keep = int(self.capacity * self.config.mix)
        if self._buffer is None or self._served + size > self.capacity - keep:
            self._refill()
        assert self._buffer is not None
        batch = _take(self._buffer, jnp.int32(self._served), size)
        self._served += size
        return batch

    def peek(self) -> Float[Array, "M N D"]:
        """Everything that is mixed and not yet served, for statistics of the first buffer."""
        if self._buffer is None:
            self._refill()
        assert self._buffer is not None
        return self._buffer[:, self._served : self.capacity]

    def get_state(self) -> StreamState:
        """Buffer, place in it, and place in the data."""
        buffer = self._empty() if self._buffer is None else self._buffer
        tokens = self.tokens.get_state()
        cursor = {"filled": self._filled, "served": self._served, "refills": self._refills, "seen": self.seen_tokens,
                  "dropped": self.dropped_tokens, "damaged": self.damaged_tokens, "tokens": dict(tokens.cursor)}  # fmt: skip
        return StreamState({"buffer": buffer}, cursor)

    def set_state(self, state: StreamState) -> None:
        """Continue from a saved state."""
        cursor = state.cursor
        self._buffer = state.arrays["buffer"] if cursor["refills"] else None
        self._filled, self._served, self._refills = cursor["filled"], cursor["served"], cursor["refills"]
        self.seen_tokens, self.dropped_tokens, self.damaged_tokens = cursor["seen"], cursor["dropped"], cursor["damaged"]
        self.tokens.set_state(StreamState({}, cursor["tokens"]))

    def _refill(self) -> None:
        """Move what was not served to the front, fill up from the model, and mix."""
        buffer = self._empty() if self._buffer is None else _shift(self._buffer, jnp.int32(self._served))
        filled, empty = self._filled - self._served, 0
        while filled < self.capacity:
            tapped = tap(self.decoder, next(self.tokens), self.config)
            count = int(jnp.sum(tapped.mask_BT))
            empty = 0 if count else empty + 1
            if empty > EMPTY_BATCHES:
                raise no_token_counts(empty, int(tapped.damaged))
            buffer = _append(buffer, tapped.x_MBTD, tapped.mask_BT, jnp.int32(filled))
            filled += count
            self.seen_tokens += int(tapped.seen)
            self.dropped_tokens += int(tapped.seen) - count
            self.damaged_tokens += int(tapped.damaged)
        key = jax.random.fold_in(jax.random.key(self.config.seed), self._refills)
        self._buffer = _mix(buffer, key, self.capacity)
        self._filled, self._served, self._refills = filled, 0, self._refills + 1

    def _empty(self) -> Array:
        """A buffer with room for one model batch beyond its capacity."""
        rows = self.capacity + self.tokens.shape[0] * self.tokens.shape[1]
        return jnp.zeros((len(self.config.layers), rows, self.decoder.config.d_model), self.decoder.config.dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TappedStreams:
    """Residual streams of one model batch.

    Attributes:
        x_MBTD: Streams of the tapped layers, in the model's dtype.
        mask_BT: Tokens that count in all of them.
        seen: Tokens that are no padding.
        damaged: Those among them whose stream is NaN or infinite in some layer; never in the mask.
    """

    x_MBTD: Float[Array, "M B T D"]
    mask_BT: Bool[Array, "B T"]
    seen: Int[Array, ""]
    damaged: Int[Array, ""]


def tap(decoder: Decoder, batch: TokenBatch, config: ActivationConfig) -> TappedStreams:
    """Run the model up to the highest tapped layer, and say which tokens count: no padding, outlier, first or damaged token."""
    taps = jnp.asarray(config.layers, jnp.int32)
    out = forward(decoder, batch.tokens_BT, batch.segment_ids_BT, (), taps, stop_after=max(config.layers))
    assert out.residuals is not None
    return _filter(out.residuals, jnp.asarray(batch.segment_ids_BT), config.max_norm_multiple, config.drop_first)


def no_token_counts(batches: int, damaged: int) -> InputError | SourceError:
    """The error for many batches in a row without a token that counts."""
    if damaged:
        return SourceError(
            f"the model's residual stream was NaN or infinite in {batches} batches in a row; its weights are damaged, or its dtype is too narrow"
        )
    return InputError(f"{batches} batches in a row held no token that counts; the texts are too short, or the norm filter drops all")


@partial(jax.jit, static_argnames=("multiple", "drop_first"))
def _filter(x_MBTD: Array, segment_ids: Int[Array, "B T"], multiple: float, drop_first: bool) -> TappedStreams:
    finite_BT = jnp.all(jnp.isfinite(x_MBTD), axis=(0, 3))
    # Damaged tokens take no part in the median that outliers are measured by.
    healthy = jnp.where(finite_BT, segment_ids, 0)
    masks = [ordinary_tokens(x, healthy, max_norm_multiple=multiple, drop_first=False) for x in x_MBTD]
    mask_BT = jnp.stack(masks).all(axis=0)
    if drop_first:
        mask_BT &= ~first_tokens(segment_ids)
    seen_BT = segment_ids > 0
    return TappedStreams(x_MBTD, mask_BT, jnp.sum(seen_BT), jnp.sum(seen_BT & ~finite_BT))


@partial(jax.jit, donate_argnames="buffer")
def _append(buffer: Array, x_MBTD: Array, mask_BT: Array, start: Array) -> Array:
    """Write a model batch behind row `start`, tokens that count first; what follows them is overwritten by the next."""
    order = jnp.argsort(~mask_BT.reshape(-1), stable=True)
    x_MND = x_MBTD.reshape(x_MBTD.shape[0], -1, x_MBTD.shape[-1])[:, order]
    return jax.lax.dynamic_update_slice(buffer, x_MND.astype(buffer.dtype), (0, start, 0))


@jax.jit
def _shift(buffer: Array, served: Array) -> Array:
    """Move row `served` to the front, in a new array: the old one may be part of a saved state."""
    return jnp.roll(buffer, -served, axis=1)


@partial(jax.jit, static_argnames="capacity", donate_argnames="buffer")
def _mix(buffer: Array, key: Key[Array, ""], capacity: int) -> Array:
    """Permute the first `capacity` rows, the same way in every layer."""
    order = jax.random.permutation(key, capacity)
    return buffer.at[:, :capacity].set(buffer[:, order])


@partial(jax.jit, static_argnames="size")
def _take(buffer: Array, start: Array, size: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(buffer, start, size, axis=1)


def mean_squared_norm(x_ND: Any) -> Float[Array, ""]:
    """Mean of |x|^2 over tokens."""
    return jnp.mean(jnp.sum(jnp.square(x_ND.astype(jnp.float32)), axis=-1))


@jax.jit
def geometric_median(x_ND: Float[Array, "N D"]) -> Float[Array, " D"]:
    """Point of least total distance to the rows, by Weiszfeld's iteration from the mean: at most 100 rounds or movement below 1e-5."""
    x = x_ND.astype(jnp.float32)

    def step(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        point, _, rounds = carry
        weights = 1 / jnp.maximum(jnp.linalg.norm(x - point, axis=-1), jnp.float32(1e-8))
        moved = jnp.einsum("n,nd->d", weights, x, precision=jax.lax.Precision.HIGHEST) / jnp.sum(weights)
        return moved, jnp.linalg.norm(moved - point), rounds + 1

    start = (jnp.mean(x, axis=0), jnp.float32(jnp.inf), jnp.int32(0))
    return jax.lax.while_loop(lambda c: (c[1] >= 1e-5) & (c[2] < 100), step, start)[0]
