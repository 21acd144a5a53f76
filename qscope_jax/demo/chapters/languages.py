"""Chapter: the one feature that tells each language from all others."""

import numpy as np

from qscope_jax.demo.corpus import LANGUAGES, sentences
from qscope_jax.demo.tour import Chapter, Check, Tour
from qscope_jax.features.languages import detector_accuracy, fit_detector, monolinguality
from qscope_jax.features.readout import read_features
from qscope_jax.report.figures import heat_map
from qscope_jax.report.page import Page

TITLE = "Each language's own feature"
# Languages with a script of their own are easy; English and French share theirs.
_TARGETS = {"zh": 0.95, "ru": 0.95, "ko": 0.95, "ar": 0.95, "en": 0.85, "fr": 0.85}
_EVERY = 4


def run(tour: Tour) -> Chapter:
    """Choose feature, threshold and layer on training sentences; measure on held-out ones."""
    tour.readouts = {code: read_features(tour.model, tour.saes, sentences(code)[::_EVERY]) for code in LANGUAGES}
    tour.held_out_readouts = {code: read_features(tour.model, tour.saes, sentences(code, held_out=True)) for code in LANGUAGES}
    layers = [sae.layer for sae in tour.saes]
    accuracy = np.zeros((len(LANGUAGES), len(layers)))
    rows, checks = [], []
    for row, (code, name) in enumerate(LANGUAGES.items()):
        detectors = [fit_detector(code, {c: readouts[layer] for c, readouts in tour.readouts.items()}) for layer in layers]
        for column, detector in enumerate(detectors):
            accuracy[row, column] = detector_accuracy(detector, {c: readouts[detector.layer] for c, readouts in tour.held_out_readouts.items()})
        best = max(range(len(layers)), key=lambda column: detectors[column].train_accuracy)
        chosen = tour.detectors[code] = detectors[best]
        rows.append((name, str(chosen.layer), str(chosen.feature), chosen.train_accuracy, accuracy[row, best], float(accuracy[row].max())))
        target = _TARGETS[code]
        checks.append(Check(f"one feature tells {name}", float(accuracy[row, best]), f"at least {target}", bool(accuracy[row, best] >= target)))
    nu = {layer: monolinguality({c: r[layer] for c, r in tour.readouts.items()}) for layer in layers}
    held = len(sentences("en", held_out=True)) * len(LANGUAGES)
    summary = (
        f"A feature belongs to a language as far as its mean activation there exceeds the mean over the other languages. Feature, threshold and "
        f"layer are chosen on training sentences; on {held} held-out ones the weakest language scores a balanced accuracy of "
        f"{min(c.value for c in checks):.3f}."
    )

    def draw(page: Page) -> None:
        columns = ("language", "layer", "feature", "training", "held out", "held out, best layer in hindsight")
        page.table(columns, rows, caption="Balanced accuracy of one feature")
        labels = [f"layer {layer}" for layer in layers]
        page.figure(heat_map(list(LANGUAGES.values()), labels, accuracy, title="Held-out balanced accuracy of each layer's single best feature"))

    data = {
        "detectors": {code: vars(detector) for code, detector in tour.detectors.items()},
        "held_out_accuracy": {code: accuracy[row].tolist() for row, code in enumerate(LANGUAGES)},
        "most_monolingual": {layer: {code: int(np.argmax(scores)) for code, scores in by_language.items()} for layer, by_language in nu.items()},
    }
    return Chapter(TITLE, summary, checks, data, draw)
