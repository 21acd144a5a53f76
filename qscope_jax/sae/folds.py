"""Rewriting an SAE as another with the same codes and reconstructions: what carries it between formats that store it differently.

With z = W_enc (x - [flag] b_dec) + b_enc, a the selection of z, and xhat = a W_dec + b_dec, each function below changes the tensors and keeps
the function (or rescales a, where it says so). Everything is computed in float64 and rounded once, to float32 or the wider type it came in;
rounding is the only error, about one unit in the last place. Each fold adds its name to `metadata["folds"]`.
Dimensions: F SAE features, D model width.
"""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Shaped

from qscope_jax.sae.arrays import SAEArrays, row_blocks

_SMALLEST_NORM = 1e-8


def b_dec_out_of_input(arrays: SAEArrays) -> SAEArrays:
    """The encoder sees x instead of x - b_dec: b_enc' = b_enc - W_enc b_dec."""
    if not arrays.apply_b_dec_to_input:
        return arrays
    b_enc_F = _rounded(arrays.b_enc.astype(np.float64) - _encoded_b_dec(arrays), arrays.b_enc)
    return _folded(arrays, "b_dec_out_of_input", b_enc=b_enc_F, apply_b_dec_to_input=False)


def b_dec_into_input(arrays: SAEArrays) -> SAEArrays:
    """The encoder sees x - b_dec instead of x: b_enc' = b_enc + W_enc b_dec."""
    if arrays.apply_b_dec_to_input:
        return arrays
    b_enc_F = _rounded(arrays.b_enc.astype(np.float64) + _encoded_b_dec(arrays), arrays.b_enc)
    return _folded(arrays, "b_dec_into_input", b_enc=b_enc_F, apply_b_dec_to_input=True)


def unit_decoder(arrays: SAEArrays, *, threshold_is_rescaled: bool = False) -> SAEArrays:
    """Decoder rows of norm 1, with n the norms of the old ones: W_enc' = n W_enc, b_enc' = n b_enc, W_dec' = W_dec / n; activations become n a.

    Right only where the selection was made on n z, or looks at each feature alone (a threshold); a top-k of z would choose other features.

    Args:
        arrays: The SAE.
        threshold_is_rescaled: Whether the threshold is one on n z already; otherwise it becomes n threshold.
    """
    norms_F = _row_norms(arrays.W_dec)
    threshold_F = arrays.threshold
    if threshold_F is not None and not threshold_is_rescaled:
        threshold_F = _rounded(threshold_F.astype(np.float64) * norms_F, threshold_F)
    return _folded(
        arrays,
        "unit_decoder",
        W_enc=_rows_scaled(arrays.W_enc, norms_F),
        b_enc=_rounded(arrays.b_enc.astype(np.float64) * norms_F, arrays.b_enc),
        W_dec=_rows_scaled(arrays.W_dec, 1 / norms_F),
        threshold=threshold_F,
    )


def input_scale(arrays: SAEArrays, scale_in: float, scale_out: float | None = None) -> SAEArrays:
    """For an SAE trained on s x that should see x, activations kept: W_enc' = s_in W_enc, W_dec' = W_dec / s_out, b_dec' = b_dec / s_out.

    Args:
        arrays: The SAE; one whose encoder sees x - b_dec has the same scale on both sides.
        scale_in: s of the input.
        scale_out: s of the reconstruction; the same by default.
    """
    scale_out = scale_in if scale_out is None else scale_out
    if arrays.apply_b_dec_to_input and scale_in != scale_out:
        raise ValueError("an encoder that sees x - b_dec needs one scale for both sides; take b_dec out of the input first")
    return _folded(
        arrays,
        "input_scale",
        W_enc=_rows_scaled(arrays.W_enc, np.full(arrays.num_features, scale_in)),
        W_dec=_rows_scaled(arrays.W_dec, np.full(arrays.num_features, 1 / scale_out)),
        b_dec=_rounded(arrays.b_dec.astype(np.float64) / scale_out, arrays.b_dec),
    )


def input_scale_into_biases(arrays: SAEArrays, scale: float) -> SAEArrays:
    """For an SAE trained on s x that should see x, matrices kept: biases and threshold are divided by s; activations become a / s.

    Args:
        arrays: The SAE.
        scale: s; where a library records the mean norm that it divided by, s is one over it.
    """
    vectors = {"b_enc": arrays.b_enc, "b_dec": arrays.b_dec, "threshold": arrays.threshold}
    changed = {name: None if array is None else _rounded(array.astype(np.float64) / scale, array) for name, array in vectors.items()}
    return _folded(arrays, "input_scale_into_biases", **changed)


def gate_to_threshold(
    arrays: SAEArrays,
    gate_bias_F: Shaped[np.ndarray, " F"],
    mag_bias_F: Shaped[np.ndarray, " F"],
    log_mag_scale_F: Shaped[np.ndarray, " F"],
) -> SAEArrays:
    """A gated SAE as a jumprelu one with the same support: with r = exp(log_mag_scale), W_enc' = r W_enc, b_enc' = mag_bias and
    threshold = max(0, mag_bias - r gate_bias).

    Args:
        arrays: The SAE; its b_enc and threshold are not looked at.
        gate_bias_F: A feature is on where u + gate_bias > 0, u being the encoder's product.
        mag_bias_F: Its magnitude is relu(r u + mag_bias).
        log_mag_scale_F: log r.
    """  # noqa: D205
    scale_F = np.exp(log_mag_scale_F.astype(np.float64))
    threshold_F = np.maximum(0, mag_bias_F.astype(np.float64) - scale_F * gate_bias_F.astype(np.float64))
    W_enc_FD = _rows_scaled(arrays.W_enc, scale_F)
    return _folded(
        arrays, "gate_to_threshold", W_enc=W_enc_FD, b_enc=mag_bias_F, threshold=_rounded(threshold_F, mag_bias_F), activation="jumprelu"
    )


def _folded(arrays: SAEArrays, name: str, **changes: Any) -> SAEArrays:
    folded = dataclasses.replace(arrays, **changes)
    unit = {"unit_norm_decoder": True} if name == "unit_decoder" else {"unit_norm_decoder": False} if name == "input_scale" else {}
    return dataclasses.replace(folded, metadata={**arrays.metadata, **unit, "folds": [*arrays.metadata.get("folds", []), name]})


def _rounded(values: np.ndarray, like: np.ndarray) -> np.ndarray:
    """float64 values in float32, or in the type of `like` where that is wider: a fold in bfloat16 would be lost to rounding."""
    return values.astype(np.promote_types(like.dtype, np.float32))


def _encoded_b_dec(arrays: SAEArrays) -> Shaped[np.ndarray, " F"]:
    b_dec_D = arrays.b_dec.astype(np.float64)
    return np.concatenate([arrays.W_enc[block].astype(np.float64) @ b_dec_D for block in row_blocks(arrays.W_enc)])


def _row_norms(W_dec_FD: Shaped[np.ndarray, "F D"]) -> Shaped[np.ndarray, " F"]:
    norms = [np.linalg.norm(W_dec_FD[block].astype(np.float64), axis=1) for block in row_blocks(W_dec_FD)]
    return np.maximum(np.concatenate(norms), _SMALLEST_NORM)


def _rows_scaled(matrix_FD: Shaped[np.ndarray, "F D"], scale_F: Shaped[np.ndarray, " F"]) -> Shaped[np.ndarray, "F D"]:
    scaled = np.empty(matrix_FD.shape, np.promote_types(matrix_FD.dtype, np.float32))
    for block in row_blocks(matrix_FD):
        scaled[block] = matrix_FD[block].astype(np.float64) * scale_F[block, None]
    return scaled
