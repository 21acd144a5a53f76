"""Pre-activations and the choice of the largest, a few tokens at a time: all pre-activations of a batch never exist at once on a CPU."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from qscope_jax.models.linear import precision_for
from qscope_jax.parallel.shards import Shards
from qscope_jax.sae.topk import top_k

_CHUNK = 512


def largest_features(
    x_ND: Float[Array, "N D"],
    W_FD: Float[Array, "F D"],
    b_F: Float[Array, " F"],
    k: int,
    *,
    floor_F: Float[Array, " F"] | None = None,
    allowed_F: Bool[Array, " F"] | None = None,
) -> tuple[Float[Array, "N K"], Int[Array, "N K"]]:
    """The k largest entries of `x W^T + b` in each row, descending, and their features; at most F of them.

    The product is taken in the dtype of W and added up in float32, in which the choice is made.

    Args:
        x_ND: What the encoder multiplies.
        W_FD: Encoder vectors.
        b_F: Encoder bias, float32.
        k: How many.
        floor_F: Only entries above it count; the others are -inf.
        allowed_F: Only these features count; the others are -inf.
    """

    def choose(x_ND: Array) -> tuple[Array, Array]:
        z_NF = pre_activations(x_ND, W_FD, b_F)
        if floor_F is not None:
            z_NF = jnp.where(z_NF > floor_F, z_NF, -jnp.inf)
        if allowed_F is not None:
            z_NF = jnp.where(allowed_F, z_NF, -jnp.inf)
        return top_k(z_NF, min(k, W_FD.shape[0]))

    return _in_chunks(choose, x_ND, W_FD.shape[0])


def largest_over_shards(
    x_ND: Float[Array, "N D"],
    W_FD: Float[Array, "F D"],
    b_F: Float[Array, " F"],
    k: int,
    floor_F: Float[Array, " F"] | None = None,
    allowed_F: Bool[Array, " F"] | None = None,
) -> tuple[Float[Array, "N K"], Int[Array, "N K"]]:
    """`largest_features`; where the mesh that is set splits features, k candidates a shard and token cross devices, and no array of [N, F]."""
    mesh = jax.sharding.get_abstract_mesh()
    split = 1 if mesh.empty else mesh.shape.get("tensor", 1)
    if split == 1 or W_FD.shape[0] % split:
        return largest_features(x_ND, W_FD, b_F, k, floor_F=floor_F, allowed_F=allowed_F)

    def own(x_ND: Array, by_feature: tuple[Array, Array, Array | None, Array | None]) -> tuple[Array, Array]:
        W, b, floor, allowed = by_feature
        shards = Shards(features="tensor")
        values_NK, indices_NK = largest_features(x_ND, W, b, k, floor_F=floor, allowed_F=allowed)
        all_values = shards.gather_features(values_NK)
        all_indices = shards.gather_features(indices_NK + shards.feature_shard * W.shape[0])
        # Behind each other in the shards' order: equal values still go to the lower feature.
        values_NK, places_NK = jax.lax.top_k(all_values, min(k, all_values.shape[1]))
        return values_NK, jnp.take_along_axis(all_indices, places_NK, axis=1)

    by_feature = (W_FD, b_F, floor_F, allowed_F)
    specs = jax.tree.map(lambda _: PartitionSpec("tensor"), by_feature)
    # After the gather every shard has the same, which the checker cannot know.
    over_mesh = jax.shard_map(own, in_specs=(PartitionSpec(), specs), out_specs=PartitionSpec(), axis_names=frozenset({"tensor"}), check_vma=False)
    return over_mesh(x_ND, by_feature)


def pre_activations(x_ND: Float[Array, "N D"], W_FD: Float[Array, "F D"], b_F: Float[Array, " F"]) -> Float[Array, "N F"]:
    """`x W^T + b`: product in the dtype of W, sum in float32."""
    contract = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(x_ND.astype(W_FD.dtype), W_FD, contract, precision_for(W_FD.dtype), jnp.float32) + b_F


def _in_chunks(choose: Callable[[Array], tuple[Array, Array]], x_ND: Array, num_features: int) -> tuple[Array, Array]:
    """`choose` over groups of 512 tokens where the pre-activations of all at once would leave a CPU's caches."""
    tokens, width = x_ND.shape
    chunks = tokens // _CHUNK
    if jax.default_backend() != "cpu" or chunks < 2 or tokens * num_features < _CHUNK * 16384:
        return choose(x_ND)
    parts = [out.reshape(chunks * _CHUNK, -1) for out in jax.lax.map(choose, x_ND[: chunks * _CHUNK].reshape(chunks, _CHUNK, width))]
    if tokens % _CHUNK:
        parts = [jnp.concatenate(pair) for pair in zip(parts, choose(x_ND[chunks * _CHUNK :]), strict=True)]
    return parts[0], parts[1]
