import pytest

from qscope_jax.errors import InputError
from qscope_jax.features.generation.generators import Reply
from qscope_jax.features.synthesis.targets import Target
from qscope_jax.features.synthesis.writers import InstructedWriter, Request


class Echo:
    """Answers with what it was asked."""

    name = "echo"

    def __init__(self):
        self.settings = {}

    def __call__(self, conversations, **settings):
        self.settings = settings
        return [Reply("", "HTTP 500") if "broken" in c[1]["content"] else Reply(c[1]["content"]) for c in conversations]


def ask(target: Target, attempt: int = 0, **contexts: tuple[str, ...]) -> str:
    return InstructedWriter(Echo(), {key.replace("_", "/"): value for key, value in contexts.items()})([Request(target, attempt)])[0].text


def test_a_writer_is_told_the_explanation_the_contexts_the_kind_and_the_number():
    assert "message number 3 that clearly contains the following: rude words" in ask(Target(0, 1, "rude words"), 2)
    asked = ask(Target(0, 1, "rude words", harmful=True), **{"0_1": tuple("abcdefg")})
    assert "rude words" in asked and "- e" in asked and "- f" not in asked and "harm" in asked
    assert "have in common" in ask(Target(0, 1), **{"0_1": ("a",)})
    assert "- " + "a" * 999 + "…" in ask(Target(0, 1), **{"0_1": ("a" * 2000,)})
    assert "something harmless" in ask(Target(0, 1, "knives", harmful=False))


def test_the_control_is_told_nothing_of_the_target():
    writer = InstructedWriter(Echo(), {"0/1": ("a context",)}).untargeted()
    (reply,) = writer([Request(Target(0, 1, "rude words"), 0)])
    assert "rude" not in reply.text and "context" not in reply.text and writer.name == "echo, untargeted"


def test_settings_reach_the_generator_and_failures_come_back():
    echo = Echo()
    replies = InstructedWriter(echo, {}, max_tokens=5, temperature=0.5)([Request(Target(0, 1, "broken"), 0), Request(Target(0, 2, "x"), 0)], seed=4)
    assert echo.settings == {"max_tokens": 5, "temperature": 0.5, "seed": 4}
    assert replies[0].error == "HTTP 500" and not replies[1].error
    assert InstructedWriter(echo, {})([]) == []


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ('"a b"', "a b"), ("“a”", "a"), ('"a" or "b"', '"a" or "b"'), (" a ", "a"), ('"', '"'),
        ("<think>rude?</think> a", "a"), ("rude?\n</think>\n\na", "a"), ("<think>rude, then", ""),
    ],
)  # fmt: skip
def test_quotation_marks_and_thoughts_are_taken_off(said, text):
    class Says:
        name = "says"

        def __call__(self, conversations, **settings):
            return [Reply(said)]

    assert InstructedWriter(Says(), {})([Request(Target(0, 1, "x"), 0)]) == [Reply(text)]


def test_nobody_can_be_told_about_a_feature_that_nothing_is_known_of():
    with pytest.raises(InputError, match="target 0/1 has neither an explanation nor contexts"):
        ask(Target(0, 1))
