"""Losses of one SAE on a batch, and their gradient, written out: everything in it stays sparse, on one device or on a shard of the mesh.

    loss  = FVU + aux_weight * L_aux + multi_topk_weight * FVU_4k [ + sparsity * (L0 / k - 1)^2 ]
    FVU   = sum |x - xhat|^2 / sum |x - mean x|^2
    L_aux = sum |e - a_aux W_dec|^2 / sum |e - mean e|^2,  e = stop_gradient(x - xhat),
            a_aux = relu(top aux_k of z among dead features), no b_dec

Sums and means are over all tokens of the batch, those of other devices too, and a quotient is taken once, at the end: neither sharding nor
micro-batches change a gradient. A quotient whose denominator is 0 is 0. The gradient is by hand because autodiff through collectives
would add some of it up twice, and because every part of it is the same three sparse products.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qscope_jax.parallel.shards import Shards
from qscope_jax.sae.autoencoder import SparseAutoencoder, replace_params
from qscope_jax.sae.selection import largest_features
from qscope_jax.sae.sparse import combine_rows, dot_rows, residual_rows, scatter_rows, scatter_scalars
from qscope_jax.sae.topk import batch_winners, shard_winners
from qscope_jax.training.sae_config import SAEConfig

_COUNTER_LIMIT = 2_000_000_000
_COMPACT = 8
_Sums = tuple[SparseAutoencoder, Array]  # gradient, and the decoder gradient's product with each direction


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Losses:
    """What a batch says about an SAE, over all shards.

    Attributes:
        fvu: Fraction of variance unexplained.
        aux: L_aux.
        l0: Active features a token.
        dead: Share of features that are dead.
        cut: Share of tokens that had no slot left for further features.
        sparsity: `jumprelu`'s penalty.
    """

    fvu: Float[Array, ""]
    aux: Float[Array, ""]
    l0: Float[Array, ""]
    dead: Float[Array, ""]
    cut: Float[Array, ""]
    sparsity: Float[Array, ""]


class Gradient(NamedTuple):
    """Everything that a step needs.

    Attributes:
        parameters: Gradient of every parameter, in an SAE's place; this shard's features, all shards' tokens.
        along_F: The decoder gradient's product with each direction, which is known from the codes: neither matrix is read for it.
        losses: The losses.
        tokens_since_fired: Counters of this shard's features, this batch counted.
        least_active: `batch_topk`'s least active value.
    """

    parameters: SparseAutoencoder
    along_F: Float[Array, " F"]
    losses: Losses
    tokens_since_fired: Int[Array, " F"]
    least_active: Float[Array, ""]


class _Term(NamedTuple):
    """A sparse code beside the gradient of the loss with respect to what it decodes to, and to its values where that is known already."""

    code: "_Code"
    y_ND: Array
    slopes_NJ: Array | None = None


class _Code(NamedTuple):
    """Slots of each token: pre-activation, feature, and whether it is active."""

    z_NJ: Array
    indices_NJ: Array
    active_NJ: Array

    @property
    def values_NJ(self) -> Array:  # noqa: N802
        return jnp.where(self.active_NJ, self.z_NJ, jnp.float32(0))

    def columns(self, columns: slice) -> "_Code":
        return _Code(*(array[:, columns] for array in self))


def loss_and_gradient(
    sae: SparseAutoencoder,
    x_ND: Float[Array, "N D"],
    tokens_since_fired: Int[Array, " F"],
    sparsity_weight: Float[Array, ""] | float,
    *,
    config: SAEConfig,
    aux_k: int,
    shards: Shards | None = None,
) -> Gradient:
    """Losses and gradient of one SAE on a batch, for this device's tokens and features.

    Args:
        sae: Parameters, of inputs of unit mean squared norm; the features of this shard.
        x_ND: The tokens of this shard, scaled, float32.
        tokens_since_fired: Counters before the batch.
        sparsity_weight: Of `jumprelu`'s penalty.
        config: Variant and weights.
        aux_k: Slots of AuxK's code.
        shards: Axes that tokens and features are split over; default one device.
    """
    shards = shards or Shards()
    tokens = shards.all_tokens(x_ND.shape[0])
    matrices = _Matrices(sae, config)
    code, wide, least = _choose(sae, x_ND, matrices, shards)
    fired_F = shards.any_token(scatter_scalars(code.active_NJ.astype(jnp.float32), code.indices_NJ, sae.num_features) > 0)
    since_F = jnp.where(fired_F, 0, jnp.minimum(tokens_since_fired + tokens, _COUNTER_LIMIT))
    dead_F = since_F >= config.dead_after_tokens
    num_dead = jnp.sum(dead_F, dtype=jnp.int32)

    fvu, error_ND, terms, db_dec_ND = _rebuild(sae, x_ND, matrices, code, wide, shards)
    l0 = shards.sum(jnp.sum(code.active_NJ, dtype=jnp.float32)) / tokens
    toward_l0 = 2 * sparsity_weight * (l0 / config.k - 1) / (config.k * tokens)

    def without_aux() -> tuple[_Sums, Array]:
        return matrices.gradient(x_ND, terms, db_dec_ND, toward_l0), jnp.float32(0)

    def with_aux(most: int) -> tuple[_Sums, Array]:
        aux_code = _choose_dead(sae, x_ND, matrices, dead_F, min(aux_k, shards.all_features(most)), most, shards)
        rest_ND = error_ND - shards.sum_features(matrices.decode(aux_code))
        aux, down = _quotient(rest_ND, _spread(error_ND, shards), shards)
        term = _Term(aux_code, config.aux_weight * down * rest_ND)
        return matrices.gradient(x_ND, [*terms, term], db_dec_ND, toward_l0), aux

    sums, aux = _by_number_of_dead(num_dead, sae.num_features, aux_k, without_aux, with_aux, shards) if config.aux_weight else without_aux()
    all_dead = shards.sum_features(num_dead)
    full_N = shards.sum_features(jnp.sum(code.active_NJ, axis=1, dtype=jnp.int32)) >= config.slots
    losses = Losses(
        fvu=fvu,
        aux=jnp.where(all_dead > 0, aux, jnp.float32(0)),
        l0=l0,
        dead=all_dead.astype(jnp.float32) / shards.all_features(sae.num_features),
        cut=jnp.float32(0) if config.activation == "topk" else shards.sum_tokens(jnp.sum(full_N, dtype=jnp.float32)) / tokens,
        sparsity=jnp.square(l0 / config.k - 1) if config.activation == "jumprelu" else jnp.float32(0),
    )
    parameters, along_F = jax.tree.map(shards.sum_tokens, sums)
    return Gradient(parameters, along_F, losses, since_F, least)


def _rebuild(
    sae: SparseAutoencoder, x_ND: Array, matrices: "_Matrices", code: "_Code", wide: "_Code | None", shards: Shards
) -> tuple[Array, Array, list["_Term"], Array]:
    """FVU, the reconstruction's error, the codes with the gradient of what they decode to, and b_dec's gradient token by token."""
    spread = _spread(x_ND, shards)
    if wide is None and not shards.features:
        error_ND, along_NJ = matrices.residual(x_ND - sae.b_dec[...], code)
        fvu, down = _quotient(error_ND, spread, shards)
        y_ND = down * error_ND
        return fvu, error_ND, [_Term(code, y_ND, down * along_NJ)], y_ND
    error_ND = x_ND - (shards.sum_features(matrices.decode(code)) + sae.b_dec[...])
    fvu, down = _quotient(error_ND, spread, shards)
    y_ND = down * error_ND
    if wide is None:
        return fvu, error_ND, [_Term(code, y_ND)], y_ND
    wide_error_ND = error_ND - shards.sum_features(matrices.decode(wide))
    _, down = _quotient(wide_error_ND, spread, shards)
    wide_y_ND = matrices.config.multi_topk_weight * down * wide_error_ND
    y_ND += wide_y_ND
    return fvu, error_ND, [_Term(code, y_ND), _Term(wide, wide_y_ND)], y_ND


def _by_number_of_dead(
    num_dead: Array,
    num_features: int,
    aux_k: int,
    without_aux: Callable[[], tuple[_Sums, Array]],
    with_aux: Callable[[int], tuple[_Sums, Array]],
    shards: Shards,
) -> tuple[_Sums, Array]:
    """No AuxK where nothing is dead, as it is 0; where little is, AuxK over those features alone; else over all.

    Every device takes the same branch, since there are collectives in them.
    """
    few = max(num_features // _COMPACT, min(aux_k, num_features))
    most_dead = shards.largest(num_dead)
    branches, which = [without_aux, partial(with_aux, num_features)], (most_dead > 0).astype(jnp.int32)
    if few * 2 <= num_features:
        branches.insert(1, partial(with_aux, few))
        which += (most_dead > few).astype(jnp.int32)
    return jax.lax.switch(which, branches)


class _Matrices:
    """Both matrices in the dtype of the products, and the products with a code, in micro-batches where asked."""

    def __init__(self, sae: SparseAutoencoder, config: SAEConfig):
        self.sae, self.config = sae, config
        self.W_enc_FD, self.W_dec_FD = sae.W_enc[...].astype(config.compute_dtype), sae.W_dec[...].astype(config.compute_dtype)

    def largest(self, x_ND: Array, k: int, rows: Array | None = None, **limits: Any) -> tuple[Array, Array]:
        """The k largest pre-activations of each token, among all features or those of some `rows`, and their places among these."""
        W, b = self.W_enc_FD, self.sae.b_enc[...]
        if rows is not None:
            W, b = W[rows], b[rows]
        return _in_parts(lambda part: largest_features(part, W, b, k, **limits), x_ND, self.config.micro_batches)

    def decode(self, code: "_Code") -> Array:
        return _in_parts(lambda part: combine_rows(part.values_NJ, part.indices_NJ, self.W_dec_FD), code, self.config.micro_batches)

    def residual(self, target_ND: Array, code: "_Code") -> tuple[Array, Array]:
        """What a code leaves of a target, and its products with the code's rows."""
        rows = (target_ND, code.values_NJ, code.indices_NJ)
        return _in_parts(lambda part: residual_rows(part[0], part[1], part[2], self.W_dec_FD), rows, self.config.micro_batches)

    def gradient(self, x_ND: Array, terms: Sequence["_Term"], db_dec_ND: Array, toward_l0: Array) -> _Sums:
        """Sums over this device's tokens: every term's gradient, and its decoder part along each direction."""
        rows, parts = (x_ND, tuple(terms), db_dec_ND), self.config.micro_batches
        if parts == 1:
            return self._part(rows, toward_l0)
        split = jax.tree.map(lambda array: array.reshape(parts, -1, *array.shape[1:]), rows)
        nothing = (jax.tree.map(jnp.zeros_like, self.sae), jnp.zeros_like(self.sae.b_enc[...]))
        return jax.lax.scan(lambda total, part: (jax.tree.map(jnp.add, total, self._part(part, toward_l0)), None), nothing, split)[0]

    def _part(self, rows: tuple[Array, Sequence[_Term], Array], toward_l0: Array) -> _Sums:
        x_ND, terms, db_dec_ND = rows
        features, dtype = self.sae.num_features, self.W_dec_FD.dtype
        indices_NJ = jnp.concatenate([term.code.indices_NJ for term in terms], axis=1)
        active_NJ = jnp.concatenate([term.code.active_NJ for term in terms], axis=1)
        slopes_NJ = jnp.concatenate([self._slopes(term) for term in terms], axis=1)
        dz_NJ = jnp.where(active_NJ, slopes_NJ, jnp.float32(0))
        values_NJ = jnp.concatenate([term.code.values_NJ for term in terms], axis=1)
        dW_dec = [scatter_rows(term.code.values_NJ, term.code.indices_NJ, term.y_ND.astype(dtype), features) for term in terms]
        changes: dict[str, Array] = {
            "W_enc": scatter_rows(dz_NJ, indices_NJ, x_ND.astype(dtype), features),
            "W_dec": sum(dW_dec[1:], start=dW_dec[0]),
            "b_enc": scatter_scalars(dz_NJ, indices_NJ, features),
            "b_dec": jnp.sum(db_dec_ND, axis=0),
        }
        if hasattr(self.sae, "threshold"):
            changes["threshold"] = self._threshold(terms[0].code, slopes_NJ[:, : terms[0].code.z_NJ.shape[1]], toward_l0)
        return replace_params(self.sae, changes), scatter_scalars(values_NJ * slopes_NJ, indices_NJ, features)

    def _slopes(self, term: _Term) -> Array:
        return dot_rows(term.y_ND, term.code.indices_NJ, self.W_dec_FD) if term.slopes_NJ is None else term.slopes_NJ

    def _threshold(self, code: "_Code", slopes_NJ: Array, toward_l0: Array) -> Array:
        """Straight-through estimate (Rajamanoharan et al. 2024, arXiv 2407.14435), not 0 within a window eps wide about theta.

        There d a / d theta = -theta / eps and d L0 / d theta = -1 / eps.
        """
        theta_F = self.sae.threshold[...]
        if self.config.activation != "jumprelu":
            return jnp.zeros_like(theta_F)
        theta_NJ = theta_F[code.indices_NJ]
        inside_NJ = jnp.abs(code.z_NJ - theta_NJ) < self.config.bandwidth / 2
        change_NJ = -(theta_NJ * slopes_NJ + toward_l0) / self.config.bandwidth
        return scatter_scalars(jnp.where(inside_NJ, change_NJ, jnp.float32(0)), code.indices_NJ, theta_F.shape[0])


def _choose(sae: SparseAutoencoder, x_ND: Array, matrices: _Matrices, shards: Shards) -> tuple[_Code, _Code | None, Array]:
    """The code of every token; with multi-top-k what the wider code has beside it; and `batch_topk`'s least active value."""
    config, nothing = matrices.config, jnp.float32(0)
    if config.activation == "jumprelu":
        theta_F = sae.threshold[...]
        z_NJ, indices_NJ = matrices.largest(x_ND, config.slots, floor_F=theta_F - config.bandwidth / 2)
        z_NJ = jnp.where(shard_winners(z_NJ, config.slots, shards), z_NJ, -jnp.inf)
        return _Code(z_NJ, indices_NJ, z_NJ > jnp.maximum(theta_F[indices_NJ], 0)), None, nothing
    if config.activation == "batch_topk":
        z_NJ, indices_NJ = matrices.largest(x_ND, config.slots)
        values_NJ = jnp.where(shard_winners(z_NJ, config.slots, shards), jnp.maximum(z_NJ, 0), nothing)
        active_NJ, least = batch_winners(values_NJ, config.k * shards.all_tokens(x_ND.shape[0]), shards)
        return _Code(z_NJ, indices_NJ, active_NJ & (values_NJ > 0)), None, least
    widest = min(4 * config.k, shards.all_features(sae.num_features)) if config.multi_topk_weight else config.k
    z_NJ, indices_NJ = matrices.largest(x_ND, widest)
    first = slice(0, config.k)  # a shard's share of the k largest of all is a prefix of its own
    code = _Code(z_NJ[:, first], indices_NJ[:, first], (z_NJ[:, first] > 0) & shard_winners(z_NJ[:, first], config.k, shards))
    if widest == config.k:
        return code, None, nothing
    also_NJ = jnp.pad(~code.active_NJ, ((0, 0), (0, z_NJ.shape[1] - code.z_NJ.shape[1])), constant_values=True)
    wide = _Code(z_NJ, indices_NJ, (z_NJ > 0) & shard_winners(z_NJ, widest, shards) & also_NJ)
    return code, wide if shards.features else wide.columns(slice(config.k, None)), nothing


def _choose_dead(sae: SparseAutoencoder, x_ND: Array, matrices: _Matrices, dead_F: Array, aux_k: int, most: int, shards: Shards) -> _Code:
    """AuxK's code: the largest pre-activations of dead features, of which this shard has at most `most`."""
    if most < sae.num_features:
        rows = jnp.nonzero(dead_F, size=most, fill_value=0)[0].astype(jnp.int32)
        there = jnp.arange(most, dtype=jnp.int32) < jnp.sum(dead_F, dtype=jnp.int32)
        z_NJ, places_NJ = matrices.largest(x_ND, aux_k, rows, allowed_F=there)
        indices_NJ = rows[places_NJ]
    else:
        z_NJ, indices_NJ = matrices.largest(x_ND, aux_k, allowed_F=dead_F)
    return _Code(z_NJ, indices_NJ, (z_NJ > 0) & shard_winners(z_NJ, aux_k, shards))


def _in_parts(function: Callable[[Any], Any], rows: Any, parts: int) -> Any:
    """A function of rows, over parts of them one after the other."""
    if parts == 1:
        return function(rows)
    split = jax.tree.map(lambda array: array.reshape(parts, -1, *array.shape[1:]), rows)
    return jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:]), jax.lax.map(function, split))


def _spread(x_ND: Array, shards: Shards) -> Array:
    """Sum of squares about the mean, over all shards."""
    mean_D = shards.sum_tokens(jnp.sum(x_ND, axis=0)) / shards.all_tokens(x_ND.shape[0])
    return shards.sum_tokens(jnp.sum(jnp.square(x_ND - mean_D)))


def _quotient(error_ND: Array, spread: Array, shards: Shards) -> tuple[Array, Array]:
    """Sum of squares of an error as a share of `spread`, and what the error is multiplied by for the gradient with respect to what was rebuilt."""
    share = jnp.where(spread > 0, 1 / jnp.where(spread > 0, spread, 1), jnp.float32(0))
    return shards.sum_tokens(jnp.sum(jnp.square(error_ND))) * share, -2 * share
