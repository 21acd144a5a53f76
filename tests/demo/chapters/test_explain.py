import json

import pytest

from qscope_jax.data.files import plain
from qscope_jax.demo.chapters import explain
from qscope_jax.demo.corpus import LANGUAGES
from qscope_jax.features.languages import Detector
from qscope_jax.report.page import Page


@pytest.fixture(scope="module")
def chapter(with_saes):
    with_saes.detectors = {code: Detector(code, i % 2, 3 + i, 0.0, 1.0) for i, code in enumerate(LANGUAGES)}
    with_saes.named = {"rude": (1, 20)}
    return explain.run(with_saes)


def test_every_named_feature_has_its_card(chapter):
    cards = chapter.data["cards"]
    assert list(cards) == [*LANGUAGES.values(), "rude"]
    assert (cards["rude"]["layer"], cards["rude"]["feature"]) == (1, 20)
    assert all(0 <= card["density"] <= card["text_rate"] <= 1 for card in cards.values())
    json.dumps(plain(chapter.data))


def test_the_check_is_about_the_weakest_language(chapter):
    (check,) = chapter.checks
    assert check.value == min(chapter.data["own_language"].values()) and check.met == (check.value >= 0.9)
    assert list(chapter.data["own_language"]) == list(LANGUAGES.values())


def test_the_page_shows_the_cards_with_their_contexts(chapter):
    page = Page("tour")
    chapter.draw(page)
    headings = [line for line in page.html().splitlines() if line.startswith("<h3")]
    for name in (*LANGUAGES.values(), "rude"):
        assert any(line.endswith(f": {name}</h3>") for line in headings), name
