"""Chapter: cards of features that the tour has met: where they fire, for whom, and what they write."""

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from qscope_jax.demo.corpus import LANGUAGES, sentences
from qscope_jax.demo.tone import tone_sentences
from qscope_jax.demo.tour import Chapter, Check, Tour
from qscope_jax.features.explain.explanation import ExplainConfig, explain_features
from qscope_jax.features.explain.feature_card import FeatureCard
from qscope_jax.features.readout import token_texts
from qscope_jax.features.store.feature_store import FeatureStore
from qscope_jax.features.store.store_writer import StoreConfig, write_store
from qscope_jax.report.explanation_page import add_card
from qscope_jax.report.page import Page

TITLE = "Explain features from a store"
# So many that one odd context is not what decides a share; the page shows the first few.
_CONFIG = ExplainConfig(top=24, quantiles=3, per_quantile=2, cofiring=5)
_SHOWN = 8
_EVERY = 4
TONE_SENTENCES = 40
_OWN = 0.9


def run(tour: Tour) -> Chapter:
    """Write a store of natural, rude and polite sentences, and read the cards of each language's feature and of the rude one from it."""
    features = {name: (tour.detectors[code].layer, tour.detectors[code].feature) for code, name in LANGUAGES.items() if code in tour.detectors}
    features |= {name: place for name, place in tour.named.items() if name not in features}
    layers = sorted({layer for layer, _ in features.values()})
    with tempfile.TemporaryDirectory() as scratch:
        rows = list(_corpus())
        saes = [sae for sae in tour.saes if sae.layer in layers]
        store = write_store(tour.model, saes, rows, Path(scratch) / "store", StoreConfig(shard_tokens=16_384))
        cards = _cards(store, features)
    own = {name: _share(card, "language", name) for name, card in cards.items() if name in LANGUAGES.values()}
    weakest = min(own.values())
    checks = [Check("a language's feature is strongest in its language", weakest, f"at least {_OWN}", weakest >= _OWN)]
    rude = cards.get("rude")
    told = (
        f" The feature that tells rude from polite best has {_share(rude, 'tone', 'rude'):.0%} of its strongest contexts in rude sentences."
        if rude
        else ""
    )
    summary = (
        f"One pass wrote what {len(saes)} layers' features did over {len(rows)} sentences; the model is not needed again. Of the "
        f"{_CONFIG.top} strongest contexts of each language's own feature at least {weakest:.0%} are in that language.{told}"
    )

    def token_text(token: int) -> str:
        return token_texts(tour.model, [token])[0]

    def draw(page: Page) -> None:
        for name, card in cards.items():
            add_card(page, replace(card, top=card.top[:_SHOWN]), token_text, known_as=name, level=3)

    data = {
        "sentences": len(rows),
        "own_language": own,
        "cards": {
            name: {
                "layer": card.layer,
                "feature": card.feature,
                "density": card.density,
                "text_rate": card.text_rate,
                "promoted": [token_text(token) for token, _ in card.promoted],
                "neighbours": card.neighbours,
                "cofiring": card.cofiring,
            }
            for name, card in cards.items()
        },
    }
    return Chapter(TITLE, summary, checks, data, draw)


def _corpus() -> Iterator[dict[str, str]]:
    """Natural sentences, and rude and polite ones, with where they are from."""
    for code, name in LANGUAGES.items():
        for line in sentences(code)[::_EVERY]:
            yield {"text": line, "language": name, "tone": "neither"}
    for item in tone_sentences(list(LANGUAGES), train=TONE_SENTENCES, held_out=0):
        yield {"text": item.text, "language": LANGUAGES[item.language], "tone": item.tone}


def _cards(store: FeatureStore, features: dict[str, tuple[int, int]]) -> dict[str, FeatureCard]:
    """The card of each named feature, layer after layer."""
    found: dict[tuple[int, int], FeatureCard] = {}
    for layer in sorted({layer for layer, _ in features.values()}):
        wanted = sorted({feature for at, feature in features.values() if at == layer})
        found |= {(layer, card.feature): card for card in explain_features(store, layer, wanted, _CONFIG)}
    return {name: found[place] for name, place in features.items()}


def _share(card: FeatureCard, column: str, value: str) -> float:
    """Share of the strongest contexts whose text has this value."""
    return sum(context.about[column] == value for context in card.top) / max(len(card.top), 1)
