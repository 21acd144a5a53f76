"""Residual streams as training data: made on the fly by the model, filtered, mixed in a buffer on the devices, served in batches.

One model pass feeds the SAEs of all tapped layers, and one permutation mixes them: each sees what it would see alone, less the tokens that
are outliers in another layer.

The buffer consists of lanes. Each has documents, rows of the model's batch, a part of the buffer and a permutation of its own, and gives
its share of every batch; so on a mesh a lane stays on its shard of `data`, nothing crosses devices when tokens are filtered and mixed, and
what is served depends on the number of lanes, not on that of devices or processes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key

from qscope_jax.data.batches import TokenBatch
from qscope_jax.errors import ConfigError, InputError, SourceError
from qscope_jax.models.decoder import Decoder
from qscope_jax.models.language_model import forward
from qscope_jax.parallel.mesh import make_mesh
from qscope_jax.parallel.rules import place_rows, replicated
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
    lanes: int = 1
    """Independent parts of the buffer; a multiple of the mesh's `data` axis."""
    seed: int = 0
    """Of the mixing."""

    def __post_init__(self):
        """Check ranges."""
        if not self.layers or len(set(self.layers)) != len(self.layers):
            raise ConfigError(f"layers is {self.layers}, expected one or more, none of them twice")
        if self.batch_tokens < 1 or self.buffer_batches < 2 or not 0 <= self.mix < 1:
            found = f"batch_tokens {self.batch_tokens}, buffer_batches {self.buffer_batches}, mix {self.mix}"
            raise ConfigError(f"{found}: expected at least 1, at least 2, and 0 to below 1")
        if self.lanes < 1 or self.batch_tokens % self.lanes:
            raise ConfigError(f"batch_tokens is {self.batch_tokens}, expected a multiple of lanes = {self.lanes}")


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


class ActivationStream:
    """Batches of residual streams [M, N, D] of the tapped layers, endless and resumable to the bit."""

    def __init__(self, decoder: Decoder, tokens: TokenStream, config: ActivationConfig, mesh: Mesh | None = None):
        """Nothing is computed before the first batch.

        Args:
            decoder: The model.
            tokens: Source of `TokenBatch`es, of as many lanes as the config has.
            config: Filter, buffer and batch sizes.
            mesh: Where the model lies; default one device.

        Raises:
            ConfigError: lanes, layers or rows cannot be split as the mesh wants it.
        """
        self.decoder, self.tokens, self.config, self.mesh = decoder, tokens, config, mesh or make_mesh()
        self.capacity = config.batch_tokens * config.buffer_batches // config.lanes
        self._check()
        self._buffer: Array | None = None
        # Rows of each lane that hold tokens, rows of every lane already served, and refills so far.
        self._filled, self._served, self._refills = np.zeros(config.lanes, np.int32), 0, 0
        self.seen_tokens, self.dropped_tokens, self.damaged_tokens = 0, 0, 0
        self._place = NamedSharding(self.mesh, buffer_spec(self.mesh, len(config.layers)))

    def __next__(self) -> Float[Array, "M N D"]:
        """The next batch, in the model's dtype: each lane's share behind the other."""
        size = self.config.batch_tokens // self.config.lanes
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
        return _flatten_lanes(self._buffer[:, :, self._served : self.capacity])

    @property
    def counts(self) -> Mapping[str, int]:
        """Tokens that the model read, those of them that are not served, and those of these whose stream was not finite."""
        return {"seen_tokens": self.seen_tokens, "dropped_tokens": self.dropped_tokens, "damaged_tokens": self.damaged_tokens}

    def get_state(self) -> StreamState:
        """Buffer, place in it, and place in the data."""
        buffer = self._empty() if self._buffer is None else self._buffer
        tokens = self.tokens.get_state()
        cursor = {"filled": self._filled.tolist(), "served": self._served, "refills": self._refills, "seen": self.seen_tokens,
                  "dropped": self.dropped_tokens, "damaged": self.damaged_tokens, "tokens": dict(tokens.cursor)}  # fmt: skip
        return StreamState({"buffer": buffer}, cursor)

    def set_state(self, state: StreamState) -> None:
        """Continue from a saved state."""
        cursor = state.cursor
        self._buffer = state.arrays["buffer"] if cursor["refills"] else None
        self._filled, self._served, self._refills = np.asarray(cursor["filled"], np.int32), cursor["served"], cursor["refills"]
        self.seen_tokens, self.dropped_tokens, self.damaged_tokens = cursor["seen"], cursor["dropped"], cursor["damaged"]
        self.tokens.set_state(StreamState({}, cursor["tokens"]))

    def _check(self) -> None:
        config, axes, rows = self.config, self.mesh.shape, self.tokens.shape[0]
        if config.lanes % axes["data"]:
            raise ConfigError(f"lanes is {config.lanes}, expected a multiple of the mesh's data={axes['data']}")
        if self.tokens.lanes != config.lanes:
            raise ConfigError(f"the tokens come in {self.tokens.lanes} lanes, expected lanes = {config.lanes}")
        if rows % (axes["data"] * axes["fsdp"]):
            raise ConfigError(f"the model's batch has {rows} rows, expected a multiple of data={axes['data']} times fsdp={axes['fsdp']}")

    def _refill(self) -> None:
        """Move what was not served to the front, fill every lane up from the model, and mix."""
        buffer = self._empty() if self._buffer is None else _shift(self._buffer, jnp.int32(self._served))
        filled, empty = self._filled - np.int32(self._served), 0
        while filled.min() < self.capacity:
            tapped = tap(self.decoder, next(self.tokens), self.config, self.mesh)
            counts, seen, damaged = (np.asarray(found) for found in _counts(tapped, self.config.lanes, self.mesh))
            empty = 0 if counts.any() else empty + 1
            if empty > EMPTY_BATCHES:
                raise no_token_counts(empty, int(damaged))
            # A lane that is full already gives up what it has beyond that, so that it never grows: at most a few tokens, while others fill.
            start = np.minimum(filled, self.capacity)
            buffer = _append(buffer, tapped.x_MBTD, tapped.mask_BT, jnp.asarray(start), self.mesh)
            self.seen_tokens += int(seen)
            self.dropped_tokens += int(seen) - int(counts.sum()) + int((filled - start).sum())
            self.damaged_tokens += int(damaged)
            filled = start + counts
        key = jax.random.fold_in(jax.random.key(self.config.seed), self._refills)
        self._buffer = _mix(buffer, key, self.capacity, self.mesh)
        self._filled, self._served, self._refills = filled, 0, self._refills + 1

    def _empty(self) -> Array:
        """A buffer with room for one model batch beyond its capacity."""
        rows = self.capacity + self.tokens.shape[0] * self.tokens.shape[1] // self.config.lanes
        shape = (len(self.config.layers), self.config.lanes, rows, self.decoder.config.d_model)
        return jax.jit(lambda: jnp.zeros(shape, self.decoder.config.dtype), out_shardings=self._place)()


def tap(decoder: Decoder, batch: TokenBatch, config: ActivationConfig, mesh: Mesh | None = None) -> TappedStreams:
    """Run the model up to the highest tapped layer, and say which tokens count: no padding, outlier, first or damaged token."""
    mesh = mesh or make_mesh()
    taps = jnp.asarray(config.layers, jnp.int32)
    tokens_BT, segment_ids = (place_rows(rows, mesh) for rows in (batch.tokens_BT, batch.segment_ids_BT))
    with jax.set_mesh(mesh):
        out = forward(decoder, tokens_BT, segment_ids, (), taps, stop_after=max(config.layers))
    assert out.residuals is not None
    return _filter(out.residuals, segment_ids, config.max_norm_multiple, config.drop_first)


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


@partial(jax.jit, static_argnames=("lanes", "mesh"))
def _counts(tapped: TappedStreams, lanes: int, mesh: Mesh) -> tuple[Array, Array, Array]:
    """Tokens of each lane that count, tokens seen and damaged, on every device: each process reads its own copy."""
    counts_V = jnp.sum(tapped.mask_BT.reshape(lanes, -1), axis=1, dtype=jnp.int32)
    return jax.lax.with_sharding_constraint((counts_V, tapped.seen, tapped.damaged), replicated(mesh))


def buffer_spec(mesh: Mesh, layers: int) -> PartitionSpec:
    """Layers over `fsdp` where it divides them, lanes over `data`."""
    return PartitionSpec("fsdp" if layers % mesh.shape["fsdp"] == 0 else None, "data", None, None)


@partial(jax.jit, static_argnames="mesh", donate_argnames="buffer")
def _append(buffer: Array, x_MBTD: Array, mask_BT: Array, start_V: Array, mesh: Mesh) -> Array:
    """Write a model batch into every lane behind its row `start`, tokens that count first; what follows them is overwritten by the next."""
    layers, lanes, _, width = buffer.shape
    x_MVND, mask_VN = x_MBTD.reshape(layers, lanes, -1, width), mask_BT.reshape(lanes, -1)

    def own(buffer: Array, x_MVND: Array, mask_VN: Array, start_V: Array) -> Array:
        for lane in range(buffer.shape[1]):
            order = jnp.argsort(~mask_VN[lane], stable=True)
            rows = x_MVND[:, lane, order][:, None].astype(buffer.dtype)
            buffer = jax.lax.dynamic_update_slice(buffer, rows, (0, lane, start_V[lane], 0))
        return buffer

    spec = buffer_spec(mesh, layers)
    by_lane = PartitionSpec("data")
    return jax.shard_map(own, mesh=mesh, in_specs=(spec, spec, by_lane, by_lane), out_specs=spec)(buffer, x_MVND, mask_VN, start_V)


@jax.jit
def _shift(buffer: Array, served: Array) -> Array:
    """Move row `served` of every lane to the front, in a new array: the old one may be part of a saved state."""
    return jnp.roll(buffer, -served, axis=2)


@partial(jax.jit, static_argnames=("capacity", "mesh"), donate_argnames="buffer")
def _mix(buffer: Array, key: Key[Array, ""], capacity: int, mesh: Mesh) -> Array:
    """Permute the first `capacity` rows of every lane, the same way in every layer."""

    def own(buffer: Array, key: Array) -> Array:
        lanes = buffer.shape[1]
        for lane in range(lanes):
            number = jax.lax.axis_index("data") * lanes + lane
            order = jax.random.permutation(jax.random.fold_in(key, number), capacity)
            buffer = buffer.at[:, lane, :capacity].set(buffer[:, lane, order])
        return buffer

    spec = buffer_spec(mesh, buffer.shape[0])
    return jax.shard_map(own, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec)(buffer, key)


@partial(jax.jit, static_argnames="size")
def _take(buffer: Array, start: Array, size: int) -> Array:
    return _flatten_lanes(jax.lax.dynamic_slice_in_dim(buffer, start, size, axis=2))


def _flatten_lanes(x_MVND: Array) -> Array:
    return x_MVND.reshape(x_MVND.shape[0], -1, x_MVND.shape[-1])


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
