"""What models scored on benchmarks: a table of scores, and which samples each model got right."""

import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from qscope_jax.data.benchmark_files import Benchmark
from qscope_jax.data.tables import load_table
from qscope_jax.errors import InputError, SourceError

_NO_NUMBER = ("", "na", "n/a", "nan", "none", "null", "-")


@dataclass(frozen=True, eq=False)
class ScoreTable:
    """Scores of M models on B benchmarks.

    Attributes:
        name: Where they are from, for messages.
        models: Names of the models.
        benchmarks: Names of the benchmarks.
        values: The scores [M, B]; NaN where a model has none.
    """

    name: str
    models: tuple[str, ...]
    benchmarks: tuple[str, ...]
    values: Float[np.ndarray, "M B"]

    def columns(self, benchmarks: Sequence[str]) -> Float[np.ndarray, "M C"]:
        """The scores of some benchmarks.

        Raises:
            InputError: there is no such benchmark; those that are there are named.
        """
        for benchmark in benchmarks:
            if benchmark not in self.benchmarks:
                raise InputError(f"{self.name}: has no scores of benchmark {benchmark!r}; it has {', '.join(map(repr, self.benchmarks)) or 'none'}")
        return self.values[:, [self.benchmarks.index(benchmark) for benchmark in benchmarks]]


@dataclass(frozen=True, eq=False)
class Correctness:
    """Which of a benchmark's N samples each of M models got right."""

    models: tuple[str, ...]
    correct: Bool[np.ndarray, "M N"]


def load_scores(path: str | Path, *, model_column: str = "model") -> ScoreTable:
    """Read a table of scores: a row for each model, a column for each benchmark; an empty cell is a missing score.

    Args:
        path: A `.csv`, `.jsonl` or `.parquet` file.
        model_column: Column of the model's name.

    Raises:
        SourceError: the file is missing or damaged.
        InputError: there is no column of models, a model is there twice, or a score is no number.
    """
    table = load_table(path)
    models = table.classes(model_column)
    if twice := next((model for index, model in enumerate(models) if model in models[:index]), None):
        raise InputError(f"{path}: has two rows of model {twice!r}; expected one row a model")
    benchmarks = tuple(dict.fromkeys(key for row in table.rows for key in row if key and key != model_column))
    if not benchmarks:
        raise InputError(f"{path}: has no column but {model_column!r}; expected a column of scores for each benchmark")
    values = [[_score(row.get(name), f"{path} {place}", name) for name in benchmarks] for row, place in zip(table.rows, table.places, strict=True)]
    return ScoreTable(str(path), tuple(models), benchmarks, np.array(values, np.float64))


def load_correctness(path: str | Path) -> dict[str, Correctness]:
    """Read which samples models got right.

    Args:
        path: A `.jsonl` or `.parquet` file of rows `{"benchmark", "model", "correct": [0, 1, ...]}`, or a `.npz` file with an array [M, N] of
            0 and 1 for each benchmark and, if models are to have names, an array `models`.

    Raises:
        SourceError: the file is missing or damaged.
        InputError: columns are missing, values are not 0 and 1, or models of a benchmark answered different numbers of samples.
    """
    if Path(path).suffix.lower() == ".npz":
        return _npz_correctness(Path(path).expanduser())
    table = load_table(path)
    benchmarks, models, answers = table.classes("benchmark"), table.classes("model"), table.column("correct")
    rows: dict[str, dict[str, np.ndarray]] = {}
    for benchmark, model, answer, place in zip(benchmarks, models, answers, table.places, strict=True):
        own = rows.setdefault(benchmark, {})
        if model in own:
            raise InputError(f"{path} {place}: has model {model!r} on benchmark {benchmark!r} a second time; expected one row for each")
        own[model] = _bits(answer, f"{path} {place}")
    return {benchmark: _joined(str(path), benchmark, own) for benchmark, own in rows.items()}


def accuracy_table(correctness: Mapping[str, Correctness], name: str = "accuracies") -> ScoreTable:
    """Scores as the shares of samples that models got right."""
    models = tuple(dict.fromkeys(model for one in correctness.values() for model in one.models))
    values = np.full((len(models), len(correctness)), math.nan)
    for column, one in enumerate(correctness.values()):
        values[[models.index(model) for model in one.models], column] = one.correct.mean(axis=1)
    return ScoreTable(name, models, tuple(correctness), values)


def answers_of(benchmark: Benchmark, correctness: Correctness) -> Bool[np.ndarray, "M N"]:
    """The answers to the prompts of a benchmark that were read: models may have answered all rows of its source, or those prompts alone.

    Raises:
        InputError: they answered another number of samples.
    """
    samples = correctness.correct.shape[1]
    if samples not in (benchmark.total, len(benchmark.prompts)):
        few = f" or the {len(benchmark.prompts):,} that were read" if len(benchmark.prompts) != benchmark.total else ""
        raise InputError(f"models answered {samples:,} samples of benchmark {benchmark.name}; expected its {benchmark.total:,} rows{few}")
    return correctness.correct[:, list(benchmark.rows)] if samples == benchmark.total else correctness.correct


def _score(value: Any, where: str, column: str) -> float:
    if value is None or (isinstance(value, str) and value.strip().lower() in _NO_NUMBER):
        return math.nan
    try:
        number = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else None
    except ValueError:
        number = None
    if number is None or math.isinf(number):
        raise InputError(f"{where}: column {column} holds {value!r}, expected a score; leave a missing one empty")
    return number


def _bits(answer: Any, where: str) -> np.ndarray:
    values = np.asarray(answer) if isinstance(answer, list) and answer else np.zeros(0, object)
    if values.ndim != 1 or not len(values) or values.dtype.kind not in "biuf" or not np.isin(values, (0, 1)).all():
        raise InputError(f"{where}: column correct holds something else than a list of 0 and 1, one for each sample; mend the row")
    return values.astype(bool)


def _joined(path: str, benchmark: str, own: Mapping[str, np.ndarray]) -> Correctness:
    lengths = {model: len(answer) for model, answer in own.items()}
    if len(set(lengths.values())) > 1:
        (a, n), (b, m) = min(lengths.items(), key=lambda item: item[1]), max(lengths.items(), key=lambda item: item[1])
        raise InputError(f"{path}: on benchmark {benchmark!r}, {a!r} answered {n} samples and {b!r} {m}; expected the same samples of all models")
    return Correctness(tuple(own), np.stack(list(own.values())))


def _npz_correctness(path: Path) -> dict[str, Correctness]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise SourceError(f"{path}: is not a .npz file of plain arrays ({error}); write it with numpy.savez") from error
    names = arrays.pop("models", None)
    found = {}
    for benchmark, array in arrays.items():
        if array.ndim != 2 or not array.size or array.dtype.kind not in "biuf" or not np.isin(array, (0, 1)).all():
            raise InputError(f"{path}: array {benchmark!r} of shape {list(array.shape)} is not one of models by samples that holds 0 and 1")
        models = tuple(map(str, names.tolist() if names is not None else range(len(array))))
        if len(models) != len(array):
            raise InputError(f"{path}: array {benchmark!r} has {len(array)} rows and `models` {len(models)} names; expected as many")
        found[benchmark] = Correctness(models, array.astype(bool))
    if not found:
        raise InputError(f"{path}: holds no benchmark; expected an array of models by samples for each")
    return found
