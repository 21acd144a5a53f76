import re

import pytest

from qscope_jax.errors import InputError
from qscope_jax.features.explain.feature_card import Context, FeatureCard, GroupRate, QuantileContexts
from qscope_jax.report.explanation_page import MOST_FEATURES, share, write_explanation_page

TOP = Context(3, 1, 4, (5, 6, 7), (0.0, 9.0, 1.0), {"language": "<French>"})
LOW = Context(8, 0, 0, (6,), (2.0,))
CARD = FeatureCard(
    4, 17, 0.0123, 0.5, 9.0, 4.0,
    histogram=((0.0, 4.5, 6), (4.5, 9.0, 2)),
    groups={"language": tuple(GroupRate(f"group {i}", 10, 1 - i / 100, 0.1, 2.0) for i in range(40))},
    top=(TOP,), quantiles=(QuantileContexts(4.5, 9.0, 2, ()), QuantileContexts(1.0, 4.5, 6, (LOW,))),
    promoted=((5, 1.5), (6, 1.25)), suppressed=((7, -2.0),), neighbours=((300, 0.875),), cofiring=((12, 0.625),),
    explanation="tea & cake", scores={"detection": 0.9},
)  # fmt: skip


def token_text(token: int) -> str:
    return f"<w{token}>"


@pytest.fixture
def written(tmp_path):
    def write(*cards: FeatureCard) -> str:
        return write_explanation_page(tmp_path / "p.html", cards, token_text=token_text, subtitle="a store").read_text(encoding="utf-8")

    return write


def test_a_feature_has_all_its_sections(written):
    document = written(CARD)
    for said in ("Layer 4, feature 17: tea &amp; cake", "a store", "1.23 %", "Detection score of the explanation: 0.90", "text 3, token 5, language",
                 "&lt;French&gt;", "From 6 texts with a maximum of 1 to 4.5", "&lt;w5&gt;", "0.875", "0.625", ">300<", ">12<"):  # fmt: skip
        assert said in document, said
    assert "From 2 texts" not in document and "<w5>" not in document
    assert "Texts by maximum" in document and "the 30 of 40 in which it fires most" in document


def test_contexts_of_a_feature_share_one_scale(written):
    document = written(CARD)
    scales = re.findall(r"0 <i></i> ([\d.]+)<", document)
    assert scales == ["9", "9"]


def test_a_feature_that_never_fires_says_so_and_no_more(written):
    document = written(FeatureCard(4, 18, 0.0, 0.0, 0.0, 0.0))
    assert "It never fires in these texts." in document and "data-figure=" not in document


def test_what_a_store_does_not_hold_has_no_section(written):
    document = written(FeatureCard(4, 17, 0.1, 0.5, 9.0, 4.0, histogram=((0.0, 9.0, 3),)))
    assert "Where it fires most" not in document and "What its direction writes" not in document and "Features near it" not in document


def test_more_features_than_a_page_can_show_are_refused(written):
    with pytest.raises(InputError, match="write a site instead"):
        written(*[CARD] * (MOST_FEATURES + 1))


def test_a_rare_share_keeps_its_digits():
    assert [share(value) for value in (0.5, 0.0123, 0.0000123, 0.0)] == ["50 %", "1.23 %", "0.00123 %", "0 %"]
