"""Any SAE on disk or on the hub -> `SAEArrays`: recognise the format, pick the layer, read it.

A source is one SAE, or a collection of them in folders; it is told by its files, a single file by the names of its tensors. One table says
which files belong to which format and who reads them, another names what is recognised and not read.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qscope_jax.data.files import read_json
from qscope_jax.data.hub import Source, open_source
from qscope_jax.errors import ArchitectureError, InputError, QscopeError, SourceError
from qscope_jax.sae.arrays import SAEArrays
from qscope_jax.sae.formats import dictionary_learning, gemma_scope, llama_scope, own_format, qwen_scope, sae_lens, sparsify
from qscope_jax.sae.formats.layout import Given
from qscope_jax.sae.formats.single_file import read_single_file
from qscope_jax.sae.formats.source_files import source_files

Files = Collection[str]


@dataclass(frozen=True)
class FolderFormat:
    """A format with one folder for each SAE.

    Attributes:
        name: What to call it.
        marker: The file that every SAE has, relative to its folder.
        beside: Files of which one must lie beside it; empty where there need be none.
        config_says: Whether the folder's `config.json`, if any, agrees.
        read: Reads an SAE from the source (folder or repository), the SAE's folder inside it (with a final `/`, or nothing), and what the
            caller says. Beside what its own docstring names, it raises a QscopeError where files are damaged or do not fit each other.
        layer_of: The layer that the folder's name or config states.
    """

    name: str
    marker: str
    beside: tuple[str, ...]
    config_says: Callable[[Mapping[str, object]], bool]
    read: Callable[[Source, str, Given], SAEArrays]
    layer_of: Callable[[Source, str], int | None]


def _any(config: Mapping[str, object]) -> bool:
    return True


def _is_llamascopium(config: Mapping[str, object]) -> bool:
    return "sae_type" in config or "act_fn" in config


FOLDER_FORMATS: tuple[FolderFormat, ...] = (
    FolderFormat("SAELens", sae_lens.WEIGHTS_FILE, (sae_lens.CONFIG_FILE,), _any, sae_lens.read_folder, sae_lens.layer_of),
    FolderFormat("sparsify", sparsify.WEIGHTS_FILE, (sparsify.CONFIG_FILE,), _any, sparsify.read_folder, sparsify.layer_of),
    FolderFormat("dictionary_learning", dictionary_learning.WEIGHTS_FILE, (), _any, dictionary_learning.read_folder, dictionary_learning.layer_of),
    FolderFormat("Gemma Scope", gemma_scope.WEIGHTS_FILE, (), _any, gemma_scope.read_folder, gemma_scope.layer_of),
    FolderFormat("Gemma Scope 2", gemma_scope.WEIGHTS_FILE_2, (), _any, gemma_scope.read_folder_2, gemma_scope.layer_of),
    FolderFormat("Llama Scope", llama_scope.FINAL_FILE, (llama_scope.PARAMETERS_FILE,), _any, llama_scope.read_folder, llama_scope.layer_of),
    FolderFormat(
        "Llamascopium",
        llama_scope.WEIGHTS_FILE,
        (llama_scope.CONFIG_FILE,),
        _is_llamascopium,
        llama_scope.read_folder_llamascopium,
        llama_scope.layer_of,
    ),
    FolderFormat(
        "Llama Scope R1",
        llama_scope.WEIGHTS_FILE,
        (llama_scope.CONFIG_FILE,),
        lambda config: not _is_llamascopium(config),
        llama_scope.read_folder_r1,
        llama_scope.layer_of,
    ),
)

READ = "Qwen-Scope, qscope_jax, " + ", ".join(known.name for known in FOLDER_FORMATS) + ", Goodfire and DeepSeek-R1-Distill"
"""The formats that are read, for messages."""

_REFUSED = {
    "weights.safetensors": ("the zactheaipm/qwenscope format", "its authors do not say whether the encoder sees x or x - pre_bias"),
    ".metadata": ("a Llamascopium .dcp checkpoint", "it is split over processes; save it as sae_weights.safetensors with Llamascopium"),
}


def read_sae_arrays(
    name: str | Path,
    layer: int | None,
    *,
    k: int | None = None,
    activation: str | None = None,
    input_norm: float | None = None,
    revision: str | None = None,
) -> SAEArrays:
    """Read one layer of an SAE, in whichever format it is.

    Args:
        name: A folder, a file, a hub id `owner/repository`, or a folder of a repository, `owner/repository/folder`.
        layer: 0-based layer; None where the source holds exactly one.
        k: Active features a token: needed where the source does not say, and wins where it does. For an SAE with thresholds, the most kept.
        activation: `topk` or `batch_topk`, where a file fits both.
        input_norm: Mean norm of the activations that the SAE was trained on, where the format scales by it and does not store it.
        revision: Branch, tag or commit on the hub.

    Returns:
        The arrays, mapped from disk where the format allows it.

    Raises:
        InputError: the source has no such layer, holds several and `layer` is None, or k or another argument is missing or out of range.
        ArchitectureError: the format, or its kind of SAE, is recognised and not supported.
        ShapeError: the tensors disagree with each other, with the name or with the config.
        SourceError: nothing is there, or it is damaged, hostile or not recognised.
    """
    if activation not in (None, "topk", "batch_topk"):
        raise InputError(f"activation is {activation!r}, expected topk or batch_topk")
    opened = _open(name, revision)
    if layer is None and len(opened.layers) != 1:
        raise InputError(f"{name}: holds {len(opened.layers)} layers ({_ranges(opened.layers)}); say which with layer")
    if layer is not None and layer not in opened.layers and not opened.unnumbered:
        raise InputError(f"{name}: has no layer {layer}; it holds {_ranges(opened.layers)} (layers count from 0)")
    arrays = opened.read(opened.layers[0] if layer is None else layer, Given(k, activation, input_norm))
    if layer is None or arrays.metadata.get("layer") is not None:
        return arrays
    hook_name = arrays.metadata.get("hook_name") or f"blocks.{layer}.hook_resid_post"
    return dataclasses.replace(arrays, metadata={**arrays.metadata, "layer": layer, "hook_name": hook_name})


def list_sae_layers(name: str | Path, revision: str | None = None) -> list[int]:
    """Layers that a source holds, 0-based and sorted; no weights are downloaded.

    Args:
        name: A folder, a file, a hub id `owner/repository`, or a folder of a repository.
        revision: Branch, tag or commit on the hub.

    Raises:
        InputError: `name` holds a single SAE and nothing says of which layer.
        ArchitectureError, SourceError: as `read_sae_arrays`.
    """
    opened = _open(name, revision)
    if opened.unnumbered:
        raise InputError(f"{name}: holds a single SAE, and nothing there says which layer it belongs to; pass layer, or call it layer<n>.sae.pt")
    return [layer for layer in opened.layers if layer is not None]


@dataclass(frozen=True)
class _Opened:
    """A recognised source. `read` takes a layer and what the caller says; a single SAE of unknown layer has `layers == [None]`."""

    layers: Sequence[int | None]
    read: Callable[[int | None, Given], SAEArrays]

    @property
    def unnumbered(self) -> bool:
        return None in self.layers


def _open(name: str | Path, revision: str | None) -> _Opened:
    path = Path(name).expanduser()
    if path.is_file():
        return _open_file(path)
    source, folder = _split(name, revision)
    if source.folder is None and qwen_scope.ReleaseName.parse(source.name):
        return _qwen_scope(source)  # decided by the name alone, so that a cached layer can be read offline
    if not folder and source.has(own_format.CONFIG_FILE):
        return _ours(source)
    files = [file for file in source_files(source) if file.startswith(folder)]
    if any(qwen_scope.file_layer(file) is not None for file in files if "/" not in file):
        return _qwen_scope(source)
    for known in FOLDER_FORMATS:
        if folders := _folders(source, files, known):
            return _collection(source, known, folders)
    for marker, (what, reason) in _REFUSED.items():
        if any(file.split("/")[-1] == marker for file in files):
            raise ArchitectureError(f"{source.name}: is {what}, which is not read because {reason}; the formats read are {READ}")
    raise SourceError(f"{source.name}: is not recognised as an SAE ({len(files)} files, none that tells); expected {READ}")


def _split(name: str | Path, revision: str | None) -> tuple[Source, str]:
    """The source, and the folder of the repository that a name such as `owner/repository/folder` picks."""
    parts = str(name).rstrip("/").split("/")
    if len(parts) > 2 and parts[0] not in ("", ".", "..", "~") and not Path(name).expanduser().exists():
        return open_source("/".join(parts[:2]), revision), "/".join(parts[2:]) + "/"
    return open_source(name, revision), ""


def _folders(source: Source, files: Files, known: FolderFormat) -> list[str]:
    """The folders of a source that hold an SAE of this format, each with a final `/`, or nothing for the source itself."""
    present, found = set(files), []
    for file in files:
        folder = file.removesuffix(known.marker)
        if folder == file or (folder and not folder.endswith("/")):
            continue
        if known.beside and not any(folder + other in present for other in known.beside):
            continue
        config = f"{folder}config.json"
        if known.config_says is not _any and not known.config_says(read_json(source.path(config))):
            continue
        found.append(folder)
    return found


def _collection(source: Source, known: FolderFormat, folders: Sequence[str]) -> _Opened:
    by_layer: dict[int | None, list[str]] = {}
    for folder in folders:
        by_layer.setdefault(known.layer_of(source, folder), []).append(folder)
    if None in by_layer and len(folders) > 1:
        unknown = by_layer.pop(None)
        if not by_layer:
            raise InputError(f"{source.name}: holds {len(unknown)} SAEs whose layers are not known; give one of its folders: {_some(unknown)}")

    def read(layer: int | None, given: Given) -> SAEArrays:
        chosen = by_layer[layer] if layer in by_layer else by_layer[None]
        if len(chosen) > 1:
            raise InputError(f"{source.name}: holds {len(chosen)} SAEs of layer {layer}; give the folder of one: {_some(chosen)}")
        return known.read(source, chosen[0], given)

    return _Opened(sorted(by_layer, key=lambda layer: -1 if layer is None else layer), read)


def _open_file(path: Path) -> _Opened:
    folder = open_source(path.absolute().parent)
    if path.suffix == ".safetensors" and folder.has(own_format.CONFIG_FILE):
        named = [layer for layer in own_format.list_layers(folder) if path.name == f"layer{layer}.safetensors"]
        if named:
            return dataclasses.replace(_ours(folder), layers=named)
    for known in FOLDER_FORMATS:  # a file that lies among the others of its format is read with them
        root = path.absolute().parents[known.marker.count("/")]
        if path.absolute() == root / known.marker and (known.beside or (root / "config.json").is_file()):
            source = open_source(root)
            if _folders(source, [known.marker, *(other for other in known.beside if source.has(other))], known):
                return _collection(source, known, [""])
    return _Opened([qwen_scope.file_layer(path)], lambda layer, given: read_single_file(path, layer, given, READ))


def _qwen_scope(source: Source) -> _Opened:
    return _Opened(qwen_scope.list_layers(source), lambda layer, given: qwen_scope.read_layer(source, _known(layer), k=given.k))


def _ours(source: Source) -> _Opened:
    def read(layer: int | None, given: Given) -> SAEArrays:
        arrays = own_format.read_layer(source, _known(layer))
        if given.k is None:
            return arrays
        changed = dataclasses.replace(arrays, k=given.k)
        changed.validate(source.name)
        return changed

    return _Opened(own_format.list_layers(source), read)


def holds_saes(folder: Path) -> bool:
    """Whether a folder holds SAEs in a format that is read: what an overwriting program may replace."""
    try:
        _open(folder, None)
    except QscopeError:
        return False
    return True


def _known(layer: int | None) -> int:
    if layer is None:
        raise InputError("layer is None; give the 0-based layer to read")
    return layer


def _some(folders: Sequence[str]) -> str:
    return ", ".join(folders[:4]) + (f" and {len(folders) - 4} more" if len(folders) > 4 else "")


def _ranges(layers: Sequence[int | None]) -> str:
    """Layers as people write them: 0-3, 7."""
    known = sorted(layer for layer in layers if layer is not None)
    starts = [layer for layer in known if layer - 1 not in known]
    ends = [layer for layer in known if layer + 1 not in known]
    return ", ".join(str(start) if start == end else f"{start}-{end}" for start, end in zip(starts, ends, strict=True)) or "none"
