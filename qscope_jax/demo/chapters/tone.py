"""Chapter: tell rude sentences from polite ones by a handful of features, without training a classifier."""

from collections.abc import Mapping

import numpy as np

from qscope_jax.demo.corpus import LANGUAGES
from qscope_jax.demo.tone import tone_sentences
from qscope_jax.demo.tour import Chapter, Check, Tour
from qscope_jax.features.classify.classification import FeatureRule, RuleConfig, Tables, fit_rule
from qscope_jax.features.classify.classification_report import LabelledHalves, jaccard, score_rule, transfer
from qscope_jax.features.classify.text_baselines import bag_of_words, mean_difference, stream_regression
from qscope_jax.features.classify.text_reading import LayerReading, ReadingConfig, read_texts
from qscope_jax.report.figures import curves, heat_map
from qscope_jax.report.page import Page

TITLE = "Rude or polite, by a few features"
# Of either tone in English; half as many in each other language.
TRAIN, HELD_OUT = 240, 100
_READING = ReadingConfig(batch_size=64)
_RULE = RuleConfig(k=5, thresholds="f1")
_PAPER = RuleConfig(k=1)
_SHARES, _DRAWS = (0.05, 0.1, 0.2, 0.5, 1.0), 10
_TENTH = 0.1
_SAMPLES = 500


def run(tour: Tour) -> Chapter:
    """Choose layer, features and thresholds on training sentences; measure on held-out ones."""
    labelled = tone_sentences(["en"], train=TRAIN, held_out=HELD_OUT)
    labelled += tone_sentences([code for code in LANGUAGES if code != "en"], train=TRAIN // 2, held_out=HELD_OUT // 2)
    texts = [item.text for item in labelled]
    readings = read_texts(tour.model, tour.saes, texts, _READING)
    tables = {layer: reading.features for layer, reading in readings.items()}
    language, split, tone = (np.array([getattr(item, name) for item in labelled]) for name in ("language", "split", "tone"))
    everything = LabelledHalves(tone == "rude", np.flatnonzero(split == "train"), np.flatnonzero(split == "held_out"))
    halves = {name: everything.of(language == code) for code, name in LANGUAGES.items()}
    english = halves["English"]
    rule = fit_rule(tables, english.positive_B, _RULE, rows=english.discovery)
    tour.named["rude"] = (rule.terms[0].layer, rule.terms[0].feature)
    rows = _scores(texts, readings, tables, english, rule)
    f1 = {share: float(np.mean(found)) for share, found in _with_less(tables, english).items()}
    kept = f1[_TENTH] / f1[1.0] if f1[1.0] else 0.0
    moved, shared = transfer(tables, halves, _RULE), jaccard(tables, halves)[rule.layers[0]]
    checks = [
        Check("F1 on held-out English, at most 5 features", rows[0][1], "at least 0.90", rows[0][1] >= 0.9),
        Check("share of it that a tenth of the data gives", kept, "at least 0.95", kept >= 0.95),
    ]
    elsewhere = ", ".join(f"{moved.f1[0, row]:.2f} in {name}" for row, name in enumerate(halves) if row)
    _, score, low, high, *_ = rows[0]
    summary = (
        f"A sentence is rude if any of {len(rule.terms)} features of layer {rule.layers[0]} exceeds its threshold; all of it is chosen on "
        f"{len(english.discovery)} training sentences. On {len(english.evaluation)} held-out English ones, which share no sentence and only some of "
        f"the words, F1 is {score:.3f} ({low:.3f} to {high:.3f}), and {kept:.1%} of that with a tenth of the data. Found on English and applied "
        f"elsewhere, the same features give {elsewhere}; features found on each language itself give {min(np.diag(moved.f1)):.2f} or more. Calling "
        f"every sentence rude would give 0.67."
    )

    def draw(page: Page) -> None:
        columns = ("method", "F1", "from", "to", "precision", "recall", "AUC")
        page.table(columns, rows, caption="Held-out English; 95 % intervals by bootstrap")
        page.figure(curves(list(f1), {"F1": list(f1.values())}, title="With less data", x_title="share of the training sentences", y_title="F1"))
        names = list(halves)
        page.figure(heat_map(names, names, moved.f1, title="Held-out F1", y_title="found on", x_title="applied to"))
        page.figure(heat_map(names, names, shared, title=f"Jaccard of the ten best features at layer {rule.layers[0]}"))

    data = {
        "rule": [vars(term) for term in rule.terms],
        "methods": [dict(zip(("method", "f1", "low", "high", "precision", "recall", "auc"), row, strict=True)) for row in rows],
        "f1_by_share": {str(share): value for share, value in f1.items()},
        "languages": list(halves),
        "transfer": moved.f1,
        "transfer_layers": moved.layers,
        "jaccard": shared,
    }
    return Chapter(TITLE, summary, checks, data, draw)


def _scores(
    texts: list[str], readings: Mapping[int, LayerReading], tables: Tables, halves: LabelledHalves, rule: FeatureRule
) -> list[tuple[str, float, float, float, float, float, float]]:
    """The rule, the paper's rule of one feature that fires or not, and the baselines: F1 with its interval, precision, recall, AUC."""
    paper = fit_rule(tables, halves.positive_B, _PAPER, rows=halves.discovery)
    found = {
        f"any of {len(rule.terms)} features": score_rule(rule, tables, halves, samples=_SAMPLES),
        "the best feature, fires or not": score_rule(paper, tables, halves, samples=_SAMPLES),
    }
    truth, split = halves.positive_B, (halves.discovery, halves.evaluation)
    layer = rule.layers[0]
    streams = readings[layer].mean_streams
    baselines = [
        mean_difference(streams, truth, *split, layer=layer),
        stream_regression(streams, truth, *split, layer=layer),
        bag_of_words(texts, truth, *split),
    ]
    found |= {one.name: one.scores(truth[halves.evaluation], samples=_SAMPLES) for one in baselines}
    return [(name, one.f1.value, one.f1.low, one.f1.high, one.precision.value, one.recall.value, one.auc.value) for name, one in found.items()]


def _with_less(tables: Tables, halves: LabelledHalves) -> dict[float, list[float]]:
    """Held-out F1 of rules fitted to shares of either class, drawn several times."""
    found: dict[float, list[float]] = {share: [] for share in _SHARES}
    for seed in range(_DRAWS):
        rng = np.random.default_rng(seed)
        orders = [rng.permutation(halves.discovery[halves.positive_B[halves.discovery] == of_class]) for of_class in (True, False)]
        for share, scores in found.items():
            rows = np.concatenate([order[: round(share * len(order))] for order in orders])
            rule = fit_rule(tables, halves.positive_B, _RULE, rows=rows)
            scores.append(score_rule(rule, tables, halves, samples=0).f1.value)
    return found
