"""A page for a study of classifying by features: scores, layers, languages, little data, and texts with the token that fires."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Shaped

from qscope_jax.features.classify.classification_study import LanguageStudy, Study
from qscope_jax.report.figures import curves, heat_map
from qscope_jax.report.page import Page

_SCORES = {"precision": "precision", "recall": "recall", "f1": "F1", "accuracy": "accuracy", "auc": "AUC"}


@dataclass(frozen=True, eq=False)
class Example:
    """A text with a feature's activation at every token.

    Attributes:
        kind: `found`, `false alarm` or `missed`.
        tokens: What its tokens read as.
        activation: The feature's activation at each.
        layer: 0-based layer.
        feature: The feature.
    """

    kind: str
    tokens: Sequence[str]
    activation: Shaped[np.ndarray, " T"]
    layer: int
    feature: int


def write_classification_page(
    path: str | os.PathLike[str], found: Study, examples: Mapping[str, Sequence[Example]] | None = None, *, subtitle: str = ""
) -> Path:
    """Write the page.

    Args:
        path: The HTML file.
        found: What `study` gives.
        examples: Texts to show of each language.
        subtitle: A line below the title: which model, which SAEs, which texts.

    Raises:
        SourceError: the file cannot be written.
    """
    return add_study(Page(f"Which texts are {found.data.positive}", subtitle), found, examples).write(path)


def add_study(page: Page, found: Study, examples: Mapping[str, Sequence[Example]] | None = None) -> Page:
    """Add the sections to a page."""
    data = found.data
    page.text(
        f"A text is called {data.positive} where any of a few features fires. Features, layers and thresholds were chosen on "
        f"{len(data.split.discovery):,} texts; every score is on {len(data.split.evaluation):,} others, with a bootstrap interval of 95 % over "
        f"texts, resampled by class. Left out: {data.split.removed() or 'no text'}."
    )
    if len(found.languages) > 1:
        _add_overview(page, found)
    for name, language in found.languages.items():
        _add_language(page, name, language, (examples or {}).get(name, ()), alone=len(found.languages) == 1)
    if found.transfer is not None:
        _add_between_languages(page, found)
    _add_efficiency(page, found)
    return page


def _add_overview(page: Page, found: Study) -> None:
    page.heading("F1 by language")
    names = list(dict.fromkeys(one.name for language in found.languages.values() for one in language.methods))
    rows = []
    for name, language in found.languages.items():
        scores = {one.name: one.scores.f1.value for one in language.methods}
        rows.append((name, *(scores.get(method) for method in names)))
    page.table(("language", *names), rows)


def _add_language(page: Page, name: str, found: LanguageStudy, examples: Sequence[Example], *, alone: bool) -> None:
    page.heading("Scores" if alone else name)
    rows = [
        (one.name, ", ".join(map(str, one.layers)) or None, one.features, *(str(getattr(one.scores, score)) for score in _SCORES))
        for one in found.methods
    ]
    page.table(("how", "layers", "features", *_SCORES.values()), rows, highlight=[0] if found.rule else None)
    if found.rule is None:
        page.text("No feature of any layer fires more often on texts of the class, so there is no rule of the kind asked for.")
    else:
        terms = [(str(term.layer), str(term.feature), term.difference, term.threshold) for term in found.rule.terms]
        page.table(("layer", "feature", "difference of firing rates", "threshold"), terms, caption="The OR rule")
    swept = found.sweep
    page.figure(
        heat_map(
            [f"layer {layer}" for layer in swept.layers],
            list(swept.ks),
            swept.evaluation_f1.tolist(),
            title="F1 by layer and number of features",
            x_title="features",
            value_title="F1",
        ),
        caption=_choices(found),
    )
    page.figure(
        curves(swept.layers, {"largest difference, discovery texts": swept.differences, "best F1, evaluation texts": swept.evaluation_f1.max(axis=1)},
               title="How well the largest difference foretells the best layer", x_title="layer", y_title="difference of firing rates, F1")
    )  # fmt: skip
    if examples:
        page.heading("Texts held out", 3)
        for one in examples:
            page.tokens(one.tokens, one.activation, label=f"{one.kind}: layer {one.layer}, feature {one.feature}")


def _choices(found: LanguageStudy) -> str:
    swept = found.sweep
    layer, k = swept.chosen("discovery")
    best, best_k = swept.chosen("hindsight")
    picked = swept.evaluation_f1[swept.layers.index(layer), swept.ks.index(k)]
    return (
        f"The largest difference chooses layer {swept.by_difference}; F1 on discovery texts chooses layer {layer} with {k} features (F1 here "
        f"{picked:.3f}). In hindsight layer {best} with {best_k} is best ({swept.evaluation_f1.max():.3f})."
    )


def _add_between_languages(page: Page, found: Study) -> None:
    moved = found.transfer
    assert moved is not None
    page.heading("Between languages")
    layers = ", ".join(f"{name} {layer if layer >= 0 else 'none'}" for name, layer in zip(moved.languages, moved.layers, strict=True))
    page.figure(
        heat_map(moved.languages, moved.languages, moved.f1.tolist(), title="F1 of a rule found on one language and applied to another",
                 x_title="applied to", y_title="found on", value_title="F1"),
        caption=f"Layer of each language's rule: {layers}.",
    )  # fmt: skip
    pairs = np.triu_indices(len(moved.languages), 1)
    means = {layer: float(matrix[pairs].mean()) for layer, matrix in found.jaccard.items()}
    page.figure(
        curves(list(means), {"mean over pairs": list(means.values())}, title="Overlap of the languages' best features by layer", x_title="layer",
               y_title="Jaccard: shared / all")
    )  # fmt: skip
    fullest = max(means, key=lambda layer: means[layer])
    page.figure(
        heat_map(moved.languages, moved.languages, found.jaccard[fullest].tolist(), title=f"Overlap of the best features, layer {fullest}",
                 value_title="Jaccard"),
        caption="The layer where languages share most.",
    )  # fmt: skip


def _add_efficiency(page: Page, found: Study) -> None:
    page.heading("With fewer texts")
    curve = found.efficiency
    lines = {"layer chosen on these texts": curve.chosen, "best layer in hindsight": curve.hindsight}
    rows = [
        (budget, *(value for how in ("chosen", "hindsight") for value in (float(getattr(curve, how)[p].mean()), curve.kept(p, how))))
        for p, budget in enumerate(curve.budgets)
    ]
    page.figure(
        curves(curve.budgets, {name: draws.mean(axis=1) for name, draws in lines.items()},
               bands={name: (draws.min(axis=1), draws.max(axis=1)) for name, draws in lines.items()},
               title=f"F1 of {found.efficiency_k} features chosen on few texts", x_title="discovery texts of a class", y_title="F1", log_x=True),
        caption=f"Mean over languages; bands span {curve.chosen.shape[1]} draws.",
    )  # fmt: skip
    page.table(("texts of a class", "F1", "of that with all", "F1, layer in hindsight", "of that with all"), rows)
