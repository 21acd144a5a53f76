"""Benchmarks as lists of prompts: the report's 17 by name, or any file or hub dataset with a column of text."""

import contextlib
import itertools
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qscope_jax.data.benchmark_adapters import ADAPTERS, EVERY, Adapter, find_adapter
from qscope_jax.data.tables import Table, load_table
from qscope_jax.data.texts import check_column, first_line, hub_errors
from qscope_jax.errors import InputError, SourceError

HUB = "hub:"


@dataclass(frozen=True)
class Benchmark:
    """A benchmark's prompts.

    Attributes:
        name: The benchmark.
        prompts: What a model is asked, none of it blank.
        rows: Which row of the source each prompt is of, to find what models answered there.
        total: Rows of the source.
    """

    name: str
    prompts: tuple[str, ...]
    rows: tuple[int, ...]
    total: int

    @property
    def repeated(self) -> int:
        """Prompts that occurred before, word by word."""
        return len(self.prompts) - len(set(self.prompts))


def load_benchmark(
    name: str,
    source: str = "",
    *,
    column: str = "text",
    split: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    suffix: str = "",
) -> Benchmark:
    """Read a benchmark.

    Args:
        name: Its name. For one of the report's 17, rows with the columns of its public data set become prompts by its adapter.
        source: A `.jsonl`, `.json`, `.parquet` or `.csv` file, a folder (of a benchmark that is several files), or a dataset on the hub,
            `hub:owner/name`, with `:configuration` and `@split` if need be. Empty for the public data set of one of the 17.
        column: Column of the prompt where the name is none of the 17, or its rows have other columns.
        split: Split of a hub dataset; by default the benchmark's own, or `test`.
        limit: Read at most so many rows, drawn at random from all.
        seed: Of the draw.
        suffix: Text at the end of every prompt, such as a line `Answer:`. What is common to all benchmarks makes them look alike.

    Raises:
        SourceError: there is no such source, or it is damaged or empty.
        InputError: columns are missing, or `limit` is below 1.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; expected 1 row or more")
    adapter = find_adapter(name)
    table = _load(name, source, adapter, split)
    prompts = _prompts(table, adapter, column)
    rows = [index for index, prompt in enumerate(prompts) if prompt.strip()]
    if not rows:
        raise SourceError(f"{source or name}: holds no prompt, all {len(table)} rows are blank; check the source and the column")
    return draw_prompts(Benchmark(name, tuple(prompts[row] + suffix for row in rows), tuple(rows), len(table)), limit, seed)


def draw_prompts(benchmark: Benchmark, limit: int | None, seed: int = 0) -> Benchmark:
    """The benchmark with at most `limit` of its prompts, drawn at random, in their order."""
    if limit is None or limit >= len(benchmark.prompts):
        return benchmark
    chosen = sorted(np.random.default_rng(seed).choice(len(benchmark.prompts), limit, replace=False).tolist())
    prompts, rows = (tuple(column[i] for i in chosen) for column in (benchmark.prompts, benchmark.rows))
    return Benchmark(benchmark.name, prompts, rows, benchmark.total)


def group_texts(texts: Sequence[str], names: Sequence[Any]) -> dict[str, Benchmark]:
    """Texts of several benchmarks, with the name of each text's benchmark; rows are counted within a benchmark."""
    grouped: dict[str, list[str]] = {}
    for text, name in zip(texts, names, strict=True):
        grouped.setdefault(str(name), []).append(text)
    return {name: Benchmark(name, tuple(own), tuple(range(len(own))), len(own)) for name, own in grouped.items()}


def shared_prompts(benchmarks: Sequence[Benchmark]) -> dict[tuple[str, str], int]:
    """Prompts that two benchmarks have in common, word by word, for the pairs that have any."""
    prompts = [set(one.prompts) for one in benchmarks]
    pairs = itertools.combinations(range(len(benchmarks)), 2)
    return {(benchmarks[i].name, benchmarks[j].name): shared for i, j in pairs if (shared := len(prompts[i] & prompts[j]))}


def split_source(source: str, split: str) -> tuple[str, str]:
    """`hub:owner/name:configuration@split` as the name that `load_table` takes, and the split."""
    name, found, own = source.removeprefix(HUB).rpartition("@") if source.startswith(HUB) else (source, "", "")
    return (name, own) if found and name else (source.removeprefix(HUB), split)


def _load(name: str, source: str, adapter: Adapter | None, split: str | None) -> Table:
    if not source and adapter is None:
        raise InputError(f"benchmark {name!r} needs a source, NAME=FILE or NAME=hub:OWNER/DATASET; those known by name are {', '.join(ADAPTERS)}")
    if not source:
        assert adapter is not None
        if not adapter.sources:
            raise InputError(f"{adapter.title} is no dataset of the hub; download its files and give their folder, {name}=FOLDER")
        return _joined(name, [table for one in adapter.sources for table in _public_tables(one, adapter, split or adapter.split)])
    if Path(source).expanduser().is_dir():
        if adapter is None or not adapter.files:
            raise SourceError(f"{source}: is a folder, expected a file for benchmark {name!r}")
        return _joined(source, _file_tables(Path(source).expanduser(), adapter))
    dataset, split = split_source(source, split or (adapter.split if adapter else "test"))
    return load_table(dataset, split=split)


def _prompts(table: Table, adapter: Adapter | None, column: str) -> list[str]:
    """By the adapter where the rows are of its kind, else the column."""
    first = table.rows[0]
    if adapter is not None and (adapter.fits(first) or column not in first):
        return [adapter.prompt(row, f"{table.name} {place}") for row, place in zip(table.rows, table.places, strict=True)]
    return table.texts(column)


def _public_tables(source: str, adapter: Adapter, split: str) -> list[Table]:
    """The public data set: its files as they are, or one table for each of its configurations."""
    repository, _, configuration = source.partition(":")
    if adapter.files:
        return _file_tables(_download(repository, adapter), adapter)
    if configuration != EVERY:
        return [load_table(source, split=split)]
    import datasets

    with hub_errors(repository, split):
        names = datasets.get_dataset_config_names(repository)
    return [load_table(f"{repository}:{name}", split=split) for name in names]


def _download(repository: str, adapter: Adapter) -> Path:
    import huggingface_hub

    wanted = [adapter.archive] if adapter.archive else [*adapter.files, *([f"*/{adapter.lookup[0]}"] if adapter.lookup else [])]
    try:
        return Path(huggingface_hub.snapshot_download(repository, repo_type="dataset", allow_patterns=wanted))
    except Exception as error:  # the hub and its HTTP library have errors of their own
        raise SourceError(
            f"{repository}: its files cannot be loaded from the hub ({first_line(error)}); download them and give their folder"
        ) from error


def _file_tables(folder: Path, adapter: Adapter) -> list[Table]:
    """The files of a benchmark that is several, by name, each with what it looks up in a second file of its folder."""
    with _unpacked(folder, adapter.archive) as root:
        paths = sorted({path for pattern in adapter.files for path in root.rglob(pattern) if path.is_file()})
        if not paths:
            raise SourceError(f"{folder}: has no files {', '.join(adapter.files)}, which {adapter.title} consists of; give the folder that has")
        return [_with_lookup(load_table(path), path, adapter) for path in paths]


@contextlib.contextmanager
def _unpacked(folder: Path, archive: str) -> Iterator[Path]:
    """The folder, or for as long as it is needed what its archive holds."""
    if not archive or not (folder / archive).is_file():
        yield folder
        return
    with tempfile.TemporaryDirectory() as scratch:
        try:
            with zipfile.ZipFile(folder / archive) as file:
                file.extractall(scratch)
        except (zipfile.BadZipFile, OSError) as error:
            raise SourceError(f"{folder / archive}: is not a complete zip file ({first_line(error)}); get it again") from error
        yield Path(scratch)


def _with_lookup(table: Table, path: Path, adapter: Adapter) -> Table:
    if adapter.lookup is None:
        return table
    file, here, there = adapter.lookup
    second = load_table(path.with_name(file))
    by_key = dict(zip(map(str, second.column(there)), second.rows, strict=True))
    rows: list[Mapping[str, Any]] = []
    for row, place in zip(table.rows, table.places, strict=True):
        check_column(f"{path} {place}", here, list(row))
        if str(row[here]) not in by_key:
            raise SourceError(f"{path} {place}: names {here} {row[here]!r}, which {second.name} lacks; get both files again")
        rows.append({**by_key[str(row[here])], **row})
    return Table(table.name, tuple(rows), table.places)


def _joined(name: str, tables: Sequence[Table]) -> Table:
    """One table of several, whose places name the table."""
    places = tuple(f"{table.name} {place}" if len(tables) > 1 else place for table in tables for place in table.places)
    return Table(tables[0].name if len(tables) == 1 else name, tuple(row for table in tables for row in table.rows), places)
