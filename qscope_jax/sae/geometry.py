"""How an SAE's directions lie to each other: near duplicates, agreement of encoder and decoder, norms."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qscope_jax.sae.autoencoder import SparseAutoencoder

_BLOCK_ELEMENTS = 2**24


@dataclass(frozen=True, eq=False)
class CodeGeometry:
    """Geometry of the F features of an SAE, in float32 on the host; a cosine with a row of zeros is 0.

    Attributes:
        decoder_max_cosine_F: Largest cosine of each decoder row with another one (signed: an opposite direction is no duplicate).
        encoder_max_cosine_F: The same among encoder rows.
        encoder_decoder_cosine_F: Cosine of each feature's encoder and decoder row.
        decoder_norm_F: Norms of decoder rows.
        encoder_norm_F: Norms of encoder rows.
    """

    decoder_max_cosine_F: Float[np.ndarray, " F"]
    encoder_max_cosine_F: Float[np.ndarray, " F"]
    encoder_decoder_cosine_F: Float[np.ndarray, " F"]
    decoder_norm_F: Float[np.ndarray, " F"]
    encoder_norm_F: Float[np.ndarray, " F"]

    def summary(self) -> dict[str, float]:
        """Means over features, and of the decoder's norms the smallest and largest as well."""
        fields = {name.removesuffix("_F"): values for name, values in vars(self).items()}
        found = {name: float(np.mean(values, dtype=np.float64)) for name, values in fields.items()}
        return found | {"decoder_norm_min": float(self.decoder_norm_F.min()), "decoder_norm_max": float(self.decoder_norm_F.max())}


def code_geometry(sae: SparseAutoencoder) -> CodeGeometry:
    """The geometry of an SAE; takes 4 F^2 D operations and never holds an array of [F, F]."""
    encoder, decoder = sae.W_enc[...], sae.W_dec[...]
    encoder_norm_F, decoder_norm_F, aligned_F = (np.asarray(array) for array in _norms_and_cosine(encoder, decoder))
    return CodeGeometry(
        largest_cosines(decoder, decoder, other=True), largest_cosines(encoder, encoder, other=True), aligned_F, decoder_norm_F, encoder_norm_F
    )


def largest_cosines(rows_AD: Float[Array, "A D"], among_FD: Float[Array, "F D"], *, other: bool = False) -> Float[np.ndarray, " A"]:
    """Largest cosine, with its sign, of every row with any row of `among_FD`, in blocks of rows.

    Args:
        rows_AD: Rows.
        among_FD: Rows that they are compared with.
        other: Compare row i with all but row i of `among_FD`: both are the same matrix. -1 where there is no other.
    """
    rows, among = _unit(rows_AD), _unit(among_FD)
    size = min(max(_BLOCK_ELEMENTS // among.shape[0], 1), rows.shape[0])
    found_A = np.empty(rows.shape[0], np.float32)
    for start in range(0, rows.shape[0], size):
        # The last block begins where it still fits, so that one program serves all.
        start = min(start, rows.shape[0] - size)
        found_A[start : start + size] = _block_cosines(rows, among, jnp.int32(start), size, other)
    return found_A


@partial(jax.jit, static_argnames=("size", "other"))
def _block_cosines(rows: Array, among: Array, start: Int[Array, ""], size: int, other: bool) -> Array:
    block = jax.lax.dynamic_slice_in_dim(rows, start, size)
    cosines = jnp.matmul(block, among.T, precision=jax.lax.Precision.HIGHEST)
    if other:
        itself = start + jnp.arange(size, dtype=jnp.int32)
        cosines = jnp.where(jnp.arange(among.shape[0], dtype=jnp.int32) == itself[:, None], jnp.float32(-1), cosines)
    return jnp.max(cosines, axis=1)


@jax.jit
def _unit(rows: Array) -> Array:
    rows = rows.astype(jnp.float32)
    norms = jnp.linalg.norm(rows, axis=1, keepdims=True)
    return rows / jnp.where(norms > 0, norms, jnp.float32(1))


@jax.jit
def _norms_and_cosine(encoder_FD: Array, decoder_FD: Array) -> tuple[Array, Array, Array]:
    norms = tuple(jnp.linalg.norm(rows.astype(jnp.float32), axis=1) for rows in (encoder_FD, decoder_FD))
    return *norms, jnp.sum(_unit(encoder_FD) * _unit(decoder_FD), axis=1)
