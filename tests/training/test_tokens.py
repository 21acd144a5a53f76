import json

import numpy as np
import pytest

from qscope_jax.data.batches import BatchConfig
from qscope_jax.data.text_stream import TextStream
from qscope_jax.errors import ConfigError, InputError
from qscope_jax.parallel.mesh import make_mesh
from qscope_jax.training import tokens
from qscope_jax.training.checkpoint import StreamState
from qscope_jax.training.tokens import TokenStream


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


def codes(text) -> list[int]:
    return [ord(character) - 30 for character in text]


def test_each_lane_reads_its_own_documents_and_makes_its_own_rows(documents):
    texts = documents(60)
    stream = TokenStream(texts, codes, BatchConfig(6, 24), lanes=3)
    alone = [TokenStream(texts[lane::3], codes, BatchConfig(2, 24)) for lane in range(3)]
    for _ in range(4):
        batch, parts = next(stream), [next(one) for one in alone]
        for name in ("tokens_BT", "segment_ids_BT", "positions_BT"):
            np.testing.assert_array_equal(getattr(batch, name), np.concatenate([getattr(part, name) for part in parts]))
    state = stream.get_state()
    expected = next(stream).tokens_BT
    stream.set_state(state)
    np.testing.assert_array_equal(next(stream).tokens_BT, expected)


def test_lanes_that_do_not_fit_are_refused(documents):
    with pytest.raises(ConfigError, match="batch of 6 rows cannot be split into 4 lanes"):
        TokenStream(documents(60), codes, BatchConfig(6, 24), lanes=4)
    with pytest.raises(ConfigError, match="2 documents for 3 lanes"):
        TokenStream(documents(2), codes, BatchConfig(6, 24), lanes=3)
    state = TokenStream(documents(60), codes, BatchConfig(6, 24), lanes=2).get_state()
    with pytest.raises(ConfigError, match="data state has 2 lanes, this run 3"):
        TokenStream(documents(60), codes, BatchConfig(6, 24), lanes=3).set_state(state)


@pytest.fixture
def folder(documents, tmp_path):
    """Sixty documents in three files."""
    for number in range(3):
        rows = "".join(json.dumps({"text": text}) + "\n" for text in documents(60)[20 * number : 20 * number + 20])
        (tmp_path / f"{number}.jsonl").write_text(rows)
    return tmp_path


def test_a_text_stream_feeds_lanes_and_goes_on_where_it_stood(folder):
    def stream(lanes: int = 3) -> TokenStream:
        return TokenStream(TextStream(folder, shuffle_buffer=12), codes, BatchConfig(6, 24), lanes=lanes)

    whole = stream()
    batches = [next(whole).tokens_BT for _ in range(4)]
    alone = [TokenStream(OneLane(folder, lane), codes, BatchConfig(2, 24)) for lane in range(3)]
    np.testing.assert_array_equal(batches, [np.concatenate([next(one).tokens_BT for one in alone]) for _ in range(4)])
    state = json.loads(json.dumps(whole.get_state().cursor))
    expected = [next(whole).tokens_BT for _ in range(60)]
    other = stream()
    other.set_state(StreamState({}, state))
    np.testing.assert_array_equal([next(other).tokens_BT for _ in range(60)], expected)
    with pytest.raises(ConfigError, match="data state has 3 lanes, this run 2"):
        stream(lanes=2).set_state(StreamState({}, state))


class OneLane(TextStream):
    """A lane of three as a stream of its own."""

    def __init__(self, folder, own: int):
        super().__init__(folder, shuffle_buffer=12)
        self.own = own

    def lane(self, number: int, lanes: int):
        assert (number, lanes) == (0, 1)
        return super().lane(self.own, 3)


def test_a_process_reads_the_documents_of_its_own_lanes_alone(documents, monkeypatch):
    class Elsewhere:
        """Rows 2 to 5 of 6 are on this process's devices: lanes 1 and 2 of 3."""

        def addressable_devices_indices_map(self, shape):
            return {"one": (slice(2, 4), slice(None)), "other": (slice(4, None), slice(None))}

    monkeypatch.setattr(tokens, "batch_sharding", lambda mesh, ndim: Elsewhere())
    read, texts = set(), documents(60)

    def note(text) -> list[int]:
        read.add(text)
        return codes(text)

    stream = TokenStream(texts, note, BatchConfig(6, 24), lanes=3, mesh=make_mesh())
    batch, whole = next(stream), next(TokenStream(texts, codes, BatchConfig(6, 24), lanes=3))
    np.testing.assert_array_equal(batch.tokens_BT[2:], whole.tokens_BT[2:])
    assert not batch.segment_ids_BT[:2].any() and read and not read & (set(texts[::3]) - set(texts[1::3]) - set(texts[2::3]))


def test_a_process_opens_the_lanes_of_a_text_stream_that_are_its_own(folder, monkeypatch):
    monkeypatch.setattr(tokens, "_own_lanes", lambda mesh, shape, lanes: [1, 2])
    opened, lane = [], TextStream.lane

    def note(self, number, lanes):
        opened.append(number)
        return lane(self, number, lanes)

    whole = next(TokenStream(TextStream(folder), codes, BatchConfig(6, 24), lanes=3))
    monkeypatch.setattr(TextStream, "lane", note)
    batch = next(TokenStream(TextStream(folder), codes, BatchConfig(6, 24), lanes=3, mesh=make_mesh()))
    np.testing.assert_array_equal(batch.tokens_BT[2:], whole.tokens_BT[2:])
    assert opened == [1, 2] and not batch.segment_ids_BT[:2].any()
