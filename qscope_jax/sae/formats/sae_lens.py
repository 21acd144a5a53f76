"""SAELens: a folder with `cfg.json` and `sae_weights.safetensors`. W_enc is [D, F] there, W_dec [F, D].

Source: SAELens 6.54 (decoderesearch/SAELens), inference files of its version 6, its training checkpoints, and older configs through the
same migration that it makes itself.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qscope_jax.data.files import read_json, write_json
from qscope_jax.data.hub import Source
from qscope_jax.errors import ArchitectureError, InputError, SourceError
from qscope_jax.sae.arrays import SAEArrays
from qscope_jax.sae.folds import gate_to_threshold, input_scale, unit_decoder
from qscope_jax.sae.formats.layout import Given, Layout, Provenance, threshold_arrays, top_k_arrays
from qscope_jax.sae.formats.mapped_tensors import map_safetensors, write_safetensors

CONFIG_FILE, WEIGHTS_FILE, SCALER_FILE = "cfg.json", "sae_weights.safetensors", "activation_scaler.json"
VERSION = "6.54.12"
"""The version of SAELens whose files are written."""

_FOUR = {"W_enc": "W_enc", "W_dec": "W_dec", "b_enc": "b_enc", "b_dec": "b_dec"}
_GATED = {"W_enc": "W_enc", "W_dec": "W_dec", "b_dec": "b_dec", "gate_bias": "b_gate", "mag_bias": "b_mag", "log_mag_scale": "r_mag"}
_TURNED = frozenset({"W_enc"})
LAYOUTS: Mapping[str, Layout] = {
    "topk": Layout("SAELens topk", _FOUR, _TURNED),
    "standard": Layout("SAELens standard", _FOUR, _TURNED),
    "jumprelu": Layout("SAELens jumprelu", {**_FOUR, "threshold": "threshold"}, _TURNED),
    "gated": Layout("SAELens gated", _GATED, _TURNED),
    "batchtopk": Layout("SAELens batchtopk", {**_FOUR, "scalar_threshold": "topk_threshold"}, _TURNED),
    "matryoshka_batchtopk": Layout("SAELens matryoshka_batchtopk", {**_FOUR, "scalar_threshold": "topk_threshold"}, _TURNED),
}
"""Architecture -> its tensors."""

_LOG_JUMPRELU = Layout("SAELens jumprelu", {**_FOUR, "log_threshold": "log_threshold"}, _TURNED)
_LAYER = re.compile(r"(?:blocks|layers|h)\.(\d+)(?:\.|$)", re.ASCII)
_OURS = "qscope_jax"


def read_folder(source: Source, prefix: str, given: Given) -> SAEArrays:
    """Read the SAE in one folder.

    Arguments as those of `FolderFormat.read`.

    Raises:
        ArchitectureError: its architecture or input normalisation is not supported.
        InputError, ShapeError, SourceError: the files are damaged, or do not fit each other.
    """
    cfg = _migrated(read_json(source.path(prefix + CONFIG_FILE)), f"{source.name}: {prefix}{CONFIG_FILE}")
    path = source.path(prefix + WEIGHTS_FILE)
    where = str(path)
    _refuse_unsupported(cfg, where)
    tensors = {name: array for name, array in map_safetensors(path).items() if not _is_void(name, array, where)}
    architecture = cfg["architecture"]
    layout = _LOG_JUMPRELU if architecture == "jumprelu" and "log_threshold" in tensors else LAYOUTS[architecture]
    found = layout.take(tensors, where)
    arrays = _arrays(found, cfg, given, _provenance(cfg, source), where)
    scale = _scale(source, prefix, cfg, where)
    if scale is not None:
        arrays = input_scale(arrays, scale)
    if cfg["rescale_acts_by_decoder_norm"] and architecture not in ("jumprelu", "standard", "gated"):
        if scale is not None and arrays.threshold is not None:
            # It is one on z times the row norm, which the scale has just divided.
            arrays = dataclasses.replace(arrays, threshold=(arrays.threshold.astype(np.float64) / scale).astype(arrays.threshold.dtype))
        arrays = unit_decoder(arrays, threshold_is_rescaled=True)
    return arrays


def layer_of(source: Source, prefix: str) -> int | None:
    """The 0-based layer that the config of an SAE's folder names; None where it names none."""
    return _layer(_metadata(read_json(source.path(prefix + CONFIG_FILE))))


def write_folder(path: Path, arrays: SAEArrays) -> None:
    """Write one SAE as SAELens 6 reads it: topk as `topk`, anything with a threshold as `jumprelu`; bit-exact.

    `path` is the folder, made where it is missing; a SourceError says that it cannot be written.
    """
    architecture = "topk" if arrays.activation == "topk" else "jumprelu"
    dtype = arrays.W_enc.dtype.name
    cfg: dict[str, Any] = {"architecture": architecture}
    if architecture == "topk":
        cfg |= {"k": arrays.k, "rescale_acts_by_decoder_norm": False}
    cfg |= {
        "d_in": arrays.d_model,
        "d_sae": arrays.num_features,
        "dtype": dtype,
        "device": "cpu",
        "apply_b_dec_to_input": arrays.apply_b_dec_to_input,
        "normalize_activations": "none",
        "reshape_activations": "none",
    }
    known, layer = arrays.metadata, arrays.metadata.get("layer")
    metadata = {
        **known.get("sae_lens_metadata", {}),
        "sae_lens_version": VERSION,
        "model_name": known.get("model_name"),
        "hook_name": known.get("hook_name") or (None if layer is None else f"blocks.{layer}.hook_resid_post"),
        "hf_hook_name": None if layer is None else f"model.layers.{layer}",
        _OURS: {
            "layer": layer,
            "k": arrays.k,
            "activation": arrays.activation,
            **{key: known[key] for key in ("format", "source", "folds", "unit_norm_decoder") if key in known},
        },
    }
    path.mkdir(parents=True, exist_ok=True)
    write_safetensors(path / WEIGHTS_FILE, LAYOUTS[architecture].put(arrays.tensors()))
    write_json(path / CONFIG_FILE, {**cfg, "metadata": metadata})


def _arrays(found: dict[str, np.ndarray], cfg: Mapping[str, Any], given: Given, origin: Provenance, where: str) -> SAEArrays:
    """The SAE as the architecture means its tensors, before any folding of norms."""
    flag, architecture = cfg["apply_b_dec_to_input"], cfg["architecture"]
    if architecture == "topk":
        k = given.k if given.k is not None else cfg.get("k")
        if type(k) is not int:
            raise SourceError(f"{where}: k in {CONFIG_FILE} is {k!r}, expected a whole number")
        return top_k_arrays(found, k, flag, origin, where)
    F = found["W_enc"].shape[0]
    if architecture == "gated":
        blank_F = np.zeros(F, np.float32)
        arrays = threshold_arrays({**found, "b_enc": blank_F}, blank_F, given, flag, origin, where)
        return gate_to_threshold(arrays, found["gate_bias"], found["mag_bias"], found["log_mag_scale"])
    if architecture == "standard":
        threshold_F = np.zeros(F, found["b_enc"].dtype)
    elif "scalar_threshold" in found:
        threshold_F = np.full(F, float(found["scalar_threshold"]), np.float32)
    elif "log_threshold" in found:
        threshold_F = np.exp(found["log_threshold"].astype(np.float64)).astype(np.float32)
    else:
        threshold_F = found["threshold"]
    recorded = origin.more.get(_OURS, {})
    slots = recorded.get("k")
    given = Given(slots) if given.k is None and type(slots) is int else given
    return threshold_arrays(found, threshold_F, given, flag, origin, where)


def _migrated(cfg: dict[str, Any], where: str) -> dict[str, Any]:
    """The config with every key that is used, whichever version wrote it; the defaults are SAELens's own."""
    cfg = dict(cfg)
    if cfg.get("activation_fn_str", cfg.get("activation_fn")) == "topk" and cfg.get("architecture", "standard") == "standard":
        cfg |= {"architecture": "topk", "k": (cfg.get("activation_fn_kwargs") or {}).get("k")}
    if isinstance(cfg.get("normalize_activations"), bool):
        cfg["normalize_activations"] = "expected_average_only_in" if cfg["normalize_activations"] else "none"
    cfg.setdefault("architecture", "standard")
    cfg["normalize_activations"] = cfg.get("normalize_activations") or "none"
    cfg.setdefault("apply_b_dec_to_input", True)
    cfg.setdefault("rescale_acts_by_decoder_norm", "topk" in str(cfg["architecture"]) and cfg["architecture"] != "topk")  # batchtopk trains with it
    cfg.setdefault("reshape_activations", "hook_z" if "hook_z" in str(_metadata(cfg).get("hook_name")) else "none")
    for key in ("apply_b_dec_to_input", "rescale_acts_by_decoder_norm"):
        if type(cfg[key]) is not bool:
            raise SourceError(f"{where}: {key} is {cfg[key]!r}, expected true or false")
    return cfg


def _metadata(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """What the config says about the SAE's place: a part of its own since version 6, among the other keys before."""
    metadata = cfg.get("metadata")
    found = dict(metadata) if isinstance(metadata, dict) else {}
    for key, old in {"hook_name": "hook_point", "model_name": "model_name", "hook_layer": "hook_point_layer"}.items():
        found.setdefault(key, cfg.get(key, cfg.get(old)))
    return found


def _refuse_unsupported(cfg: Mapping[str, Any], where: str) -> None:
    architecture, norm, fn = cfg["architecture"], cfg["normalize_activations"], cfg.get("activation_fn_str", cfg.get("activation_fn", "relu"))
    if architecture not in LAYOUTS:
        raise ArchitectureError(f"{where}: architecture {architecture!r} of SAELens is not supported; supported are {', '.join(LAYOUTS)}")
    if architecture == "standard" and fn != "relu":
        raise ArchitectureError(f"{where}: activation function {fn!r} is not supported; a standard SAE has relu")
    if cfg["reshape_activations"] != "none":
        raise ArchitectureError(
            f"{where}: reads attention heads (reshape_activations {cfg['reshape_activations']!r}); only the residual stream is read"
        )
    if norm not in ("none", "expected_average_only_in", "covariance_whitening"):  # whitening is folded into the weights when they are saved
        raise ArchitectureError(f"{where}: normalises its input token by token ({norm}), which no linear encoder can hold; use SAELens for it")


def _is_void(name: str, array: np.ndarray, where: str) -> bool:
    """Whether a tensor is a scaling factor that scales nothing, which some versions wrote.

    Raises:
        ArchitectureError: it scales something.
    """
    if name != "scaling_factor":
        return False
    if not np.allclose(array, 1):
        raise ArchitectureError(f"{where}: has a fine-tuned scaling_factor, which is not supported; fold it into W_dec and b_enc first")
    return True


def _scale(source: Source, prefix: str, cfg: Mapping[str, Any], where: str) -> float | None:
    """What the input was multiplied by in training and still has to be; None where it was not."""
    if cfg["normalize_activations"] != "expected_average_only_in":
        return None
    if not source.has(prefix + SCALER_FILE):
        raise InputError(f"{where}: was trained on scaled activations (expected_average_only_in); add the training run's {SCALER_FILE} beside it")
    scale = read_json(source.path(prefix + SCALER_FILE)).get("scaling_factor")
    if scale is None:
        return None
    if not isinstance(scale, int | float) or not math.isfinite(scale) or scale <= 0:
        raise SourceError(f"{where}: scaling_factor in {SCALER_FILE} is {scale!r}, expected a positive number")
    return float(scale)


def _provenance(cfg: Mapping[str, Any], source: Source) -> Provenance:
    metadata = _metadata(cfg)
    ours = metadata.get(_OURS)
    more: dict[str, Any] = {"sae_lens_metadata": {key: value for key, value in metadata.items() if key != _OURS}}
    if isinstance(ours, dict):
        more[_OURS] = ours
    return Provenance("sae_lens", source.name, _layer(metadata), metadata.get("model_name"), metadata.get("hook_name"), more)


def _layer(metadata: Mapping[str, Any]) -> int | None:
    ours = metadata.get(_OURS)
    for value in (ours.get("layer") if isinstance(ours, dict) else None, metadata.get("hook_layer")):
        if type(value) is int:
            return value
    match = _LAYER.search(str(metadata.get("hook_name")))
    return int(match[1]) if match else None
