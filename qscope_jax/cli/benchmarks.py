"""`qscope benchmarks`: what benchmarks measure, and which of them to keep."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from qscope_jax.cli.options import Integers, Texts, check_at_least, positional, same_named
from qscope_jax.cli.results import check_writable, write_result
from qscope_jax.cli.sources import TINY, SAEOptions, open_model, open_saes, sae_groups
from qscope_jax.errors import ConfigError, InputError

if TYPE_CHECKING:
    from scipy.sparse import csr_array

    from qscope_jax.data.benchmark_files import Benchmark
    from qscope_jax.data.benchmark_scores import Correctness, ScoreTable
    from qscope_jax.features.benchmarks.benchmark_comparison import BenchmarkComparison, ComparisonConfig


@dataclass(frozen=True, kw_only=True)
class Config(SAEOptions):
    """Compare benchmarks by the features that their prompts light up, and say which to keep, merge or drop."""

    benchmarks: Texts = positional(())
    """NAME=FILE or NAME=hub:OWNER/DATASET:CONFIGURATION@SPLIT; NAME alone of a known benchmark, such as gsm8k, or of one in --store; or `tiny`, for
    the embedded model's tasks and what its checkpoints answered."""
    text_column: str = "text"
    """Column of the prompt, where rows are not those of a known benchmark."""
    split: str | None = None
    """Split of hub datasets, by default each benchmark's own."""
    limit: Texts | None = None
    """Read at most so many prompts of each benchmark, drawn at random: N, or NAME=N for one."""
    suffix: str = ""
    """Text at the end of every prompt, such as a line `Answer:`."""
    store: str = ""
    """Feature store to take the texts and their features from, instead of benchmarks, model and SAEs."""
    column: str = "benchmark"
    """Column of the store that names the benchmark of a text."""
    layers: Integers = ()
    """Layers, such as 14 or 7,14,21; by default the middle one."""
    batch_size: int = 16
    """Prompts in a forward pass."""
    sequence_length: int = 2048
    """Of longer prompts, read so many tokens at the end."""
    scores: str = ""
    """Scores of models (.csv, .jsonl or .parquet): a row for each model, a column for each benchmark."""
    model_column: str = "model"
    """Column of the scores that names the model."""
    correct: str = ""
    """Which samples models got right: .jsonl rows with benchmark, model and correct (a list of 0 and 1), or .npz. Without scores, gives them too."""
    control: str | None = None
    """Benchmark among the scores whose share is taken out of the others, such as mmlu."""
    least_samples: int = 10
    """Samples that a benchmark needs."""
    equal_samples: int | None = None
    """Samples that benchmarks are cut down to where sizes must be equal, by default those of the smallest."""
    subsets: int = 200
    """Random subsets of each size for the redundancy of performance."""
    least_models: int = 5
    """Models that a comparison of scores needs."""
    resample: Literal["benchmarks", "pairs"] = "benchmarks"
    """What intervals of correlations over pairs resample."""
    resamples: int = 2000
    """Bootstrap resamples of intervals."""
    confidence: float = 0.95
    """Of the intervals."""
    drop_covered: float = 0.9
    """Drop a benchmark of whose features this share is in others."""
    merge_overlap: float = 0.6
    """Merge benchmarks whose overlap_min is at least this."""
    similar: float = 0.8
    """Drop and merge only where scores correlate at least this much."""
    seed: int = 0
    """Seed of all draws."""
    page: str = ""
    """HTML file for tables, heat maps and clusters."""
    out: str = ""
    """JSON file for all numbers."""


def run(config: Config) -> dict[str, Any]:
    """Compare; returns the comparison at each layer."""
    from qscope_jax.data.benchmark_files import shared_prompts
    from qscope_jax.features.benchmarks.benchmark_comparison import check_comparison, compare_benchmarks

    check_at_least(config, 1, "batch_size", "sequence_length")
    check_writable(config.out)
    check_writable(config.page)
    settings = _settings(config)
    benchmarks = _benchmarks(config)
    scores, correct = _scores(config, benchmarks)
    check_comparison({one.name: len(one.prompts) for one in benchmarks}, settings, scores, correct, config.control)
    source, codes = (_stored if config.store else _read)(config, benchmarks)
    comparisons = {
        layer: compare_benchmarks(tables, layer, scores=scores, correct=correct, control=config.control, config=settings)
        for layer, tables in codes.items()
    }
    shared = shared_prompts(benchmarks)
    for comparison in comparisons.values():
        _show(comparison)
    if config.page:
        from qscope_jax.report.benchmarks_page import write_benchmarks_page

        write_benchmarks_page(config.page, comparisons, subtitle=source, shared=shared)
        print(f"Page: {config.page}")
    result = {
        "source": source,
        "repeated_prompts": {one.name: one.repeated for one in benchmarks},
        "shared_prompts": [{"benchmarks": pair, "prompts": count} for pair, count in shared.items()],
        "layers": {layer: comparison.summary() for layer, comparison in comparisons.items()},
    }
    write_result(config.out, "benchmarks", config, result)
    return result


def _settings(config: Config) -> "ComparisonConfig":
    from qscope_jax.features.benchmarks.benchmark_advice import AdviceConfig
    from qscope_jax.features.benchmarks.benchmark_comparison import ComparisonConfig

    advice = AdviceConfig(**same_named(AdviceConfig, config))
    return ComparisonConfig(**same_named(ComparisonConfig, config), advice=advice)


def _benchmarks(config: Config) -> "list[Benchmark]":
    """The prompts of all benchmarks, read like all else that can be wrong before the model is loaded."""
    from qscope_jax.data.benchmark_files import load_benchmark

    given = [name.partition("=")[::2] for name in config.benchmarks]
    names = [name for name, _ in given]
    if twice := [name for index, name in enumerate(names) if name in names[:index]]:
        raise InputError(f"benchmark {twice[0]!r} is given twice; give each a name of its own")
    if config.store:
        return _stored_benchmarks(config, names)
    if not given:
        raise ConfigError("no benchmark given; give two or more as NAME=FILE, or --store, or tiny")
    if config.benchmarks == (TINY,):
        return _tiny_benchmarks(config)
    limits = _limits(config.limit or (), names)
    settings: dict[str, Any] = dict(column=config.text_column, split=config.split, seed=config.seed, suffix=config.suffix)
    return [load_benchmark(name, source, limit=limits.get(name, limits.get("")), **settings) for name, source in given]


def _stored_benchmarks(config: Config, names: Sequence[str]) -> "list[Benchmark]":
    from qscope_jax.data.benchmark_files import draw_prompts, group_texts
    from qscope_jax.features.store.feature_store import read_store

    store = read_store(config.store)
    found = group_texts(store.texts, store.column(config.column))
    if strange := [name for name in names if name not in found]:
        raise InputError(f"{config.store}: column {config.column} has no benchmark {strange[0]!r}; it has {', '.join(map(repr, found))}")
    names = names or list(found)
    limits = _limits(config.limit or (), names)
    return [draw_prompts(found[name], limits.get(name, limits.get("")), config.seed) for name in names]


def _tiny_benchmarks(config: Config) -> "list[Benchmark]":
    from qscope_jax.data.benchmark_files import draw_prompts, group_texts
    from qscope_jax.demo.tasks import tasks

    asked = [(sample.prompt + config.suffix, task.name) for task in tasks() for sample in task.samples]
    found = group_texts(*zip(*asked, strict=True))
    limits = _limits(config.limit or (), list(found))
    return [draw_prompts(one, limits.get(name, limits.get("")), config.seed) for name, one in found.items()]


def _limits(limits: Sequence[str], names: Sequence[str]) -> dict[str, int]:
    """Limits by name; under the empty name that of all others."""
    found = {}
    for limit in limits:
        name, _, number = limit.rpartition("=")
        if not number.isdecimal() or int(number) < 1 or (name and name not in names):
            raise ConfigError(f"limit is {limit!r}, expected a number of prompts such as 500, or NAME=500 for one of {', '.join(names)}")
        found[name] = int(number)
    return found


def _scores(config: Config, benchmarks: "Sequence[Benchmark]") -> "tuple[ScoreTable | None, dict[str, Any]]":
    """Scores, from their file or as accuracies, and the answers to the prompts that are read."""
    from qscope_jax.data.benchmark_scores import accuracy_table, answers_of, load_correctness, load_scores

    answers = load_correctness(config.correct) if config.correct else _tiny_answers(config)
    if config.correct and not any(one.name in answers for one in benchmarks):
        raise InputError(f"{config.correct}: answers none of the benchmarks given; it has {', '.join(map(repr, answers))}")
    scores = load_scores(config.scores, model_column=config.model_column) if config.scores else None
    if scores is None and all(one.name in answers for one in benchmarks):
        scores = accuracy_table(answers, f"{config.correct or TINY} accuracies") if answers else None
    return scores, {one.name: answers_of(one, answers[one.name]) for one in benchmarks if one.name in answers}


def _tiny_answers(config: Config) -> "dict[str, Correctness]":
    """What the checkpoints of the embedded model's training answered, where its tasks are compared and no scores are given."""
    if config.benchmarks != (TINY,) or config.scores or config.store:
        return {}
    from qscope_jax.data.benchmark_scores import Correctness
    from qscope_jax.demo.embedded import TINY as EMBEDDED
    from qscope_jax.demo.recipe import SCORES
    from qscope_jax.demo.task_scores import read_scores

    scores = read_scores(EMBEDDED / SCORES)
    models = tuple(f"step {step}" for step in scores.steps)
    return {name: Correctness(models, correct) for name, correct in scores.correct.items()}


def _stored(config: Config, benchmarks: "Sequence[Benchmark]") -> "tuple[str, dict[int, dict[str, csr_array]]]":
    """Last tokens of the store's texts; its texts of a benchmark are numbered from 0."""
    from qscope_jax.features.store.feature_store import read_store

    store = read_store(config.store)
    names = [str(name) for name in store.column(config.column)]
    places = {one.name: [i for i, name in enumerate(names) if name == one.name] for one in benchmarks}
    codes = {}
    for layer in config.layers or (store.layers[len(store.layers) // 2],):
        last = store.text_features(layer).last
        codes[layer] = {one.name: last[[places[one.name][row] for row in one.rows]] for one in benchmarks}
    return f"{store.model}, SAEs {store.sae}", codes


def _read(config: Config, benchmarks: "Sequence[Benchmark]") -> "tuple[str, dict[int, dict[str, csr_array]]]":
    """Last tokens of all prompts at all layers, a few SAEs at a time."""
    from qscope_jax.features.store.last_tokens import read_last_tokens

    model = open_model(config.model, config.dtype, config.mesh)
    saes = open_saes(config.sae, model)
    layers = config.layers or (model.config.num_layers // 2,)
    prompts = [prompt for one in benchmarks for prompt in one.prompts]
    codes: dict[int, dict[str, csr_array]] = {}
    for group in sae_groups(saes, layers, model):
        with _bar(f"layers {', '.join(str(sae.layer) for sae in group)}", len(prompts)) as progress:
            size = dict(batch_size=config.batch_size, max_tokens=config.sequence_length)
            tables = read_last_tokens(model, group, prompts, **size, progress=progress)
        codes |= {layer: _by_benchmark(table, benchmarks) for layer, table in tables.items()}
    return f"{model.name}, SAEs {config.sae}", codes


def _by_benchmark(table: "csr_array", benchmarks: "Sequence[Benchmark]") -> "dict[str, csr_array]":
    found, first = {}, 0
    for one in benchmarks:
        found[one.name] = table[first : first + len(one.prompts)]
        first += len(one.prompts)
    return found


@contextlib.contextmanager
def _bar(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar; yields what to tell the number of prompts read."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("prompts"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as bar:
        task = bar.add_task(name, total=total)
        yield lambda done: bar.update(task, completed=done)


def _show(comparison: "BenchmarkComparison") -> None:
    from qscope_jax.report.benchmarks_page import advice_rows, correlation_rows
    from qscope_jax.report.terminal import print_table

    equal = f"at {comparison.equal_samples:,}"
    rows = []
    for one in comparison.footprints:
        measured = comparison.performance.get(one.name)
        redundancy = (one.redundancy, one.redundancy_at(comparison.equal_samples), measured.value if measured else None)
        rows.append((one.name, one.samples, one.size, *redundancy))
    print_table(("benchmark", "samples", "features", "R-hat", equal, "R"), rows, title=f"Layer {comparison.layer}")
    print()
    if comparison.correlations:
        print_table(("what agrees", "correlation", "value", "low", "high", "points"), correlation_rows(comparison))
        print()
    suite = comparison.suite
    title = f"Those to keep cover {suite.kept_share:.1%} of {suite.features:,} features with {suite.kept_samples:,} of {suite.samples:,} samples"
    print_table(("benchmark", "advice", "why"), advice_rows(comparison), title=title)
    print()
