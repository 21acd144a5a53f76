"""Whether two SAEs are the same: bit for bit, or in the codes and reconstructions that they give to a sample of tokens.

Everything is computed in float64 with NumPy, so that differences are those of the stored tensors. Dimensions: N tokens, F features, D width.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from qscope_jax.sae.arrays import SAEArrays, row_blocks

TOLERANCE = 1e-5
"""Relative error of a reconstruction that rounding may cause; also how close to the edge of a selection a pre-activation is a tie."""


@dataclass(frozen=True)
class Comparison:
    """Two SAEs on the same tokens.

    Attributes:
        tokens: How many there were.
        moved: Tokens whose sets of active features differ, features within rounding of the edge of both selections aside.
        ties: Tokens whose sets differ by such features only.
        worst_error: Largest relative difference of reconstructions, among tokens with equal sets.
        error: The same over all tokens, on average.
    """

    tokens: int
    moved: int
    ties: int
    worst_error: float
    error: float

    @property
    def same(self) -> bool:
        """Whether they differ by rounding only."""
        return self.moved == 0 and self.worst_error <= TOLERANCE


def first_difference(one: SAEArrays, other: SAEArrays) -> str | None:
    """Name of the first tensor that differs in a bit, in type or in shape; None where all are equal."""
    names = list(one.tensors())
    if names != list(other.tensors()):
        return "the list of tensors"
    for name in names:
        a, b = one.tensors()[name], other.tensors()[name]
        if a.dtype != b.dtype or a.shape != b.shape:
            return name
        if any(a[block].tobytes() != b[block].tobytes() for block in row_blocks(a)):
            return name
    return None


def compare_codes(one: SAEArrays, other: SAEArrays, tokens: int = 256, seed: int = 0) -> Comparison:
    """Compare two SAEs on random tokens that look like what `one` was made for (`sample_tokens`)."""
    x_ND = sample_tokens(one, tokens, seed)
    (active_NF, unsure_NF, xhat_ND), (other_NF, other_unsure_NF, other_xhat_ND) = _coded(one, x_ND), _coded(other, x_ND)
    differ_NF = active_NF != other_NF
    moved_N = (differ_NF & ~(unsure_NF & other_unsure_NF)).any(axis=1)
    differ_N = differ_NF.any(axis=1)
    error_N = np.linalg.norm(xhat_ND - other_xhat_ND, axis=1) / np.maximum(np.linalg.norm(xhat_ND, axis=1), np.finfo(np.float64).tiny)
    worst = float(error_N[~differ_N].max(initial=0))
    return Comparison(len(x_ND), int(moved_N.sum()), int((differ_N & ~moved_N).sum()), worst, float(error_N.mean()))


def sample_tokens(arrays: SAEArrays, tokens: int = 256, seed: int = 0) -> Float[np.ndarray, "N D"]:
    """Random tokens in the range where an SAE works: b_dec, a few directions with exponentially distributed strengths, and 10 % noise.

    Strengths have the scale at which a feature whose encoder and decoder agree clearly passes its threshold. They are not a model's
    activations: they tell whether two SAEs agree, not how well either reconstructs.
    """
    rng = np.random.default_rng(seed)
    F, D = arrays.W_dec.shape
    count = min(F, max(arrays.k if arrays.activation == "topk" else 0, 16))
    x_ND = np.empty((tokens, D))
    for i in range(tokens):
        features = np.sort(rng.choice(F, count, replace=False))
        directions = arrays.W_dec[features].astype(np.float64)
        gain = np.einsum("fd,fd->f", arrays.W_enc[features].astype(np.float64), directions)
        wanted = 1 + (0 if arrays.threshold is None else 2 * np.maximum(arrays.threshold[features].astype(np.float64), 0))
        strengths = rng.exponential(size=count) * wanted / np.maximum(np.abs(gain), 0.1 * np.abs(gain).mean() + 1e-12)
        x_ND[i] = strengths @ directions
    noise = rng.standard_normal((tokens, D)) * (0.1 * np.linalg.norm(x_ND, axis=1, keepdims=True) / np.sqrt(D))
    return x_ND + noise + arrays.b_dec.astype(np.float64)


def _coded(arrays: SAEArrays, x_ND: Float[np.ndarray, "N D"]) -> tuple[Bool[np.ndarray, "N F"], Bool[np.ndarray, "N F"], Float[np.ndarray, "N D"]]:
    """Which features are active, which lie within rounding of the edge of the selection, and the reconstructions."""
    seen_ND = x_ND - arrays.b_dec.astype(np.float64) if arrays.apply_b_dec_to_input else x_ND
    z_NF = np.empty((len(x_ND), arrays.num_features))
    for block in row_blocks(arrays.W_enc):
        z_NF[:, block] = seen_ND @ arrays.W_enc[block].astype(np.float64).T + arrays.b_enc[block].astype(np.float64)
    scale_N1 = np.abs(z_NF).max(axis=1, keepdims=True)
    if arrays.activation == "topk":
        order = np.argsort(-np.maximum(z_NF, 0), axis=1, kind="stable")[:, : arrays.k]
        active_NF = np.zeros(z_NF.shape, bool)
        np.put_along_axis(active_NF, order, True, axis=1)
        edge_NF = np.maximum(np.take_along_axis(z_NF, order[:, -1:], axis=1), 0)
        active_NF &= z_NF > 0
    else:
        assert arrays.threshold is not None
        edge_NF = np.maximum(arrays.threshold.astype(np.float64), 0)[None]
        active_NF = z_NF > edge_NF
    unsure_NF = np.abs(z_NF - edge_NF) <= TOLERANCE * scale_N1
    z_NF[~active_NF] = 0
    xhat_ND = np.tile(arrays.b_dec.astype(np.float64), (len(x_ND), 1))
    for block in row_blocks(arrays.W_dec):
        xhat_ND += z_NF[:, block] @ arrays.W_dec[block].astype(np.float64)
    return active_NF, unsure_NF, xhat_ND
