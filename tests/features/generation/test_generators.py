import pytest

from qscope_jax.features.generation.generators import Reply


@pytest.mark.parametrize(
    ("text", "spoken"),
    [
        (" Yes. ", "Yes."),
        ("<think>no, or?</think>\n\nYes.", "Yes."),
        ("no, or?</think>Yes.", "Yes."),
        ("<think>cut while it th", ""),
        ("The tag <think> is XML.", "The tag <think> is XML."),
        ("", ""),
    ],
)
def test_what_a_model_thinks_aloud_is_no_part_of_its_answer(text, spoken):
    assert Reply(text).spoken == spoken
