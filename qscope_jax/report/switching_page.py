"""Pages of unwanted switches of language: how often, in which answers, what features do before one, and what taking them away does."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qscope_jax.features.choices import ChoiceAccuracy
from qscope_jax.features.scripts import find_script, split_by_script
from qscope_jax.features.switching.code_switching import RatioChange, Response, SwitchRatio
from qscope_jax.features.switching.switch_ablation import MEASURES, DoseCurves
from qscope_jax.features.switching.switch_traces import Curve, Trace
from qscope_jax.report.figures import bars, curves
from qscope_jax.report.number_format import format_change, format_points
from qscope_jax.report.page import Align, Page

_AROUND = 240  # characters of an answer shown on either side of its switch
_NORMAL = 1.96  # standard errors of an interval of 95 %


class SwitchExample(NamedTuple):
    """An answer to show.

    Attributes:
        response: The answer.
        prompt: What was asked.
    """

    response: Response
    prompt: str


def write_ratios_page(
    path: str | os.PathLike[str],
    ratios: Mapping[str, Sequence[SwitchRatio]],
    *,
    script: str,
    changes: Mapping[str, Sequence[RatioChange]] | None = None,
    examples: Mapping[str, Sequence[SwitchExample]] | None = None,
    subtitle: str = "",
) -> Path:
    """Write the page of `qscope code-switch measure`.

    Args:
        path: The HTML file.
        ratios: The rows of each model, see `switch_ratios`.
        script: Script of the unwanted language.
        changes: For models but the first, their rows beside its, see `compare_ratios`.
        examples: Answers of each model to show.
        subtitle: A line below the title.

    Raises:
        SourceError: the file cannot be written.
    """
    page = Page(f"Answers with {script}", subtitle)
    page.text(
        f"An answer has switched where it contains a single character of {script}; quotations and names count. Intervals of 95 % are over "
        "prompts, since answers to one prompt are alike."
    )
    _add_ratios(page, ratios)
    for name, rows in (changes or {}).items():
        page.heading(f"{name} beside {next(iter(ratios))}")
        cells = [
            (
                _row_name(row),
                _percent(row.before),
                _percent(row.after),
                f"{100 * row.change:+.2f}",
                format_points(row.low, row.high),
                format_change(row.relative),
            )
            for row in rows
        ]
        page.table(("answers", "before, %", "after, %", "change, points", "interval, points", "relative"), cells, align=_sides(1, 5))
    for name, shown in (examples or {}).items():
        if shown:
            page.heading(f"Switched answers of {name}" if len(ratios) > 1 else "Switched answers")
            _add_examples(page, shown, script)
    return page.write(path)


def write_traces_page(
    path: str | os.PathLike[str], traces: Mapping[int, Trace], features: Mapping[int, Sequence[str]], *, subtitle: str = ""
) -> Path:
    """Write the page of `qscope code-switch trace`.

    Args:
        path: The HTML file.
        traces: The trace of each layer, see `switch_traces`.
        features: What to call each of its features.
        subtitle: A line below the title.

    Raises:
        SourceError: the file cannot be written.
    """
    page = Page("Features before a switch", subtitle)
    page.text(
        "Mean pre-activation by distance from the first switched token, which is 0; the state at -1 is that from which it is drawn. Beside it, "
        "answers that have not switched, at the same distance from their beginnings. Bands are 1.96 standard errors, answers to one prompt taken "
        "as one."
    )
    for layer, trace in traces.items():
        page.heading(f"Layer {layer}")
        kept = trace.switched.counts_O > 0
        offsets = trace.offsets_O[kept]
        for place, name in enumerate(features[layer]):
            lines = {"switched": trace.switched, "not switched": trace.baseline}
            page.figure(
                curves(
                    offsets, {label: curve.mean_OS[kept, place] for label, curve in lines.items()},
                    bands={label: _band(curve, place, kept) for label, curve in lines.items()},
                    title=f"Layer {layer}, {name}", x_title="tokens from the switch", y_title="pre-activation",
                )
            )  # fmt: skip
        rows = [
            (f"{offset:+d}" if offset else "0", int(trace.switched.counts_O[index]), int(trace.baseline.counts_O[index]),
             *(float(curve.mean_OS[index, place]) for place in range(len(features[layer])) for curve in (trace.switched, trace.baseline)))
            for index, offset in enumerate(trace.offsets_O.tolist()) if kept[index]
        ]  # fmt: skip
        columns = [f"{name}, {kind}" for name in features[layer] for kind in ("switched", "not")]
        page.table(("offset", "switched answers", "others", *columns), rows)
    return page.write(path)


def write_doses_page(path: str | os.PathLike[str], found: DoseCurves, *, script: str, unit: str = "raw", subtitle: str = "") -> Path:
    """Write the page of `qscope code-switch ablate`.

    Args:
        path: The HTML file.
        found: What `ablate_switches` gives.
        script: Script of the unwanted language.
        unit: Unit of the doses.
        subtitle: A line below the title.

    Raises:
        SourceError: the file cannot be written.
    """
    page = Page("Directions taken away before a switch", subtitle)
    page.text(
        f"From the state after layer {found.layer} at the token right before a switch to {script}, lambda times a feature's direction is taken "
        f"away, in {len(found.prompts_N):,} answers. Their median norm there is {found.residual_norm:.4g}. Bands are 1.96 standard errors, answers "
        "to one prompt taken as one."
    )
    what = "lambda" if unit == "raw" else "lambda, in median norms of the state"
    for measure, by_name in found.values.items():
        found_curves = {name: found.curve(measure, name) for name in by_name}
        means = {name: mean for name, (mean, _) in found_curves.items()}
        bands = {name: _around(mean, error) for name, (mean, error) in found_curves.items()}
        page.figure(curves(found.doses, means, bands=bands, title=MEASURES[measure], x_title=what, y_title="mean over switches"))
        page.table(("lambda", *means), [(dose, *(float(mean[index]) for mean in means.values())) for index, dose in enumerate(found.doses)])
    return page.write(path)


def write_choices_page(path: str | os.PathLike[str], accuracies: Mapping[str, Sequence[ChoiceAccuracy]], *, subtitle: str = "") -> Path:
    """Write the page of `qscope code-switch choices`.

    Args:
        path: The HTML file.
        accuracies: The rows of each model, see `choice_accuracy`.
        subtitle: A line below the title.

    Raises:
        SourceError: the file cannot be written.
    """
    page = Page("Multiple-choice accuracy", subtitle)
    page.text("The likeliest choice is the answer: by its log-likelihood, or by that a character. Wilson's intervals of 95 % over questions.")
    names = [row.group or "all" for row in next(iter(accuracies.values()))]
    for how, title in (("raw", "By log-likelihood"), ("normalised", "By log-likelihood a character")):
        shares = {model: [getattr(row, how) for row in rows] for model, rows in accuracies.items()}
        page.figure(
            bars(
                names, {model: [one.value for one in found] for model, found in shares.items()}, title=title, y="accuracy",
                bounds={model: ([one.low for one in found], [one.high for one in found]) for model, found in shares.items()},
            )
        )  # fmt: skip
    cells = [
        (model, row.group or "all", row.questions, row.chance, str(row.raw), str(row.normalised))
        for model, rows in accuracies.items()
        for row in rows
    ]
    page.table(("model", "questions of", "questions", "by chance", "accuracy", "a character"), cells)
    return page.write(path)


def _add_ratios(page: Page, ratios: Mapping[str, Sequence[SwitchRatio]]) -> None:
    first = next(iter(ratios.values()))
    for group, title in (("all", "All answers"), ("language", "By language of the prompt"), ("task", "By task")):
        names = [row.name or "all" for row in first if row.group == group]
        if not names or (group == "language" and len(names) == 1):
            continue
        rows = {model: [row for row in found if row.group == group] for model, found in ratios.items()}
        page.figure(
            bars(
                names, {model: [100 * row.ratio for row in own] for model, own in rows.items()}, title=title, y="switched answers, %",
                bounds={model: ([100 * row.low for row in own], [100 * row.high for row in own]) for model, own in rows.items()},
            )
        )  # fmt: skip
    cells = [
        (model, _row_name(row), row.prompts, row.responses, row.switched, _percent(row.ratio), _interval(row.low, row.high))
        for model, found in ratios.items() for row in found
    ]  # fmt: skip
    page.table(("model", "answers", "prompts", "number", "switched", "%", "interval, %"), cells, align=_sides(2, 5))


def _add_examples(page: Page, examples: Sequence[SwitchExample], script: str) -> None:
    for response, prompt in examples:
        start = find_script(response.text, script)
        first, last = max(start - _AROUND, 0), start + _AROUND
        shown = "…" * (first > 0) + response.text[first:last] + "…" * (last < len(response.text))
        pieces = split_by_script(shown, script)
        task = f", {response.task}" if response.task else ""
        label = f"{response.language}{task}, answer {response.sample + 1} to: {_short(prompt)}"
        page.tokens([piece for piece, _ in pieces], [float(own) for _, own in pieces], label=label, color="red", maximum=1.0)


def _band(curve: Curve, place: int, kept_O: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return _around(curve.mean_OS[kept_O, place], curve.error_OS[kept_O, place])


def _around(mean: np.ndarray, error: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ends of a band; where the error is not known it has no width."""
    half = _NORMAL * np.nan_to_num(error)
    return mean - half, mean + half


def _sides(left: int, right: int) -> list[Align]:
    """Columns of names, then those of numbers that are written out."""
    names: list[Align] = ["left"]
    numbers: list[Align] = ["right"]
    return names * left + numbers * right


def _row_name(row: SwitchRatio | RatioChange) -> str:
    return "all" if row.group == "all" else f"{row.group} {row.name}"


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"


def _interval(low: float, high: float) -> str:
    return f"({100 * low:.2f} to {100 * high:.2f})"


def _short(text: str) -> str:
    return (text if len(text) <= 90 else "…" + text[-89:]).replace("\n", "↵")
