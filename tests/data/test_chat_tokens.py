from dataclasses import replace

import numpy as np
import pytest

from qscope_jax.data.chat_data import Conversation
from qscope_jax.data.chat_templates import BUILT_IN
from qscope_jax.data.chat_tokens import ChatFormat, ChatRow, chat_rows, prompt_text, turn_end_ids
from qscope_jax.demo.embedded import tiny_model
from qscope_jax.errors import ConfigError, InputError
from tests.data.chat_tokenizers import CHATML, GEMMA, HEADERS_ALONE, LLAMA3, MISTRAL, QWEN3, make_tokenizer, turns

# Name -> tokenizer's family, its own template, the format, and what ends an answer.
FORMATS = {
    "Qwen3's own": ("qwen", QWEN3, ChatFormat(), "<|im_end|>"),
    "ChatML, its own": ("qwen", CHATML, ChatFormat(), "<|im_end|>"),
    "Gemma's own": ("gemma", GEMMA, ChatFormat(), "<end_of_turn>"),
    "Llama 3's own": ("llama", LLAMA3, ChatFormat(), "<|eot_id|>"),
    "Mistral's own": ("mistral", MISTRAL, ChatFormat(), "</s>"),
    "chatml": ("qwen", None, ChatFormat("chatml"), "<|im_end|>"),
    "gemma": ("gemma", None, ChatFormat("gemma"), "<end_of_turn>"),
    "llama3": ("llama", None, ChatFormat("llama3"), "<|eot_id|>"),
    "plain": ("gemma", None, ChatFormat("plain"), "<eos>"),
    "marker": ("qwen", HEADERS_ALONE, ChatFormat(response_marker="<|im_start|>assistant\n", turn_end="<|im_end|>\n"), "<|im_end|>\n"),
}
THOUGHT = "<think>\n\n</think>\n\n"  # Qwen3's template writes it before the last answer


def conversation(*texts: str, language: str = "", system: str = "") -> Conversation:
    return Conversation(turns(*texts, system=system), language, f"line {len(texts)}")


def parts(row: ChatRow, tokenizer) -> list[tuple[bool, str]]:
    """Runs of tokens that are, or are not, trained, as text."""
    borders = [0, *(np.flatnonzero(np.diff(row.trained)) + 1).tolist(), len(row.tokens)]
    return [(bool(row.trained[a]), tokenizer.decode(row.tokens[a:b])) for a, b in zip(borders, borders[1:], strict=False)]


def trained_texts(row: ChatRow, tokenizer) -> list[str]:
    return [text for trained, text in parts(row, tokenizer) if trained]


@pytest.mark.parametrize("name", FORMATS)
def test_answers_and_their_ends_are_trained_and_nothing_else(name):
    family, template, format, end = FORMATS[name]
    tokenizer = make_tokenizer(family, template)
    system = "" if name in ("Gemma's own", "Mistral's own") else "Answer: Six."
    messages = turns("What is 2 + 4? Six.", "Six.", "Is Six the answer?", "Six, the answer is Six.", system=system)
    rows = chat_rows([Conversation(messages, "en", "here")], tokenizer, format, length=400)
    expected = ["Six." + end, "Six, the answer is Six." + end]
    if name == "Mistral's own":
        expected = [" " + text for text in expected]
    if name == "Qwen3's own":
        expected[1] = THOUGHT + expected[1]
    assert trained_texts(rows[0], tokenizer) == expected
    assert len(rows) == 1 and rows[0].language == "en" and rows.refused == {} and rows.truncated == 0


@pytest.mark.parametrize("name", FORMATS)
def test_a_prompts_tokens_are_those_before_the_answer_in_training(name):
    family, template, format, _ = FORMATS[name]
    tokenizer = make_tokenizer(family, template)
    messages = turns("What is 2 + 4?", "Six.", "Is Six the answer?", "Yes.")
    (row,) = chat_rows([Conversation(messages)], tokenizer, format, length=400)
    for turn in (1, 3):
        prompt = tokenizer(prompt_text(messages[:turn], tokenizer, format), add_special_tokens=False)["input_ids"]
        assert row.tokens[: len(prompt)].tolist() == prompt
        assert row.trained[len(prompt)] and not row.trained[len(prompt) - 1]


@pytest.mark.parametrize("name", FORMATS)
def test_a_row_is_its_rendering_with_one_beginning(name):
    family, template, format, _ = FORMATS[name]
    tokenizer = make_tokenizer(family, template)
    (row,) = chat_rows([conversation("a", "b", "c", "d")], tokenizer, format, length=400)
    begins = int(tokenizer.bos_token is not None)
    assert np.count_nonzero(row.tokens == tokenizer.bos_token_id) == begins and (row.tokens[0] == tokenizer.bos_token_id) == begins
    if format.template == "":
        text = tokenizer.apply_chat_template([message._asdict() for message in turns("a", "b", "c", "d")], tokenize=False)
        assert tokenizer.decode(row.tokens) == text
    assert row.tokens.dtype == np.int32 and row.trained.dtype == bool and not row.trained[0]


@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize("answer", ["🤝", "a🤝", "你好🤝 ok", "e\u0301te\u0301", "  two    spaces ", "x\n\n\n  y", "ไทย"])
def test_characters_of_several_tokens_and_spaces_are_trained_whole(answer, trim):
    tokenizer = make_tokenizer("qwen", trim_offsets=trim)
    format = ChatFormat("chatml")
    (row,) = chat_rows([conversation("你🤝", answer, "e\u0301🤝", answer)], tokenizer, format, length=400)
    end = tokenizer("<|im_end|>")["input_ids"]
    begin = tokenizer("<|im_start|>assistant\n")["input_ids"]
    expected = tokenizer(answer)["input_ids"] + end
    place = next(i for i in range(len(row.tokens)) if row.tokens[i : i + len(begin)].tolist() == begin) + len(begin)
    assert row.tokens[place : place + len(expected)].tolist() == expected
    assert row.trained[place : place + len(expected)].all() and row.trained.sum() == 2 * len(expected)


def test_a_token_that_reaches_into_the_prompt_is_not_trained():
    tokenizer = make_tokenizer("qwen", "{% for m in messages %}{{ m.content + (eos_token if m.role == 'assistant' else '') }}{% endfor %}")
    (row,) = chat_rows([conversation("the quest", "ion is")], tokenizer, ChatFormat(), length=40)
    assert parts(row, tokenizer) == [(False, "the question"), (True, " is<|im_end|>")]


def test_a_space_of_the_prompt_is_not_trained_where_offsets_leave_spaces_out():
    template = "{% for m in messages %}{{ m.content + (eos_token if m.role == 'assistant' else ': ') }}{% endfor %}"
    tokenizer = make_tokenizer("qwen", template, trim_offsets=True)
    (row,) = chat_rows([conversation("Why", " 3")], tokenizer, ChatFormat(), length=40)
    assert parts(row, tokenizer) == [(False, "Why: "), (True, " 3<|im_end|>")]


def test_the_first_token_is_never_trained_since_nothing_predicts_it():
    tokenizer = make_tokenizer("qwen", "{% for m in messages if m.role == 'assistant' %}{{ m.content + eos_token }}{% endfor %}")
    (row,) = chat_rows([conversation("Why?", "7 8")], tokenizer, ChatFormat(), length=40)
    assert parts(row, tokenizer) == [(False, "7"), (True, " 8<|im_end|>")]


def test_the_embedded_models_tokenizer_reads_plain_chats():
    tokenizer = tiny_model().tokenizer
    rows = chat_rows([conversation("Ça va ?", "나는  책을 🤝 읽는다.", language="ko")], tokenizer, ChatFormat("plain"), length=200)
    assert parts(rows[0], tokenizer) == [(False, "Ça va ?\n\n"), (True, "나는  책을 🤝 읽는다.<|endoftext|>")]
    assert prompt_text(turns("Ça va ?"), tokenizer, ChatFormat("plain")) == "Ça va ?\n\n"


def test_long_rows_are_cut_on_the_right_and_counted():
    tokenizer, format = make_tokenizer("qwen"), ChatFormat("chatml", max_refused_share=0.5)
    chats = [conversation("a", "one two three"), conversation("a", "b"), conversation("a " * 30, "b")]
    whole = chat_rows(chats, tokenizer, format, length=400)
    length = len(whole[0].tokens) - 4
    rows = chat_rows(chats, tokenizer, format, length=length)
    assert len(rows) == 2 and rows.truncated == 1 and rows.refused == {f"no answer within {length} tokens": 1}
    for row, full in zip(rows, whole, strict=False):
        assert row.tokens.tolist() == full.tokens[:length].tolist() and row.trained.tolist() == full.trained[:length].tolist()
    exact = chat_rows(chats[:1], tokenizer, format, length=len(whole[0].tokens))
    assert exact.truncated == 0 and exact[0].trained.tolist() == whole[0].trained.tolist()


def test_rows_are_read_by_index_and_in_slices():
    tokenizer = make_tokenizer("qwen")
    chats = [conversation("q", "a" * number, language=str(number)) for number in range(1, 600)]
    rows = chat_rows(chats, tokenizer, ChatFormat("chatml"), length=1000)
    assert len(rows) == 599 and [row.language for row in rows] == [str(number) for number in range(1, 600)]
    assert all(tokenizer.decode(row.tokens[row.trained]) == "a" * int(row.language) + "<|im_end|>" for row in rows)
    assert rows[-1].language == "599" and [row.language for row in rows[1:7:3]] == ["2", "5"]
    with pytest.raises(IndexError):
        rows[599]


def test_conversations_left_out_are_counted_by_reason():
    tokenizer = make_tokenizer("gemma", GEMMA)
    chats = [*[conversation("a", "b")] * 17, conversation("a", " "), conversation("a", ""), conversation("a", "b", system="c")]
    rows = chat_rows(chats, tokenizer, ChatFormat(max_refused_share=0.15), length=50)
    assert len(rows) == 17 and rows.refused == {"an empty answer": 2, "the template refuses it (System role not supported)": 1}


def test_too_many_left_out_is_an_error_that_counts_the_reasons():
    tokenizer = make_tokenizer("qwen")
    chats = [
        *[conversation("a", "b")] * 17,
        replace(conversation("a", " "), where="x.jsonl line 8"),
        conversation("a", ""),
        conversation("a" * 99, "b"),
    ]
    with pytest.raises(InputError) as error:
        chat_rows(chats, tokenizer, ChatFormat("chatml", max_refused_share=0.149), length=50)
    assert str(error.value) == (
        "3 of 20 conversations cannot be trained on, 14.9% may be left out (max_refused_share): 2 x an empty answer (first: x.jsonl line 8); "
        "1 x no answer within 50 tokens (first: line 2); mend them or choose another chat template"
    )


def test_nothing_left_is_an_error_whatever_the_share():
    with pytest.raises(InputError, match="1 of 1 conversations cannot be trained on, none is left: 1 x an empty answer"):
        chat_rows([conversation("a", " ")], make_tokenizer("qwen"), ChatFormat("chatml", max_refused_share=1.0), length=50)


def test_a_template_without_a_response_marker_refuses_every_row():
    tokenizer = make_tokenizer("qwen", HEADERS_ALONE)
    with pytest.raises(InputError, match="3 of 3 .*: 3 x the template marks no place where an answer begins; set response_marker"):
        chat_rows([conversation("a", "b")] * 3, tokenizer, ChatFormat(), length=50)
    with pytest.raises(InputError, match="the tokenizer's chat template gives no prompt for these 1 turns: the template marks no place"):
        prompt_text(turns("a"), tokenizer, ChatFormat())


def test_nothing_to_read_or_no_room_is_refused():
    with pytest.raises(InputError, match="0 conversations in rows of 50 tokens"):
        chat_rows([], make_tokenizer("qwen"), ChatFormat("chatml"), length=50)
    with pytest.raises(InputError, match="1 conversations in rows of 1 tokens"):
        chat_rows([conversation("a", "b")], make_tokenizer("qwen"), ChatFormat("chatml"), length=1)


def test_a_tokenizer_that_knows_no_characters_is_refused():
    class Slow:
        chat_template, is_fast = CHATML, False

        def apply_chat_template(self, messages, **settings) -> str:
            return make_tokenizer("qwen", CHATML).apply_chat_template(messages, **settings)

    with pytest.raises(ConfigError, match="does not say which characters its tokens are; give a fast one"):
        chat_rows([conversation("a", "b")], Slow(), ChatFormat(), length=50)


@pytest.mark.parametrize("name", FORMATS)
def test_what_ends_an_answer_is_known_for_generation(name):
    family, template, format, end = FORMATS[name]
    tokenizer = make_tokenizer(family, template)
    ids = turn_end_ids(tokenizer, format)
    assert tokenizer.decode(ids) == end and (len(ids) == 1 or name == "marker")


def test_every_built_in_format_is_tested():
    assert set(BUILT_IN) <= {format.template for _, _, format, _ in FORMATS.values()}
