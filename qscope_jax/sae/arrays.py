"""The tensors of one sparse autoencoder on the host, whatever format they came from, and the checks that every reader makes.

Dimensions: F SAE features, D model width.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

from qscope_jax.errors import ArchitectureError, InputError, ShapeError, SourceError

ACTIVATIONS = ("topk", "batch_topk", "jumprelu")
"""Activation functions of a sparse autoencoder; the last two need a threshold."""

FLOAT_DTYPES = (np.dtype("<f8"), np.dtype("<f4"), np.dtype("<f2"), np.dtype(ml_dtypes.bfloat16))
"""Element types that SAE tensors may have on disk."""

_BLOCK_BYTES = 1 << 24
_UNIT_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class SAEArrays:
    """One sparse autoencoder as numpy arrays, possibly views of a mapped file.

    Attributes:
        W_enc: [F, D]; row f is the encoder vector of feature f.
        W_dec: [F, D]; row f is the direction of feature f.
        b_enc: [F].
        b_dec: [D].
        k: Active features a token; 0 where the activation has none.
        activation: One of `ACTIVATIONS`.
        apply_b_dec_to_input: Whether the encoder sees x - b_dec instead of x.
        threshold: [F], for batch_topk and jumprelu; a feature is active when its pre-activation is greater.
        metadata: What is known and never guessed: `format`, `source`, `model_name`, `layer`, `hook_name`, `dtype` (as read), `unit_norm_decoder`
            (measured), `folds` (names of the folds applied, in order).
    """

    W_enc: np.ndarray
    W_dec: np.ndarray
    b_enc: np.ndarray
    b_dec: np.ndarray
    k: int
    activation: str = "topk"
    apply_b_dec_to_input: bool = False
    threshold: np.ndarray | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def num_features(self) -> int:
        """F."""
        return self.W_enc.shape[0]

    @property
    def d_model(self) -> int:
        """D."""
        return self.W_enc.shape[1]

    def tensors(self) -> dict[str, np.ndarray]:
        """The arrays by name; `threshold` only where there is one."""
        named = {"W_enc": self.W_enc, "W_dec": self.W_dec, "b_enc": self.b_enc, "b_dec": self.b_dec}
        return named if self.threshold is None else {**named, "threshold": self.threshold}

    def validate(self, where: str) -> None:
        """Check that the arrays fit each other and the settings.

        Args:
            where: What to call this SAE in errors.

        Raises:
            ShapeError: an array does not have the shape that W_enc's [F, D] demands, or a needed threshold is missing.
            ArchitectureError: the activation is unknown.
            InputError: k is out of range.
        """
        if self.W_enc.ndim != 2 or 0 in self.W_enc.shape:
            raise ShapeError(f"{where}: W_enc has shape {self.W_enc.shape}, expected [F, D] with neither empty")
        F, D = self.W_enc.shape
        expected = {"W_enc": (F, D), "W_dec": (F, D), "b_enc": (F,), "b_dec": (D,), "threshold": (F,)}
        for name, array in self.tensors().items():
            if array.shape != expected[name]:
                raise ShapeError(f"{where}: {name} has shape {array.shape}, expected {expected[name]} because W_enc is [F={F}, D={D}]")
        if self.activation not in ACTIVATIONS:
            raise ArchitectureError(f"{where}: activation {self.activation!r} is not known; expected one of {', '.join(ACTIVATIONS)}")
        if self.activation != "topk" and self.threshold is None:
            raise ShapeError(f"{where}: activation {self.activation} needs a threshold of shape [F={F}], there is none")
        if not (1 if self.activation == "topk" else 0) <= self.k <= F:
            raise InputError(f"{where}: k is {self.k}, expected 1 to {F} (the number of features)")


def check_floating(name: str, array: np.ndarray, where: str) -> None:
    """Check that a tensor holds floating-point numbers, all of them finite; reads it once, in blocks.

    Raises:
        SourceError: the element type is not one of `FLOAT_DTYPES`, or there is a NaN or an infinity.
    """
    if array.dtype not in FLOAT_DTYPES:
        raise SourceError(f"{where}: tensor {name} is {array.dtype}, expected floating-point numbers; the file is not an SAE of the expected kind")
    rows = np.atleast_1d(array)
    for block in row_blocks(rows):
        if not np.isfinite(rows[block]).all():
            raise SourceError(f"{where}: tensor {name} holds NaN or infinite values; the file is damaged or its training diverged")


def decoder_rows_are_unit(W_dec_FD: np.ndarray) -> bool:
    """Whether every row of the decoder has Euclidean norm 1 (within 0.1 %), measured in blocks."""
    for block in row_blocks(W_dec_FD):
        rows = W_dec_FD[block].astype(np.float32, copy=False)
        norms_F = np.sqrt(np.einsum("fd,fd->f", rows, rows))
        if np.abs(norms_F - 1).max() > _UNIT_TOLERANCE:
            return False
    return True


def row_blocks(array: np.ndarray) -> Iterator[slice]:
    """Slices of the leading axis that cover `array` in pieces of about 16 MiB, so that work on it never doubles memory."""
    if array.size == 0:
        return
    step = max(1, _BLOCK_BYTES * len(array) // array.nbytes)
    for start in range(0, len(array), step):
        yield slice(start, start + step)
