"""A page for a comparison of benchmarks: what to keep, footprints, overlaps, and how they agree with scores."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qscope_jax.features.benchmarks.benchmark_comparison import BenchmarkComparison, curve_sizes
from qscope_jax.features.benchmarks.benchmark_performance import Similarity
from qscope_jax.features.benchmarks.correlation import Correlation, Kind
from qscope_jax.report.benchmark_figures import coverage_curves, named_curves, scatter, tree
from qscope_jax.report.figures import heat_map
from qscope_jax.report.page import Page

if TYPE_CHECKING:
    import plotly.graph_objects

_KINDS: tuple[Kind, ...] = ("spearman", "pearson", "kendall")


def write_benchmarks_page(
    path: str | os.PathLike[str],
    comparisons: Mapping[int, BenchmarkComparison],
    *,
    subtitle: str = "",
    shared: Mapping[tuple[str, str], int] | None = None,
) -> Path:
    """Write a page for comparisons of the same benchmarks at one or several layers.

    Args:
        path: The HTML file.
        comparisons: A comparison for each layer.
        subtitle: A line below the title: which model, which SAEs.
        shared: Prompts that pairs of benchmarks have in common word by word.

    Raises:
        SourceError: the file cannot be written.
    """
    page = Page("What benchmarks measure", subtitle)
    if len(comparisons) > 1:
        _add_layers(page, comparisons)
    for comparison in comparisons.values():
        add_benchmarks(page, comparison)
    if shared:
        page.heading("Prompts in common")
        rows = [(a, b, count) for (a, b), count in sorted(shared.items(), key=lambda item: -item[1])]
        page.table(("benchmark", "benchmark", "prompts in common"), rows, caption="Word by word; their features overlap for this reason alone")
    return page.write(path)


def add_benchmarks(page: Page, comparison: BenchmarkComparison) -> Page:
    """Add the sections of one layer to a page."""
    page.heading(f"Layer {comparison.layer}")
    _add_advice(page, comparison)
    _add_redundancy(page, comparison)
    _add_overlap(page, comparison)
    if comparison.similarity is not None:
        _add_similarity(page, comparison, comparison.similarity)
    return page


def correlation_rows(comparison: BenchmarkComparison) -> list[tuple[str, str, float, float, float, int]]:
    """What agrees with what: names, kind, coefficient, interval and points, row by row."""
    return [
        (name, kind, kinds[kind].value, kinds[kind].low, kinds[kind].high, kinds[kind].points)
        for name, kinds in comparison.correlations.items()
        for kind in _KINDS
    ]


def advice_rows(comparison: BenchmarkComparison) -> list[tuple[str, str, str]]:
    """Benchmark, advice with the partner it is about, and why, row by row."""
    return [
        (one.benchmark, one.action if one.action == "keep" else f"{one.action}: {one.partner}", "; ".join(one.reasons))
        for one in comparison.suite.advice
    ]


def _add_layers(page: Page, comparisons: Mapping[int, BenchmarkComparison]) -> None:
    page.heading("Layers")
    figures = {
        "R": {name: f"{name} and R" for name in ("R-hat", "R-hat at equal sizes", "samples")},
        "similarity": {name: f"{name} and similarity" for name in ("overlap_min", "overlap_min at equal sizes")},
        "partial similarity": {name: f"{name} and partial similarity" for name in ("overlap_min", "overlap_min at equal sizes")},
    }
    for what, keys in figures.items():
        found = {name: [_spearman(one, key) for one in comparisons.values()] for name, key in keys.items()}
        if any(math.isfinite(value) for values in found.values() for value in values):
            title = f"Correlation with {what} by layer"
            figure = named_curves(list(comparisons), found, title=title, x_title="layer", y_title="Spearman correlation")
            page.figure(figure.update_xaxes(tickvals=list(comparisons)))
    rows = []
    for layer, one in comparisons.items():
        counts = [len(one.suite.names(action)) for action in ("keep", "merge", "drop")]
        rows.append((str(layer), one.suite.features, *counts, one.suite.kept_share))
    page.table(("layer", "features", "keep", "merge", "drop", "kept ones cover"), rows, caption="All benchmarks together, and what is advised")


def _spearman(comparison: BenchmarkComparison, key: str) -> float:
    return comparison.correlations[key]["spearman"].value if key in comparison.correlations else math.nan


def _add_advice(page: Page, comparison: BenchmarkComparison) -> None:
    suite = comparison.suite
    page.heading("Keep, merge or drop", 3)
    page.text(
        f"All benchmarks together light up {suite.features:,} features at their last tokens. Those to keep cover {suite.kept_share:.1%} of them with "
        f"{suite.kept_samples:,} of {suite.samples:,} samples; with those to merge, {suite.merged_share:.1%} are covered. Benchmarks were taken in "
        "the order of what they add, the one that adds most first."
    )
    page.table(("benchmark", "advice", "why"), advice_rows(comparison), align=("left", "left", "left"))


def _add_redundancy(page: Page, comparison: BenchmarkComparison) -> None:
    page.heading("Footprints and redundancy", 3)
    page.text(
        "A footprint is the union of the features that fire at the last token of each sample. R-hat is the mean coverage over subsets of all sizes, "
        "times samples over features, once in closed form and once sampled; it grows with the number of samples, so that sizes are made equal in "
        "the column beside it. R is the mean Kendall correlation of model accuracies on subsets and on the whole benchmark. The last column is "
        "how many samples cover 90 % of the footprint in the mean."
    )
    equal = f"R-hat at {comparison.equal_samples:,}"
    rows = []
    for one, (sampled, _) in zip(comparison.footprints, comparison.sampled, strict=True):
        measured = comparison.performance.get(one.name)
        row = (one.name, one.samples, one.silent, one.size, one.area, one.redundancy, sampled)
        rows.append((*row, one.redundancy_at(comparison.equal_samples), None if measured is None else measured.value, one.samples_for(0.9)))
    page.table(("benchmark", "samples", "silent", "features", "AUC", "R-hat", "sampled", equal, "R", "for 90 %"), rows)
    page.figure(coverage_curves({one.name: (curve_sizes(one.samples).tolist(), one.coverage) for one in comparison.footprints}))
    there = [one for one in comparison.footprints if one.name in comparison.performance]
    if there:
        names, measured = [one.name for one in there], [comparison.performance[one.name].value for one in there]
        caption = _sentence(comparison.correlations.get("R-hat and R"))
        figure = scatter(names, [one.redundancy for one in there], measured, title="Redundancy by features and by performance", x_title="R-hat",
                         y_title="R")  # fmt: skip
        page.figure(figure, caption)
        figure = scatter(names, [one.redundancy_at(comparison.equal_samples) for one in there], measured, title="The same at equal sizes",
                         x_title=equal, y_title="R")  # fmt: skip
        page.figure(figure, _sentence(comparison.correlations.get("R-hat at equal sizes and R")))


def _add_overlap(page: Page, comparison: BenchmarkComparison) -> None:
    page.heading("Overlap", 3)
    title = "Clusters by 1 - overlap_min"
    page.figure(tree(comparison.clustering.joins, comparison.names, title=title, x_title="mean distance at which they join"))
    page.figure(_map(comparison, comparison.overlap, "overlap: share of the row's features that the column covers"))
    page.figure(_map(comparison, comparison.overlap_min, "overlap_min: shared features over the smaller footprint"))
    equal = f"overlap_min of {comparison.equal_samples:,} samples each"
    page.figure(_map(comparison, comparison.equal_overlap_min, equal), "On the diagonal, two draws from the same benchmark")


def _add_similarity(page: Page, comparison: BenchmarkComparison, similarity: Similarity) -> None:
    page.heading("Agreement with scores", 3)
    fewest = int(similarity.models.min())
    page.figure(_map(comparison, similarity.values, "Similarity: correlation of scores over models"), f"Over {fewest} models or more")
    if comparison.partial is not None:
        page.figure(_map(comparison, comparison.partial.values, f"Similarity given {comparison.partial.control}"))
    first, second = np.triu_indices(len(comparison.names), 1)
    pairs = [f"{comparison.names[i]}, {comparison.names[j]}" for i, j in zip(first, second, strict=True)]
    for name, scores in (("similarity", similarity), ("partial similarity", comparison.partial)):
        if scores is not None:
            figure = scatter(pairs, comparison.overlap_min[first, second], scores.values[first, second], title=f"Overlap and {name} of pairs",
                             x_title="overlap_min", y_title=name)  # fmt: skip
            page.figure(figure, _sentence(comparison.correlations.get(f"overlap_min and {name}")))
    if comparison.correlations:
        page.table(("what", "correlation", "value", "low", "high", "points"), correlation_rows(comparison), caption="With bootstrap intervals")


def _map(comparison: BenchmarkComparison, values: np.ndarray, title: str) -> "plotly.graph_objects.Figure":
    order: Sequence[int] = comparison.clustering.order
    names = [comparison.names[i] for i in order]
    return heat_map(names, names, values[np.ix_(order, order)], title=title)


def _sentence(kinds: Mapping[Kind, Correlation] | None) -> str:
    if kinds is None:
        return ""
    parts = [f"{kind.capitalize()} {kinds[kind].value:.2f} [{kinds[kind].low:.2f}, {kinds[kind].high:.2f}]" for kind in _KINDS]
    return f"{', '.join(parts)} over {kinds['spearman'].points} points"
