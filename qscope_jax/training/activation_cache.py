"""Residual streams written to disk once, so that SAEs train on them many times: 2 D bytes a token and layer in bfloat16.

The model computes a batch while the one before is copied to the host, and files are written, flushed and hashed beside both.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qscope_jax.data.files import plain, read_json
from qscope_jax.data.resumable import ResumableFolder, source_fingerprint
from qscope_jax.errors import ConfigError, SourceError
from qscope_jax.models.language_model import LanguageModel
from qscope_jax.models.safetensors_file import write_file
from qscope_jax.sae.filtering import MAX_NORM_MULTIPLE
from qscope_jax.training.activation_files import (
    DTYPES,
    FORMAT,
    SHARD_FILE,
    TOKENS_FILE,
    VERSION,
    ActivationCache,
    RowsFile,
    holds_cache,
    layer_file,
    read_cache,
    shard_name,
)
from qscope_jax.training.activations import ActivationConfig
from qscope_jax.training.checkpoint import StreamState
from qscope_jax.training.kept_tokens import TOKEN_COLUMNS, KeptTokens, Place, ShardedTokens, ahead, kept_tokens
from qscope_jax.training.tokens import TokenStream

# The histogram behind the median norm: bins an octave, and octaves on either side of 1.
_BINS, _OCTAVES = 64, 64


@dataclass(frozen=True)
class CacheConfig:
    """What is cached, and in which files."""

    layers: tuple[int, ...]
    """Tapped layers, 0-based."""
    max_tokens: int | None = None
    """Stop after so many kept tokens; None ends with the documents."""
    shard_tokens: int = 131_072
    """Kept tokens of a shard. An interruption loses at most one shard of work."""
    dtype: str = "bfloat16"
    """Type of the rows on disk: bfloat16, float32, float16, or `model` for the model's own."""
    max_norm_multiple: float = MAX_NORM_MULTIPLE
    """Tokens are dropped whose norm exceeds this multiple of the median of their model batch in some layer; 0 keeps all."""
    drop_first: bool = True
    """Drop the first token of every document."""

    def __post_init__(self):
        """Check ranges."""
        _ = self.filter
        if self.shard_tokens < 1 or (self.max_tokens is not None and self.max_tokens < 1):
            raise ConfigError(f"shard_tokens is {self.shard_tokens} and max_tokens {self.max_tokens}, expected 1 or more")
        if self.dtype not in (*DTYPES, "model"):
            raise ConfigError(f"dtype is {self.dtype!r}, expected one of {', '.join(DTYPES)}, or model")

    @property
    def filter(self) -> ActivationConfig:
        """Layers and filter, as taps want them."""
        return ActivationConfig(self.layers, max_norm_multiple=self.max_norm_multiple, drop_first=self.drop_first)

    def disk_dtype(self, model_dtype: str) -> str:
        """Name of the rows' type for a model of the given one."""
        return model_dtype if self.dtype == "model" else self.dtype

    def token_bytes(self, model: LanguageModel) -> int:
        """Bytes on disk that a kept token takes, over all layers; headers and the manifest come on top."""
        row = model.config.d_model * DTYPES[self.disk_dtype(model.config.dtype)].itemsize
        return len(self.layers) * row + sum(dtype.itemsize for dtype in TOKEN_COLUMNS.values())


def cache_activations(
    model: LanguageModel,
    tokens: TokenStream,
    config: CacheConfig,
    out: str | Path,
    *,
    data: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    report: Callable[[int], None] = lambda kept: None,
) -> ActivationCache:
    """Run the model over token batches and write the streams of the tokens that count; see `activation_files` for the layout.

    An interrupted call resumes at its last whole shard, and what it writes equals, file by file, what an uninterrupted one writes. Memory
    holds a few model batches, whatever the length of the corpus. Several processes are refused: each would see only a part of the rows.

    Args:
        model: Whose streams are cached, on its mesh.
        tokens: Batches from the beginning, in one lane: a finite number of epochs, unless `max_tokens` is given.
        config: Layers, filter, sizes and dtype.
        out: Folder that appears when the cache is complete.
        data: What the documents are, in JSON's terms: a run is resumed only where this, the model's files, `tokens` and `config` are the same.
        overwrite: Replace a cache that is there.
        report: Called with the number of tokens written so far: when work begins, and whenever there are more.

    Raises:
        ConfigError: JAX runs in several processes, or the tokens' rows or lanes do not suit the mesh.
        InputError: a layer out of range, or no token counts.
        SourceError: the model's streams are damaged, `out` exists or cannot be written, or the disk is or will be full. Whole shards stay,
            and the same call resumes.
    """
    _check(model, tokens, config)
    with ResumableFolder(Path(out), _plan(model, tokens, config, data), overwrite=overwrite, replaceable=holds_cache) as folder:
        written, place = _resumed(folder)
        if written:
            tokens.set_state(StreamState({}, place.cursor))
        if config.max_tokens is not None:
            _check_space(folder, (config.max_tokens - written) * config.token_bytes(model))
        report(written)
        with closing(ahead(kept_tokens(model, tokens, config.filter, config.disk_dtype(model.config.dtype), place))) as batches:
            parts = ShardedTokens(batches, config.shard_tokens, max_tokens=config.max_tokens, written=written, place=place)
            for shard, group in groupby(parts, key=lambda part: part[0]):
                with folder.unit(shard_name(shard)) as path:
                    written = _write_shard(path, (kept for _, kept in group), config.layers, written, report)
        folder.finish(**_facts(folder, model, config, parts.after))
    return read_cache(out)


def _write_shard(path: Path, parts: Iterator[KeptTokens], layers: tuple[int, ...], written: int, report: Callable[[int], None]) -> int:
    """Write the files of a shard; return how many tokens there are with it, `written` of them before."""
    path.mkdir()
    columns: dict[str, list[np.ndarray]] = {name: [] for name in TOKEN_COLUMNS}
    sums, count, place = [_Norms() for _ in layers], 0, Place({})
    with ExitStack() as stack:
        files = [stack.enter_context(RowsFile(path / layer_file(layer))) for layer in layers]
        for kept in parts:
            for file, norms, rows_ND, norms_N in zip(files, sums, kept.rows_MND, kept.norms_MN, strict=True):
                file.append(rows_ND)
                norms.add(norms_N)
            for name, column in kept.columns.items():
                columns[name].append(column)
            count, place = count + len(kept), kept.place
            report(written + count)
    write_file(path / TOKENS_FILE, ((name, (count,), TOKEN_COLUMNS[name]) for name in columns), map(np.concatenate, columns.values()))
    content = {"tokens": count, "place": asdict(place), "norms": [norms.plain() for norms in sums]}
    (path / SHARD_FILE).write_text(json.dumps(plain(content)) + "\n", encoding="utf-8")
    return written + count


class _Norms:
    """Sum of squares and histogram of norms, from which mean and median over many shards are made."""

    def __init__(self) -> None:
        self.count, self.squares = 0, 0.0
        self.bins = np.zeros(2 * _OCTAVES * _BINS, np.int64)

    def add(self, norms_N: np.ndarray) -> None:
        norms = norms_N.astype(np.float64)
        smallest = 2.0**-_OCTAVES
        places = np.floor((np.log2(np.maximum(norms, smallest)) + _OCTAVES) * _BINS).astype(np.int64)
        self.count, self.squares = self.count + len(norms), self.squares + float(np.sum(np.square(norms)))
        self.bins += np.bincount(np.minimum(places, len(self.bins) - 1), minlength=len(self.bins))

    def plain(self) -> dict[str, Any]:
        filled = np.flatnonzero(self.bins)
        return {"count": self.count, "squares": self.squares, "bins": {int(place): int(self.bins[place]) for place in filled}}

    def add_plain(self, found: Mapping[str, Any]) -> None:
        self.count, self.squares = self.count + found["count"], self.squares + found["squares"]
        for place, count in found["bins"].items():
            self.bins[int(place)] += count

    def statistics(self) -> dict[str, float]:
        """Mean squared norm, and the middle of the bin that the median lies in."""
        place = int(np.searchsorted(np.cumsum(self.bins), (self.count + 1) // 2))
        return {"mean_squared_norm": self.squares / self.count, "median_norm": 2.0 ** ((place + 0.5) / _BINS - _OCTAVES)}


def _check(model: LanguageModel, tokens: TokenStream, config: CacheConfig) -> None:
    if (processes := jax.process_count()) > 1:
        raise ConfigError(f"activations are cached by one process, this one is of {processes}; run one process for each part of the documents")
    if tokens.lanes != 1:
        raise ConfigError(f"the tokens come in {tokens.lanes} lanes, of which the shortest would end the cache; expected lanes = 1")
    axes = model.mesh.shape
    if tokens.shape[0] % (axes["data"] * axes["fsdp"]):
        raise ConfigError(f"the model's batch has {tokens.shape[0]} rows, expected a multiple of data={axes['data']} times fsdp={axes['fsdp']}")
    for layer in config.layers:
        model.check_layer(layer)


def _plan(model: LanguageModel, tokens: TokenStream, config: CacheConfig, data: Mapping[str, Any] | None) -> dict[str, Any]:
    folder = model.source.folder if model.source else None
    return {
        "source": str(folder.resolve()) if folder else model.name,
        "revision": _revision(model),
        "source_files": source_fingerprint(folder) if folder else {},
        "model_dtype": model.config.dtype,
        "data": dict(data or {}),
        "stream": dict(tokens.get_state().cursor),
        **asdict(config),
    }


def _revision(model: LanguageModel) -> str | None:
    """The commit of a model from the hub, whose branches move; None for a folder, which `source_fingerprint` tells from others."""
    if model.source is None or model.source.folder is not None:
        return None
    return model.source.path("config.json").parent.name  # snapshots/{commit}/config.json in the hub's cache


def _resumed(folder: ResumableFolder) -> tuple[int, Place]:
    """Tokens in the whole shards of an earlier run, and the place after them; what follows a gap is made again."""
    written, shard, place = 0, 0, Place({})
    while folder.done(shard_name(shard)):
        found = read_json(folder.path / shard_name(shard) / SHARD_FILE)
        written, shard, place = written + found["tokens"], shard + 1, Place(**found["place"])
    return written, place


def _check_space(folder: ResumableFolder, needed: int) -> None:
    free = shutil.disk_usage(folder.path).free
    if needed > free:
        raise SourceError(
            f"{folder.target}: {needed / 1e9:,.1f} GB more are needed and {free / 1e9:,.1f} GB are free; free some space, or lower max_tokens"
        )


def _facts(folder: ResumableFolder, model: LanguageModel, config: CacheConfig, after: Place) -> dict[str, Any]:
    """What the manifest says besides plan and files."""
    norms, tokens, shard = [_Norms() for _ in config.layers], 0, 0
    while folder.done(shard_name(shard)):
        found = read_json(folder.path / shard_name(shard) / SHARD_FILE)
        tokens, shard = tokens + found["tokens"], shard + 1
        for layer, sums in zip(norms, found["norms"], strict=True):
            layer.add_plain(sums)
    return {
        "format": FORMAT,
        "format_version": VERSION,
        "model": model.name,
        "revision": _revision(model),
        "layers": config.layers,
        "d_model": model.config.d_model,
        "dtype": config.disk_dtype(model.config.dtype),
        "tokens": tokens,
        "shard_tokens": config.shard_tokens,
        "seen_tokens": after.seen,
        "dropped_tokens": after.dropped,
        "damaged_tokens": after.damaged,
        "filter": {"max_norm_multiple": config.max_norm_multiple, "drop_first": config.drop_first},
        "statistics": {layer: sums.statistics() for layer, sums in zip(config.layers, norms, strict=True)},
        "statistics_note": f"of the rows on disk; median_norm is the middle of a bin of a histogram with {_BINS} bins an octave, the mean is exact",
    }
