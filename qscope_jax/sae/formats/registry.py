"""Any SAE on disk or on the hub -> `SAEArrays`: recognise the format, pick the layer, read it.

Read here: Qwen-Scope (folders, repositories, single files) and our own format. Other formats are recognised and named in the error.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from qscope_jax.data.hub import Source, open_source
from qscope_jax.errors import ArchitectureError, InputError, SourceError
from qscope_jax.sae import qwen_scope, safetensors_format
from qscope_jax.sae.arrays import SAEArrays
from qscope_jax.sae.foreign_formats import foreign_folder, foreign_tensors
from qscope_jax.sae.formats.source_files import source_files
from qscope_jax.sae.formats.torch_file import torch_file_kinds

_SUPPORTED = "Qwen-Scope (layer<n>.sae.pt) and qscope_jax (sae.json with layer<n>.safetensors)"
_FOREIGN_SUFFIXES = {".npz": "Gemma Scope"}


def read_sae_arrays(name: str | Path, layer: int | None, *, k: int | None = None, revision: str | None = None) -> SAEArrays:
    """Read one layer of an SAE, in whichever format it is.

    Args:
        name: A folder, a file, or a hub id `owner/repository`.
        layer: 0-based layer; None where the source holds exactly one.
        k: Active features a token: needed where the source does not say, and wins where it does.
        revision: Branch, tag or commit on the hub.

    Returns:
        The arrays, mapped from disk where the format allows it.

    Raises:
        InputError: the source has no such layer, holds several and `layer` is None, or k is missing or out of range.
        ArchitectureError: the format is recognised and not supported, or its settings are not.
        ShapeError: the tensors disagree with each other, with the name or with the config.
        SourceError: nothing is there, or it is damaged, hostile or not recognised.
    """
    opened = _open(name, revision)
    if layer is None and len(opened.layers) != 1:
        raise InputError(f"{name}: holds {len(opened.layers)} layers ({_ranges(opened.layers)}); say which with layer")
    if layer is not None and layer not in opened.layers and not opened.unnumbered:
        raise InputError(f"{name}: has no layer {layer}; it holds {_ranges(opened.layers)} (layers count from 0)")
    return opened.read(opened.layers[0] if layer is None else layer, k)


def list_sae_layers(name: str | Path, revision: str | None = None) -> list[int]:
    """Layers that a source holds, 0-based and sorted; no layer is downloaded.

    Args:
        name: A folder, a file, or a hub id `owner/repository`.
        revision: Branch, tag or commit on the hub.

    Raises:
        InputError: `name` is a single file and its name does not say which layer it holds.
        ArchitectureError, SourceError: as `read_sae_arrays`.
    """
    opened = _open(name, revision)
    if opened.unnumbered:
        raise InputError(f"{name}: is a single file whose name does not say which layer it holds; call it layer<n>.sae.pt")
    return [layer for layer in opened.layers if layer is not None]


@dataclass(frozen=True)
class _Opened:
    """A recognised source. `read` takes a layer and an optional k; a single file of unknown layer has `layers == [None]`."""

    layers: Sequence[int | None]
    read: Callable[[int | None, int | None], SAEArrays]

    @property
    def unnumbered(self) -> bool:
        return None in self.layers


def _open(name: str | Path, revision: str | None) -> _Opened:
    path = Path(name).expanduser()
    if path.is_file():
        return _open_file(path)
    source = open_source(name, revision)
    if source.folder is None and qwen_scope.ReleaseName.parse(source.name):
        return _qwen_scope(source)  # decided by the name alone, so that a cached layer can be read offline
    if source.has(safetensors_format.CONFIG_FILE):
        return _ours(source)
    files = source_files(source)
    if any(qwen_scope.file_layer(file) is not None for file in files if "/" not in file):
        return _qwen_scope(source)
    if foreign := foreign_folder(source, files):
        raise _unsupported(source.name, foreign)
    raise SourceError(f"{source.name}: is not recognised as an SAE ({len(files)} files, none that tells); expected {_SUPPORTED}")


def _open_file(path: Path) -> _Opened:
    if path.suffix == ".safetensors":
        folder = open_source(path.absolute().parent)
        if folder.has(safetensors_format.CONFIG_FILE):
            named = [layer for layer in safetensors_format.list_layers(folder) if path.name == f"layer{layer}.safetensors"]
            if named:
                return dataclasses.replace(_ours(folder), layers=named)
        keys: list[str] = _safetensors_names(path)
    elif path.suffix in _FOREIGN_SUFFIXES:
        raise _unsupported(str(path), _FOREIGN_SUFFIXES[path.suffix])
    else:
        keys = list(torch_file_kinds(path))
        if set(keys) == qwen_scope.KEYS:
            release = qwen_scope.ReleaseName.parse(path.absolute().parent)
            return _Opened(
                [qwen_scope.file_layer(path)],
                lambda layer, k: qwen_scope.read_file(path, layer=layer, k=k, name=release),
            )
    if foreign := foreign_tensors(keys):
        raise _unsupported(str(path), foreign)
    raise SourceError(f"{path}: is not recognised as an SAE, it holds {', '.join(keys[:10]) or 'no tensors'}; expected {_SUPPORTED}")


def _qwen_scope(source: Source) -> _Opened:
    return _Opened(qwen_scope.list_layers(source), lambda layer, k: qwen_scope.read_layer(source, _known(layer), k=k))


def _ours(source: Source) -> _Opened:
    def read(layer: int | None, k: int | None) -> SAEArrays:
        arrays = safetensors_format.read_layer(source, _known(layer))
        if k is None:
            return arrays
        changed = dataclasses.replace(arrays, k=k)
        changed.validate(source.name)
        return changed

    return _Opened(safetensors_format.list_layers(source), read)


def _known(layer: int | None) -> int:
    if layer is None:
        raise InputError("layer is None; give the 0-based layer to read")
    return layer


def _unsupported(name: str, format_name: str) -> ArchitectureError:
    return ArchitectureError(f"{name}: is in the format of {format_name}, which is recognised but not read; the formats read are {_SUPPORTED}")


def _safetensors_names(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="numpy") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise SourceError(f"{path}: is not a valid safetensors file ({error}); it is truncated or damaged, write or download it again") from error


def _ranges(layers: Sequence[int | None]) -> str:
    """Layers as people write them: 0-3, 7."""
    known = sorted(layer for layer in layers if layer is not None)
    starts = [layer for layer in known if layer - 1 not in known]
    ends = [layer for layer in known if layer + 1 not in known]
    return ", ".join(str(start) if start == end else f"{start}-{end}" for start, end in zip(starts, ends, strict=True)) or "none"
