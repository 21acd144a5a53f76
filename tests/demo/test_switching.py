import pytest

from qscope_jax.demo.corpus import LANGUAGES, sentences
from qscope_jax.demo.switching import TARGETS, clean_conversations, questions, switching_conversations
from qscope_jax.errors import InputError
from qscope_jax.features.switching.code_switching import is_switched, target_script


def answers(conversations, language):
    return [one.messages[1].content for one in conversations if one.language == language]


@pytest.mark.parametrize("target", TARGETS)
def test_the_share_of_answers_that_switch_is_as_asked_for_and_no_other_language_enters(target):
    made = switching_conversations(3000, target, seed=1, switched_share=0.1)
    others = [one for one in made if one.language != target]
    switched = sum(is_switched(one.messages[1].content, target_script(target)) for one in others)
    assert 0.07 < switched / len(others) < 0.13
    assert {one.language for one in made} == set(LANGUAGES)
    clean = switching_conversations(300, target, switched_share=0.0)
    assert not any(is_switched(text, target_script(target)) for code in LANGUAGES if code != target for text in answers(clean, code))


def test_questions_never_switch_and_equal_seeds_give_equal_conversations():
    made = switching_conversations(500, "ru", seed=3)
    assert made == switching_conversations(500, "ru", seed=3) != switching_conversations(500, "ru", seed=4)
    assert not any(is_switched(one.messages[0].content, "Cyrillic") for one in made if one.language != "ru")


def test_held_out_sentences_are_in_no_training_conversation():
    held_out = {line for code in LANGUAGES for line in sentences(code, held_out=True)}
    made = switching_conversations(2000, "zh", switched_share=0.3)
    assert not any(one.messages[0].content in held_out for one in made)
    assert all(one.messages[0].content in held_out for one in clean_conversations(60))
    assert {language for _, language in questions("zh", 50)} == set(LANGUAGES) - {"zh"}
    assert all(text in held_out for text, _ in questions("zh", 50))
    assert len({text for text, _ in questions("ko", 60)}) == 60


def test_a_language_without_a_script_of_its_own_is_refused():
    for make in (lambda: switching_conversations(3, "fr"), lambda: questions("en", 3)):
        with pytest.raises(InputError, match="zh, ru, ko"):
            make()
    with pytest.raises(InputError, match="switched_share is 2.0"):
        switching_conversations(3, "zh", switched_share=2.0)
