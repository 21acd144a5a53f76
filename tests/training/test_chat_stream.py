from dataclasses import fields

import numpy as np
import pytest

from qscope_jax.data.batches import BatchConfig
from qscope_jax.data.chat_batches import chat_batches
from qscope_jax.data.chat_tokens import ChatRow
from qscope_jax.errors import ConfigError, InputError
from qscope_jax.parallel.mesh import make_mesh
from qscope_jax.training import tokens
from qscope_jax.training.tokens import ChatStream

LANGUAGES = ("en", "ko")
ROWS = [ChatRow(np.full(2 + number % 9, number, np.int32), np.arange(2 + number % 9) > 0, ("en", "ko", "fr")[number % 3]) for number in range(1, 61)]
CONFIG = BatchConfig(6, 24)


def assert_same(batch, other):
    for field in fields(batch):
        np.testing.assert_array_equal(getattr(batch, field.name), getattr(other, field.name), strict=True)


def test_one_lane_is_the_batches_of_all_chats():
    stream, batches = ChatStream(ROWS, LANGUAGES, CONFIG), chat_batches(ROWS, LANGUAGES, CONFIG)
    assert stream.shape == (6, 24)
    for _ in range(8):
        assert_same(next(stream), next(batches))


def test_each_lane_reads_its_own_chats_and_makes_its_own_rows():
    stream = ChatStream(ROWS, LANGUAGES, CONFIG, lanes=3)
    alone = [ChatStream(ROWS[lane::3], LANGUAGES, BatchConfig(2, 24)) for lane in range(3)]
    for _ in range(4):
        batch, parts = next(stream), [next(one) for one in alone]
        for field in fields(batch):
            np.testing.assert_array_equal(getattr(batch, field.name), np.concatenate([getattr(part, field.name) for part in parts]), strict=True)


def test_a_restored_stream_goes_on_where_it_stood():
    stream, other = (ChatStream(ROWS, LANGUAGES, CONFIG, lanes=2) for _ in range(2))
    for _ in range(3):
        next(stream)
    other.set_state(stream.get_state())
    for _ in range(12):
        assert_same(next(stream), next(other))
    with pytest.raises(InputError, match="documents was 30, is 20"):
        ChatStream(ROWS[:40], LANGUAGES, CONFIG, lanes=2).set_state(stream.get_state())


def test_lanes_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="batch of 6 rows cannot be split into 4 lanes"):
        ChatStream(ROWS, LANGUAGES, CONFIG, lanes=4)
    with pytest.raises(ConfigError, match="2 documents for 3 lanes"):
        ChatStream(ROWS[:2], LANGUAGES, CONFIG, lanes=3)


def test_rows_of_other_processes_lanes_are_padding(monkeypatch):
    class Elsewhere:
        """Rows 2 to 5 of 6 are on this process's devices: lanes 1 and 2 of 3."""

        def addressable_devices_indices_map(self, shape):
            return {"one": (slice(2, 4), slice(None)), "other": (slice(4, None), slice(None))}

    monkeypatch.setattr(tokens, "batch_sharding", lambda mesh, ndim: Elsewhere())
    batch = next(ChatStream(ROWS, LANGUAGES, CONFIG, lanes=3, mesh=make_mesh()))
    whole = next(ChatStream(ROWS, LANGUAGES, CONFIG, lanes=3))
    for field in fields(batch):
        np.testing.assert_array_equal(getattr(batch, field.name)[2:], getattr(whole, field.name)[2:])
    assert not batch.segment_ids_BT[:2].any() and not batch.trained_BT[:2].any() and (batch.languages_BT[:2] == -1).all()
