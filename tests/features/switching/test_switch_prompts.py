import json

import pytest

from qscope_jax.data.chat_data import Message
from qscope_jax.data.chat_templates import BUILT_IN, ChatFormat
from qscope_jax.data.chat_tokens import prompt_text
from qscope_jax.errors import InputError, SourceError
from qscope_jax.features.switching.switch_prompts import SwitchPrompt, check_prompts, load_prompts, prompt_renderer


def asked(text: str, language: str, task: str = "") -> SwitchPrompt:
    return SwitchPrompt((("user", text),), language, task)


@pytest.fixture
def written(tmp_path):
    """Factory of a JSON-lines file."""

    def write(*rows: dict) -> str:
        path = tmp_path / "prompts.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


def test_prompts_are_texts_or_turns(written):
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    source = written({"prompt": "one", "language": "th", "task": "t"}, {"messages": turns, "language": "ar", "task": "u"})
    first, second = load_prompts(source)
    assert first == asked("one", "th", "t")
    assert second == SwitchPrompt((("system", "be brief"), ("user", "?")), "ar", "u")


def test_columns_have_other_names_and_tasks_may_be_missing(written):
    source = written({"q": "one", "lang": "th"}, {"q": "two", "lang": "ar"})
    assert load_prompts(source, column="q", language_column="lang") == [asked("one", "th"), asked("two", "ar")]


def test_some_languages_and_some_prompts_of_each_are_kept(written):
    source = written(*({"prompt": f"{language} {i}", "language": language} for i in range(20) for language in ("th", "ar", "en")))
    found = load_prompts(source, languages=["th", "ar"], limit=5, seed=1)
    assert [one.language for one in found].count("th") == 5 == len(found) - 5
    assert found == load_prompts(source, languages=["th", "ar"], limit=5, seed=1) != load_prompts(source, languages=["th", "ar"], limit=5, seed=2)
    order = [int(one.messages[0][1].split()[1]) for one in found]
    assert order == sorted(order) and max(order) > 5


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        ({"prompt": "one"}, InputError, "line 1: has no column 'language'"),
        ({"prompt": "one", "language": ""}, InputError, "line 1: column language holds nothing"),
        ({"text": "one", "language": "th"}, InputError, "neither messages nor a text in column 'prompt'; the columns there are 'text', 'language'"),
        ({"prompt": " ", "language": "th"}, InputError, "line 1: its prompt is blank"),
        ({"messages": [], "language": "th"}, InputError, "its prompt is blank"),
        ({"messages": [{"role": "user"}], "language": "th"}, SourceError, "a message is .*expected role and content"),
    ],
)
def test_a_row_that_is_no_labelled_prompt_is_refused_with_its_place(written, row, error, message):
    with pytest.raises(error, match=message):
        load_prompts(written(row))


def test_a_language_that_is_not_there_is_refused(written):
    with pytest.raises(InputError, match="has no prompts in zz; it has th"):
        load_prompts(written({"prompt": "one", "language": "th"}), languages=["zz"])


def test_prompts_in_the_target_or_in_its_script_are_refused():
    fine = [asked("สวัสดี", "th"), asked("hello", "en"), asked("привет", "ru")]
    assert check_prompts(fine, "Han") == 0
    for text, language in (("你好", "zh"), ("こんにちは", "ja"), ("你好", "zh-TW"), ("你好吗", "our own label")):
        with pytest.raises(InputError, match=rf"prompts in {language!r} \(1 of 4\) are written in Han themselves"):
            check_prompts([*fine, asked(text, language)], "Han")
    assert check_prompts([asked("こんにちは", "ja")], "Hangul") == 0
    with pytest.raises(InputError, match="written in Hiragana.Katakana themselves"):
        check_prompts([asked("こんにちは", "ja")], "Hiragana+Katakana")


def test_prompts_that_quote_the_script_are_counted():
    assert check_prompts([asked("แปลว่า 你好", "th"), asked("สวัสดี", "th")], "Han") == 1
    assert check_prompts([asked("translate 你 into English letters please", "tlh")], "Han") == 1


def test_prompts_without_a_language_are_refused():
    with pytest.raises(InputError, match="prompt 1 has no language"):
        check_prompts([asked("one", "en"), asked("two", " ")], "Han")
    with pytest.raises(InputError, match="no prompts"):
        check_prompts([], "Han")


class Chatty:
    """Writes turns in brackets; every text begins with a token of its own, which the template writes too."""

    chat_template, bos_token, is_fast = "own", "^", True

    def __call__(self, text, add_special_tokens=True, return_offsets_mapping=False):
        texts = [text] if isinstance(text, str) else text
        ids = [[ord(character) for character in "^" * add_special_tokens + one] for one in texts]
        offsets = [[(place, place + 1) for place in range(len(one))] for one in texts]
        return {"input_ids": ids[0] if isinstance(text, str) else ids, "offset_mapping": offsets}

    def apply_chat_template(self, turns, tokenize, add_generation_prompt, chat_template=None):
        name = (chat_template or "own")[:3]
        return f"^{name}: " + "".join(f"<{turn['role']} {turn['content']}>" for turn in turns) + "<assistant " * add_generation_prompt


def test_prompts_are_written_as_in_training():
    prompt = asked("why?", "en")
    assert prompt_renderer(Chatty())(prompt) == "own: <user why?><assistant "
    assert prompt_renderer(Chatty(), format=ChatFormat("chatml"))(prompt) == f"{BUILT_IN['chatml'][:3]}: <user why?><assistant "
    assert prompt_text([Message("user", "why?")], Chatty(), ChatFormat()) == "^" + prompt_renderer(Chatty())(prompt)


def test_prompts_are_continued_as_they_stand_where_there_is_no_template():
    prompt, several = asked("why?", "en"), SwitchPrompt((("system", "be brief"), ("user", "why?")), "en")
    assert prompt_renderer(Chatty(), chat=False)(prompt) == "why?" == prompt_renderer(object())(prompt)
    assert prompt_renderer(object())(several) == "System: be brief\nUser: why?\nAssistant:"
    with pytest.raises(InputError, match="no chat template; name one"):
        prompt_renderer(object(), chat=True)


def test_a_template_that_refuses_a_prompt_says_so(monkeypatch):
    render = prompt_renderer(Chatty())

    def refuse(*arguments, **settings):
        raise ValueError("no such role")

    monkeypatch.setattr(Chatty, "apply_chat_template", refuse)
    with pytest.raises(InputError, match="gives no prompt for 'why.': the template refuses it .no such role."):
        render(asked("why?", "en"))
