"""A page for a training run, made from the metrics and options in its folder."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jaxtyping import Float, Int

from qscope_jax.errors import SourceError
from qscope_jax.report.evaluation_page import MOST_LINES, Metrics, add_evaluation, layer_figure
from qscope_jax.report.figures import curves
from qscope_jax.report.number_format import format_number
from qscope_jax.report.page import Page
from qscope_jax.sae.probing import ProbingResult

PAGE = "page.html"

_MOST_POINTS = 400
_MOST_COLUMNS = 100
_LOG_SPAN = 5.0
_TITLES = {
    "loss": "Loss", "fvu": "FVU", "l0": "L0", "dead": "Dead features", "aux": "AuxK loss",
    "gradient_norm": "Gradient norm", "learning_rate": "Learning rate", "fvu_all": "FVU, all tokens", "cossim": "Cosine",
    "dead_fraction": "Silent features",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Series:
    """A metric over a run.

    Attributes:
        steps: Steps at which it was written.
        values: A value for each step and layer; one column where the metric is one number. NaN where it was not finite.
        by_layer: Whether columns are layers.
    """

    steps: Int[np.ndarray, " S"]
    values: Float[np.ndarray, "S M"]
    by_layer: bool


@dataclass(frozen=True, eq=False)
class Run:
    """What a run's folder says.

    Attributes:
        config: Options of the run; empty where it has no `config.yaml`.
        training: Metrics of training steps, by name.
        held_out: Metrics of evaluations, by name.
        layers: Layers, in the order of metrics by layer.
        seeds: Seeds of the SAEs of a layer; with several, training metrics hold an entry for each layer and seed, seeds fastest.
    """

    config: dict[str, Any]
    training: dict[str, Series]
    held_out: dict[str, Series]
    layers: tuple[int, ...]
    seeds: tuple[int, ...] = (0,)

    def names(self, columns: int) -> list[str]:
        """What the columns of a metric by layer stand for."""
        if columns == len(self.layers):
            return [str(layer) for layer in self.layers]
        named = [f"{layer}, seed {seed}" for layer in self.layers for seed in self.seeds]
        return named if columns == len(named) else [str(place) for place in range(columns)]


def write_run_page(
    run_dir: str | os.PathLike[str],
    evaluation: Metrics | None = None,
    *,
    path: str | os.PathLike[str] | None = None,
    probing: Mapping[int, ProbingResult] | None = None,
) -> Path:
    """Write the page of a training run.

    Args:
        run_dir: Folder of the run: `metrics.jsonl` and, where a verb made it, `config.yaml`.
        evaluation: Results of `evaluate_sae` on what was trained, by layer.
        path: The HTML file; by default `page.html` in the folder.
        probing: Results of `probe_saes`.

    Raises:
        SourceError: the folder holds no metrics, they are damaged, or the page cannot be written.
    """
    folder = Path(run_dir).expanduser()
    run = read_run(folder)
    page = Page(f"Training run {folder.resolve().name}", _subtitle(run))
    for title, series in (("Held-out texts", run.held_out), ("Training", run.training)):
        if series:
            page.heading(title)
            _add_last(page, run, series)
            moving = [name for name in sorted(series, key=_rank) if not _is_constant(series[name])]
            for name in moving:
                page.figure(_figure(name, series[name], run))
            if still := [name for name in sorted(series, key=_rank) if name not in moving]:
                page.text("The same throughout: " + ", ".join(f"{_title(name)} {format_number(series[name].values.flat[0])}" for name in still) + ".")
    if evaluation:
        add_evaluation(page, evaluation, probing)
    if run.config:
        page.heading("Options of the run")
        page.table(("option", "value"), [(name, _shown(value)) for name, value in run.config.items()], align=["left", "left"])
    return page.write(folder / PAGE if path is None else path)


def read_run(run_dir: str | os.PathLike[str]) -> Run:
    """Read a run's metrics and options; a last line that is still being written is left out.

    Raises:
        SourceError: there are no metrics, or a file is damaged.
    """
    folder = Path(run_dir).expanduser()
    lines = _read_lines(folder / "metrics.jsonl")
    config = _read_config(folder / "config.yaml")
    training, held_out = (_series([line for line in lines if bool(line.get("held_out")) == wanted]) for wanted in (False, True))
    width = max((one.values.shape[1] for one in (*training.values(), *held_out.values()) if one.by_layer), default=0)
    count, first = config.get("num_seeds") or 1, config.get("seed") or 0
    seeds = tuple(range(first, first + count)) if isinstance(first, int) and isinstance(count, int) and width % count == 0 else (0,)
    named = config.get("layers")
    layers = tuple(named) if isinstance(named, list) and len(named) in (width, width // len(seeds)) else tuple(range(width // len(seeds)))
    return Run(config, training, held_out, layers, seeds)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    try:
        texts = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise SourceError(f"{path}: cannot be read ({reason}); give the folder of a training run") from error
    lines = []
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
            steps = line["step"] + 0
        except (ValueError, KeyError, TypeError) as error:
            if number == len(texts) and isinstance(error, ValueError):
                break
            raise SourceError(f"{path} line {number}: is not a line of metrics with a step; mend or remove it") from error
        lines.append({**line, "step": int(steps)})
    if not lines:
        raise SourceError(f"{path}: holds no metrics yet; wait until the run has logged a step")
    return lines


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise SourceError(f"{path}: is not readable YAML; mend or remove it") from error
    return config if isinstance(config, dict) else {}


def _series(lines: list[dict[str, Any]]) -> dict[str, Series]:
    """Metrics by name: numbers, and lists of numbers of one length."""
    found: dict[str, Series] = {}
    for name in dict.fromkeys(name for line in lines for name in line if name not in ("step", "held_out")):
        there = [line for line in lines if name in line and _is_metric(line[name])]
        if not there:
            continue
        rows = [line[name] if isinstance(line[name], list) else [line[name]] for line in there]
        if len({len(row) for row in rows}) == 1:
            steps = np.array([line["step"] for line in there], np.int64)
            found[name] = Series(steps, np.array(rows, float).reshape(len(rows), -1), isinstance(there[0][name], list))
    return found


def _is_metric(value: Any) -> bool:
    """Whether it is a number or a list of them; null is a number that was not finite."""
    if isinstance(value, list):
        return bool(value) and all(not isinstance(item, list) and _is_metric(item) for item in value)
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _is_constant(series: Series) -> bool:
    return len(series.steps) > 1 and bool(np.all(series.values == series.values.flat[0]))


def _figure(name: str, series: Series, run: Run) -> Any:
    steps, values = _thinned(series, _MOST_COLUMNS if series.values.shape[1] > MOST_LINES else _MOST_POINTS)
    finite = values[np.isfinite(values)]
    log = bool(finite.size and finite.min() > 0 and finite.max() > _LOG_SPAN * finite.min())
    title = _title(name)
    if series.by_layer:
        return layer_figure(run.names(values.shape[1]), steps.tolist(), values.T.tolist(), title=title, x_title="step", value=title, log=log)
    return curves(steps.tolist(), {title: values[:, 0].tolist()}, title=title, x_title="step", y_title="", log_y=log)


def _thinned(series: Series, most: int) -> tuple[np.ndarray, np.ndarray]:
    """At most so many points: means of neighbours, at the last step of each group."""
    if len(series.steps) <= most:
        return series.steps, series.values
    groups = np.array_split(np.arange(len(series.steps)), most)
    finite = np.isfinite(series.values)
    sums = np.array([np.where(finite, series.values, 0)[group].sum(axis=0) for group in groups])
    counts = np.array([finite[group].sum(axis=0) for group in groups])
    return np.array([series.steps[group[-1]] for group in groups]), np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _add_last(page: Page, run: Run, found: dict[str, Series]) -> None:
    """A table of where each layer ended."""
    last = {name: series.values[-1] for name, series in found.items() if series.by_layer}
    width = max(map(len, last.values()), default=0)
    names = sorted((name for name, values in last.items() if len(values) == width), key=_rank)
    rows = [(layer, *(float(last[name][row]) for name in names)) for row, layer in enumerate(run.names(width))]
    if rows:
        page.table(("layer", *map(_title, names)), rows, caption=f"At step {_last_step(found):,}")


def _last_step(found: dict[str, Series]) -> int:
    return max(int(series.steps[-1]) for series in found.values())


def _subtitle(run: Run) -> str:
    every = {**run.held_out, **run.training}
    parts = [f"{_last_step(every):,} steps"]
    parts += [f"{len(run.layers)} layers"] if len(run.layers) > 1 else []
    parts += [f"{name} {run.config[name]}" for name in ("model", "data") if run.config.get(name)]
    return ", ".join(parts)


def _title(name: str) -> str:
    return _TITLES.get(name, name.replace("_", " "))


def _rank(name: str) -> int:
    return list(_TITLES).index(name) if name in _TITLES else len(_TITLES)


def _shown(value: Any) -> str | None:
    """An option as its file has it, on one line."""
    return None if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
