import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qscope_jax.data.packing import pack_texts
from qscope_jax.errors import InputError


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 12), max_size=40), st.integers(1, 5))
def test_every_token_lies_in_one_place_and_texts_stay_whole(lengths, batch_size):
    rng = np.random.default_rng(0)
    texts = [rng.integers(1, 100, length).tolist() for length in lengths]
    found = np.zeros(sum(lengths), np.int64)
    for packed in pack_texts(texts, batch_size=batch_size, length=12):
        assert packed.texts_BT.shape == (batch_size, 12)
        np.testing.assert_array_equal(packed.texts_BT >= 0, packed.batch.segment_ids_BT > 0)
        inside = packed.places_BT >= 0
        np.testing.assert_array_equal(inside, packed.texts_BT >= 0)
        found[packed.places_BT[inside]] += packed.batch.tokens_BT[inside]
        for row in range(batch_size):
            for text in set(packed.texts_BT[row][inside[row]].tolist()):
                where = np.flatnonzero(packed.texts_BT[row] == text)
                assert where.tolist() == list(range(where[0], where[0] + lengths[text]))
                assert packed.batch.positions_BT[row][where].tolist() == list(range(lengths[text]))
                assert len(set(packed.batch.segment_ids_BT[row][where])) == 1
    assert found.tolist() == [token for text in texts for token in text]


def test_rows_are_filled_as_a_best_fit_fills_them():
    (packed,) = pack_texts([[1] * n for n in (2, 5, 3, 6, 4)], batch_size=4, length=10)
    rows = [sorted(set(row[row >= 0].tolist())) for row in packed.texts_BT]
    assert rows == [[3, 4], [0, 1, 2], [], []]


def test_a_text_that_no_row_holds_is_refused():
    with pytest.raises(InputError, match="texts have 0 to 3 tokens, expected 1 to 8"):
        pack_texts([[1, 2, 3], []], batch_size=1, length=8)
    with pytest.raises(InputError, match="texts have 9 to 9 tokens"):
        pack_texts([[1] * 9], batch_size=1, length=8)
