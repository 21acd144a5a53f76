"""Our own format: a folder with one `layer{n}.safetensors` a layer and one `sae.json` that says what the tensors mean.

Each file holds W_enc [F, D], W_dec [F, D], b_enc [F], b_dec [D] and, where there is one, threshold [F], in any floating-point type.
`sae.json` holds what all layers share (k, activation, flags, sizes), the list of layers, and the metadata of each.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from qscope_jax.data.files import atomic_path, read_json, write_json
from qscope_jax.data.hub import Source
from qscope_jax.errors import ArchitectureError, InputError, ShapeError, SourceError
from qscope_jax.sae.arrays import SAEArrays, check_floating

CONFIG_FILE = "sae.json"
"""The file that makes a folder one of ours."""

FORMAT = "qscope_jax"
VERSION = 1

_REQUIRED = {"W_enc", "W_dec", "b_enc", "b_dec"}
_SHARED = {"k": int, "activation": str, "apply_b_dec_to_input": bool, "num_features": int, "d_model": int}
_MAX_HEADER_BYTES = 100_000_000
_DTYPES = {"F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}


def list_layers(source: Source) -> list[int]:
    """Layers that a folder or repository in our format holds, 0-based and sorted.

    Raises:
        SourceError: there is no `sae.json`, or it is malformed.
        ArchitectureError: it was written by a newer version.
    """
    return _read_config(source)["layers"]


def read_layer(source: Source, layer: int) -> SAEArrays:
    """Read one layer; a hub file is downloaded now, the others are left alone.

    Returns:
        Read-only views of the mapped file.

    Raises:
        InputError: the source does not list the layer.
        ShapeError: the tensors disagree with each other or with `sae.json`.
        SourceError: a file is missing, truncated or malformed, lacks or adds a tensor, or holds NaN or infinity.
        ArchitectureError: it was written by a newer version, or its activation is unknown.
    """
    config = _read_config(source)
    if layer not in config["layers"]:
        raise InputError(f"{source.name}: has no layer {layer}; it holds {', '.join(map(str, config['layers']))}")
    path = source.path(f"layer{layer}.safetensors")
    where = str(path)
    tensors = _mapped_tensors(path)
    if not _REQUIRED <= set(tensors) <= _REQUIRED | {"threshold"}:
        raise SourceError(f"{where}: holds the tensors {', '.join(tensors) or 'none'}; expected {', '.join(sorted(_REQUIRED))} and perhaps threshold")
    arrays = SAEArrays(
        **tensors,
        k=config["k"],
        activation=config["activation"],
        apply_b_dec_to_input=config["apply_b_dec_to_input"],
        metadata=config["metadata"].get(str(layer), {}),
    )
    arrays.validate(where)
    if (arrays.num_features, arrays.d_model) != (config["num_features"], config["d_model"]):
        raise ShapeError(
            f"{where}: W_enc is [F={arrays.num_features}, D={arrays.d_model}], {CONFIG_FILE} says F={config['num_features']}, D={config['d_model']}"
        )
    for name, array in tensors.items():
        check_floating(name, array, where)
    return arrays


def write_folder(path: str | os.PathLike[str], layers: Mapping[int, SAEArrays]) -> None:
    """Write a folder of layers, bit-exact; it appears, or replaces an existing folder, when it is complete.

    Layers are taken from the mapping one at a time, so a mapping that loads lazily never holds them all.

    Args:
        path: The folder.
        layers: 0-based layer -> arrays; all with the same k, activation, flag and sizes.

    Raises:
        InputError: there is no layer, a layer index is negative, or layers differ in what they must share.
        ShapeError, ArchitectureError: the arrays of a layer do not fit each other.
        SourceError: a tensor holds NaN or infinity, or the folder cannot be written.
    """
    where, indices = str(path), sorted(layers)
    if not indices or indices[0] < 0:
        raise InputError(f"{where}: layers are {indices}, expected at least one and none below 0")
    shared: dict[str, Any] = {}
    metadata: dict[str, dict[str, Any]] = {}
    with atomic_path(path, directory=True) as folder:
        for layer in indices:
            found, metadata[str(layer)] = _write_layer(folder / f"layer{layer}.safetensors", layers[layer], f"{where}: layer {layer}")
            shared = shared or found
            if found != shared:
                raise InputError(f"{where}: layer {layer} has {found}, layer {indices[0]} has {shared}; write them to separate folders")
        write_json(folder / CONFIG_FILE, {"format": FORMAT, "version": VERSION, **shared, "layers": indices, "metadata": metadata})


def _read_config(source: Source) -> dict[str, Any]:
    """`sae.json`, with every key that is used checked for its type."""
    path = source.path(CONFIG_FILE)
    config = read_json(path)
    if config.get("format") != FORMAT:
        raise SourceError(f"{path}: format is {config.get('format')!r}, expected {FORMAT!r}; this is not a folder that qscope_jax wrote")
    version = config.get("version")
    if version != VERSION:
        raise ArchitectureError(f"{path}: format version is {version!r}, this release reads {VERSION}; upgrade qscope_jax")
    for key, kind in {**_SHARED, "layers": list, "metadata": dict}.items():
        if type(config.get(key)) is not kind:
            raise SourceError(f"{path}: {key} is {config.get(key)!r}, expected {kind.__name__}")
    layers = config["layers"]
    if not all(type(layer) is int and layer >= 0 for layer in layers) or len(set(layers)) != len(layers):
        raise SourceError(f"{path}: layers is {layers!r}, expected distinct whole numbers >= 0")
    if not all(isinstance(value, dict) for value in config["metadata"].values()):
        raise SourceError(f"{path}: metadata is not an object of objects, one for each layer")
    return {**config, "layers": sorted(layers)}


def _write_layer(path: Path, arrays: SAEArrays, where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Check and write the tensors of one layer; returns what it must share with the others, and its metadata."""
    arrays.validate(where)
    for name, array in arrays.tensors().items():
        check_floating(name, array, where)
    try:
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.tensors().items()}, path)
    except SafetensorError as error:
        raise SourceError(f"{where}: cannot be written ({error}); nothing was changed there") from error
    return {key: getattr(arrays, key) for key in _SHARED}, arrays.metadata


def _mapped_tensors(path: Path) -> dict[str, np.ndarray]:
    """Views of a safetensors file. The library checks the header (types, shapes, ranges); we bound its length first and map the data."""
    try:
        mapped = np.memmap(path, dtype=np.uint8, mode="r")
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise SourceError(f"{path}: cannot be read as a safetensors file ({error})") from error
    length = int.from_bytes(bytes(mapped[:8]), "little")
    if length > min(len(mapped) - 8, _MAX_HEADER_BYTES):
        raise SourceError(f"{path}: its header claims {length} bytes, the file has {len(mapped)}; it is truncated or not a safetensors file")
    try:
        with safe_open(path, framework="numpy"):
            header = json.loads(bytes(mapped[8 : 8 + length]))
    except (SafetensorError, OSError, ValueError) as error:
        raise SourceError(f"{path}: is not a valid safetensors file ({error}); it is truncated or damaged, write or download it again") from error
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            raise SourceError(f"{path}: tensor {name} is {entry['dtype']}, expected floating-point numbers ({', '.join(_DTYPES)})")
        begin = 8 + length + entry["data_offsets"][0]
        tensors[name] = np.ndarray(tuple(entry["shape"]), _DTYPES[entry["dtype"]], buffer=mapped, offset=begin)
    return tensors
