"""Our own format: a folder with the tensors of each layer and one `sae.json` that says what they mean.

The tensors are W_enc [F, D], W_dec [F, D], b_enc [F], b_dec [D] and, where there is one, threshold [F], in any floating-point type: in one
`layer{n}.safetensors` a layer, or as one Orbax checkpoint `layer{n}/` a layer. `sae.json` holds what all layers share (k, activation, flags,
sizes, storage), the list of layers, and the metadata of each.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qscope_jax.data.files import atomic_path, read_json, write_json
from qscope_jax.data.hub import Source
from qscope_jax.data.orbax_arrays import read_arrays, write_arrays
from qscope_jax.errors import ArchitectureError, InputError, ShapeError, SourceError
from qscope_jax.sae.arrays import SAEArrays, check_floating
from qscope_jax.sae.formats.mapped_tensors import map_safetensors, write_safetensors

CONFIG_FILE = "sae.json"
"""The file that makes a folder one of ours."""

FORMAT = "qscope_jax"
VERSION = 1

_REQUIRED = {"W_enc", "W_dec", "b_enc", "b_dec"}
_SHARED = {"k": int, "activation": str, "apply_b_dec_to_input": bool, "num_features": int, "d_model": int}
STORAGES = {"safetensors": "layer{layer}.safetensors", "orbax": "layer{layer}"}
"""Storage -> name of a layer's file or folder."""


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
        Read-only views of the mapped file, or what Orbax restored.

    Raises:
        InputError: the source does not list the layer.
        ShapeError: the tensors disagree with each other or with `sae.json`.
        SourceError: a file is missing, truncated or malformed, lacks or adds a tensor, or holds NaN or infinity.
        ArchitectureError: it was written by a newer version, or its activation is unknown.
    """
    config = _read_config(source)
    if layer not in config["layers"]:
        raise InputError(f"{source.name}: has no layer {layer}; it holds {', '.join(map(str, config['layers']))}")
    name = STORAGES[config["storage"]].format(layer=layer)
    if config["storage"] == "orbax":
        if source.folder is None:
            raise SourceError(f"{source.name}: holds Orbax checkpoints, which are read from a local folder; download it first")
        where, tensors = str(source.folder / name), read_arrays(source.folder / name)
    else:
        path = source.path(name)
        where, tensors = str(path), map_safetensors(path)
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
    """Write a folder of layers as safetensors, bit-exact; it appears, or replaces an existing folder, when it is complete.

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
    config: dict[str, Any] = {}
    with atomic_path(path, directory=True) as folder:
        for layer in indices:
            arrays = layers[layer]
            config = add_to_config(config, layer, arrays, "safetensors", where)
            write_tensors(folder / STORAGES["safetensors"].format(layer=layer), arrays, "safetensors", f"{where}: layer {layer}")
            del arrays
        write_json(folder / CONFIG_FILE, config)


def write_tensors(path: Path, arrays: SAEArrays, storage: str, where: str) -> None:
    """Check the tensors of one layer and write them at `path`, bit-exact.

    Raises:
        ShapeError, ArchitectureError, InputError: the arrays do not fit each other.
        SourceError: a tensor holds NaN or infinity, or writing failed.
    """
    arrays.validate(where)
    for name, array in arrays.tensors().items():
        check_floating(name, array, where)
    (write_arrays if storage == "orbax" else write_safetensors)(path, arrays.tensors())


def add_to_config(config: Mapping[str, Any], layer: int, arrays: SAEArrays, storage: str, where: str) -> dict[str, Any]:
    """The content of `sae.json` with one more layer.

    Args:
        config: What it was; empty before the first layer.
        layer: 0-based.
        arrays: The layer's SAE.
        storage: One of `STORAGES`.
        where: What to call the folder in errors.

    Raises:
        InputError: the layer differs from the others in what they must share.
    """
    found = {key: getattr(arrays, key) for key in _SHARED}
    shared = {key: config[key] for key in _SHARED} if config else found
    if found != shared:
        raise InputError(f"{where}: layer {layer} has {found}, layer {config['layers'][0]} has {shared}; write them to separate folders")
    layers = sorted({*config.get("layers", []), layer})
    metadata = {**config.get("metadata", {}), str(layer): arrays.metadata}
    return {"format": FORMAT, "version": VERSION, "storage": storage, **shared, "layers": layers, "metadata": metadata}


def _read_config(source: Source) -> dict[str, Any]:
    """`sae.json`, with every key that is used checked for its type."""
    path = source.path(CONFIG_FILE)
    config = read_json(path)
    if config.get("format") != FORMAT:
        raise SourceError(f"{path}: format is {config.get('format')!r}, expected {FORMAT!r}; this is not a folder that qscope_jax wrote")
    version = config.get("version")
    if version != VERSION:
        raise ArchitectureError(f"{path}: format version is {version!r}, this release reads {VERSION}; upgrade qscope_jax")
    config.setdefault("storage", "safetensors")  # files of before there was a choice
    if config["storage"] not in STORAGES:
        raise SourceError(f"{path}: storage is {config['storage']!r}, expected {' or '.join(STORAGES)}")
    for key, kind in {**_SHARED, "layers": list, "metadata": dict}.items():
        if type(config.get(key)) is not kind:
            raise SourceError(f"{path}: {key} is {config.get(key)!r}, expected {kind.__name__}")
    layers = config["layers"]
    if not all(type(layer) is int and layer >= 0 for layer in layers) or len(set(layers)) != len(layers):
        raise SourceError(f"{path}: layers is {layers!r}, expected distinct whole numbers >= 0")
    if not all(isinstance(value, dict) for value in config["metadata"].values()):
        raise SourceError(f"{path}: metadata is not an object of objects, one for each layer")
    return {**config, "layers": sorted(layers)}
