import json
import subprocess
import sys
import threading
from collections import Counter, UserDict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qscope_jax.data.batches import BatchConfig, TokenBatch, TokenBatchIterator, pad_batch, token_batches
from qscope_jax.errors import ConfigError, InputError

LENGTHS = [1, 5, 0, 3, 20, 7, 2, 2, 9, 64, 8, 16, 17]


def document(number: int, length: int) -> str:
    """A text whose tokens (one a word) are all different: 1000 * number + 1, + 2, ..."""
    return " ".join(str(1000 * number + i) for i in range(1, length + 1))


def tokenize(text: str) -> list[int]:
    return [int(word) for word in text.split()]


TEXTS = [document(number, length) for number, length in enumerate(LENGTHS, 1)]
PACKED = BatchConfig(batch_size=3, length=8, seed=5, epochs=1)


def segments(batch: TokenBatch) -> list[list[int]]:
    """Tokens of every segment, checked for everything that holds in every batch."""
    assert batch.tokens_BT.shape == batch.segment_ids_BT.shape == batch.positions_BT.shape
    assert {batch.tokens_BT.dtype, batch.segment_ids_BT.dtype, batch.positions_BT.dtype} == {np.dtype(np.int32)}
    found = []
    for tokens, ids, positions in zip(batch.tokens_BT, batch.segment_ids_BT, batch.positions_BT, strict=True):
        used = np.count_nonzero(ids)
        assert (ids[:used] == np.sort(ids[:used])).all() and not ids[used:].any()
        assert not tokens[used:].any() and not positions[used:].any()
        assert sorted(set(ids[:used].tolist())) == list(range(1, ids.max() + 1))
        for segment in range(1, ids.max() + 1):
            assert (positions[ids == segment] == np.arange((ids == segment).sum())).all()
            found.append(tokens[ids == segment].tolist())
    return found


def pieces(length: int, texts: list[str] = TEXTS) -> list[list[int]]:
    return [tokenize(text)[start : start + length] for text in texts for start in range(0, len(tokenize(text)), length)]


def take(iterator: TokenBatchIterator, count: int) -> list[TokenBatch]:
    return [next(iterator) for _ in range(count)]


def same(left: list[TokenBatch], right: list[TokenBatch]) -> bool:
    return len(left) == len(right) and all(
        np.array_equal(getattr(a, name), getattr(b, name))
        for a, b in zip(left, right, strict=True)
        for name in ("tokens_BT", "segment_ids_BT", "positions_BT")
    )


def through_json(state: dict) -> dict:
    return json.loads(json.dumps(state))


@pytest.mark.parametrize("length", [4, 8, 64, 100])
def test_packing_keeps_every_token_once_and_cuts_only_long_documents(length):
    batches = list(token_batches(TEXTS, tokenize, replace(PACKED, length=length)))
    assert sorted(sum(map(segments, batches), [])) == sorted(pieces(length))


def test_every_epoch_holds_every_token():
    batches = list(token_batches(TEXTS, tokenize, replace(PACKED, epochs=3)))
    counts = Counter(token for batch in batches for segment in segments(batch) for token in segment)
    assert counts == Counter({token: 3 for text in TEXTS for token in tokenize(text)})


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=20).filter(any),
    batch_size=st.integers(1, 5),
    length=st.integers(1, 12),
    seed=st.integers(0, 2**32 - 1),
)
def test_packing_keeps_every_token_of_any_documents(lengths, batch_size, length, seed):
    texts = [document(number, size) for number, size in enumerate(lengths, 1)]
    batches = list(token_batches(texts, tokenize, BatchConfig(batch_size, length, seed, epochs=1)))
    assert all(batch.tokens_BT.shape == (batch_size, length) for batch in batches)
    assert sorted(sum(map(segments, batches), [])) == sorted(pieces(length, texts))


def test_last_batch_of_a_finite_run_is_filled_with_padding_rows():
    batches = list(token_batches(TEXTS, tokenize, replace(PACKED, batch_size=100)))
    assert len(batches) == 1 and batches[0].tokens_BT.shape == (100, 8)
    assert len(segments(batches[0])) == len(pieces(8))
    assert not batches[0].segment_ids_BT[-1].any()


def test_packing_wastes_little_room():
    texts = [document(number, 1 + number * 37 % 60) for number in range(1, 900)]
    batches = list(token_batches(texts, tokenize, BatchConfig(4, 64, epochs=1)))
    assert np.mean([batch.segment_ids_BT > 0 for batch in batches]) > 0.9


def test_padding_does_not_gather_at_the_end_of_a_packing_group():
    texts = [document(number, 1 + number * 37 % 60) for number in range(1, 2000)]
    batches = take(token_batches(texts, tokenize, BatchConfig(16, 64)), 24)  # 3 groups of 128 rows
    early, late = np.reshape([np.mean(batch.segment_ids_BT > 0) for batch in batches], (3, 2, 4)).mean((0, 2))
    assert abs(early - late) < 0.04


def test_without_packing_a_row_is_one_document_cut_off_at_the_length():
    batches = list(token_batches(TEXTS, tokenize, replace(PACKED, pack=False)))
    assert sorted(sum(map(segments, batches), [])) == sorted(tokenize(text)[:8] for text in TEXTS if text)
    assert max(batch.segment_ids_BT.max() for batch in batches) == 1
    assert [batch.tokens_BT.shape for batch in batches] == [(3, 8)] * 4


def test_order_depends_on_the_seed_alone():
    def order(seed: int) -> list[list[int]]:
        return sum(map(segments, token_batches(TEXTS, tokenize, replace(PACKED, seed=seed, pack=False))), [])

    assert order(5) == order(5)
    assert order(5) != order(6)
    assert order(5) != [tokenize(text)[:8] for text in TEXTS if text]


def test_every_epoch_has_an_order_of_its_own():
    rows = sum(map(segments, token_batches(TEXTS, tokenize, replace(PACKED, pack=False, epochs=2))), [])
    first, second = rows[:12], rows[12:]
    assert sorted(first) == sorted(second) and first != second


def test_endless_batches_do_not_end():
    iterator = token_batches(TEXTS[:2], tokenize, BatchConfig(2, 4, epochs=None))
    assert iter(iterator) is iterator
    assert all(len(segments(batch)) >= 2 for batch in take(iterator, 300))


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("pack", [True, False])
def test_restored_iterator_continues_exactly_from_every_place(pack, prefetch):
    config = replace(PACKED, pack=pack, epochs=3, prefetch=prefetch)
    iterator = token_batches(TEXTS, tokenize, config)
    states, batches = [through_json(iterator.get_state())], []
    for batch in iterator:
        batches.append(batch)
        states.append(through_json(iterator.get_state()))
    assert len(batches) > 8
    for place, state in enumerate(states):
        restored = token_batches(TEXTS, tokenize, config)
        restored.set_state(state)
        assert through_json(restored.get_state()) == state
        assert same(list(restored), batches[place:])


def test_restored_iterator_continues_exactly_across_packing_groups():
    # Rows are packed in groups of 128; 40 batches of 8 rows cross two borders, and endless epochs several more.
    texts = [document(number, 1 + number * 37 % 50) for number in range(1, 150)]
    config = BatchConfig(batch_size=8, length=16, seed=1)
    iterator = token_batches(texts, tokenize, config)
    states, batches = [], []
    for _ in range(70):
        states.append(through_json(iterator.get_state()))
        batches.append(next(iterator))
    for place in (0, 1, 15, 16, 17, 31, 32, 33, 60):
        restored = token_batches(texts, tokenize, config)
        restored.set_state(states[place])
        assert same(take(restored, 70 - place), batches[place:])


@pytest.mark.parametrize("prefetch", [0, 3])
def test_used_iterator_can_go_back(prefetch):
    iterator = token_batches(TEXTS, tokenize, replace(PACKED, epochs=2, prefetch=prefetch))
    take(iterator, 2)
    state = iterator.get_state()
    rest = list(iterator)
    iterator.set_state(state)
    assert same(list(iterator), rest)
    end = iterator.get_state()
    iterator.set_state(end)
    assert list(iterator) == []


def test_state_does_not_change_under_its_holder():
    iterator = token_batches(TEXTS, tokenize, PACKED)
    state = iterator.get_state()
    before = through_json(state)
    take(iterator, 3)
    assert state == before


def test_state_stays_small():
    iterator = token_batches(TEXTS * 50, tokenize, replace(PACKED, epochs=None))
    take(iterator, 200)
    assert len(json.dumps(iterator.get_state())) < 400


def test_prefetching_changes_neither_batches_nor_states():
    plain = token_batches(TEXTS, tokenize, replace(PACKED, epochs=2))
    ahead = token_batches(TEXTS, tokenize, replace(PACKED, epochs=2, prefetch=4))
    for batch in plain:
        assert same([batch], [next(ahead)])
        assert plain.get_state() == ahead.get_state()
    with pytest.raises(StopIteration):
        next(ahead)


def test_closing_stops_the_prefetch_thread():
    before = threading.active_count()
    iterator = token_batches(TEXTS, tokenize, replace(PACKED, epochs=None, prefetch=2))
    take(iterator, 2)
    assert threading.active_count() == before + 1
    iterator.set_state(iterator.get_state())
    assert threading.active_count() == before
    next(iterator)
    iterator.close()
    assert threading.active_count() == before


def test_no_prefetch_means_no_threads():
    def tokenize_here(text: str) -> list[int]:
        assert threading.current_thread() is threading.main_thread()
        return tokenize(text)

    assert list(token_batches(TEXTS, tokenize_here, PACKED))


@pytest.mark.parametrize(
    "change",
    [{"batch_size": 4}, {"length": 9}, {"seed": 6}, {"pack": False}],
    ids=lambda change: next(iter(change)),
)
def test_state_of_another_configuration_is_refused(change):
    state = token_batches(TEXTS, tokenize, PACKED).get_state()
    with pytest.raises(InputError, match=f"{next(iter(change))} was .*, is ") as error:
        token_batches(TEXTS, tokenize, replace(PACKED, **change)).set_state(state)
    assert "\n" not in str(error.value)


def test_state_of_other_documents_is_refused():
    state = token_batches(TEXTS, tokenize, PACKED).get_state()
    with pytest.raises(InputError, match="documents was 13, is 12"):
        token_batches(TEXTS[1:], tokenize, PACKED).set_state(state)


@pytest.mark.parametrize("state", [{}, {"next_index": 3}, {"stream": 1, "place": {}}])
def test_what_is_no_state_is_refused(state):
    with pytest.raises(InputError, match="not one that a token batch iterator saved"):
        token_batches(TEXTS, tokenize, PACKED).set_state(state)


def test_damaged_place_is_refused_and_leaves_the_iterator_where_it_was():
    iterator = token_batches(TEXTS, tokenize, PACKED)
    expected = list(token_batches(TEXTS, tokenize, PACKED))
    with pytest.raises(InputError, match="does not fit"):
        iterator.set_state({**iterator.get_state(), "place": {"next_row": 1}})
    assert same(list(iterator), expected)


def test_run_can_be_made_longer_but_not_shorter_than_its_state():
    long, short = (token_batches(TEXTS, tokenize, replace(PACKED, epochs=epochs)) for epochs in (None, 1))
    take(short, 2)
    long.set_state(short.get_state())
    take(long, 200)
    with pytest.raises(InputError, match="fewer epochs"):
        short.set_state(long.get_state())


def test_single_document_makes_batches():
    batches = list(token_batches([document(1, 5)], tokenize, BatchConfig(2, 3, epochs=2)))
    assert sorted(sum(map(segments, batches), [])) == [[1001, 1002, 1003], [1001, 1002, 1003], [1004, 1005], [1004, 1005]]


def test_tokens_may_come_as_arrays():
    def tokenize_to_array(text: str) -> Any:
        return np.array(tokenize(text), np.int64)

    batches = token_batches(TEXTS, tokenize_to_array, PACKED)
    assert same(list(batches), list(token_batches(TEXTS, tokenize, PACKED)))


@pytest.mark.parametrize("texts", [[], ["", " ", "\n"]])
def test_no_tokens_at_all_are_refused(texts):
    with pytest.raises(InputError, match="no documents|none of the 3 documents"):
        token_batches(texts, tokenize, PACKED)


@pytest.mark.parametrize(
    "result",
    [UserDict(input_ids=[1]), [[1, 2]], [[1], [2, 3]], ["a"], [0.5], "abc"],
    ids=["mapping", "nested", "ragged", "strings", "floats", "string"],
)
def test_tokenizer_that_returns_something_else_is_refused(result):
    with pytest.raises(InputError, match="tokenize returned .*expected a flat list of token ids"):
        token_batches(["text"], lambda text: result, PACKED)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_error_of_the_tokenizer_reaches_the_caller(prefetch):
    def fail_later(text: str) -> list[int]:
        if text == TEXTS[4]:
            raise InputError("this text cannot be tokenized")
        return tokenize(text)

    with pytest.raises(InputError, match="this text cannot"):
        list(token_batches(TEXTS, fail_later, replace(PACKED, prefetch=prefetch)))


@pytest.mark.parametrize(
    ("name", "value"),
    [("batch_size", 0), ("length", 0), ("length", -4), ("seed", -1), ("seed", 2**32), ("epochs", 0), ("prefetch", -1)],
)
def test_configuration_out_of_range_is_refused(name, value):
    with pytest.raises(ConfigError, match=f"{name} is {value}; expected") as error:
        replace(PACKED, **{name: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("side", "tokens", "positions"), [("right", [7, 8, 0, 0], [0, 1, 0, 0]), ("left", [0, 0, 7, 8], [0, 0, 0, 1])])
def test_padding_goes_to_the_given_side(side, tokens, positions):
    batch = pad_batch([[7, 8], [1, 2, 3, 4], []], length=4, side=side)
    assert batch.tokens_BT.tolist() == [tokens, [1, 2, 3, 4], [0] * 4]
    assert batch.positions_BT.tolist() == [positions, [0, 1, 2, 3], [0] * 4]
    assert batch.segment_ids_BT.tolist() == [[int(token > 0) for token in tokens], [1] * 4, [0] * 4]
    assert batch.tokens_BT.dtype == batch.segment_ids_BT.dtype == batch.positions_BT.dtype == np.int32


def test_token_zero_is_no_padding():
    assert pad_batch([[0, 0]], length=3).segment_ids_BT.tolist() == [[1, 1, 0]]
    batch = next(token_batches(["x"], lambda text: [0, 0], BatchConfig(1, 3, epochs=1)))
    assert batch.segment_ids_BT.tolist() == [[1, 1, 0]]


def test_list_longer_than_the_rows_is_refused():
    with pytest.raises(InputError, match="token list 1 has 3 tokens, more than the row length 2"):
        pad_batch([[1], [1, 2, 3]], length=2)


def test_padding_nothing_or_nowhere_is_refused():
    with pytest.raises(InputError, match="no token lists"):
        pad_batch([], length=2)
    with pytest.raises(InputError, match="rows of 0 tokens"):
        pad_batch([[]], length=0)


def test_import_brings_none_of_the_heavy_libraries():
    program = "import sys, qscope_jax.data.batches; assert not {'datasets', 'torch', 'transformers', 'pyarrow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_documents_are_read_by_index_only():
    class Column(Sequence[str]):
        """Documents that may be too many to walk through, as those of a memory-mapped column are."""

        def __len__(self) -> int:
            return len(TEXTS)

        def __getitem__(self, index: Any) -> Any:
            return TEXTS[index]

        def __iter__(self) -> Iterator[str]:
            yield TEXTS[0]
            pytest.fail("walks through all documents")

    rows = sum(map(segments, token_batches(Column(), tokenize, PACKED)), [])
    assert sorted(rows) == sorted(pieces(8))
