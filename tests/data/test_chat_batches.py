import json
from collections import Counter
from dataclasses import fields, replace

import numpy as np
import pytest

from qscope_jax.data.batches import BatchConfig
from qscope_jax.data.chat_batches import ChatBatch, chat_batches, pad_chat, padding_rows
from qscope_jax.data.chat_tokens import ChatRow
from qscope_jax.errors import InputError

LANGUAGES = ("en", "ko", "")
PACKED = BatchConfig(batch_size=3, length=16, seed=5, epochs=1)


def chat(number: int, length: int) -> ChatRow:
    """Tokens 1000 * number + 1, + 2, ..., those divisible by 3 trained; the language goes round through en, ko, fr and none."""
    tokens = 1000 * number + np.arange(1, length + 1, dtype=np.int32)
    return ChatRow(tokens, tokens % 3 == 0, ("en", "ko", "fr", "")[number % 4])


ROWS = [chat(number, 1 + number * 7 % 16) for number in range(1, 60)]


def chats(batch: ChatBatch) -> list[tuple[list[int], list[bool], int]]:
    """Tokens, masks and language of every chat, checked for everything that holds in every batch."""
    arrays = {field.name: getattr(batch, field.name) for field in fields(batch)}
    assert {name: array.dtype.name for name, array in arrays.items()} == {name: "bool" if name == "trained_BT" else "int32" for name in arrays}
    assert len({array.shape for array in arrays.values()}) == 1
    padding = batch.segment_ids_BT == 0
    assert (batch.languages_BT[padding] == -1).all() and not batch.trained_BT[padding].any()
    assert not batch.tokens_BT[padding].any() and not batch.positions_BT[padding].any()
    found = []
    for row, ids in enumerate(batch.segment_ids_BT):
        for segment in range(1, ids.max() + 1):
            inside = ids == segment
            (language,) = set(batch.languages_BT[row, inside].tolist())
            assert (batch.positions_BT[row, inside] == np.arange(inside.sum())).all()
            found.append((batch.tokens_BT[row, inside].tolist(), batch.trained_BT[row, inside].tolist(), language))
    return found


def given(rows: list[ChatRow] = ROWS) -> list[tuple[list[int], list[bool], int]]:
    numbers = {"en": 0, "ko": 1, "": 2}
    return [(row.tokens.tolist(), row.trained.tolist(), numbers.get(row.language, -1)) for row in rows]


def same(left: list[ChatBatch], right: list[ChatBatch]) -> bool:
    return len(left) == len(right) and all(
        np.array_equal(getattr(a, field.name), getattr(b, field.name)) for a, b in zip(left, right, strict=True) for field in fields(a)
    )


@pytest.mark.parametrize("length", [16, 40])
@pytest.mark.parametrize("pack", [True, False])
def test_every_chat_is_there_once_whole_with_its_own_mask_and_language(length, pack):
    batches = list(chat_batches(ROWS, LANGUAGES, replace(PACKED, length=length, pack=pack)))
    assert sorted(sum(map(chats, batches), [])) == sorted(given())
    assert all(batch.tokens_BT.shape == (3, length) for batch in batches)
    assert (max(batch.segment_ids_BT.max() for batch in batches) > 1) == pack


def test_every_epoch_holds_every_chat_in_another_order():
    batches = list(chat_batches(ROWS, LANGUAGES, replace(PACKED, epochs=3)))
    counts = Counter(found[0][0] for batch in batches for found in chats(batch))
    assert counts == Counter({int(row.tokens[0]): 3 for row in ROWS})
    first = [found[0][0] for batch in chat_batches(ROWS, LANGUAGES, PACKED) for found in chats(batch)]
    assert first != [found[0][0] for batch in chat_batches(ROWS, LANGUAGES, replace(PACKED, seed=6)) for found in chats(batch)]


def test_a_label_outside_the_languages_is_minus_one():
    batch = next(chat_batches([chat(2, 5)], LANGUAGES, replace(PACKED, batch_size=1)))
    assert batch.languages_BT.tolist() == [[-1] * 16] and batch.segment_ids_BT[0, :5].all()


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_restored_iterator_continues_exactly_from_every_place(prefetch):
    config = replace(PACKED, epochs=2, prefetch=prefetch)
    iterator = chat_batches(ROWS, LANGUAGES, config)
    states, batches = [json.loads(json.dumps(iterator.get_state()))], []
    for batch in iterator:
        batches.append(batch)
        states.append(json.loads(json.dumps(iterator.get_state())))
    for place, state in list(enumerate(states))[::4]:
        restored = chat_batches(ROWS, LANGUAGES, config)
        restored.set_state(state)
        assert same(list(restored), batches[place:])
    assert len(batches) > 8


def test_the_state_of_other_chats_is_refused():
    state = chat_batches(ROWS, LANGUAGES, PACKED).get_state()
    with pytest.raises(InputError, match="documents was 59, is 58"):
        chat_batches(ROWS[1:], LANGUAGES, PACKED).set_state(state)
    with pytest.raises(InputError, match="tokens was 513, is 512"):
        chat_batches([chat(1, 7), *ROWS[1:]], LANGUAGES, PACKED).set_state(state)


def test_a_chat_longer_than_a_row_is_refused():
    with pytest.raises(InputError, match="chat 3 has 17 tokens, more than the row length 16; cut chats"):
        chat_batches([*ROWS[:3], chat(3, 17)], LANGUAGES, PACKED)
    with pytest.raises(InputError, match="no chats"):
        chat_batches([], LANGUAGES, PACKED)
    with pytest.raises(InputError, match="token list 1 has 5 tokens, more than the row length 4"):
        pad_chat([chat(1, 4), chat(2, 5)], LANGUAGES, length=4)


def test_a_language_named_twice_is_refused():
    with pytest.raises(InputError, match="language 'ko' is named twice"):
        chat_batches(ROWS, ("ko", "en", "ko"), PACKED)


def test_padded_chats_have_a_row_each():
    batch = pad_chat([chat(4, 3), chat(1, 5), chat(6, 1)], LANGUAGES, length=5)
    assert batch.tokens_BT.tolist() == [[4001, 4002, 4003, 0, 0], [1001, 1002, 1003, 1004, 1005], [6001, 0, 0, 0, 0]]
    assert batch.trained_BT.astype(int).tolist() == [[0, 1, 0, 0, 0], [0, 1, 0, 0, 1], [0, 0, 0, 0, 0]]
    assert batch.languages_BT.tolist() == [[0, 0, 0, -1, -1], [1] * 5, [-1] * 5]
    assert chats(batch) == given([chat(4, 3), chat(1, 5), chat(6, 1)])


def test_rows_of_padding_hold_nothing():
    batch = padding_rows(2, 3)
    assert chats(batch) == [] and batch.tokens_BT.shape == (2, 3)
