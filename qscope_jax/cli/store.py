"""`qscope store`: write the features of a corpus to disk."""

import itertools
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qscope_jax.cli.options import Integers, Texts, check_at_least
from qscope_jax.cli.progress import token_progress
from qscope_jax.cli.results import check_writable
from qscope_jax.cli.sources import TINY, SAEOptions, check_layers, open_model, open_saes

if TYPE_CHECKING:
    from qscope_jax.features.store.feature_store import FeatureStore


@dataclass(frozen=True, kw_only=True)
class Config(SAEOptions):
    """Read a corpus once and keep its features, for explain, classify and benchmarks. The same command resumes what was interrupted."""

    data: str
    """Texts: a .jsonl, .parquet, .csv or .txt file, a hub dataset, or `tiny` for the embedded corpus' sentences."""
    out: str
    """Folder of the store; appears when it is complete."""
    layers: Integers | None = None
    """Layers: 3 or 2,4-5; by default all that have an SAE. Their SAEs are in memory together."""
    column: str = "text"
    """Column or key that holds the text."""
    columns: Texts | None = None
    """Columns to keep besides, such as language or source; by default those that hold text, numbers or booleans."""
    split: str = "train"
    """Split of a hub dataset."""
    limit: int | None = None
    """Read at most so many rows."""
    codes: bool = True
    """Keep the code of every token; contexts need it."""
    streams: bool = False
    """Keep the mean and last residual stream of every text; baselines of classify need it."""
    dictionary: int = 10
    """Tokens promoted and suppressed, and nearest directions, kept of every feature; 0 finds none."""
    max_length: int = 256
    """Tokens of a text that are read; longer texts are cut."""
    batch_size: int = 16
    """Rows of max_length tokens that the model reads at a time; texts share rows."""
    shard_tokens: int = 65_536
    """Tokens of a shard; an interruption loses at most two."""
    keep_first: bool = False
    """Count the first token of a text too."""
    max_norm_multiple: float = 10.0
    """Leave tokens out whose residual norm exceeds this multiple of the median; 0 counts all."""
    overwrite: bool = False
    """Replace a store that is in the folder."""
    progress: bool = True
    """Show a progress bar with the rate."""


def run(config: Config) -> dict[str, Any]:
    """Write the store; returns counts, bytes and rate."""
    from qscope_jax.features.store.store_writer import StoreConfig, write_store

    check_at_least(config, 1, "limit")
    settings = StoreConfig(
        max_length=config.max_length, batch_size=config.batch_size, shard_tokens=config.shard_tokens, codes=config.codes, streams=config.streams,
        dictionary=config.dictionary, drop_first=not config.keep_first, max_norm_multiple=config.max_norm_multiple,
    )  # fmt: skip
    check_writable(config.out, folder=True)
    rows = _rows(config)
    model = open_model(config.model, config.dtype, config.mesh)
    saes = open_saes(config.sae, model)
    chosen = [saes[layer] for layer in check_layers(saes, config.layers, model)]
    start = time.monotonic()
    with token_progress("reading", None, config.progress) as advance:
        store = write_store(
            model, chosen, rows, config.out, settings, columns=config.columns, sae_name=saes.source, data=_described(config),
            overwrite=config.overwrite, report=lambda texts, tokens: advance(tokens),
        )  # fmt: skip
    return _show(store, time.monotonic() - start)


def _rows(config: Config) -> Iterator[str | Mapping[str, Any]]:
    """The corpus, read as it is asked for, its text under `text`."""
    if config.data == TINY:
        from qscope_jax.demo.corpus import LANGUAGES, topics

        rows = ({"text": line, "language": code, "topic": topic.name} for code in LANGUAGES for topic in topics(code) for line in topic.train)
        return itertools.islice(rows, config.limit)
    if Path(config.data).suffix.lower() == ".txt" or Path(config.data).is_dir():
        from qscope_jax.data.texts import load_texts

        return iter(load_texts(config.data, column=config.column, limit=config.limit))
    from qscope_jax.data.tables import stream_rows
    from qscope_jax.data.texts import check_column

    def renamed() -> Iterator[Mapping[str, Any]]:
        for place, row in stream_rows(config.data, split=config.split, limit=config.limit):
            check_column(f"{config.data} {place}", config.column, list(row))
            yield {"text": row[config.column], **{name: value for name, value in row.items() if name not in ("text", config.column)}}

    return renamed()


def _described(config: Config) -> dict[str, Any]:
    """What the corpus is, for telling whether an unfinished store is of the same."""
    from qscope_jax.data.resumable import source_fingerprint

    return {name: getattr(config, name) for name in ("data", "column", "split", "limit")} | {"files": source_fingerprint(Path(config.data))}


def _show(store: "FeatureStore", seconds: float) -> dict[str, Any]:
    from qscope_jax.report.terminal import print_kv, print_table

    size = sum(path.stat().st_size for path in store.folder.rglob("*") if path.is_file())
    total = store.facts["total"]
    result = {"texts": store.num_texts, "tokens": store.num_tokens, "blank": total["blank"], "cut": total["cut"], "columns": list(store.columns),
              "shards": len(store.shard_texts), "bytes": size, "seconds": seconds}  # fmt: skip
    print_kv({**result, "columns": ", ".join(store.columns) or "none"}, title=str(store.folder))
    print()
    rows = [(str(layer), store.num_features[layer], store.k[layer], store.facts["counted_tokens"][str(layer)]) for layer in store.layers]
    print_table(("layer", "features", "k", "counted tokens"), rows)
    return {**result, "layers": list(store.layers), "store": str(store.folder)}
