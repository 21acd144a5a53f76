"""EleutherAI's sparsify: a folder `layers.{n}` with `cfg.json` and `sae.safetensors`; both matrices [F, D], the encoder sees x - b_dec.

Source: eai-sparsify 1.3.
"""

import re
from pathlib import Path
from typing import Any

from qscope_jax.data.files import read_json, write_json
from qscope_jax.data.hub import Source
from qscope_jax.errors import ArchitectureError, SourceError
from qscope_jax.sae.arrays import SAEArrays, decoder_rows_are_unit
from qscope_jax.sae.formats.layout import Given, Layout, Provenance, top_k_arrays
from qscope_jax.sae.formats.mapped_tensors import map_safetensors, write_safetensors

CONFIG_FILE, WEIGHTS_FILE = "cfg.json", "sae.safetensors"
LAYOUT = Layout("sparsify", {"W_enc": "encoder.weight", "W_dec": "W_dec", "b_enc": "encoder.bias", "b_dec": "b_dec"})

_HOOKPOINT = re.compile(r"layers[._](\d+)", re.ASCII)


def read_folder(source: Source, prefix: str, given: Given) -> SAEArrays:
    """Read the SAE in one hookpoint's folder.

    Arguments as those of `FolderFormat.read`.

    Raises:
        ArchitectureError: it is a transcoder, has a skip connection, or selects by groups or by magnitude.
        InputError, ShapeError, SourceError: the files are damaged, or do not fit each other.
    """
    cfg = read_json(source.path(prefix + CONFIG_FILE))
    path = source.path(prefix + WEIGHTS_FILE)
    where = str(path)
    _refuse_unsupported(cfg, where)
    k = given.k if given.k is not None else cfg.get("k")
    if type(k) is not int:
        raise SourceError(f"{where}: k in {CONFIG_FILE} is {k!r}, expected a whole number")
    found = LAYOUT.take(map_safetensors(path), where)
    d_in = cfg.get("d_in", found["W_enc"].shape[1])
    if d_in != found["W_enc"].shape[1]:
        raise SourceError(
            f"{where}: encoder.weight is {found['W_enc'].shape[1]} wide, {CONFIG_FILE} says d_in {d_in}; the files do not belong together"
        )
    return top_k_arrays(found, k, True, Provenance("sparsify", source.name, layer_of(source, prefix)), where)


def layer_of(source: Source, prefix: str) -> int | None:
    """The 0-based layer that a hookpoint's folder is named for; None where it is not named like one."""
    name = prefix or f"{source.folder.resolve() if source.folder else ''}"
    match = _HOOKPOINT.search(name.rstrip("/").split("/")[-1]) or _HOOKPOINT.search(prefix)
    return int(match[1]) if match else None


def write_folder(path: Path, arrays: SAEArrays) -> None:
    """Write one SAE as sparsify loads it: top-k, the encoder seeing x - b_dec; bit-exact.

    `path` is the folder, made where it is missing; a SourceError says that it cannot be written.
    """
    cfg: dict[str, Any] = {
        "activation": "topk",
        "expansion_factor": max(1, arrays.num_features // arrays.d_model),
        "normalize_decoder": decoder_rows_are_unit(arrays.W_dec),  # true makes sparsify renormalise when training goes on
        "num_latents": arrays.num_features,
        "k": arrays.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": arrays.d_model,
    }
    path.mkdir(parents=True, exist_ok=True)
    write_safetensors(path / WEIGHTS_FILE, LAYOUT.put(arrays.tensors()))
    write_json(path / CONFIG_FILE, cfg)


def _refuse_unsupported(cfg: dict[str, Any], where: str) -> None:
    reasons = {
        "it is a transcoder (transcode)": cfg.get("transcode"),
        "it has a skip connection": cfg.get("skip_connection"),
        "it keeps the largest of each group (groupmax)": cfg.get("activation", "topk") != "topk",
        "it selects by magnitude (signed)": cfg.get("signed"),
    }
    for reason, found in reasons.items():
        if found:
            raise ArchitectureError(f"{where}: is not supported because {reason}; top-k SAEs of sparsify are read")
