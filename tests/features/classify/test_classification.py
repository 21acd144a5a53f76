import operator
from fractions import Fraction

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays
from scipy.sparse import csr_array

from qscope_jax.errors import ConfigError, InputError, ShapeError
from qscope_jax.features.classify.classification import (
    FeatureRule,
    RuleConfig,
    Term,
    best_layers,
    firing_differences,
    fit_rule,
    threshold_differences,
    top_features,
)
from qscope_jax.features.text_features import TextFeatures, text_features

# Small whole numbers, so that ties and zeros are common.
ACTIVATIONS = arrays(np.float32, st.tuples(st.integers(4, 12), st.integers(1, 6)), elements=st.sampled_from([0, 0, 0, 1, 2, 3]))


def table(activations_BF, layer=0) -> TextFeatures:
    """What texts would leave whose largest activations these are."""
    maxima = csr_array(np.asarray(activations_BF, np.float32))
    counts = csr_array((np.ones(maxima.nnz, np.int32), maxima.indices, maxima.indptr), shape=maxima.shape)
    return TextFeatures(layer, maxima, counts, maxima, np.ones(maxima.shape[0], np.int64))


def classes(count: int) -> np.ndarray:
    return np.arange(count) % 2 == 0


def f1(called, positive) -> float:
    return 2 * (called & positive).sum() / max(called.sum() + positive.sum(), 1)


def test_a_difference_is_the_share_of_positive_texts_less_that_of_negative_ones():
    # The example of the specification: firing on 3 of 4 positive and 1 of 4 negative texts.
    activations = np.array([[1, 0], [2, 1], [3, 1], [0, 1], [0, 0], [0, 1], [5, 0], [0, 1]])
    positive = np.arange(8) < 4
    assert firing_differences(table(activations), positive).tolist() == [0.5, 0.25]
    assert firing_differences(table(activations), positive, np.array([0, 3, 4, 5])).tolist() == [0.5, 0.0]


def test_equal_differences_tie_exactly_and_the_lower_feature_is_taken():
    # 3/10 - 1/10 rounds to less than 2/10 - 0/10.
    positive = np.arange(20) < 10
    activations = np.zeros((20, 2))
    activations[[0, 1, 2, 10], 0], activations[:2, 1] = 1, 1
    for differences in (firing_differences, threshold_differences):
        assert len(set(differences(table(activations), positive).tolist())) == 1
    tables = {layer: table(activations[:, [layer]], layer) for layer in range(2)}
    for thresholds in ("zero", "f1"):
        assert fit_rule({0: table(activations)}, positive, RuleConfig(k=1, thresholds=thresholds)).terms[0].feature == 0
        assert fit_rule(tables, positive, RuleConfig(k=1, thresholds=thresholds)).layers == (0,)


def test_a_feature_fires_on_a_text_where_it_does_at_a_token_that_counts(readout_of):
    # The first token does not count: feature 1 fires there alone.
    readout = readout_of([[0, 9, 0], [1, 0, 0]], [[0, 9, 0], [0, 0, 2]])
    assert firing_differences(text_features(readout), np.array([True, False])).tolist() == [1, 0, -1]


@given(ACTIVATIONS, st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_or_rule_equals_set_logic(activations, k):
    positive = classes(len(activations))
    fires = [{f for f in range(activations.shape[1]) if row[f] > 0} for row in activations]
    sides = fires[::2], fires[1::2]
    # In fractions: rounding would tell apart features whose rates differ equally.
    delta = {f: operator.sub(*(Fraction(sum(f in s for s in side), len(side)) for side in sides)) for f in range(activations.shape[1])}
    largest = sorted((delta[f] for f in delta if delta[f] > 0), reverse=True)[:k]
    if not largest:
        with pytest.raises(InputError, match="no feature of layers 0 fires more often"):
            fit_rule({0: table(activations)}, positive, RuleConfig(k=k))
        return
    rule = fit_rule({0: table(activations)}, positive, RuleConfig(k=k))
    chosen = [term.feature for term in rule.terms]
    assert [delta[feature] for feature in chosen] == largest and len(set(chosen)) == len(chosen)
    read = rule.activations({0: table(activations)})
    assert rule.predict(read).tolist() == [bool(set(chosen) & s) for s in fires] == (rule.score(read) > 0).tolist()


@given(ACTIVATIONS)
@settings(max_examples=60, deadline=None)
def test_with_thresholds_a_difference_is_the_largest_that_any_of_them_gives(activations):
    positive = classes(len(activations))
    found = threshold_differences(table(activations), positive)
    for column, largest in zip(activations.T, found, strict=True):
        # At each activation that occurs, the texts on which the feature is as active or more.
        cuts = [column >= level for level in set(column[column > 0].tolist())]
        assert largest == pytest.approx(max((cut[positive].mean() - cut[~positive].mean() for cut in cuts), default=0))


def test_a_feature_that_fires_on_all_texts_but_strongly_on_the_class_is_found_by_its_threshold():
    positive = classes(8)
    activations = np.c_[np.where(positive, 5.0, 1.0), np.arange(8) == 2]
    assert fit_rule({0: table(activations)}, positive, RuleConfig(k=1)).terms[0].feature == 1
    assert fit_rule({0: table(activations)}, positive, RuleConfig(k=1, thresholds="f1")).terms == (Term(0, 0, 1.0, threshold=3.0, scale=3.0),)
    # Texts that are not looked at change nothing.
    activations[6:, 0] = 100
    assert threshold_differences(table(activations), positive, np.arange(6)).tolist() == [1, pytest.approx(1 / 3)]


def test_layers_are_chosen_by_their_largest_difference():
    positive = classes(8)
    weak, strong = np.zeros((8, 3)), np.zeros((8, 3))
    weak[0, 1] = 1
    strong[[0, 2, 4], 2] = 1
    strong[6, 0] = 1
    tables = {3: table(weak, 3), 5: table(strong, 5), 7: table(np.eye(8, 3) * ~positive[:, None], 7)}
    assert fit_rule(tables, positive, RuleConfig(k=1)).terms == (Term(5, 2, 0.75),)
    both = fit_rule(tables, positive, RuleConfig(k=1, layers=2))
    assert [(term.layer, term.feature) for term in both.terms] == [(5, 2), (3, 1)] and both.layers == (5, 3)
    # A text is positive where either layer's feature fires.
    assert np.flatnonzero(both.predict(both.activations(tables))).tolist() == [0, 2, 4]
    # Layer 7 has no feature for the class, and is never used.
    assert fit_rule(tables, positive, RuleConfig(k=1, layers=3)).layers == (5, 3)
    assert best_layers({4: 0.5, 2: 0.5, 9: 0.1}, 2) == [2, 4]


def test_the_number_of_features_is_the_one_of_highest_f1_on_texts_left_out_and_of_equals_the_fewest():
    positive = np.arange(24) < 12
    activations = np.zeros((24, 4))
    activations[:7, 0], activations[7:12, 1], activations[3:6, 2] = 1, 1, 1
    assert [term.feature for term in fit_rule({0: table(activations)}, positive).terms] == [0, 1]
    # Ten features that each hit one text of the class would seem to help where they were found.
    chance = np.concatenate([activations[:, :1], np.eye(24)[:, 7:16]], axis=1)
    for thresholds in ("zero", "f1"):
        assert len(fit_rule({0: table(chance)}, positive, RuleConfig(thresholds=thresholds)).terms) == 1


def test_a_layer_can_be_chosen_by_the_f1_of_its_rule():
    positive = np.arange(20) < 10
    one, two = np.zeros((20, 2)), np.zeros((20, 2))
    one[:7, 0] = 1  # difference 0.7, and a second feature that only errs
    one[[9, *range(10, 18)], 1] = 1
    two[:6, 0], two[6:10, 1] = 1, 1  # difference 0.6, but two features that cover all
    tables = {0: table(one), 1: table(two, 1)}
    assert fit_rule(tables, positive, RuleConfig(k=2)).layers == (0,)
    assert fit_rule(tables, positive, RuleConfig(k=2, by="f1")).layers == (1,)


@pytest.mark.parametrize("config", [RuleConfig(), RuleConfig(k=2, layers=2, thresholds="f1"), RuleConfig(by="f1", thresholds="balanced")])
def test_a_fit_never_sees_evaluation_texts(config):
    rng = np.random.default_rng(0)
    activations = rng.random((2, 40, 12)) * (rng.random((2, 40, 12)) < 0.4)
    positive = classes(40)
    activations[:, positive, 3] += 1
    tables = {layer: table(activations[layer], layer) for layer in range(2)}
    discovery = np.arange(30)
    fitted = fit_rule(tables, positive, config, rows=discovery)
    shuffled = np.concatenate([positive[:30], rng.permutation(positive[30:])])
    activations[:, 30:] = rng.random((2, 10, 12)) * 100
    others = {layer: table(activations[layer], layer) for layer in range(2)}
    assert fit_rule(others, shuffled, config, rows=discovery) == fitted
    assert fit_rule({layer: found.select(discovery) for layer, found in tables.items()}, positive[:30], config) == fitted


def test_scores_compare_features_in_units_of_their_usual_activation():
    rule = FeatureRule((Term(0, 0, 1.0, threshold=1.0, scale=2.0), Term(0, 1, 1.0, threshold=0.0, scale=100.0)))
    read = rule.activations({0: table([[3, 0], [0, 50], [0.5, 0], [0, 0]])})
    assert rule.score(read).tolist() == [1, 0.5, 0, 0] and rule.predict(read).tolist() == [True, True, False, False]
    fitted = fit_rule({0: table([[3, 0], [0, 0], [5, 0], [0, 1]])}, classes(4), RuleConfig(k=1))
    assert fitted.terms[0].scale == 4


def test_features_that_fire_no_more_on_positives_are_no_part_of_a_rule():
    assert top_features(np.array([0.2, 0.5, 0.5, 0, -1]), 5).tolist() == [1, 2, 0]


def test_what_cannot_be_fitted_is_refused():
    tables = {0: table(np.ones((4, 2)))}
    with pytest.raises(InputError, match="4 texts are all of one class"):
        fit_rule(tables, np.ones(4, bool))
    with pytest.raises(InputError, match=r"no feature of layers 0 .*\(2 positive and 2 negative texts\)"):
        fit_rule(tables, classes(4))
    with pytest.raises(ShapeError, match="has 4 texts, and 3 classes"):
        firing_differences(tables[0], classes(3))
    with pytest.raises(InputError, match="reads layer 1; the tables are of layers 0"):
        FeatureRule((Term(1, 0, 1.0),)).activations(tables)
    with pytest.raises(ShapeError, match="reads feature 9 of layer 0, whose table has 2"):
        FeatureRule((Term(0, 9, 1.0),)).activations(tables)
    with pytest.raises(ConfigError, match="k is 0"):
        RuleConfig(k=0)
