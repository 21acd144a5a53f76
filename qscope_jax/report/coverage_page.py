"""Pages for what a data set covers, and for what synthesis added to it."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qscope_jax.features.synthesis.coverage import Coverage
from qscope_jax.features.synthesis.synthesis import Synthesis
from qscope_jax.features.synthesis.synthesis_baselines import Baseline, compare_at_budget, expected_coverage, synthesis_curve
from qscope_jax.report.figures import bars, curves, histogram
from qscope_jax.report.page import Page

if TYPE_CHECKING:
    import plotly.graph_objects

_LISTED = 200
_EXAMPLES = 40
_POINTS = 60


def write_coverage_page(path: str | os.PathLike[str], found: Coverage, *, weak: int, subtitle: str = "") -> Path:
    """Write a page for a coverage.

    Args:
        path: The HTML file.
        found: The coverage.
        weak: A target is weakly covered when some texts fire it, but fewer than this.
        subtitle: A line below the title: which data, which targets.

    Raises:
        SourceError: the file cannot be written.
    """
    return add_coverage(Page("What the data covers", subtitle), found, weak=weak).write(path)


def write_synthesis_page(
    path: str | os.PathLike[str], before: Coverage, result: Synthesis, baselines: Sequence[Baseline], *, weak: int, subtitle: str = ""
) -> Path:
    """Write a page for a synthesis: what the data missed, what was made, and how baselines do at equal budget.

    Raises:
        SourceError: the file cannot be written.
    """
    page = Page("Data made for missing features", subtitle)
    add_synthesis(page, result, baselines)
    add_coverage(page, before, weak=weak)
    return page.write(path)


def add_coverage(page: Page, found: Coverage, *, weak: int) -> Page:
    """Add a coverage's sections to a page."""
    thin = found.weak(weak)
    page.heading("Coverage of the data")
    page.text(
        f"{len(found.covered):,} of {len(found.targets):,} targets are fired by at least one of {found.texts:,} texts: {found.share:.2%}. "
        f"{len(found.missing):,} are missing, and {len(thin):,} are fired by fewer than {weak} texts."
    )
    layers = found.by_layer()
    rows = [(str(layer), total, covered, total - covered, covered / total) for layer, (covered, total) in layers.items()]
    page.table(("layer", "targets", "covered", "missing", "share"), rows, caption="By layer")
    if len(layers) > 1:
        names = [f"layer {layer}" for layer in layers]
        page.figure(bars(names, [covered / total for covered, total in layers.values()], title="Share of targets covered", y="share"))
    fired = found.counts[found.counts > 0]
    if fired.size:
        page.figure(
            histogram(np.log10(fired).tolist(), title="Texts that fire a covered target", x_title="log10 of the number of texts", y_title="targets")
        )
    for name, targets in (("Missing targets", found.missing), ("Weakly covered targets", thin)):
        if targets:
            listed = [(str(target.layer), str(target.feature), target.score, target.explanation or None) for target in targets[:_LISTED]]
            page.table(("layer", "feature", "score", "explanation"), listed, caption=f"{name}, the first {len(listed)} of {len(targets):,}")
    return page


def add_synthesis(page: Page, result: Synthesis, baselines: Sequence[Baseline]) -> Page:
    """Add a synthesis' sections to a page."""
    page.heading("What was made")
    failed = f" {len(result.failures):,} requests were not answered." if result.failures else ""
    page.text(
        f"{result.written:,} texts were written for {len(result.targets):,} targets; {len(result.kept):,} fire their own target and were kept. "
        f"{len(result.hit):,} targets have a text of their own, and the kept texts together cover {result.coverage:.2%}.{failed}"
    )
    rows = compare_at_budget(result, baselines)
    page.table(("method", "texts written", "texts kept", "coverage"), rows, caption="At equal budget: texts written, and texts kept")
    if result.written:
        page.figure(_budget_curves(result, baselines), "Baselines keep every text; of them the curve is the expectation over random draws.")
    by_attempt = np.bincount([candidate.attempt for candidate in result.kept if candidate.style == "vanilla"] or [0])
    page.figure(bars([str(attempt + 1) for attempt in range(len(by_attempt))], by_attempt.tolist(), title="Texts kept by attempt", y="texts"))
    listed = [(f"layer {one.layer}, feature {one.feature}, {one.style}", f"{one.activation:.3g}", one.text) for one in result.kept[:_EXAMPLES]]
    if listed:
        page.table(("target", "activation", "text"), listed, caption=f"Texts kept, the first {len(listed)} of {len(result.kept):,}")
    if result.missed:
        missed = [(str(target.layer), str(target.feature), target.explanation or None) for target in result.missed[:_LISTED]]
        page.table(("layer", "feature", "explanation"), missed, caption=f"Targets without a text, the first {len(missed)} of {len(result.missed):,}")
    return page


def _budget_curves(result: Synthesis, baselines: Sequence[Baseline]) -> "plotly.graph_objects.Figure":
    budgets = np.unique(np.linspace(0, result.written, _POINTS).astype(int))
    lines = {"feature-driven synthesis": synthesis_curve(result)[budgets] / len(result.targets)}
    for baseline in baselines:
        there = budgets[budgets <= len(baseline.texts)]
        values = np.full(len(budgets), np.nan)
        values[: len(there)] = expected_coverage(baseline.counts, len(baseline.texts), there.tolist())
        lines[baseline.name] = values
    shown = {name: [float(value) for value in values] for name, values in lines.items()}
    return curves(budgets.tolist(), shown, title="Coverage by budget", x_title="texts written", y_title="share of targets covered")
