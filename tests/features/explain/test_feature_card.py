import json
from dataclasses import FrozenInstanceError, asdict, replace

import pytest

from qscope_jax.features.explain.feature_card import Context, FeatureCard, GroupRate, QuantileContexts

CONTEXT = Context(5, 1, 2, (10, 11, 12), (0.0, 2.5, 0.5), {"language": "en"})
CARD = FeatureCard(
    3, 17, 0.01, 0.5, 2.5, 1.25, ((0.0, 2.5, 7),), {"language": (GroupRate("en", 9, 0.5, 0.01, 1.0),)}, (CONTEXT,),
    (QuantileContexts(1.0, 2.0, 3, (CONTEXT,)),), ((11, 0.5),), ((12, -0.5),), ((1, 0.9),), ((2, 0.1),), "said", {"detection": 0.75},
)  # fmt: skip


def test_a_card_is_plain_values_that_json_carries():
    back = json.loads(json.dumps(asdict(CARD)))
    assert back["top"][0]["token_ids"] == [10, 11, 12] and back["groups"]["language"][0]["group"] == "en"
    assert back["quantiles"][0]["contexts"] == back["top"] and set(back) == set(FeatureCard.__dataclass_fields__)


def test_a_feature_that_never_fires_needs_six_numbers():
    silent = FeatureCard(3, 18, 0.0, 0.0, 0.0, 0.0)
    assert not any(getattr(silent, name) for name in FeatureCard.__dataclass_fields__ if name not in ("layer", "feature"))


def test_cards_of_the_same_facts_are_equal_and_none_is_changed_in_place():
    assert replace(CARD) == CARD != replace(CARD, explanation="other")
    with pytest.raises(FrozenInstanceError):
        CARD.feature = 4  # pyright: ignore[reportAttributeAccessIssue]
    # What one card is given is not another's.
    assert FeatureCard(0, 0, 0.0, 0.0, 0.0, 0.0).scores is not FeatureCard(0, 1, 0.0, 0.0, 0.0, 0.0).scores
