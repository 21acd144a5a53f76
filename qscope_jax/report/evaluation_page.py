"""A page for an evaluation of SAEs: tables, bars by layer, histograms of firing rates, probes."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsFloat, TypeAlias

import numpy as np

from qscope_jax.report.figures import bars, curves, heat_map
from qscope_jax.report.page import Page
from qscope_jax.sae.probing import ProbingResult

if TYPE_CHECKING:
    import plotly.graph_objects

Metrics: TypeAlias = Mapping[Any, Mapping[str, Any]]

MOST_LINES = 6
"""Layers that one plot of curves still tells apart; more become a heat map."""

_RECONSTRUCTION = {
    "tokens": "tokens", "fvu": "FVU", "fvu_all": "FVU, all tokens", "l0": "L0", "cossim": "cosine", "dead_fraction": "silent",
    "dense_fraction_1_percent": "fire on > 1 %", "dense_fraction": "> 10 %",
}  # fmt: skip
_TOKENS = {
    "tokens": "ordinary", "first_tokens": "first of a text", "outlier_tokens": "outliers of the norm", "tokens_all": "all",
    "damaged_tokens": "not finite, left out",
}  # fmt: skip
_SCORES = {"ce_loss_score": "CE score", "ce_loss_score_mean_ablation": "CE score, mean", "kl_div_score": "KL score"}
_LOSSES = {"ce_clean": "CE, intact", "ce_sae": "CE, rebuilt", "ce_zero": "CE, zeroed", "ce_mean": "CE, mean"}
_PEERS = {
    "explained_variance": "explained variance", "explained_variance_legacy": "by token", "frac_variance_explained": "by batch",
    "saebench_explained_variance": "SAEBench", "relative_reconstruction_bias": "bias", "l2_ratio": "norm ratio",
}  # fmt: skip
_GEOMETRY = {
    "decoder_max_cosine": "nearest decoder row", "encoder_max_cosine": "nearest encoder row", "encoder_decoder_cosine": "encoder, decoder",
    "decoder_norm": "norm", "decoder_norm_min": "least", "decoder_norm_max": "most",
}  # fmt: skip


def write_evaluation_page(
    path: str | os.PathLike[str], layers: Metrics, *, subtitle: str = "", probing: Mapping[int, ProbingResult] | None = None
) -> Path:
    """Write a page for the results of `evaluate_sae` and, if there are any, of `probe_saes`.

    Args:
        path: The HTML file.
        layers: Metrics of each layer.
        subtitle: A line below the title: which model, which SAEs, which texts.
        probing: Probes of each layer.

    Raises:
        SourceError: the file cannot be written.
    """
    return add_evaluation(Page("How faithful the SAEs are", subtitle), layers, probing).write(path)


def add_evaluation(page: Page, layers: Metrics, probing: Mapping[int, ProbingResult] | None = None) -> Page:
    """Add the sections of an evaluation to a page."""
    page.heading("Reconstruction")
    page.text(
        "FVU is the share of the stream's variance that the reconstruction leaves unexplained. Ordinary tokens are those that SAEs are trained "
        "on: without the first of each text and without outliers of the norm. Features that are silent did not fire on these tokens; over few "
        "tokens many look so."
    )
    _table(page, layers, _RECONSTRUCTION, "Over ordinary tokens, unless said otherwise")
    names = [f"layer {layer}" if len(layers) == 1 else str(layer) for layer in layers]
    page.figure(bars(names, _columns(layers, {"fvu": "ordinary tokens", "fvu_all": "all tokens"}), title="FVU by layer", y="FVU"))
    _table(page, layers, _TOKENS, "Tokens")
    _table(
        page,
        layers,
        _PEERS,
        "Explained variance as peers define it (by token: SAELens before 6.45.1; by batch: dictionary_learning), and the size of xhat",
    )
    if any("ce_loss_score" in found for found in layers.values()):
        page.heading("The model on what the SAE rebuilt")
        page.text(
            "The score is 1 where the model predicts as well on the reconstruction as on the stream itself, and 0 where it does no better than "
            "on zeros (or on the stream's mean)."
        )
        _table(page, layers, _SCORES | _LOSSES, "Cross-entropy in nats a token")
        page.figure(bars(names, _columns(layers, _SCORES), title="Scores by layer", y="share recovered"))
    _add_densities(page, layers)
    if any("decoder_max_cosine" in found for found in layers.values()):
        page.heading("Directions")
        _table(page, layers, _GEOMETRY, "Mean cosine of a row with its nearest other one, and of a feature's two rows; norm of decoder rows")
    if probing:
        _add_probing(page, probing)
    return page


def layer_figure(
    layers: Sequence[Any],
    x: Sequence[SupportsFloat],
    rows: Sequence[Sequence[SupportsFloat]],
    *,
    title: str,
    x_title: str,
    value: str,
    log: bool = False,
) -> "plotly.graph_objects.Figure":
    """One curve a layer, or a heat map where layers are many: rows hold a value for each x."""
    names = [f"layer {layer}" for layer in layers]
    if len(names) <= MOST_LINES:
        return curves(x, dict(zip(names, rows, strict=True)), title=title, x_title=x_title, y_title=value, log_y=log)
    values = np.asarray(rows, float)
    if log:
        with np.errstate(divide="ignore", invalid="ignore"):
            values = np.where(values > 0, np.log10(values), np.nan)
    columns = [f"{float(place):g}" for place in x]
    return heat_map([str(layer) for layer in layers], columns, values.tolist(), title=title, x_title=x_title, y_title="layer",
                    value_title=f"log10 {value}" if log else value)  # fmt: skip


def _add_densities(page: Page, layers: Metrics) -> None:
    found = {layer: metrics["density_histogram"] for layer, metrics in layers.items() if metrics.get("density_histogram")}
    if not found:
        return
    page.heading("Feature density")
    page.text("The firing rate of a feature is the share of ordinary tokens at which it is active. Silent features are left out of the figure.")
    edges = np.asarray(next(iter(found.values()))["edges"], float)
    shares = np.asarray([np.asarray(one["counts"], float) / max(np.sum(one["counts"]) + one["silent"], 1) for one in found.values()])
    used = np.flatnonzero(shares.any(axis=0))
    kept = slice(max(used[0] - 1, 0), used[-1] + 2) if used.size else slice(None)
    centres = ((edges[1:] + edges[:-1]) / 2)[kept]
    page.figure(
        layer_figure(list(found), centres.tolist(), shares[:, kept].tolist(), title="Features by firing rate", x_title="log10 of the firing rate",
                 value="share of features")
    )  # fmt: skip


def _add_probing(page: Page, probing: Mapping[int, ProbingResult]) -> None:
    page.heading("Sparse probing")
    first = next(iter(probing.values()))
    page.text(
        f"How well a logistic regression on few features of a text's mean code tells its class, on {first.test:,} texts held out of "
        f"{first.train + first.test:,}; {first.repeated:,} repeated texts and {first.contradictory:,} with several classes were removed. "
        "Beside it, as many dimensions of the residual stream, chosen in the same way, and all of them (dense)."
    )
    kinds = list(dict.fromkeys((probe.source, None if probe.source == "dense" else probe.k) for probe in first.probes))
    names = {kind: "dense" if kind[1] is None else f"{'SAE' if kind[0] == 'sae' else kind[0]} {kind[1]}" for kind in kinds}
    for place, score in enumerate(("accuracy", "F1")):
        values = {name: [result.mean(*kind)[place] for result in probing.values()] for kind, name in names.items()}
        page.figure(bars([f"layer {layer}" for layer in probing], values, title=f"{score[0].upper()}{score[1:]}, mean over classes", y=score))
    if failed := sum(not probe.converged for result in probing.values() for probe in result.probes):
        page.text(f"{failed} fits did not end within their 1,000 iterations.")
    for layer, result in probing.items():
        page.heading(f"Layer {layer}", 3)
        page.table(("class", "commoner answer", *names.values(), "features"), _probe_rows(result, kinds), caption="Accuracy on the texts held out")


def _probe_rows(result: ProbingResult, kinds: Sequence[tuple[str, int | None]]) -> list[tuple[Any, ...]]:
    """A row a class: the accuracy of each kind of probe, and the features of the largest."""
    rows = []
    for label, majority in result.majority.items():
        own = {(probe.source, None if probe.source == "dense" else probe.k): probe for probe in result.probes if probe.label == label}
        features = max((probe.columns for probe in own.values() if probe.source == "sae"), key=len, default=())
        rows.append((label, majority, *(own[kind].accuracy for kind in kinds), ", ".join(map(str, features))))
    return rows


def _table(page: Page, layers: Metrics, columns: Mapping[str, str], caption: str) -> None:
    """A row a layer, of those columns that some layer has."""
    there = [name for name in columns if any(name in found for found in layers.values())]
    if there:
        # A file has null for what is not a number.
        shown = [{name: math.nan if value is None else value for name, value in found.items()} for found in layers.values()]
        rows = [(str(layer), *(found.get(name) for name in there)) for layer, found in zip(layers, shown, strict=True)]
        page.table(("layer", *(columns[name] for name in there)), rows, caption=caption)


def _columns(layers: Metrics, names: Mapping[str, str]) -> dict[str, list[float]]:
    """{title: a value for each layer}; NaN where a layer has none (a file has null)."""
    there = {name: [found.get(name) for found in layers.values()] for name in names}
    return {names[name]: [float("nan") if value is None else float(value) for value in values] for name, values in there.items()}
