"""Llama Scope, its R1 variant, and Llamascopium, the library behind them: SAEs trained on s x, with s = sqrt(D) / mean activation norm.

Sources: fnlp/Llama3_1-8B-Base-* and fnlp/Llama-Scope-R1-Distill on the hub, Llamascopium 2.0 (OpenMOSS). The scale is folded into the weights
on reading. Llama Scope's scalar threshold is taken to be in raw units, as SAELens reads it.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from qscope_jax.data.files import read_json
from qscope_jax.data.hub import Source
from qscope_jax.errors import ArchitectureError, InputError, SourceError
from qscope_jax.sae.arrays import SAEArrays
from qscope_jax.sae.folds import input_scale, unit_decoder
from qscope_jax.sae.formats.layout import Given, Layout, Provenance, threshold_arrays, top_k_arrays
from qscope_jax.sae.formats.mapped_tensors import map_safetensors

PARAMETERS_FILE, FINAL_FILE = "hyperparams.json", "checkpoints/final.safetensors"
CONFIG_FILE, WEIGHTS_FILE = "config.json", "sae_weights.safetensors"

_LINEAR = {"W_enc": "encoder.weight", "W_dec": "decoder.weight", "b_enc": "encoder.bias", "b_dec": "decoder.bias"}
LLAMA_SCOPE = Layout("Llama Scope", _LINEAR, frozenset({"W_dec"}))
LLAMA_SCOPE_R1 = Layout("Llama Scope R1", {**_LINEAR, "log_threshold": "log_jumprelu_threshold"}, frozenset({"W_dec"}))
_SCOPIUM = {"W_enc": "W_E", "W_dec": "W_D", "b_enc": "b_E", "b_dec": "b_D"}
LLAMASCOPIUM = Layout("Llamascopium", _SCOPIUM, frozenset({"W_enc"}), frozenset({"b_dec"}))
_JUMPRELU = "activation_function.log_jumprelu_threshold"
LLAMASCOPIUM_JUMPRELU = Layout("Llamascopium jumprelu", {**_SCOPIUM, "log_threshold": _JUMPRELU}, frozenset({"W_enc"}), frozenset({"b_dec"}))

_NORMS = "dataset_average_activation_norm"
_LAYER = re.compile(r"blocks\.(\d+)\.", re.ASCII)
_FOLDER = re.compile(r"-?L(\d+)[A-Z]", re.ASCII)


def read_folder(source: Source, prefix: str, given: Given) -> SAEArrays:
    """Read an SAE of Llama Scope.

    Arguments as those of `FolderFormat.read`.

    Raises:
        InputError, ShapeError, SourceError: the files are damaged, or do not fit each other.
    """
    parameters = read_json(source.path(prefix + PARAMETERS_FILE))
    path = source.path(prefix + FINAL_FILE)
    where = str(path)
    found = LLAMA_SCOPE.take(map_safetensors(path), where)
    norms = parameters.get(_NORMS)
    norm_in, norm_out = (_positive(norms.get(key) if isinstance(norms, dict) else None, f"{_NORMS}.{key}", where) for key in ("in", "out"))
    F, D = found["W_enc"].shape
    scale_in, scale_out = math.sqrt(D) / norm_in, math.sqrt(D) / norm_out
    threshold = parameters.get("jump_relu_threshold")
    if not isinstance(threshold, int | float) or not math.isfinite(threshold):
        raise SourceError(f"{where}: jump_relu_threshold in {PARAMETERS_FILE} is {threshold!r}, expected a number")
    origin = _provenance("llama_scope", source, prefix, parameters)
    return input_scale(threshold_arrays(found, np.full(F, scale_in * threshold, np.float32), given, False, origin, where), scale_in, scale_out)


def read_folder_r1(source: Source, prefix: str, given: Given) -> SAEArrays:
    """Read an SAE of Llama Scope R1, whose files do not say by which norm its input was scaled.

    Arguments as those of `FolderFormat.read`.

    Raises:
        InputError: the norm is missing or not positive.
        ShapeError, SourceError: the files are damaged, or do not fit each other.
    """
    config = read_json(source.path(prefix + CONFIG_FILE))
    path = source.path(prefix + WEIGHTS_FILE)
    where = str(path)
    found = LLAMA_SCOPE_R1.take(map_safetensors(path), where)
    if given.input_norm is None:
        raise InputError(
            f"{where}: does not say by which mean activation norm its input was scaled; measure it on the model's layer and give input_norm"
        )
    scale = math.sqrt(found["W_enc"].shape[1]) / _positive(given.input_norm, "input_norm", where)
    origin = _provenance("llama_scope_r1", source, prefix, config)
    return input_scale(threshold_arrays(found, _exp(found["log_threshold"]), given, False, origin, where), scale)


def read_folder_llamascopium(source: Source, prefix: str, given: Given) -> SAEArrays:
    """Read an SAE that Llamascopium saved.

    Arguments as those of `FolderFormat.read`.

    Raises:
        ArchitectureError: it is a transcoder or crosscoder, has a gated encoder, normalises token by token, or has another activation.
        InputError, ShapeError, SourceError: the files are damaged, or do not fit each other.
    """
    config = read_json(source.path(prefix + CONFIG_FILE))
    path = source.path(prefix + WEIGHTS_FILE)
    where = str(path)
    _refuse_unsupported(config, where)
    act, by_norm = config["act_fn"], config.get("sparsity_include_decoder_norm") is True
    mapped = map_safetensors(path)
    norms = {name.removeprefix(f"{_NORMS}."): array for name, array in mapped.items() if name.startswith(f"{_NORMS}.")}
    layout = LLAMASCOPIUM_JUMPRELU if act == "jumprelu" else LLAMASCOPIUM
    found = layout.take({name: array for name, array in mapped.items() if not name.startswith(f"{_NORMS}.")}, where)
    found.setdefault("b_dec", np.zeros(found["W_enc"].shape[1], found["W_enc"].dtype))
    origin = _provenance("llamascopium", source, prefix, config)
    if act == "topk":
        arrays = top_k_arrays(found, given.k if given.k is not None else config.get("top_k"), False, origin, where)
    else:
        F = found["W_enc"].shape[0]
        threshold_F = _exp(found["log_threshold"]) if act == "jumprelu" else np.zeros(F, np.float32)
        arrays = threshold_arrays(found, threshold_F, given, False, origin, where)
    if by_norm:
        arrays = unit_decoder(arrays, threshold_is_rescaled=True)
    if config.get("norm_activation") != "dataset-wise":  # then the norms in the file were never set
        return arrays
    norm = norms.get(str(config.get("hook_point_in")))
    value = float(norm) if norm is not None and norm.size == 1 else None
    return input_scale(arrays, math.sqrt(arrays.d_model) / _positive(value, f"{_NORMS}.{config.get('hook_point_in')}", where))


def layer_of(source: Source, prefix: str) -> int | None:
    """The 0-based layer that a folder's config or name states; None where neither does."""
    for file in (PARAMETERS_FILE, CONFIG_FILE):
        if source.has(prefix + file):
            return _layer(read_json(source.path(prefix + file)), prefix)
    return None


def _refuse_unsupported(config: Mapping[str, Any], where: str) -> None:
    kind, act, norm = config.get("sae_type", "sae"), config.get("act_fn"), config.get("norm_activation")
    reasons = {
        f"it is of type {kind!r}": kind != "sae",
        "its encoder is gated (use_glu_encoder)": bool(config.get("use_glu_encoder")),
        f"its activation is {act!r}": act not in ("relu", "jumprelu", "topk"),
        f"it normalises its input {norm}, which no linear encoder can hold": norm not in ("dataset-wise", "inference", None),
        "it is a transcoder": config.get("hook_point_out", config.get("hook_point_in")) != config.get("hook_point_in"),
    }
    for reason, found in reasons.items():
        if found:
            raise ArchitectureError(f"{where}: is not supported because {reason}; SAEs with relu, jumprelu or topk are read")


def _provenance(name: str, source: Source, prefix: str, config: Mapping[str, Any]) -> Provenance:
    return Provenance(name, source.name, _layer(config, prefix), config.get("model_name"), config.get("hook_point_in"))


def _layer(config: Mapping[str, Any], prefix: str) -> int | None:
    match = _LAYER.search(str(config.get("hook_point_in"))) or _FOLDER.search(prefix.rstrip("/").split("/")[-1])
    return int(match[1]) if match else None


def _exp(log_F: np.ndarray) -> np.ndarray:
    return np.exp(log_F.astype(np.float64)).astype(np.float32)


def _positive(value: Any, name: str, where: str) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise InputError(f"{where}: {name} is {value!r}, expected a positive number")
    return float(value)
