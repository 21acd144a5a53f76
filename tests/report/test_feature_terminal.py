import io

import pytest

from qscope_jax.features.explain.feature_card import Context, FeatureCard, GroupRate, QuantileContexts
from qscope_jax.report.feature_terminal import print_card

WORDS = {5: " tea", 6: " with\n", 7: " m[ilk]"}
CARD = FeatureCard(
    4, 17, 0.0123, 0.5, 9.0, 4.0,
    groups={"language": tuple(GroupRate(f"g{i}", 10, 0.5, 0.1, 2.0) for i in range(10))},
    top=tuple(Context(i, 1, 4, (5, 6, 7), (0.0, 9.0 - i, 1.0)) for i in range(8)),
    quantiles=(QuantileContexts(1.0, 4.5, 6, (Context(9, 0, 0, (7,), (2.0,)),)),),
    promoted=((5, 1.5), (6, 1.25)), suppressed=((7, -2.0),), neighbours=((300, 0.875),), cofiring=((12, 0.625),),
    explanation="tea", scores={"detection": 0.9},
)  # fmt: skip


@pytest.fixture
def printed(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")

    def show(card: FeatureCard, **more) -> list[str]:
        file = io.StringIO()
        print_card(card, WORDS.__getitem__, file=file, **more)
        return file.getvalue().splitlines()

    return show


def test_a_card_reads_well_in_a_log(printed):
    lines = printed(CARD, contexts=2)
    assert lines[0] == "Layer 4, feature 17: tea (detection 0.90)"
    for said in ("at 1.23 % of tokens, in 50 % of texts", "·tea ·with↵", "·m[ilk]", "300 (0.88)", "12 (0.62)", "g7 50 %, and 2 more"):
        assert any(said in line for line in lines), said
    assert lines[-3:] == ["       9   tea⟦ with↵⟧ m[ilk]", "       8   tea⟦ with↵⟧ m[ilk]", "       2  ⟦ m[ilk]⟧"]


def test_a_feature_that_never_fires_says_so(printed):
    lines = printed(FeatureCard(4, 18, 0.0, 0.0, 0.0, 0.0, promoted=((5, 1.0),)))
    assert lines[0] == "Layer 4, feature 18" and "never in these texts" in lines[1] and "·tea" in lines[2] and len(lines) == 3
