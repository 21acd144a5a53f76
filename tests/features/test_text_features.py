import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array

from qscope_jax.errors import ShapeError
from qscope_jax.features import text_features as module
from qscope_jax.features.text_features import TextFeatures, join_texts, last_codes, text_features, text_table

F, K = 7, 3


def tokens(rng, count):
    """Codes of tokens, each of distinct features, some of its slots empty, and whether each token counts."""
    indices = np.stack([rng.permutation(F)[:K] for _ in range(count)])
    values = np.maximum(rng.integers(-2, 4, (count, K)), 0).astype(np.float32)
    return values, indices, rng.random(count) < 0.7


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=9), st.integers(0, 2**16), st.sampled_from([1, 2 * F, 2**22]))
def test_a_table_holds_what_a_loop_over_tokens_finds(lengths, seed, dense):
    values, indices, counted = tokens(np.random.default_rng(seed), sum(lengths))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_DENSE", dense)  # texts at a time
        found = text_table(values, indices, counted, offsets, F)
    maxima, counts = np.zeros((len(lengths), F)), np.zeros((len(lengths), F), int)
    for text, (begin, end) in enumerate(zip(offsets, offsets[1:], strict=False)):
        for token in range(begin, end):
            for value, feature in zip(values[token], indices[token], strict=True):
                if counted[token] and value > 0:
                    maxima[text, feature] = max(maxima[text, feature], value)
                    counts[text, feature] += 1
    shape = (len(lengths), F)
    np.testing.assert_array_equal(csr_array((found.maxima, found.features, found.indptr), shape=shape).toarray(), maxima)
    np.testing.assert_array_equal(csr_array((found.counts, found.features, found.indptr), shape=shape).toarray(), counts)
    assert (found.maxima > 0).all() and (found.counts > 0).all()
    assert all((np.diff(found.features[a:b]) > 0).all() for a, b in zip(found.indptr, found.indptr[1:], strict=False))


def test_the_last_token_s_code_is_kept_whether_it_counts_or_not(readout_of):
    tables = text_features(readout_of([[0, 0, 5], [0, 2, 0], [1, 0, 0]], [[0, 3, 0]], counted=[[False, True, False], [False]]))
    np.testing.assert_array_equal(tables.last.toarray(), [[1, 0, 0], [0, 3, 0]])
    np.testing.assert_array_equal(tables.maxima.toarray(), [[0, 2, 0], [0, 0, 0]])
    assert tables.counted_tokens.tolist() == [1, 0]


def test_joined_and_selected_tables_keep_texts_in_order(readout_of):
    parts = [text_features(readout_of([[0, 0], [1, 0]])), text_features(readout_of([[0, 0], [0, 2]], [[0, 0], [3, 0]]))]
    joined = join_texts(parts)
    np.testing.assert_array_equal(joined.maxima.toarray(), [[1, 0], [0, 2], [3, 0]])
    np.testing.assert_array_equal(joined.select([2, 0]).maxima.toarray(), [[3, 0], [1, 0]])
    with pytest.raises(ShapeError, match="cannot be joined"):
        join_texts([parts[0], text_features(readout_of([[0, 0, 0], [1, 0, 0]]))])


def test_tables_of_different_texts_are_refused():
    table = last_codes(np.ones((2, 1), np.float32), np.zeros((2, 1), np.int32), F)
    with pytest.raises(ShapeError, match="and 3 texts; expected"):
        TextFeatures(0, table, table, table, np.ones(3, np.int64))
