import pytest

from qscope_jax.data.chat_data import Message
from qscope_jax.data.chat_templates import BUILT_IN, ChatFormat, ChatTemplate, RefusedError
from qscope_jax.errors import ConfigError, SourceError
from tests.data.chat_tokenizers import CHATML, GEMMA, HEADERS_ALONE, LLAMA3, MISTRAL, QWEN3, QWEN3_THINKING, make_tokenizer, turns

FAMILY = {"chatml": "qwen", "gemma": "gemma", "llama3": "llama", "plain": "qwen"}
ENDS = {"chatml": "<|im_end|>", "gemma": "<end_of_turn>", "llama3": "<|eot_id|>", "plain": "<|im_end|>"}


def answers(template: ChatTemplate, messages) -> list[str]:
    text, spans = template.answers(messages)
    return [text[begin:end] for begin, end in spans]


@pytest.mark.parametrize(("name", "released"), [("chatml", CHATML), ("gemma", GEMMA), ("llama3", LLAMA3)])
def test_a_built_in_template_writes_what_the_released_one_does(name, released):
    tokenizer, messages = make_tokenizer(FAMILY[name], released), turns("a ", "\nb", "c", "d ")
    built_in, own = ChatTemplate(tokenizer, ChatFormat(name)), ChatTemplate(tokenizer, ChatFormat())
    assert built_in.answers(messages) == own.answers(messages) and built_in.end == own.end == ENDS[name]
    assert built_in.prompt(messages[:3]) == own.prompt(messages[:3])


@pytest.mark.parametrize("name", BUILT_IN)
def test_answers_are_found_with_what_ends_them_and_nothing_else(name):
    template = ChatTemplate(make_tokenizer(FAMILY[name]), ChatFormat(name))
    messages = turns("What is 2 + 2?", "Four.", "And Four?", "Four.", "Four.", "Six.", system="Be brief.")
    assert answers(template, messages) == [text + ENDS[name] for text in ("Four.", "Four.", "Six.")]


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_prompt_ends_where_the_answer_begins(name):
    template = ChatTemplate(make_tokenizer(FAMILY[name]), ChatFormat(name))
    messages = turns("one", "two", "three", "four", system="Be brief.")
    text, spans = template.answers(messages)
    assert [text[:begin] for begin, _ in spans] == [template.prompt(messages[:2]), template.prompt(messages[:4])]


def test_plain_is_question_blank_line_answer_and_the_end_of_text():
    template = ChatTemplate(make_tokenizer("gemma"), ChatFormat("plain"))
    assert template.answers(turns("Why? ", "So."))[0] == "<bos>Why?\n\nSo.<eos>"


def test_the_system_text_goes_above_the_first_question_where_there_is_no_such_turn():
    template = ChatTemplate(make_tokenizer("gemma"), ChatFormat("gemma"))
    text, _ = template.answers(turns("Why?", "So.", "?", "!", system="Be brief."))
    assert text.startswith("<bos><start_of_turn>user\nBe brief.\n\nWhy?<end_of_turn>\n<start_of_turn>model\nSo.") and text.count("brief") == 1
    with pytest.raises(RefusedError, match="a system text with no question after it"):
        template.answers((Message("system", "a"), Message("assistant", "b")))


def test_answers_follow_each_other_and_questions_too():
    template = ChatTemplate(make_tokenizer("qwen"), ChatFormat("chatml"))
    messages = [Message(role, text) for role, text in [("user", "a"), ("user", "b"), ("assistant", "c"), ("assistant", "d")]]
    assert answers(template, messages) == ["c<|im_end|>", "d<|im_end|>"]


def test_thoughts_dropped_from_earlier_turns_are_not_looked_for_there():
    template = ChatTemplate(make_tokenizer("qwen", QWEN3), ChatFormat())
    messages = turns("one", "<think>\nhm\n</think>\n\ntwo", "three", "<think>\nhm again\n</think>\n\nfour")
    assert answers(template, messages) == ["two<|im_end|>", "<think>\nhm again\n</think>\n\nfour<|im_end|>"]
    text, spans = template.answers(messages)
    assert [text[:begin] for begin, _ in spans] == [template.prompt(messages[:1]), template.prompt(messages[:3])]


def test_the_empty_thought_that_a_template_writes_is_the_models_to_say():
    template = ChatTemplate(make_tokenizer("qwen", QWEN3), ChatFormat())
    assert answers(template, turns("one", "two", "three", "four")) == ["two<|im_end|>", "<think>\n\n</think>\n\nfour<|im_end|>"]


def test_a_thought_that_the_prompt_opens_is_not_the_models_to_open():
    template = ChatTemplate(make_tokenizer("qwen", QWEN3_THINKING), ChatFormat())
    messages = turns("one", "<think>\nhm\n</think>\n\ntwo", "three", "<think>\nso\n</think>\n\nfour")
    assert answers(template, messages) == ["two<|im_end|>", "so\n</think>\n\nfour<|im_end|>"]
    text, spans = template.answers(messages)
    assert text[: spans[1][0]] == template.prompt(messages[:3]) and template.prompt(messages[:3]).endswith("assistant\n<think>\n")


def test_no_generation_prompt_is_needed_where_answers_follow_at_once():
    template = ChatTemplate(make_tokenizer("mistral", MISTRAL), ChatFormat())
    messages = turns("one", "two", "three", "four")
    assert answers(template, messages) == [" two</s>", " four</s>"]
    assert template.prompt(messages[:3]) == "<s>[INST] one [/INST] two</s>[INST] three [/INST]"


def test_headers_without_a_generation_prompt_show_no_place_until_a_marker_names_it():
    tokenizer, messages = make_tokenizer("qwen", HEADERS_ALONE), turns("one", "two", "<|im_start|>assistant\nthree", "four")
    template = ChatTemplate(tokenizer, ChatFormat())
    for refused in (template.answers, template.prompt):
        with pytest.raises(RefusedError, match="marks no place where an answer begins; set response_marker"):
            refused(messages)
    template = ChatTemplate(tokenizer, ChatFormat(response_marker="<|im_start|>assistant\n"))
    assert answers(template, messages) == ["two<|im_end|>", "four<|im_end|>"]
    text, spans = template.answers(messages)
    assert [text[:begin] for begin, _ in spans] == [template.prompt(messages[:1]), template.prompt(messages[:3])]


def test_a_marker_that_is_not_there_is_said():
    template = ChatTemplate(make_tokenizer("qwen"), ChatFormat("chatml", response_marker="### Response:"))
    # Neither in the header nor, where it would be another's, in a question or an earlier answer.
    with pytest.raises(RefusedError, match="no response marker '### Response:' before an answer"):
        template.answers(turns("### Response:", "### Response: a", "b", "c"))


def test_an_ends_text_can_be_given_and_must_stand_before_the_next_turn():
    tokenizer, messages = make_tokenizer("qwen", CHATML), turns("a", "b;", "c;\n", "d")
    assert answers(ChatTemplate(tokenizer, ChatFormat(turn_end="<|im_end|>\n")), messages) == ["b;<|im_end|>\n", "d<|im_end|>\n"]
    with pytest.raises(RefusedError, match="no ';' after an answer"):
        ChatTemplate(tokenizer, ChatFormat(turn_end=";")).answers(messages)


def test_what_ends_a_whole_conversation_is_no_part_of_the_turn(tmp_path):
    # Both begin with `<|`, which is no end.
    tokenizer = make_tokenizer("qwen", CHATML + "{% if not add_generation_prompt %}{{ '<|endoftext|>' }}{% endif %}")
    template = ChatTemplate(tokenizer, ChatFormat())
    assert template.end == "<|im_end|>" and answers(template, turns("a", "b", "c", "d")) == ["b<|im_end|>", "d<|im_end|>"]
    # An end behind the last answer alone leaves earlier ones without.
    last = "'</s>' if loop.last and m.role == 'assistant' else '\n'"
    tokenizer = make_tokenizer("mistral", "{% for m in messages %}{{ m.content }}{{ " + last + " }}{% endfor %}")
    template = ChatTemplate(tokenizer, ChatFormat())
    assert answers(template, turns("a", "b")) == ["b</s>"]
    with pytest.raises(RefusedError, match="no '</s>' after an answer"):
        template.answers(turns("a", "b", "c", "d"))


def test_a_template_for_one_question_and_answer_will_do():
    once = "{% if messages | length > 2 %}{{ raise_exception('once') }}{% endif %}"
    template = ChatTemplate(make_tokenizer("qwen", once + CHATML), ChatFormat())
    assert answers(template, turns("a", "b")) == ["b<|im_end|>"]


def test_line_breaks_end_a_turn_where_nothing_else_does():
    template = ChatTemplate(make_tokenizer("qwen", "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"), ChatFormat())
    assert template.end == "\n"


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        (turns("a", " \n"), "an empty answer"),
        (turns("a", "", "b", "c"), "an empty answer"),
        (turns("a", "b")[1:], "no turn before the answer"),
        (turns("a", "b", system="c"), r"the template refuses it \(System role not supported\)"),
    ],
)
def test_conversations_that_cannot_be_trained_on_say_why(messages, said):
    with pytest.raises(RefusedError, match=said):
        ChatTemplate(make_tokenizer("gemma", GEMMA), ChatFormat()).answers(messages)


@pytest.mark.parametrize("place", ["before", "after"])
def test_a_template_that_writes_other_turns_by_what_the_answer_says_is_refused(place):
    size = "messages[1].content | length | string"
    around = (f"{size} + m.content", "") if place == "before" else ("m.content", f"{{{{ {size} if not add_generation_prompt }}}}")
    template = "{% for m in messages %}{{ m.role + " + around[0] + " + eos_token }}{% endfor %}" + around[1]
    with pytest.raises(RefusedError, match="writes other turns differently for this answer"):
        ChatTemplate(make_tokenizer("qwen", template), ChatFormat(response_marker="assistant")).answers(turns("a", "b", "c", "d"))


def test_nothing_before_an_answer_gives_no_prompt():
    with pytest.raises(RefusedError, match="no turn before the answer"):
        ChatTemplate(make_tokenizer("qwen"), ChatFormat("chatml")).prompt([])


def test_a_template_can_be_a_file(tmp_path):
    (tmp_path / "own.jinja").write_text(CHATML, encoding="utf-8")
    template = ChatTemplate(make_tokenizer("qwen", GEMMA), ChatFormat(str(tmp_path / "own.jinja")))
    assert template.prompt(turns("a")) == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("template", "kind", "said"),
    [
        (b"\xff", SourceError, "cannot be read as a chat template"),
        (b" \n", ConfigError, "is empty; expected a Jinja template"),
        (b"{% for m in messages %}", ConfigError, r"is no Jinja template \(line 1: .*\); mend it"),
        (b"{{ messages[0].content + 1 }}", ConfigError, "cannot render a question and its answer: the template refuses it"),
        (b"{{ raise_exception('never') }}", ConfigError, "refuses it .never.; mend it or choose another"),
    ],
)
def test_an_unusable_template_gets_one_line(tmp_path, template, kind, said):
    (tmp_path / "own.jinja").write_bytes(template)
    with pytest.raises(kind, match=said) as error:
        ChatTemplate(make_tokenizer("qwen"), ChatFormat(str(tmp_path / "own.jinja")))
    assert str(tmp_path / "own.jinja") in str(error.value) and "\n" not in str(error.value)


def test_a_template_that_is_nowhere_is_refused():
    with pytest.raises(ConfigError, match=r"'chatmil': is neither built in \(chatml, gemma, llama3, plain\) nor a file"):
        ChatTemplate(make_tokenizer("qwen"), ChatFormat("chatmil"))
    with pytest.raises(ConfigError, match="the tokenizer has no chat template; set template to one of chatml"):
        ChatTemplate(make_tokenizer("qwen"), ChatFormat())


def test_a_template_that_ends_no_answer_is_refused():
    tokenizer = make_tokenizer("qwen")
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="'plain' writes nothing after an answer"):
        ChatTemplate(tokenizer, ChatFormat("plain")).answers(turns("a", "b"))


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(ConfigError, match=f"max_refused_share is {share}; expected 0 to 1"):
        ChatFormat(max_refused_share=share)
