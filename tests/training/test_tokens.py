import numpy as np
import pytest

from qscope_jax.errors import InputError
from qscope_jax.training.checkpoint import StreamState


def test_batches_have_the_shape_the_stream_states_and_hold_the_documents(token_stream, documents):
    stream = token_stream()
    batch = next(stream)
    assert batch.tokens_BT.shape == stream.shape == (4, 24)
    rows = zip(batch.tokens_BT, batch.segment_ids_BT, strict=True)
    rows = ["".join(chr(token + 30) for token in tokens[segments == 1]) for tokens, segments in rows]
    assert set(rows) <= set(documents())


def test_a_restored_stream_goes_on_where_it_stood_through_epochs(token_stream, documents):
    texts = documents(30)
    stream, other = token_stream(texts), token_stream(texts)
    for _ in range(5):
        next(stream)
    state = stream.get_state()
    assert state.arrays == {}
    expected = [next(stream).tokens_BT for _ in range(20)]
    other.set_state(state)
    np.testing.assert_array_equal([next(other).tokens_BT for _ in range(20)], expected)


def test_the_state_of_other_documents_is_refused(token_stream, documents):
    with pytest.raises(InputError, match="documents was 200, is 30"):
        token_stream(documents(30)).set_state(token_stream().get_state())
    with pytest.raises(InputError, match="not one that a token batch iterator saved"):
        token_stream().set_state(StreamState({}, {}))
