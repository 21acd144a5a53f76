"""Exact top-k over features, block-wise.

The K largest values of a row lie in the K blocks with the largest maxima, so it suffices to rank block maxima and then the members of
K blocks: about half the time of `lax.top_k` over the whole row on a CPU.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from qscope_jax.parallel.shards import Shards

_BLOCK = 64
_PARTS = 16


def top_k(z_NF: Float[Array, "N F"], k: int) -> tuple[Float[Array, "N K"], Int[Array, "N K"]]:
    """The k largest values of each row, descending, and their indices; equal values by lower index, as `jax.lax.top_k`.

    Ranking happens in float32: rounding to bfloat16 would change the selected set, and its sort is a hundred times slower on a CPU.
    """
    z_NF = z_NF.astype(jnp.float32)
    width = z_NF.shape[-1]
    if jax.default_backend() == "tpu" or width % _BLOCK or width // _BLOCK < 2 * k:
        # TPUs have a native instruction for wide float32 rows; narrow rows have too few blocks to leave any out.
        values_NK, indices_NK = jax.lax.top_k(z_NF, k)
        return values_NK, indices_NK
    return block_top_k(z_NF, k, _BLOCK)


def block_top_k(z_NF: Float[Array, "N F"], k: int, block: int) -> tuple[Float[Array, "N K"], Int[Array, "N K"]]:
    """Two-stage selection with blocks of `block` features; `F` must be a multiple of it and hold at least k blocks."""
    rows, width = z_NF.shape
    blocks = z_NF.reshape(rows, width // block, block)
    _, chosen_NK = _top_k_in_parts(jnp.max(blocks, axis=-1), k)
    # In order of position, so that ties inside the second stage still go to the lower feature.
    chosen_NK = jnp.sort(chosen_NK, axis=-1)
    candidates = jnp.take_along_axis(blocks, chosen_NK[..., None], axis=1).reshape(rows, k * block)
    values_NK, places_NK = _top_k_in_parts(candidates, k)
    indices_NK = jnp.take_along_axis(chosen_NK, places_NK // block, axis=-1) * block + places_NK % block
    return values_NK, indices_NK


def _top_k_in_parts(rows_NW: Array, k: int) -> tuple[Array, Array]:
    """`jax.lax.top_k`; on a CPU as sixteen calls, each of which runs on one core, but beside others when there are many."""
    if jax.default_backend() != "cpu" or rows_NW.shape[0] % _PARTS:
        values_NK, indices_NK = jax.lax.top_k(rows_NW, k)
        return values_NK, indices_NK
    parts = [jax.lax.top_k(part, k) for part in jnp.split(rows_NW, _PARTS)]
    return jnp.concatenate([values for values, _ in parts]), jnp.concatenate([indices for _, indices in parts])


def shard_winners(values_NK: Float[Array, "N J"], k: int, shards: Shards) -> Bool[Array, "N J"]:
    """Which of a shard's own largest values are among the k largest of all shards of features.

    Exact, ties included (to the lower feature, as `top_k` on one device): every shard brings its k largest, so all winners are there. One
    all-gather of J values a shard and token; no gradient goes through it. The winners are a prefix of each row, as rows are descending.

    Args:
        values_NK: The shard's largest values, at least k of them or all it has, descending, equal ones by feature.
        k: How many win over all shards.
        shards: The axes of the mesh.
    """
    own = values_NK.shape[1]
    all_NS = shards.gather_features(jax.lax.stop_gradient(values_NK))
    if all_NS.shape[1] <= k:
        return jnp.ones(values_NK.shape, bool)
    least_N1 = jax.lax.top_k(all_NS, k)[0][:, -1:]
    above_NS, tied_NS = all_NS > least_N1, all_NS == least_N1
    room_N1 = k - jnp.sum(above_NS, axis=1, keepdims=True, dtype=jnp.int32)
    rank_NS = jnp.cumsum(tied_NS, axis=1, dtype=jnp.int32)
    winners_NS = above_NS | (tied_NS & (rank_NS <= room_N1))
    return jax.lax.dynamic_slice_in_dim(winners_NS, shards.feature_shard * own, own, axis=1)


def batch_winners(values_NJ: Float[Array, "N J"], total: int, shards: Shards) -> tuple[Bool[Array, "N J"], Float[Array, ""]]:
    """Which values are among the `total` largest positive ones of the whole batch, over all shards, and the least of them (0 if none is positive).

    Exact: the bits of non-negative floats sort as integers, so the least winner is found bit by bit, by 31 counts that are added up over
    the mesh; values equal to it win in the order of tokens, then features.

    Args:
        values_NJ: Non-negative values of this shard's tokens and features, each row in order of value, equal ones by feature.
        total: Winners wanted over the whole batch.
        shards: The axes of the mesh.
    """
    bits_NJ = jax.lax.bitcast_convert_type(values_NJ, jnp.int32)

    def count(least: Array) -> Array:
        return shards.sum(jnp.sum(bits_NJ >= least, dtype=jnp.int32))

    def narrow(step: Array, least: Array) -> Array:
        candidate = least | (jnp.int32(1) << (30 - step))
        return jnp.where(count(candidate) >= total, candidate, least)

    # Without enough positive values the search ends at 0; all that are positive win then.
    found = jax.lax.fori_loop(0, 31, narrow, jnp.int32(0))
    above_NJ, tied_NJ = bits_NJ > found, (bits_NJ == found) & (found > 0)
    room = total - shards.sum(jnp.sum(above_NJ, dtype=jnp.int32))
    ties_N1 = jnp.sum(tied_NJ, axis=1, keepdims=True, dtype=jnp.int32)
    by_shard_NS = shards.gather_features(ties_N1)
    here = jnp.arange(by_shard_NS.shape[1], dtype=jnp.int32) < shards.feature_shard
    of_lower_features_N = jnp.sum(jnp.where(here, by_shard_NS, 0), axis=1, dtype=jnp.int32)
    of_token_N = jnp.sum(by_shard_NS, axis=1, dtype=jnp.int32)
    of_earlier_N = jnp.cumsum(of_token_N, dtype=jnp.int32) - of_token_N + shards.earlier_tokens(jnp.sum(of_token_N, dtype=jnp.int32))
    rank_NJ = (of_earlier_N + of_lower_features_N)[:, None] + jnp.cumsum(tied_NJ, axis=1, dtype=jnp.int32)
    winners_NJ = above_NJ | (tied_NJ & (rank_NJ <= room))
    return winners_NJ, jax.lax.bitcast_convert_type(found, jnp.float32)
