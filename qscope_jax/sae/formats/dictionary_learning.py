"""dictionary_learning: a folder `trainer_{i}` with `ae.pt` and `config.json`; the config's `dict_class` says what the tensors mean.

Source: saprmarks/dictionary_learning, the package of 2025. Finished files hold biases in raw units; what an interrupted run leaves does not.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qscope_jax.data.files import read_json, write_json
from qscope_jax.data.hub import Source
from qscope_jax.errors import ArchitectureError, InputError, SourceError
from qscope_jax.sae.arrays import SAEArrays
from qscope_jax.sae.folds import gate_to_threshold, input_scale_into_biases
from qscope_jax.sae.formats.layout import Given, Layout, Provenance, threshold_arrays, top_k_arrays
from qscope_jax.sae.formats.torch_file import read_torch_content, write_torch_file

CONFIG_FILE, WEIGHTS_FILE = "config.json", "ae.pt"

_LINEAR = {"W_enc": "encoder.weight", "W_dec": "decoder.weight", "b_enc": "encoder.bias"}
_MATRICES = {"W_enc": "W_enc", "W_dec": "W_dec", "b_enc": "b_enc", "b_dec": "b_dec"}
_GATED = {
    "W_enc": "encoder.weight",
    "W_dec": "decoder.weight",
    "b_dec": "decoder_bias",
    "gate_bias": "gate_bias",
    "mag_bias": "mag_bias",
    "log_mag_scale": "r_mag",
}
_DECODER, _ENCODER = frozenset({"W_dec"}), frozenset({"W_enc"})


@dataclass(frozen=True)
class Kind:
    """One class of the library.

    Attributes:
        layout: Its tensors.
        selection: How it chooses features: `topk`, `scalar` (one threshold for all), `threshold`, `gate` or `relu`.
        apply_b_dec_to_input: Whether its encoder sees x - b_dec.
    """

    layout: Layout
    selection: str
    apply_b_dec_to_input: bool


_TOP_K = {**_LINEAR, "b_dec": "b_dec", "k": "k", "scalar_threshold": "threshold"}
_OLD = frozenset({"k", "scalar_threshold"})  # files from before these were stored
KINDS: Mapping[str, Kind] = {
    "AutoEncoderTopK": Kind(Layout("dictionary_learning TopK", _TOP_K, _DECODER, _OLD), "topk", True),
    "BatchTopKSAE": Kind(Layout("dictionary_learning BatchTopK", _TOP_K, _DECODER), "scalar", True),
    "MatryoshkaBatchTopKSAE": Kind(
        Layout(
            "dictionary_learning Matryoshka",
            {**_MATRICES, "k": "k", "scalar_threshold": "threshold"},
            _ENCODER,
            ignored=frozenset({"group_sizes"}),
        ),
        "scalar",
        True,
    ),
    "JumpReluAutoEncoder": Kind(Layout("dictionary_learning JumpReLU", {**_MATRICES, "threshold": "threshold"}, _ENCODER), "threshold", False),
    "GatedAutoEncoder": Kind(Layout("dictionary_learning Gated", _GATED, _DECODER), "gate", True),
    "AutoEncoder": Kind(Layout("dictionary_learning Standard", {**_LINEAR, "b_dec": "bias"}, _DECODER), "relu", True),
    "AutoEncoderNew": Kind(Layout("dictionary_learning Standard (new)", {**_LINEAR, "b_dec": "decoder.bias"}, _DECODER), "relu", False),
}
"""`dict_class` -> how it is read."""

_BUNDLE = {"ae", "norm_factor"}
_BY_ACTIVATION = {"topk": "AutoEncoderTopK", "batch_topk": "BatchTopKSAE"}
_LAYER = re.compile(r"layers?[._](\d+)", re.ASCII)


def read_folder(source: Source, prefix: str, given: Given) -> SAEArrays:
    """Read the SAE in one trainer's folder.

    Arguments as those of `FolderFormat.read`.

    Raises:
        ArchitectureError: its class is not supported, or its threshold was never set.
        InputError: there is no config and the tensors fit two classes.
        ShapeError, SourceError: the files are damaged, or do not fit each other.
    """
    trainer = _trainer(source, prefix)
    origin = Provenance("dictionary_learning", source.name, layer_of(source, prefix), trainer.get("lm_name"), None)
    return _read(source.path(prefix + WEIGHTS_FILE), trainer, given, origin)


def read_file(path: Path, given: Given, layer: int | None = None) -> SAEArrays:
    """Read a bare `ae.pt`, without its config.

    Raises:
        InputError: the tensors fit two classes and the caller does not say which.
        ArchitectureError, ShapeError, SourceError: as `read_folder`.
    """
    return _read(path, {}, given, Provenance("dictionary_learning", str(path), layer))


def fits(names: Mapping[str, Any] | set[str]) -> bool:
    """Whether a file with these top-level keys is one of the library's."""
    return set(names) >= _BUNDLE or any(kind.layout.fits(names) for kind in KINDS.values())


def layer_of(source: Source, prefix: str) -> int | None:
    """The 0-based layer that a trainer's config or folder names; None where neither does."""
    layer = _trainer(source, prefix).get("layer")
    if type(layer) is int:
        return layer
    match = _LAYER.search(prefix)
    return int(match[1]) if match else None


def write_folder(path: Path, arrays: SAEArrays) -> None:
    """Write one SAE as the library's AutoEncoderTopK, the encoder seeing x - b_dec; bit-exact.

    `path` is the folder, made where it is missing; a SourceError says that it cannot be written.
    """
    layer = arrays.metadata.get("layer")
    extra = {"k": np.array(arrays.k, np.int32), "scalar_threshold": np.array(-1, np.float32)}
    trainer = {
        "trainer_class": "TopKTrainer",
        "dict_class": "AutoEncoderTopK",
        "activation_dim": arrays.d_model,
        "dict_size": arrays.num_features,
        "k": arrays.k,
        "layer": layer,
        "lm_name": arrays.metadata.get("model_name"),
        "submodule_name": None if layer is None else f"resid_post_layer_{layer}",
    }
    path.mkdir(parents=True, exist_ok=True)
    write_torch_file(path / WEIGHTS_FILE, KINDS["AutoEncoderTopK"].layout.put({**arrays.tensors(), **extra}))
    write_json(path / CONFIG_FILE, {"trainer": trainer})


def _trainer(source: Source, prefix: str) -> dict[str, Any]:
    if not source.has(prefix + CONFIG_FILE):
        return {}
    trainer = read_json(source.path(prefix + CONFIG_FILE)).get("trainer")
    return trainer if isinstance(trainer, dict) else {}


def _read(path: Path, trainer: Mapping[str, Any], given: Given, origin: Provenance) -> SAEArrays:
    where = str(path)
    content = read_torch_content(path)
    factor = None
    if set(content) >= _BUNDLE:
        factor = _norm_factor(content["norm_factor"], where)
        config = content.get("config")
        trainer = config if isinstance(config, dict) and not trainer else trainer
        content = content["ae"]
    if not isinstance(content, dict) or not all(isinstance(value, np.ndarray) for value in content.values()):
        raise SourceError(f"{where}: does not hold a flat dict of tensors; expected what dictionary_learning saves as {WEIGHTS_FILE}")
    name = _class_of(content, trainer, given, where)
    kind = KINDS[name]
    found = kind.layout.take(content, where)
    arrays, scalar = _arrays(found, kind, trainer, given, origin, where), found.get("scalar_threshold")
    if kind.selection == "scalar" and scalar is not None and scalar < 0:
        raise ArchitectureError(
            f"{where}: its threshold was never set (the run was too short); train on, or read it as a TopK SAE with its config's k"
        )
    return arrays if factor is None else input_scale_into_biases(arrays, 1 / factor)


def _class_of(tensors: Mapping[str, np.ndarray], trainer: Mapping[str, Any], given: Given, where: str) -> str:
    """The library's class of these tensors: its config decides, then the caller, then the tensors where they fit one class only."""
    name = trainer.get("dict_class")
    if name is not None:
        if name not in KINDS:
            raise ArchitectureError(f"{where}: dict_class {name!r} of dictionary_learning is not supported; supported are {', '.join(KINDS)}")
        stated = {"topk": "topk", "scalar": "batch_topk"}.get(KINDS[name].selection, "none")
        if given.activation not in (None, stated):
            raise InputError(f"{where}: {CONFIG_FILE} says {name}, which contradicts activation {given.activation}; leave it out")
        return name
    fitting = [candidate for candidate, kind in KINDS.items() if kind.layout.fits(tensors)]
    if not fitting:
        raise SourceError(f"{where}: holds {', '.join(tensors)}, which is no class of dictionary_learning; expected one of {', '.join(KINDS)}")
    if len(fitting) == 1:
        return fitting[0]
    if given.activation is None:
        raise InputError(
            f"{where}: fits {' and '.join(fitting)} alike and has no {CONFIG_FILE}; give activation topk or batch_topk, or add the config"
        )
    return _BY_ACTIVATION[given.activation]


def _arrays(found: dict[str, np.ndarray], kind: Kind, trainer: Mapping[str, Any], given: Given, origin: Provenance, where: str) -> SAEArrays:
    F, flag = found["W_enc"].shape[0], kind.apply_b_dec_to_input
    stored = int(found["k"]) if "k" in found else trainer.get("k")
    k = given.k if given.k is not None else stored if type(stored) is int else None
    match kind.selection:
        case "topk":
            return top_k_arrays(found, k, flag, origin, where)
        case "scalar":
            threshold_F = np.full(F, found["scalar_threshold"], np.float32)
            made = threshold_arrays(found, threshold_F, given, flag, origin, where)
            return made if given.k is not None else dataclasses.replace(made, metadata={**made.metadata, "mean_l0": stored})
        case "threshold":
            return threshold_arrays(found, found["threshold"], given, flag, origin, where)
        case "gate":
            blank_F = np.zeros(F, np.float32)
            arrays = threshold_arrays({**found, "b_enc": blank_F}, blank_F, given, flag, origin, where)
            return gate_to_threshold(arrays, found["gate_bias"], found["mag_bias"], found["log_mag_scale"])
        case _:
            return threshold_arrays(found, np.zeros(F, found["b_enc"].dtype), given, flag, origin, where)


def _norm_factor(value: Any, where: str) -> float:
    factor = float(value) if isinstance(value, int | float) or (isinstance(value, np.ndarray) and value.ndim == 0) else math.nan
    if not math.isfinite(factor) or factor <= 0:
        raise SourceError(f"{where}: norm_factor of the interrupted run is {value!r}, expected a positive number")
    return factor
