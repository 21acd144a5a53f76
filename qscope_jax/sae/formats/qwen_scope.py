"""The released Qwen-Scope layout: one `layer{n}.sae.pt` a layer, k and width in the repository's name.

Source: the Qwen-Scope model cards and report (arXiv 2605.11887, section 2). The files hold W_dec as [D, F]; here it is [F, D] everywhere.
Dimensions: F SAE features, D model width.
"""

import os
import re
from dataclasses import dataclass
from pathlib import PurePath

import numpy as np
from jaxtyping import Shaped

from qscope_jax.data.hub import Source
from qscope_jax.errors import ArchitectureError, InputError, ShapeError, SourceError
from qscope_jax.sae.arrays import SAEArrays, check_floating, decoder_rows_are_unit, row_blocks
from qscope_jax.sae.formats.source_files import source_files
from qscope_jax.sae.formats.torch_file import read_torch_file, write_torch_file

_NAME = re.compile(r"SAE-Res-(.+)-W([1-9]\d{0,5})K-L0_([1-9]\d{0,5})", re.ASCII)
_FILE = re.compile(r"layer(0|[1-9]\d{0,3})\.sae\.pt", re.ASCII)

KEYS = frozenset({"W_enc", "W_dec", "b_enc", "b_dec"})
"""The tensors of a layer file, no more and no fewer."""


@dataclass(frozen=True)
class ReleaseName:
    """What a Qwen-Scope repository name says.

    Attributes:
        backbone: The model, such as `Qwen3-1.7B-Base`.
        num_features: Width F of the SAE.
        k: Active features a token.
    """

    backbone: str
    num_features: int
    k: int

    @classmethod
    def parse(cls, name: str | os.PathLike[str]) -> "ReleaseName | None":
        """Read `SAE-Res-<backbone>-W<F / 1024>K-L0_<k>`, the last component of a path or hub id; None where it is something else.

        A snapshot folder of the Hugging Face cache counts as the repository that it belongs to.
        """
        path = PurePath(name)
        last = path.name
        if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
            last = path.parent.parent.name.split("--")[-1]
        match = _NAME.fullmatch(last)
        return cls(match[1], 1024 * int(match[2]), int(match[3])) if match else None


@dataclass(frozen=True)
class Release:
    """One released group of SAEs, one SAE for each layer of the backbone.

    Attributes:
        repository: Hub id.
        backbone: The model it was trained on.
        d_model: Model width D.
        num_features: SAE width F.
        k: Active features a token.
        num_layers: Number of layers; files count from 0.
    """

    repository: str
    backbone: str
    d_model: int
    num_features: int
    k: int
    num_layers: int


def _release(name: str, d_model: int, num_layers: int) -> Release:
    match = _NAME.fullmatch(name)
    assert match is not None
    return Release(f"Qwen/{name}", match[1], d_model, 1024 * int(match[2]), int(match[3]), num_layers)


RELEASES: tuple[Release, ...] = (
    _release("SAE-Res-Qwen3-1.7B-Base-W32K-L0_50", 2048, 28),
    _release("SAE-Res-Qwen3-1.7B-Base-W32K-L0_100", 2048, 28),
    _release("SAE-Res-Qwen3-8B-Base-W64K-L0_50", 4096, 36),
    _release("SAE-Res-Qwen3-8B-Base-W64K-L0_100", 4096, 36),
    _release("SAE-Res-Qwen3.5-2B-Base-W32K-L0_50", 2048, 24),
    _release("SAE-Res-Qwen3.5-2B-Base-W32K-L0_100", 2048, 24),
    _release("SAE-Res-Qwen3.5-9B-Base-W64K-L0_50", 4096, 32),
    _release("SAE-Res-Qwen3.5-9B-Base-W64K-L0_100", 4096, 32),
    _release("SAE-Res-Qwen3.5-27B-W80K-L0_50", 5120, 64),
    _release("SAE-Res-Qwen3.5-27B-W80K-L0_100", 5120, 64),
    _release("SAE-Res-Qwen3-30B-A3B-Base-W32K-L0_50", 2048, 48),
    _release("SAE-Res-Qwen3-30B-A3B-Base-W128K-L0_100", 2048, 48),
    _release("SAE-Res-Qwen3.5-35B-A3B-Base-W32K-L0_50", 2048, 40),
    _release("SAE-Res-Qwen3.5-35B-A3B-Base-W128K-L0_100", 2048, 40),
)
"""The 14 released groups (model cards): 544 SAEs."""


def list_layers(source: Source) -> list[int]:
    """Layers that a source holds, 0-based and sorted; empty where it is not of this layout.

    A local folder is listed, a released repository is known, any other repository is asked for its files.

    Raises:
        SourceError: the hub cannot be reached, or does not have the repository.
    """
    if source.folder is None:
        for release in RELEASES:
            if release.repository == source.name:
                return list(range(release.num_layers))
    return sorted(int(match[1]) for file in source_files(source) if (match := _FILE.fullmatch(file)))


def file_layer(path: str | os.PathLike[str]) -> int | None:
    """The layer that a file named `layer{n}.sae.pt` holds; None for any other name."""
    match = _FILE.fullmatch(PurePath(path).name)
    return int(match[1]) if match else None


def read_layer(source: Source, layer: int, *, k: int | None = None) -> SAEArrays:
    """Read one layer of a folder or repository; a hub file is downloaded now, the others are left alone.

    Args:
        source: The folder or repository.
        layer: 0-based layer.
        k: Active features a token; needed where the name does not say, and wins over the name.

    Returns:
        W_enc, b_enc and b_dec as read-only views of the mapped file; W_dec [F, D] as a transposed, contiguous copy.

    Raises:
        InputError: k is neither given nor in the name, or out of range.
        ShapeError: the tensors disagree with each other or with the width in the name.
        SourceError: the file is missing, damaged or hostile, lacks or adds a tensor, or holds NaN or infinity.
    """
    return read_file(source.path(f"layer{layer}.sae.pt"), layer=layer, k=k, name=release_of(source), origin=source.name)


def read_file(
    path: str | os.PathLike[str],
    *,
    layer: int | None,
    k: int | None = None,
    name: ReleaseName | None = None,
    origin: str | None = None,
) -> SAEArrays:
    """Read one `.sae.pt` file wherever it lies.

    Args:
        path: The file.
        layer: 0-based layer, for the metadata; None where unknown.
        k: Active features a token; needed where `name` is None.
        name: What the folder's or repository's name says.
        origin: What to record as the source; the path by default.

    Raises:
        InputError, ShapeError, SourceError: as `read_layer`.
    """
    where = str(path)
    if k is None and name is None:
        raise InputError(f"{where}: k (active features a token) is not stored in the file and its folder is not named ...-L0_<k>; give k")
    tensors = read_torch_file(path)
    if set(tensors) != KEYS:
        raise SourceError(f"{where}: holds the tensors {', '.join(tensors) or 'none'}; a Qwen-Scope file has exactly {', '.join(sorted(KEYS))}")
    _check_shapes(tensors, name, where)
    for key, array in tensors.items():
        check_floating(key, array, where)
    W_dec_FD = _transposed(tensors["W_dec"])
    arrays = SAEArrays(
        W_enc=tensors["W_enc"],
        W_dec=W_dec_FD,
        b_enc=tensors["b_enc"],
        b_dec=tensors["b_dec"],
        k=k if k is not None else name.k if name else 0,
        metadata={
            "format": "qwen_scope",
            "source": origin or where,
            "model_name": None if name is None else _model_name(name),
            "layer": layer,
            "hook_name": None if layer is None else f"blocks.{layer}.hook_resid_post",
            "dtype": tensors["W_enc"].dtype.name,
            "unit_norm_decoder": decoder_rows_are_unit(W_dec_FD),
            "folds": [],
        },
    )
    arrays.validate(where)
    return arrays


def write_layer(path: str | os.PathLike[str], arrays: SAEArrays) -> None:
    """Write one layer exactly as released: float32, W_dec as [D, F]; the reverse of `read_layer` to the bit.

    The file does not hold k: name it `layer{n}.sae.pt` inside a folder whose name ends in `-W<F / 1024>K-L0_<k>`.

    Raises:
        ArchitectureError: the SAE is not a plain top-k one (a threshold, another activation, b_dec subtracted from the input).
        InputError: the tensors are wider than float32.
        ShapeError: the tensors disagree with each other.
        SourceError: the tensors hold NaN or infinity, or the file cannot be written.
    """
    where = str(path)
    arrays.validate(where)
    if arrays.activation != "topk" or arrays.apply_b_dec_to_input or arrays.threshold is not None:
        raise ArchitectureError(
            f"{where}: the Qwen-Scope format holds plain top-k SAEs only, this one has activation {arrays.activation}, "
            f"apply_b_dec_to_input {arrays.apply_b_dec_to_input}, {'no' if arrays.threshold is None else 'a'} threshold; convert it first"
        )
    tensors = {**arrays.tensors(), "W_dec": arrays.W_dec.T}
    for key, array in tensors.items():
        check_floating(key, array, where)
        if array.dtype == np.float64:
            raise InputError(f"{where}: {key} is float64, the Qwen-Scope format holds float32; round it first if you accept the loss")
    write_torch_file(path, {key: array.astype(np.float32, copy=False) for key, array in tensors.items()})


def release_of(source: Source) -> ReleaseName | None:
    """What the name of a source says: as written, or, for a folder given as `.` or through a link, as resolved."""
    return ReleaseName.parse(source.name) or (ReleaseName.parse(source.folder.resolve()) if source.folder is not None else None)


def _model_name(name: ReleaseName) -> str:
    released = any(name.backbone == release.backbone for release in RELEASES)
    return f"Qwen/{name.backbone}" if released else name.backbone


def _check_shapes(tensors: dict[str, np.ndarray], name: ReleaseName | None, where: str) -> None:
    F, D = tensors["W_enc"].shape if tensors["W_enc"].ndim == 2 else (0, 0)
    expected = {"W_enc": (F, D), "W_dec": (D, F), "b_enc": (F,), "b_dec": (D,)}
    shapes = {key: tensors[key].shape for key in expected}
    if shapes != expected or 0 in (F, D):
        found = ", ".join(f"{key} {shape}" for key, shape in shapes.items())
        raise ShapeError(f"{where}: found {found}; expected W_enc [F, D], W_dec [D, F], b_enc [F], b_dec [D]")
    if name is not None and name.num_features != F:
        raise ShapeError(f"{where}: holds {F} features, its folder's name says {name.num_features} (W{name.num_features // 1024}K)")


def _transposed(W_dec_DF: Shaped[np.ndarray, "D F"]) -> Shaped[np.ndarray, "F D"]:
    """The decoder with one row a feature: copied in blocks of rows, unless the file happens to hold it that way round."""
    if W_dec_DF.T.flags.c_contiguous:
        return W_dec_DF.T
    W_dec_FD = np.empty(W_dec_DF.shape[::-1], W_dec_DF.dtype)
    for block in row_blocks(W_dec_DF):
        W_dec_FD[:, block] = W_dec_DF[block].T
    return W_dec_FD
