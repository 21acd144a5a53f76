"""Carrying SAEs from any format that is read to any that is written: exactly, or not at all unless asked to.

A layer is read, fitted to what the target can hold (`fit`), written, read back and compared before it counts. Layers are held one at a time;
an interrupted conversion resumes (`qscope_jax.data.resumable`).
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from qscope_jax.data.files import read_json, write_json
from qscope_jax.data.resumable import ResumableFolder, source_fingerprint
from qscope_jax.errors import ArchitectureError, InputError, SourceError
from qscope_jax.sae.arrays import SAEArrays, row_blocks
from qscope_jax.sae.comparison import compare_codes, first_difference
from qscope_jax.sae.folds import b_dec_into_input, b_dec_out_of_input
from qscope_jax.sae.formats import own_format
from qscope_jax.sae.formats.qwen_scope import ReleaseName
from qscope_jax.sae.formats.registry import holds_saes, list_sae_layers, read_sae_arrays
from qscope_jax.sae.formats.writers import WRITERS, Writer

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
"""Element types that a conversion can be asked for."""


@dataclass(frozen=True)
class ConversionConfig:
    """What to make of the source; one field for each option of `converters/convert_sae.py`."""

    to: str
    """One of `WRITERS`."""
    dtype: str | None = None
    """One of `DTYPES`; None keeps each tensor's, as far as the target can hold it."""
    k: int | None = None
    """Active features a token, where the source does not say; for a conversion of thresholds to a top-k, its k."""
    activation: str | None = None
    """`topk` or `batch_topk`, where the source fits both."""
    input_norm: float | None = None
    """Mean activation norm, for formats that scale by it and do not store it."""
    lossy: bool = False
    """Allow what changes codes: thresholds to top-k, and narrower element types."""
    verify: bool = True
    """Read every layer back and compare."""
    overwrite: bool = False
    """Replace SAEs that are at the destination."""


@dataclass(frozen=True)
class ConvertedLayer:
    """What happened to one layer.

    Attributes:
        layer: 0-based.
        resumed: Whether an earlier run had finished it; then nothing else is known.
        shape: F and D.
        k: Active features a token.
        folds: Names of the exact rewritings that it has been through, here and before.
        changes: What was changed in a lossy way, one sentence each.
        outcome: What the comparison found, in words.
    """

    layer: int
    resumed: bool = False
    shape: tuple[int, int] = (0, 0)
    k: int = 0
    folds: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()
    outcome: str = ""


def convert(
    source: str | Path,
    destination: Path,
    config: ConversionConfig,
    layers: Sequence[int] | None = None,
    report: Callable[[ConvertedLayer], None] = lambda _: None,
) -> list[int]:
    """Convert layers of a source; return those that the destination holds.

    Args:
        source: Folder, file or hub id.
        destination: Folder to write; appears when it is complete.
        config: The target and the options.
        layers: 0-based; all by default.
        report: Called after each layer.

    Raises:
        QscopeError: the source cannot be read, a layer is not there, the target cannot hold it, the destination may not be replaced, the disk
            is full, or what was written does not read back equal. What is finished stays, and the same call resumes.
    """
    writer = _checked_writer(config)
    chosen = _chosen_layers(source, layers)
    plan = _plan(source, config, chosen)
    with ResumableFolder(destination, plan, overwrite=config.overwrite, replaceable=holds_saes) as folder:
        shared: dict[str, Any] = read_json(folder.path / own_format.CONFIG_FILE) if folder.done(own_format.CONFIG_FILE) else {}
        for layer in chosen:
            unit = writer.unit.format(layer=layer)
            if folder.done(unit) and (writer.storage is None or layer in shared.get("layers", [])):
                report(ConvertedLayer(layer, resumed=True))
                continue
            read = read_sae_arrays(source, layer, k=config.k, activation=config.activation, input_norm=config.input_norm)
            fitted, changes = fit(read, config, f"{destination}: layer {layer}")
            if config.to == "qwen_scope":
                _check_release_name(destination, fitted)
            if writer.storage is not None:
                shared = own_format.add_to_config(shared, layer, fitted, writer.storage, str(destination))
            with folder.unit(unit) as path:
                writer.write(path, fitted)
                outcome = _verified(read, fitted, changes, writer, path, layer, f"{destination}: layer {layer}") if config.verify else "not read back"
            if writer.storage is not None:
                with folder.unit(own_format.CONFIG_FILE) as path:
                    write_json(path, shared)
            applied = tuple(fitted.metadata.get("folds", ()))
            report(ConvertedLayer(layer, False, (fitted.num_features, fitted.d_model), fitted.k, applied, tuple(changes), outcome))
        folder.finish(layers=chosen)
    return chosen


def fit(arrays: SAEArrays, config: ConversionConfig, where: str) -> tuple[SAEArrays, list[str]]:
    """The SAE as the target can hold it, and what that changes beyond rounding, one sentence each.

    Raises:
        ArchitectureError: the target cannot hold it exactly, and lossy conversion is not allowed or not possible.
        InputError: a narrower type was asked for without `lossy`, cannot hold the values, or a top-k needs a k.
    """
    writer, changes = _checked_writer(config), []
    if arrays.activation not in writer.activations:
        arrays, sentence = _to_top_k(arrays, config, where)
        changes.append(sentence)
    if writer.apply_b_dec_to_input is True:
        arrays = b_dec_into_input(arrays)
    elif writer.apply_b_dec_to_input is False:
        arrays = b_dec_out_of_input(arrays)
    wanted = DTYPES[config.dtype] if config.dtype else np.dtype(writer.dtype) if writer.dtype else None
    if wanted is None and writer.one_dtype:
        wanted = np.result_type(*(array.dtype for array in arrays.tensors().values()))
    if wanted is not None:
        arrays, sentence = _cast(arrays, wanted, config.lossy, where)
        changes += [sentence] if sentence else []
    return arrays, changes


def _checked_writer(config: ConversionConfig) -> Writer:
    if config.to not in WRITERS:
        raise InputError(f"format {config.to!r} is not written; expected one of {', '.join(WRITERS)}")
    writer = WRITERS[config.to]
    if config.dtype is not None and config.dtype not in DTYPES:
        raise InputError(f"dtype is {config.dtype!r}, expected one of {', '.join(DTYPES)}")
    if writer.dtype and config.dtype not in (None, writer.dtype):
        raise InputError(f"{config.to} files hold {writer.dtype} only; leave dtype {config.dtype} out")
    return writer


def _chosen_layers(source: str | Path, layers: Sequence[int] | None) -> list[int]:
    try:
        available = list_sae_layers(source)
    except InputError:  # one SAE of unknown layer: the caller may say which it is
        if layers is None or len(layers) != 1:
            raise
        return list(layers)
    chosen = available if layers is None else sorted(set(layers))
    if missing := sorted(set(chosen) - set(available)):
        raise InputError(f"{source}: has no layer {missing[0]}; it has {', '.join(map(str, available)) or 'none'}")
    if not chosen:
        raise InputError(f"{source}: holds no layers to convert")
    return chosen


def _plan(source: str | Path, config: ConversionConfig, layers: list[int]) -> dict[str, Any]:
    local = Path(source).expanduser()
    options = {key: value for key, value in dataclasses.asdict(config).items() if key != "overwrite"}
    identity = str(local.resolve()) if local.exists() else str(source)
    return {"source": identity, "source_files": source_fingerprint(local), **options, "layers": layers}


def _to_top_k(arrays: SAEArrays, config: ConversionConfig, where: str) -> tuple[SAEArrays, str]:
    kind = f"{arrays.activation} (a threshold for each feature)"
    if not config.lossy:
        raise ArchitectureError(f"{where}: {config.to} holds top-k SAEs only, this one is {kind}; write sae_lens or safetensors, or allow --lossy")
    k = config.k or arrays.metadata.get("mean_l0") or (arrays.k if arrays.activation == "batch_topk" else 0)
    if not k:
        raise InputError(
            f"{where}: a top-k in place of {kind} needs k, the mean L0 on real text, which the source does not state; measure it and give --k"
        )
    metadata = {**arrays.metadata, "folds": [*arrays.metadata.get("folds", []), "threshold_to_topk"]}
    changed = dataclasses.replace(arrays, activation="topk", k=int(k), threshold=None, metadata=metadata)
    changed.validate(where)
    return changed, f"{kind} became topk with k {int(k)}: where another number of features passed its threshold, some are lost or added"


def _cast(arrays: SAEArrays, dtype: np.dtype, lossy: bool, where: str) -> tuple[SAEArrays, str | None]:
    """The tensors in another element type, and a sentence where that changes values."""
    cast, changed = {}, []
    for name, array in arrays.tensors().items():
        with np.errstate(over="ignore"):
            cast[name] = array.astype(dtype, copy=False)
        blocks = list(row_blocks(array)) if cast[name] is not array else []
        if any(not np.isfinite(cast[name][block]).all() for block in blocks):
            raise InputError(f"{where}: {name} holds values too large for {dtype.name}; choose float32 or bfloat16")
        if any((cast[name][block].astype(array.dtype) != array[block]).any() for block in blocks):
            changed.append(name)
    if changed and not lossy:
        raise InputError(
            f"{where}: {dtype.name} cannot hold the values of {', '.join(changed)} exactly; keep {arrays.W_enc.dtype.name} or allow --lossy"
        )
    sentence = f"{', '.join(changed)} rounded to {dtype.name}" if changed else None
    return dataclasses.replace(arrays, **cast), sentence


def _verified(read: SAEArrays, fitted: SAEArrays, changes: Sequence[str], writer: Writer, path: Path, layer: int, where: str) -> str:
    """Read a layer back and compare it, bit for bit with what should be there and by its codes with the source; say what was found."""
    written = writer.read_back(path, layer, fitted)
    if difference := first_difference(fitted, written):
        raise SourceError(f"{where}: {difference} differs after writing; the disk or this program is at fault, convert again")
    if _settings(fitted) != _settings(written):
        raise SourceError(f"{where}: k, activation or apply_b_dec_to_input differ after writing; this program is at fault")
    if first_difference(read, fitted) is None and _settings(read) == _settings(fitted):
        return "read back equal to the bit"
    found = compare_codes(read, written)
    if changes:
        return f"read back as written; active features differ on {found.moved} of {found.tokens} random tokens, mean error {found.error:.1e}"
    if not found.same:
        raise SourceError(
            f"{where}: active features differ from the source's on {found.moved} of {found.tokens} tokens, error {found.worst_error:.1e}; "
            "this SAE cannot be rewritten within rounding"
        )
    return f"same features on {found.tokens} random tokens ({found.ties} with ties), reconstructions within {found.worst_error:.1e}"


def _settings(arrays: SAEArrays) -> tuple[int, bool, bool]:
    return arrays.k, arrays.activation == "topk", arrays.apply_b_dec_to_input


def _check_release_name(destination: Path, arrays: SAEArrays) -> None:
    """Check that a folder named like a release will be read as what it holds."""
    name = ReleaseName.parse(destination)
    if name is not None and (name.num_features, name.k) != (arrays.num_features, arrays.k):
        raise InputError(
            f"{destination}: says {name.num_features} features and k {name.k}, the SAEs have {arrays.num_features} and {arrays.k}; rename the folder"
        )
