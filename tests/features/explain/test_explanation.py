import dataclasses

import numpy as np
import pytest

from qscope_jax.errors import ConfigError, InputError
from qscope_jax.features.explain.contexts import Window
from qscope_jax.features.explain.explanation import ExplainConfig, explain_features, quantile_rows
from tests.features.made_store import make_store

TEXTS, F = 12, 6
LANGUAGES = ["English", "French", None] * 4


@pytest.fixture(scope="module")
def readout(readout_of):
    """Twelve texts of 1 to 12 tokens, so that one has no counted token; feature 5 never fires."""
    rng = np.random.default_rng(0)
    return readout_of(
        *(rng.integers(1, 200, (length, F)) * (rng.random((length, F)) < 0.3) * (np.arange(F) < 5) for length in range(1, TEXTS + 1)), layer=4
    )


@pytest.fixture(scope="module")
def store(readout, tmp_path_factory):
    rng = np.random.default_rng(1)
    dictionary = {name: rng.integers(0, 5, (F, 3)).astype(np.int32) for name in ("promoted", "suppressed", "neighbours")}
    dictionary |= {name: rng.random((F, 3)).astype(np.float32) for name in ("promoted_logits", "suppressed_logits", "cosines")}
    columns = {"language": LANGUAGES, "one": ["same"] * TEXTS, "list": [[1]] * TEXTS, "number": list(range(TEXTS))}
    return make_store(tmp_path_factory.mktemp("s") / "store", readout, columns=columns, shard_texts=5, dictionary=dictionary)


def maxima(readout, feature: int) -> dict[int, float]:
    found = {text: float((readout.activation(text, feature) * readout.counted[text]).max()) for text in range(TEXTS)}
    return {text: value for text, value in found.items() if value > 0}


def test_a_card_has_the_rates_of_the_codes(store, readout):
    for card in explain_features(store, 4):
        firing = maxima(readout, card.feature)
        tokens = [(readout.activation(text, card.feature) * readout.counted[text] > 0).sum() for text in range(TEXTS)]
        assert card.density == pytest.approx(sum(tokens) / readout.counted_tokens)
        assert card.text_rate == pytest.approx(len(firing) / (TEXTS - 1))
        assert card.maximum == max(firing.values(), default=0) and card.mean_maximum == pytest.approx(np.mean(list(firing.values()) or [0]))
        assert sum(height for *_, height in card.histogram) == len(firing)
        for low, high, height in card.histogram:
            last = high == card.histogram[-1][1]
            assert height == sum(low <= value < high or (last and value == high) for value in firing.values())


def test_groups_count_their_own_texts_most_firing_first(store, readout):
    (card,) = explain_features(store, 4, [2])
    assert set(card.groups) == {"language", "number"}
    firing = maxima(readout, 2)
    for rate in card.groups["language"]:
        own = [text for text in range(1, TEXTS) if (LANGUAGES[text] or "–") == rate.group]
        tokens = [readout.counted[text] for text in own]
        fires = sum((readout.activation(text, 2) * readout.counted[text] > 0).sum() for text in own)
        assert rate.texts == len(own) and rate.text_rate == pytest.approx(sum(text in firing for text in own) / len(own))
        assert rate.density == pytest.approx(fires / sum(row.sum() for row in tokens))
        assert rate.mean == pytest.approx(sum(firing.get(text, 0) for text in own) / len(own))
    rates = [rate.text_rate for rate in card.groups["language"]]
    assert rates == sorted(rates, reverse=True) and len(rates) == 3


def test_contexts_are_the_highest_and_some_of_each_quantile(store, readout):
    config = ExplainConfig(top=3, quantiles=2, per_quantile=2, window=Window(1, 1))
    for card in explain_features(store, 4, config=config):
        firing = sorted(maxima(readout, card.feature).values(), reverse=True)
        assert [max(context.activations) for context in card.top] == firing[:3]
        assert sum(part.texts for part in card.quantiles) == len(firing)
        shown = [context.text for context in card.top] + [context.text for part in card.quantiles for context in part.contexts]
        assert len(set(shown)) == len(shown)
        for part, values in zip(card.quantiles, np.array_split(firing, 2) if firing else [], strict=True):
            assert (part.low, part.high, part.texts) == (values[-1], values[0], len(values))
            assert all(part.low <= max(context.activations) <= part.high for context in part.contexts)


@pytest.mark.parametrize("contexts", [1, 20, 10**6])
def test_a_card_alone_is_that_of_the_whole_layer(store, contexts, monkeypatch):
    monkeypatch.setattr("qscope_jax.features.explain.explanation._CONTEXTS", contexts)
    whole = {card.feature: card for card in explain_features(store, 4)}
    assert list(whole) == list(range(F))
    for card in explain_features(store, 4, [3, 5, 0]):
        assert card == dataclasses.replace(whole[card.feature], cofiring=card.cofiring)
        assert dict(card.cofiring) == pytest.approx(dict(whole[card.feature].cofiring))  # the sample holds all tokens


def test_tokens_and_neighbours_are_those_of_the_dictionary(store):
    (card,) = explain_features(store, 4, [1])
    found = store.dictionary(4)
    for pairs, names, values in (
        (card.promoted, found.promoted, found.promoted_logits),
        (card.suppressed, found.suppressed, found.suppressed_logits),
        (card.neighbours, found.neighbours, found.cosines),
    ):
        assert pairs == tuple(zip(names[1].tolist(), values[1].tolist(), strict=True))


def test_a_feature_that_never_fires_has_a_card_all_the_same(store):
    (card,) = explain_features(store, 4, [5])
    assert (card.density, card.maximum, card.histogram, card.top, card.quantiles) == (0, 0, (), (), ())
    assert all(rate.text_rate == 0 for rate in card.groups["language"])


def test_a_store_without_codes_still_says_how_often_features_fire(readout, store, tmp_path):
    bare = make_store(tmp_path / "bare", readout, codes=False)
    for with_codes, without in zip(explain_features(store, 4), explain_features(bare, 4), strict=True):
        assert without.density == with_codes.density and without.histogram == with_codes.histogram
        assert without.top == () and without.cofiring == () and without.promoted == ()


def test_columns_can_be_chosen(store):
    (card,) = explain_features(store, 4, [0], ExplainConfig(columns=("one",)))
    assert [rate.group for rate in card.groups["one"]] == ["same"]
    with pytest.raises(InputError, match="has no column 'nation'"):
        explain_features(store, 4, [0], ExplainConfig(columns=("nation",)))
    with pytest.raises(InputError, match="column 'list' holds other things"):
        explain_features(store, 4, [0], ExplainConfig(columns=("list",)))


def test_bad_requests_are_refused_before_anything_is_read(store):
    with pytest.raises(InputError, match="feature 6 is out of range"):
        explain_features(store, 4, [6])
    with pytest.raises(InputError, match="has no layer 3"):
        explain_features(store, 3)
    with pytest.raises(ConfigError, match="bins is 0"):
        ExplainConfig(bins=0)


def test_quantiles_have_equal_sizes():
    assert [len(rows) for rows in quantile_rows(10, 4)] == [3, 3, 2, 2]
    assert [rows.tolist() for rows in quantile_rows(2, 4)] == [[0], [1]] and quantile_rows(0, 4) == []
