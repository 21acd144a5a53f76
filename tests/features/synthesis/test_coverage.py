import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qscope_jax.errors import InputError
from qscope_jax.features.synthesis.coverage import Coverage, coverage, firing
from qscope_jax.features.synthesis.targets import Target
from qscope_jax.features.text_features import text_features

FEATURES = 5


@st.composite
def texts(draw):
    """Two layers of one to six texts of one to three tokens, first ones left out of the count."""
    lengths = draw(st.lists(st.integers(1, 3), min_size=1, max_size=6))
    cell = st.sampled_from([0.0, 0.0, 1.0, 2.0, 3.0])
    return [[draw(st.lists(st.lists(cell, min_size=FEATURES, max_size=FEATURES), min_size=n, max_size=n)) for n in lengths] for _ in range(2)]


targets_of_two_layers = st.lists(
    st.tuples(st.integers(0, 1), st.integers(0, FEATURES - 1), st.sampled_from([0.0, 1.5])), min_size=1, max_size=8, unique_by=lambda t: t[:2]
)


@given(layers=texts(), chosen=targets_of_two_layers, floor=st.sampled_from([0.0, 1.0, 2.0]))
@settings(max_examples=60, deadline=None)
def test_coverage_equals_sets(readout_of, layers, chosen, floor):
    targets = [Target(layer, feature, threshold=threshold) for layer, feature, threshold in chosen]
    tables = {layer: text_features(readout_of(*rows, layer=layer)) for layer, rows in enumerate(layers)}
    sets = [{i for i, text in enumerate(layers[t.layer]) if any(token[t.feature] > max(floor, t.threshold) for token in text[1:])} for t in targets]
    found = coverage(targets, tables, threshold=floor)
    assert found.counts.tolist() == [len(fired) for fired in sets]
    assert found.share == sum(map(bool, sets)) / len(targets)
    assert found.missing == [t for t, fired in zip(targets, sets, strict=True) if not fired]
    assert found.covered == [t for t, fired in zip(targets, sets, strict=True) if fired]
    assert found.weak(2) == [t for t, fired in zip(targets, sets, strict=True) if len(fired) == 1]
    hits = firing(targets, tables, threshold=floor).toarray()
    assert [set(np.flatnonzero(column)) for column in hits.T] == sets
    strongest = [max([0.0, *(token[t.feature] for text in layers[t.layer] for token in text[1:])]) for t in targets]
    np.testing.assert_array_equal(found.strongest, np.asarray(strongest, np.float32))


def test_layers_are_counted_apart(readout_of):
    tables = {layer: text_features(readout_of([[0, 0], [1, layer]], layer=layer)) for layer in (0, 3)}
    found = coverage([Target(3, 0), Target(0, 0), Target(0, 1), Target(3, 1)], tables)
    assert found.by_layer() == {0: (1, 2), 3: (2, 2)} and found.share == 0.75


def test_parts_of_the_texts_join_to_the_whole(readout_of):
    rng = np.random.default_rng(0)
    dense = [rng.choice([0.0, 1.0, 2.0], (3, 4), p=[0.8, 0.1, 0.1]) for _ in range(7)]
    targets = [Target(0, feature) for feature in range(4)]
    table = text_features(readout_of(*dense))
    whole = coverage(targets, {0: table})
    parts = coverage(targets, {0: table.select([0, 1, 2])}).joined(coverage(targets, {0: table.select([3, 4, 5, 6])}))
    assert (parts.counts.tolist(), parts.strongest.tolist(), parts.texts) == (whole.counts.tolist(), whole.strongest.tolist(), 7)


def test_no_text_covers_nothing(readout_of):
    found = coverage([Target(0, 1)], {0: text_features(readout_of([[1, 1]])).select([])})
    assert (found.share, found.texts, found.strongest.tolist()) == (0.0, 0, [0.0])


def test_what_makes_no_sense_is_refused(readout_of):
    table = text_features(readout_of([[1, 1]]))
    empty = Coverage((Target(0, 1),), np.zeros(1, np.int64), np.zeros(1, np.float32), 0)
    cases = [
        ("no targets given", lambda: coverage([], {0: table})),
        ("there is no layer 2 here", lambda: coverage([Target(2, 0)], {0: table})),
        ("has features 0 to 1", lambda: coverage([Target(0, 2)], {0: table})),
        ("threshold is -1", lambda: coverage([Target(0, 1)], {0: table}, threshold=-1.0)),
        (r"tables of \[0, 1\] texts", lambda: coverage([Target(0, 1)], {0: table, 1: table.select([])})),
        ("fewer than 0 texts", lambda: empty.weak(0)),
        ("different targets", lambda: empty.joined(Coverage((Target(0, 2),), np.zeros(1, np.int64), np.zeros(1, np.float32), 0))),
    ]
    for line, call in cases:
        with pytest.raises(InputError, match=line):
            call()
