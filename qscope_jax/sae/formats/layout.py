"""How a kind of file lays out an SAE's tensors, as data: their names, which matrices lie the other way round, and the way in and out.

Orientation follows the format's rule and is then asserted: where F = D, or in a tiny file, shapes alone do not tell.
Dimensions: F SAE features, D model width.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Shaped

from qscope_jax.errors import InputError, ShapeError, SourceError
from qscope_jax.sae.arrays import SAEArrays, check_floating, decoder_rows_are_unit, row_blocks

AXES: Mapping[str, tuple[str, ...]] = {
    "W_enc": ("F", "D"),
    "W_dec": ("F", "D"),
    "b_enc": ("F",),
    "b_dec": ("D",),
    "threshold": ("F",),
    "log_threshold": ("F",),
    "gate_bias": ("F",),
    "mag_bias": ("F",),
    "log_mag_scale": ("F",),
    "scalar_threshold": (),
    "k": (),
}
"""Our names of everything that formats store, with its axes in our orientation. Only `k` is a whole number."""


@dataclass(frozen=True)
class Layout:
    """The tensors of one kind of file.

    Attributes:
        format: What to call the kind in errors.
        names: Our name -> the file's name.
        transposed: Our names of the matrices that the file holds the other way round.
        optional: Our names of tensors that may be missing.
        ignored: The file's names of tensors that may be there and say nothing about the SAE's function.
    """

    format: str
    names: Mapping[str, str]
    transposed: frozenset[str] = frozenset()
    optional: frozenset[str] = frozenset()
    ignored: frozenset[str] = frozenset()

    def fits(self, names: Collection[str]) -> bool:
        """Whether a file with tensors of these names is of this kind."""
        found = set(names) - self.ignored
        return self._required() <= found <= set(self.names.values())

    def take(self, tensors: Mapping[str, np.ndarray], where: str) -> dict[str, np.ndarray]:
        """A file's tensors under our names and in our orientation: matrices that lie the other way round are copied, the rest stays mapped.

        Raises:
            SourceError: a tensor is missing or not expected, is not of floating-point numbers, or holds NaN or infinity.
            ShapeError: the shapes do not agree with each other.
        """
        if not self.fits(tensors):
            raise SourceError(self._misfit(tensors, where))
        found = {ours: tensors[theirs] for ours, theirs in self.names.items() if theirs in tensors}
        self._check_shapes(found, where)
        for name, array in found.items():
            if name == "k":
                _check_whole(self.names[name], array, where)
            else:
                check_floating(self.names[name], array, where)
        return {name: transposed(array) if name in self.transposed else array for name, array in found.items()}

    def put(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The reverse of `take`: arrays under the file's names and in its orientation, as views, in the order of `names`."""
        chosen = {ours: arrays[ours] for ours in self.names if ours in arrays}
        return {self.names[ours]: array.T if ours in self.transposed else array for ours, array in chosen.items()}

    def _required(self) -> set[str]:
        return {theirs for ours, theirs in self.names.items() if ours not in self.optional}

    def _misfit(self, tensors: Mapping[str, np.ndarray], where: str) -> str:
        missing = self._required() - set(tensors)
        extra = set(tensors) - set(self.names.values()) - self.ignored
        parts = [f"lacks {', '.join(sorted(missing))}"] * bool(missing) + [f"also holds {', '.join(sorted(extra)[:10])}"] * bool(extra)
        exact = "has exactly" if not self.optional else "has"
        options = sorted(self.names[name] for name in self.optional)
        allowed = f" and perhaps {', '.join(options)}" if options else ""
        return f"{where}: {' and '.join(parts)}; a {self.format} file {exact} {', '.join(sorted(self._required()))}{allowed}"

    def _check_shapes(self, found: Mapping[str, np.ndarray], where: str) -> None:
        axes = {name: AXES[name][::-1] if name in self.transposed else AXES[name] for name in found}
        W_enc = found["W_enc"]
        sizes = dict(zip(axes["W_enc"], W_enc.shape, strict=True)) if W_enc.ndim == 2 else {}
        wrong = 0 in sizes.values() or any(array.shape != tuple(sizes.get(axis, -1) for axis in axes[name]) for name, array in found.items())
        if wrong:
            shapes = ", ".join(f"{self.names[name]} {array.shape}" for name, array in found.items())
            wanted = ", ".join(f"{self.names[name]} [{', '.join(axes[name])}]" for name in found)
            raise ShapeError(f"{where}: found {shapes}; expected {wanted}, none empty")


@dataclass(frozen=True)
class Given:
    """What the caller says because the files do not.

    Attributes:
        k: Active features a token; wins over what the files say.
        activation: `topk` or `batch_topk`, where a file fits both.
        input_norm: Mean norm of the activations that the SAE was trained on, where a format scales its input by it.
    """

    k: int | None = None
    activation: str | None = None
    input_norm: float | None = None


@dataclass(frozen=True)
class Provenance:
    """What goes beside the tensors; see `SAEArrays.metadata`.

    Attributes:
        format: Name of the format.
        source: What the user named.
        layer: 0-based layer, where it is known.
        model_name: The model, where it is known.
        hook_name: The place in the model, where it is known.
        more: Anything else that the format records and its writer can put back.
    """

    format: str
    source: str
    layer: int | None = None
    model_name: str | None = None
    hook_name: str | None = None
    more: Mapping[str, Any] = field(default_factory=dict)

    def metadata(self, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """The metadata of an SAE that was just read; whether its decoder rows have unit norm is measured."""
        hook_name = f"blocks.{self.layer}.hook_resid_post" if self.hook_name is None and self.layer is not None else self.hook_name
        return {
            "format": self.format,
            "source": self.source,
            "model_name": self.model_name,
            "layer": self.layer,
            "hook_name": hook_name,
            "dtype": tensors["W_enc"].dtype.name,
            "unit_norm_decoder": decoder_rows_are_unit(tensors["W_dec"]),
            "folds": [],
            **self.more,
        }


def top_k_arrays(tensors: Mapping[str, np.ndarray], k: int | None, flag: bool, origin: Provenance, where: str) -> SAEArrays:
    """A top-k SAE from tensors under our names.

    Args:
        tensors: The four tensors; others are left out.
        k: Active features a token.
        flag: Whether the encoder sees x - b_dec.
        origin: Where it comes from.
        where: What to call it in errors.

    Raises:
        InputError: k is missing or out of range.
    """
    if k is None:
        raise InputError(f"{where}: k (active features a token) is not stored with the tensors; give k")
    return _checked(SAEArrays(*_four(tensors), k, "topk", flag, None, origin.metadata(tensors)), where)


def threshold_arrays(
    tensors: Mapping[str, np.ndarray], threshold_F: np.ndarray, given: Given, flag: bool, origin: Provenance, where: str
) -> SAEArrays:
    """A jumprelu SAE from tensors under our names; k, the slots of a code, is 0 where the caller gives none.

    Args:
        tensors: The four tensors; others are left out.
        threshold_F: A feature is active when its pre-activation is greater.
        given: What the caller says.
        flag: Whether the encoder sees x - b_dec.
        origin: Where it comes from.
        where: What to call it in errors.

    Raises:
        InputError: k is out of range.
    """
    return _checked(SAEArrays(*_four(tensors), given.k or 0, "jumprelu", flag, threshold_F, origin.metadata(tensors)), where)


def transposed(matrix: Shaped[np.ndarray, "A B"]) -> Shaped[np.ndarray, "B A"]:
    """The matrix the other way round: copied in blocks of rows, unless the file happens to hold it that way."""
    if matrix.T.flags.c_contiguous:
        return matrix.T
    turned = np.empty(matrix.shape[::-1], matrix.dtype)
    for block in row_blocks(matrix):
        turned[:, block] = matrix[block].T
    return turned


def _four(tensors: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    return tensors["W_enc"], tensors["W_dec"], tensors["b_enc"], tensors["b_dec"]


def _checked(arrays: SAEArrays, where: str) -> SAEArrays:
    arrays.validate(where)
    return arrays


def _check_whole(name: str, array: np.ndarray, where: str) -> None:
    if array.dtype.kind not in "iu":
        raise SourceError(f"{where}: tensor {name} is {array.dtype}, expected a whole number; the file is not an SAE of the expected kind")
