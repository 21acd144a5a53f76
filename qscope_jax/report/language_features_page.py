"""A page for a language's features: how much they are its own, and how active they are on every language."""

import os
from pathlib import Path

import numpy as np

from qscope_jax.features.switching.language_features import LanguageFeatures
from qscope_jax.report.figures import bars, heat_map
from qscope_jax.report.page import Page

_TITLES = {"monolinguality": "Features of language {}", "given": "Features by hand, for language {}", "random": "Control features, for language {}"}


def write_language_features_page(path: str | os.PathLike[str], found: LanguageFeatures, *, subtitle: str = "") -> Path:
    """Write a page.

    Args:
        path: The HTML file.
        found: The features, with the facts that `find_language_features` keeps.
        subtitle: A line below the title: which model, which texts.

    Raises:
        SourceError: the file cannot be written.
    """
    page = Page(_TITLES[found.facts["chosen"]].format(found.language), subtitle)
    add_scores(page, found)
    add_levels(page, found)
    return page.write(path)


def add_scores(page: Page, found: LanguageFeatures) -> Page:
    """Add the features, their monolinguality, and their mean activations on the languages that they were chosen by."""
    page.heading("Whose the features are")
    page.text(
        f"Monolinguality is a feature's mean activation on {found.language} less the mean of its mean activations on the other languages, which "
        f"weigh equally. Activations are the SAE's: a feature that is not in a token's code counts as 0. {_left_out(found)}"
    )
    languages, means_MKS, rates_MKS = found.facts["languages"], np.array(found.facts["means"]), np.array(found.facts["rates"])
    own = languages.index(found.language)
    rows = [
        (str(layer), str(rank), str(feature), float(found.scores_MS[m, rank]), float(rates_MKS[m, own, rank]), found.facts["runner_up"][m][rank])
        for m, layer in enumerate(found.layers)
        for rank, feature in enumerate(found.features_MS[m].tolist())
    ]
    columns = ("layer", "rank", "feature", "monolinguality", f"fires on tokens of {found.language}", "runner-up")
    page.table(columns, rows, caption="The runner-up has the highest mean of the others")
    names = feature_names(found)
    page.figure(bars(names, found.scores_MS.reshape(-1).tolist(), title=f"Monolinguality for {found.language}", y="mean activation"))
    cells = means_MKS.transpose(1, 0, 2).reshape(len(languages), -1).tolist()
    return page.figure(heat_map(languages, names, cells, title="Mean activation", x_title="layer / feature", y_title="language of the text"))


def add_levels(page: Page, found: LanguageFeatures) -> Page:
    """Add the levels: alpha of every feature and language."""
    page.heading("How far they usually reach")
    page.text(
        "Alpha is the mean of a feature's pre-activation, before threshold and top-k, over all counted tokens of a language. SASFT holds the "
        f"features down to it on texts in every language but {found.language}; where it is negative, 0 would be too lenient a ceiling."
    )
    names = feature_names(found)
    cells = found.alpha_MKS.transpose(1, 0, 2).reshape(len(found.languages), -1).tolist()
    page.figure(heat_map(found.languages, names, cells, title="Mean pre-activation (alpha)", x_title="layer / feature", y_title="language"))
    rows = [(language, int(found.tokens_K[k]), *cells[k]) for k, language in enumerate(found.languages)]
    return page.table(("language", "tokens", *names), rows, caption="Alpha, by layer / feature, and the tokens that it is a mean of")


def feature_names(found: LanguageFeatures) -> list[str]:
    """The features by layer and number, in the order of the arrays."""
    return [f"{layer} / {feature}" for layer, features in zip(found.layers, found.features_MS.tolist(), strict=True) for feature in features]


def _left_out(found: LanguageFeatures) -> str:
    multiple = found.facts["reading"]["max_norm_multiple"]
    return "Texts' first tokens are left out" + (f", and tokens whose norm is over {multiple:g} times the median of their text." if multiple else ".")
