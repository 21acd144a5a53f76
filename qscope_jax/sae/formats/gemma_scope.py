"""Gemma Scope: `layer_{n}/width_16k/average_l0_{l}/params.npz`; Gemma Scope 2: `params.safetensors` with `config.json`. w_enc is [D, F] in both.

Sources: google/gemma-scope-* and google/gemma-scope-2-* on the hub. JumpReLU with a threshold for each feature; training scale is folded already.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np

from qscope_jax.data.files import read_json
from qscope_jax.data.hub import Source
from qscope_jax.errors import ArchitectureError
from qscope_jax.sae.arrays import SAEArrays
from qscope_jax.sae.formats.layout import Given, Layout, Provenance, threshold_arrays
from qscope_jax.sae.formats.mapped_tensors import map_safetensors, read_npz

CONFIG_FILE, WEIGHTS_FILE, WEIGHTS_FILE_2 = "config.json", "params.npz", "params.safetensors"
LAYOUT = Layout(
    "Gemma Scope",
    {"W_enc": "w_enc", "W_dec": "w_dec", "b_enc": "b_enc", "b_dec": "b_dec", "threshold": "threshold"},
    frozenset({"W_enc"}),
)

_UPPER = {name.replace("w_", "W_"): name for name in LAYOUT.names.values()}  # some npz files spell the matrices W_enc and W_dec
_LAYER = re.compile(r"layer_(\d+)", re.ASCII)
_L0 = re.compile(r"average_l0_(\d+)", re.ASCII)


def read_folder(source: Source, prefix: str, given: Given) -> SAEArrays:
    """Read the SAE in one folder of Gemma Scope.

    Arguments as those of `FolderFormat.read`.

    Raises:
        ArchitectureError: it is an SAE of embeddings.
        InputError, ShapeError, SourceError: the file is damaged or holds something else.
    """
    return read_file(source.path(prefix + WEIGHTS_FILE), given, _folders(source, prefix), source.name)


def read_file(path: Path, given: Given, prefix: str | None = None, origin: str | None = None) -> SAEArrays:
    """Read a bare `params.npz`; what its folders' names say is taken from `prefix`, or from its path.

    Raises:
        QscopeError: as `read_folder`.
    """
    folders = f"{path.absolute().parent}/" if prefix is None else prefix
    if "embedding" in folders.rstrip("/").split("/")[-3:]:
        raise ArchitectureError(f"{path}: is an SAE of embeddings, which sees them times sqrt(D); only SAEs of the residual stream are read")
    found = {_UPPER.get(name, name): array for name, array in read_npz(path).items()}
    return _arrays(found, given, Provenance("gemma_scope", origin or str(path), _number(_LAYER, folders), more=_l0(folders)), str(path))


def read_folder_2(source: Source, prefix: str, given: Given) -> SAEArrays:
    """Read the SAE in one folder of Gemma Scope 2.

    Arguments as those of `FolderFormat.read`.

    Raises:
        ArchitectureError: it is a transcoder, crosses layers, or has another architecture.
        InputError, ShapeError, SourceError: the files are damaged or hold something else.
    """
    path = source.path(prefix + WEIGHTS_FILE_2)
    config = read_json(source.path(prefix + CONFIG_FILE)) if source.has(prefix + CONFIG_FILE) else {}
    if config.get("architecture", "jump_relu") != "jump_relu":
        raise ArchitectureError(f"{path}: architecture {config['architecture']!r} of Gemma Scope 2 is not supported, only jump_relu")
    entry, exit_ = config.get("hf_hook_point_in"), config.get("hf_hook_point_out")
    if exit_ not in (None, entry):
        raise ArchitectureError(f"{path}: is a transcoder from {entry} to {exit_}; only SAEs, which rebuild their input, are read")
    layer = layer_of(source, prefix)
    origin = Provenance("gemma_scope_2", source.name, layer, config.get("model_name"), entry, _l0(_folders(source, prefix)))
    return _arrays(map_safetensors(path), given, origin, str(path))


def layer_of(source: Source, prefix: str) -> int | None:
    """The 0-based layer in the names of the folders; None where they have none."""
    return _number(_LAYER, _folders(source, prefix))


def _folders(source: Source, prefix: str) -> str:
    """The names of the folders around an SAE, also of those that the user went into."""
    return f"{source.folder.resolve()}/{prefix}" if source.folder else prefix


def _arrays(found: dict[str, np.ndarray], given: Given, origin: Provenance, where: str) -> SAEArrays:
    if "affine_skip_connection" in found:
        raise ArchitectureError(f"{where}: is a transcoder (affine_skip_connection); only SAEs, which rebuild their input, are read")
    if found.get("w_dec", np.empty((0, 0))).ndim == 3:
        raise ArchitectureError(f"{where}: decodes to several layers (w_dec has shape {found['w_dec'].shape}); only SAEs of one layer are read")
    tensors = LAYOUT.take(found, where)
    return threshold_arrays(tensors, tensors["threshold"], given, False, origin, where)


def _number(pattern: re.Pattern[str], text: str) -> int | None:
    found = pattern.findall(text)
    return int(found[-1]) if found else None


def _l0(text: str) -> dict[str, Any]:
    l0 = _number(_L0, text)
    return {} if l0 is None else {"mean_l0": l0}
