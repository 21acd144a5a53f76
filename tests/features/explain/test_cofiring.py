import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qscope_jax.errors import ConfigError, InputError
from qscope_jax.features.explain.cofiring import cofiring, sampled_cofiring
from tests.features.made_store import make_store

F = 8


@pytest.fixture(scope="module")
def readout(readout_of):
    rng = np.random.default_rng(0)
    return readout_of(*(rng.integers(1, 9, (length, F)) * (rng.random((length, F)) < 0.25) for length in (12, 7, 20, 5, 9)), layer=2)


@pytest.fixture(scope="module")
def store(readout, tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("s") / "store", readout, shard_texts=2)


@pytest.fixture(scope="module")
def tokens(readout) -> list[set[tuple[int, int]]]:
    """The counted tokens at which each feature fires."""
    return [
        {(text, i) for text in range(len(readout)) for i in np.flatnonzero(readout.activation(text, f) * readout.counted[text])} for f in range(F)
    ]


def expected(tokens: list[set], feature: int) -> dict[int, float]:
    others = [f for f in range(F) if f != feature and tokens[f] & tokens[feature]]
    return {f: pytest.approx(len(tokens[f] & tokens[feature]) / len(tokens[f] | tokens[feature])) for f in others}


@settings(max_examples=20, deadline=None)
@given(features=st.permutations(range(F)), entries=st.integers(1, 3 * F))
def test_the_index_is_that_of_the_sets_of_tokens(store, tokens, features, entries):
    found = cofiring(store, 2, features, F, entries=entries)
    assert found.features.tolist() == features
    for row, feature in enumerate(features):
        assert dict(found.of(row)) == expected(tokens, feature)
        assert [f for f, _ in found.of(row)] == sorted(expected(tokens, feature), key=lambda f: (-dict(found.of(row))[f], f))


def test_a_sample_of_all_tokens_is_exact(store, tokens, readout):
    for entries in (1, 3 * F, 10**6):
        found = sampled_cofiring(store, 2, F, tokens=10**6, entries=entries)
        assert found.tokens == readout.counted_tokens
        assert [dict(found.of(row)) for row in range(F)] == [expected(tokens, f) for f in range(F)]


def test_a_sample_draws_counted_tokens_only_and_each_once(store):
    found = sampled_cofiring(store, 2, 3, tokens=11, seed=4)
    assert found.tokens == 11 and found.partners.shape == (F, 3)
    assert [found.of(row) for row in range(F)] == [sampled_cofiring(store, 2, 3, tokens=11, seed=4).of(row) for row in range(F)]


def test_fewer_partners_are_asked_for(store, tokens):
    found = cofiring(store, 2, [0], 2)
    assert len(found.of(0)) == min(2, len(expected(tokens, 0))) and found.partners.shape == (1, 2)


def test_a_feature_that_never_fires_has_no_partner(readout_of, tmp_path):
    store = make_store(tmp_path / "s", readout_of([[1, 0, 2], [0, 0, 3], [1, 0, 1]]))
    assert cofiring(store, 0, [1]).of(0) == () and cofiring(store, 0, [0]).of(0) == ((2, 0.5),)
    assert cofiring(store, 0, []).partners.shape == (0, 10)


def test_bad_requests_are_refused(store, readout, tmp_path):
    with pytest.raises(InputError, match="feature 8 is out of range"):
        cofiring(store, 2, [8])
    with pytest.raises(ConfigError, match="expected 1 partner"):
        cofiring(store, 2, [0], 0)
    with pytest.raises(ConfigError, match="tokens is 0"):
        sampled_cofiring(store, 2, tokens=0)
    with pytest.raises(InputError, match="keeps no token's code"):
        sampled_cofiring(make_store(tmp_path / "s", readout, codes=False), 2)
