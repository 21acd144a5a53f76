import dataclasses

import numpy as np
import pytest

from qscope_jax.errors import InputError, ShapeError
from qscope_jax.features.readout import read_token_features
from qscope_jax.features.repetition import repetition_features as module
from qscope_jax.features.repetition.repetition_features import (
    COLUMNS,
    RepetitionSums,
    find_repetition_features,
    rank_repetition_features,
    repeated_tokens,
)

RNG = np.random.default_rng(0)
F = 6


def sample(period, rounds, before=5):
    """Tokens that end in a circle."""
    return [*range(60, 60 + before), *([10 + i for i in range(period)] * rounds)]


@pytest.fixture
def readout_of_samples(readout_of):
    """Factory of a readout of given tokens and activations; the first token of each text does not count."""

    def make(*texts, layer=0, counted=None):
        found = readout_of(*(activations for _, activations in texts), layer=layer, counted=counted)
        return dataclasses.replace(found, token_ids=tuple(tuple(ids) for ids, _ in texts))

    return make


def activations(tokens):
    return np.maximum(RNG.standard_normal((tokens, F)), 0).astype(np.float32)


def test_a_repeated_token_is_first_in_the_first_round_and_last_in_the_last():
    places = repeated_tokens([9, 9, *[1, 2, 3] * 30, 1])
    assert places.first_J.tolist() == [2, 3, 4] and places.last_J.tolist() == [92, 90, 91]
    assert repeated_tokens(list(range(200))) is None


def test_a_token_twice_in_the_circle_is_compared_with_itself_after_the_same_tokens():
    places = repeated_tokens([9, *[1, 2, 1, 3] * 20])
    assert places.first_J.tolist() == [1, 2, 3, 4] and places.last_J.tolist() == [77, 78, 79, 80]


def test_the_increase_is_last_minus_first_over_tokens_then_over_samples(readout_of_samples):
    one, two, none = sample(2, 40), sample(7, 20), list(range(100))
    given = [(ids, activations(len(ids))) for ids in (one, two, none)]
    sums = RepetitionSums(0, F)
    sums.add_repetitive(readout_of_samples(*given))
    a, b = given[0][1], given[1][1]
    first = (a[5:7].mean(axis=0) + b[5:12].mean(axis=0)) / 2
    last = (a[-2:].mean(axis=0) + b[-7:].mean(axis=0)) / 2
    np.testing.assert_allclose(sums.increase(), last - first, atol=1e-6)
    assert (sums.samples, sums.skipped) == (2, 1)


def test_readouts_may_come_one_by_one(readout_of_samples):
    given = [(ids, activations(len(ids))) for ids in (sample(2, 40), sample(7, 20))]
    whole, parts = RepetitionSums(0, F), RepetitionSums(0, F)
    whole.add_repetitive(readout_of_samples(*given))
    whole.add_normal(readout_of_samples(*given))
    for one in given:
        parts.add_repetitive(readout_of_samples(one))
        parts.add_normal(readout_of_samples(one))
    np.testing.assert_allclose(whole.increase(), parts.increase())
    np.testing.assert_allclose(whole.normal_F, parts.normal_F)
    np.testing.assert_array_equal(whole.normal_fires_F, parts.normal_fires_F)


def test_tokens_that_do_not_count_both_times_are_left_out(readout_of_samples):
    ids = sample(2, 40, before=0)  # the first token of the text is the first of the circle
    values = activations(len(ids))
    sums = RepetitionSums(0, F)
    sums.add_repetitive(readout_of_samples((ids, values)))
    np.testing.assert_allclose(sums.increase(), values[-1] - values[1], atol=1e-6)
    sums.add_repetitive(readout_of_samples((ids, values), counted=[[False] * len(ids)]))
    assert (sums.samples, sums.skipped) == (1, 1)


def test_features_are_ranked_by_their_increase_with_their_activation_on_normal_text_beside(readout_of_samples):
    ids, normal = sample(1, 80), list(range(4))
    values = np.zeros((len(ids), F), np.float32)
    values[5, :3], values[-1, :3] = [1, 0, 4], [3, 5, 1]
    ordinary = np.zeros((4, F), np.float32)
    ordinary[:, 0] = [9, 0.5, 0, 1]  # the first token does not count
    sums = RepetitionSums(3, F)
    sums.add_repetitive(readout_of_samples((ids, values), layer=3))
    sums.add_normal(readout_of_samples((normal, ordinary), layer=3))
    found = rank_repetition_features([sums], count=2)
    assert found.features_MS.tolist() == [[1, 0]] and found.scores_MS.tolist() == [[5, 2]]
    assert len(COLUMNS) == 8
    np.testing.assert_allclose(found.rows(), [(3, 1, 1, 5, 0, 5, 0, 0), (3, 2, 0, 2, 1, 3, 0.5, 2 / 3)])
    assert (found.samples, found.skipped, found.normal_tokens) == (1, 0, 3)
    with pytest.raises(InputError, match="3 repetition features of layer 3: 2 rise"):
        rank_repetition_features([sums], count=3)


def test_streaming_through_the_model_equals_its_readouts_by_hand(character_model, saes, monkeypatch):
    """All batches are of two texts in rows of one length, read layer by layer: few programs."""
    samples = [sample(2, 40), list(range(90)), sample(5, 20), sample(1, 70), sample(3, 25)]
    normal = [list(range(5, 85)), list(range(2, 92))]
    monkeypatch.setattr(module, "LAYERS_AT_ONCE", 1)
    found = find_repetition_features(character_model, iter(saes[:2]), samples, normal, count=2, batch_texts=2)
    assert (found.layers, found.samples, found.skipped, found.normal_tokens) == ((0, 1), 4, 1, 79 + 89)
    for place, sae in enumerate(saes[:2]):
        readout = read_token_features(character_model, [sae], [samples[0], *samples[2:]], batch_texts=2)[place]
        increase = np.zeros(24)
        for text, period in enumerate((2, 5, 1, 3)):
            dense = np.stack([readout.activation(text, f) for f in range(24)], axis=1)
            increase += (dense[-period:].mean(axis=0) - dense[5 : 5 + period].mean(axis=0)) / 4
        best = np.argsort(-increase, kind="stable")[:2]
        assert found.features_MS[place].tolist() == best.tolist()
        np.testing.assert_allclose(found.scores_MS[place], increase[best], rtol=1e-3)
        means, rates = read_token_features(character_model, [sae], normal)[place].means()
        np.testing.assert_allclose(found.normal_MS[place], means[best], rtol=1e-3)
        np.testing.assert_allclose(found.normal_rates_MS[place], rates[best], rtol=1e-6)


def test_what_cannot_be_measured_is_refused_in_one_line(character_model, saes, readout_of_samples):
    looping, normal = sample(2, 40), list(range(9))
    other = readout_of_samples((looping, activations(len(looping))), layer=1)
    cases = [
        (InputError, "0 of 1 samples end in endless", lambda: find_repetition_features(character_model, saes, [normal], [normal])),
        (InputError, "and 0 are normal", lambda: find_repetition_features(character_model, saes, [looping], [])),
        (InputError, "0 features of each layer", lambda: find_repetition_features(character_model, saes, [looping], [normal], count=0)),
        (InputError, r"layers \[\]", lambda: find_repetition_features(character_model, [], [looping], [normal])),
        (InputError, r"layers \[1, 1\]", lambda: find_repetition_features(character_model, [saes[1]] * 2, [looping], [normal])),
        (InputError, "no normal text", lambda: rank_repetition_features([RepetitionSums(0, F, samples=1)])),
        (InputError, "none of 0 samples", lambda: rank_repetition_features([RepetitionSums(0, F)])),
        (ShapeError, "layer 1 with 6 features is added to sums of layer 0", lambda: RepetitionSums(0, F).add_normal(other)),
    ]
    for kind, line, call in cases:
        with pytest.raises(kind, match=line) as caught:
            call()
        assert "\n" not in str(caught.value)
