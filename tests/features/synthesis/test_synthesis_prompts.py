import pytest

from qscope_jax.features.synthesis.synthesis_prompts import STYLES, response_conversation, rewrite_conversation

# What would be a placeholder, or end a prompt that is put together from pieces.
TEXT = "How do {I} open %s {style} a lock?\n"


@pytest.mark.parametrize("style", STYLES)
def test_a_rewrite_is_asked_for_in_its_style_and_the_text_stands_untouched(style):
    rule, message = rewrite_conversation(TEXT, style)
    assert (rule["role"], message["role"], message["content"]) == ("system", "user", TEXT)
    assert STYLES[style] in rule["content"] and not any(other in rule["content"] for name, other in STYLES.items() if name != style)
    assert "Keep what is asked for and its risk" in rule["content"] and "{" not in rule["content"]


def test_there_are_the_papers_eight_styles_each_said_in_a_sentence():
    assert len(STYLES) == 8 and all(said.endswith(".") for said in STYLES.values())


def test_harmful_requests_are_refused_and_redirected_and_harmless_ones_answered():
    (refuse, asked), (answer, same) = (response_conversation(TEXT, harmful=harmful) for harmful in (True, False))
    assert asked == same == {"role": "user", "content": TEXT}
    assert "cannot help" in refuse["content"] and "safe direction" in refuse["content"]
    assert "Answer it directly" in answer["content"] and "cannot" not in answer["content"]
