import threading
from itertools import islice

import numpy as np
import pytest

from qscope_jax.errors import InputError
from qscope_jax.training.activations import ActivationConfig
from qscope_jax.training.checkpoint import StreamState
from qscope_jax.training.kept_tokens import Place, ShardedTokens, ahead, kept_tokens

CONFIG = ActivationConfig((0, 1))


def batches(model, tokens, place=None):
    return kept_tokens(model, tokens, CONFIG, "float32", place or Place({}))


def test_pieces_of_documents_are_numbered_through_and_positions_count_inside_them(model, token_stream):
    texts = ["abcdefgh", "ijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ", "0123456789"]
    (kept,) = batches(model, token_stream(texts, epochs=1))
    # The second text is longer than a row of 24 tokens: two pieces of it.
    by_piece = {piece: kept.columns["token_ids"][kept.columns["pieces"] == piece] for piece in np.unique(kept.columns["pieces"])}
    assert sorted("".join(chr(token + 30) for token in tokens) for tokens in by_piece.values()) == sorted(
        ["bcdefgh", "jklmnopqrstuvwxyzABCDEF", "HIJKLMNOPQRSTUVWXYZ", "123456789"]
    )
    assert sorted(by_piece) == [0, 1, 2, 3] and kept.after.pieces == 4
    for piece in by_piece:
        np.testing.assert_array_equal(kept.columns["positions"][kept.columns["pieces"] == piece], np.arange(1, len(by_piece[piece]) + 1))


def test_places_add_up_over_batches(model, token_stream):
    found = list(batches(model, token_stream(epochs=1)))
    for one, other in zip(found, found[1:], strict=False):
        after, before = one.after, other.before
        assert (after.pieces, after.seen, after.dropped, after.damaged) == (before.pieces, before.seen, before.dropped, before.damaged)
    # Every document is one piece, and every piece has its own number.
    np.testing.assert_array_equal(np.unique(np.concatenate([kept.columns["pieces"] for kept in found])), np.arange(200))
    assert found[-1].after.pieces == 200 and found[-1].after.seen - found[-1].after.dropped == sum(map(len, found))


@pytest.mark.parametrize("shard_tokens", [7, 50, 1000])
def test_cut_tokens_are_all_tokens_in_order_and_fill_shards(shard_tokens, model, token_stream):
    whole = list(islice(batches(model, token_stream()), 3))
    parts = list(ShardedTokens(iter(whole), shard_tokens, place=Place({})))
    np.testing.assert_array_equal(
        np.concatenate([part.rows_MND for _, part in parts], axis=1), np.concatenate([batch.rows_MND for batch in whole], axis=1)
    )
    sizes = np.bincount([shard for shard, _ in parts], [len(part) for _, part in parts])
    assert (sizes[:-1] == shard_tokens).all() and 0 < sizes[-1] <= shard_tokens and sizes.sum() == sum(map(len, whole))


def test_tokens_from_a_place_are_those_that_followed_it(model, token_stream):
    parts = list(ShardedTokens(batches(model, token_stream()), 40, max_tokens=200, place=Place({})))
    for index in (0, 2, len(parts) - 2):
        place = parts[index][1].place
        tokens = token_stream()
        tokens.set_state(StreamState({}, place.cursor))
        written = sum(len(part) for _, part in parts[: index + 1])
        rest = list(ShardedTokens(batches(model, tokens, place), 40, max_tokens=200, written=written, place=place))
        assert [shard for shard, _ in rest] == [shard for shard, _ in parts[index + 1 :]]
        for (_, one), (_, other) in zip(rest, parts[index + 1 :], strict=True):
            np.testing.assert_array_equal(one.rows_MND, other.rows_MND)
            np.testing.assert_array_equal(one.columns["pieces"], other.columns["pieces"])
            assert (one.place, one.after) == (other.place, other.after)


@pytest.mark.parametrize("settings", [{}, {"epochs": 1}])
def test_documents_without_a_token_that_counts_end_in_an_error(settings, model, token_stream):
    with pytest.raises(InputError, match="batches in a row held no token that counts" if not settings else "1 batches in a row"):
        list(ShardedTokens(batches(model, token_stream(["a", "b"], **settings)), 40, place=Place({})))


def test_items_are_made_in_a_thread_a_few_ahead_and_errors_arrive_in_their_place():
    made = []

    def items():
        for number in range(6):
            made.append((number, threading.current_thread().name))
            yield number
        raise ZeroDivisionError

    iterator = ahead(items(), depth=2)
    assert [next(iterator) for _ in range(3)] == [0, 1, 2]
    assert 3 <= len(made) <= 5 and all(name.startswith("ahead") for _, name in made)
    assert [next(iterator) for _ in range(3)] == [3, 4, 5]
    with pytest.raises(ZeroDivisionError):
        next(iterator)


def test_a_closed_iterator_leaves_no_thread():
    iterator = ahead(iter(range(100)))
    next(iterator)
    iterator.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]
