import json
import re

import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.features.switching.language_features import LanguageFeatures
from qscope_jax.report.language_features_page import write_language_features_page
from qscope_jax.sae.encoder_rows import EncoderRows

ALPHA = np.array([[[-0.5, -0.25], [1.5, 1.25], [0.125, -2]], [[-3, -4], [5, 6], [-7, 8]]], np.float32)


@pytest.fixture
def found() -> LanguageFeatures:
    means = np.arange(8).reshape(2, 2, 2).tolist()
    facts = {
        "chosen": "monolinguality", "languages": ["en", "zh"], "means": means, "rates": (np.arange(8).reshape(2, 2, 2) / 8).tolist(),
        "runner_up": [["en", "en"], ["en", "en"]], "reading": {"max_norm_multiple": 10.0},
    }  # fmt: skip
    rows = tuple(EncoderRows(jnp.zeros((2, 4)), jnp.zeros(2)) for _ in range(2))
    features, scores = np.array([[104, 77], [9, 31]]), np.array([[2.5, 1.5], [3.5, 0.5]], np.float32)
    return LanguageFeatures("zh", ("en", "zh", "<ru>"), (26, 27), features, scores, ALPHA, np.array([4000, 5000, 6000]), "m", "s", rows, facts)


def figures(page: str) -> list[dict]:
    return [json.loads(text)["data"][0] for text in re.findall(r'<script type="application/json" id="figure-\d+">(.*?)</script>', page)]


def test_a_page_shows_whose_the_features_are_and_how_far_they_reach(found, tmp_path):
    page = write_language_features_page(tmp_path / "p.html", found, subtitle="model m").read_text()
    scores, means, alpha = figures(page)
    assert scores["y"] == [2.5, 1.5, 3.5, 0.5] and scores["customdata"] == ["26 / 104", "26 / 77", "27 / 9", "27 / 31"]
    assert means["z"] == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert alpha["z"] == [[-0.5, -0.25, -3, -4], [1.5, 1.25, 5, 6], [0.125, -2, -7, 8]]
    assert "Features of language zh" in page and "model m" in page and "over 10 times the median" in page
    assert "&lt;ru&gt;" in page and "6,000" in page


def test_features_by_hand_and_controls_are_called_so(found, tmp_path):
    for chosen, title in (("given", "Features by hand, for language zh"), ("random", "Control features, for language zh")):
        found.facts["chosen"] = chosen
        found.facts["reading"]["max_norm_multiple"] = 0.0
        page = write_language_features_page(tmp_path / "p.html", found).read_text()
        assert title in page and "first tokens are left out." in page
