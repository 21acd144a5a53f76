import pytest

from qscope_jax.demo.corpus import sentences
from qscope_jax.demo.repetition import (
    cold_start_conversations,
    full_answer,
    held_out_prompts,
    open_questions,
    prompts_to_learn,
    right_sum,
    sums,
)
from qscope_jax.errors import InputError


def texts(rows):
    return [row.messages[0].content for row in rows]


def value(prompt):
    """What a question about two numbers comes to."""
    a, b = (int(word) for word in prompt.split() if word.isdigit())
    return a + b if prompt.startswith(("add", "sum", "plus")) else a - b


def test_every_sum_has_its_answer_and_held_out_pairs_are_in_no_frame_learnt_from():
    learnt, kept = sums(10_000), sums(10_000, held_out=True)
    assert all(str(value(prompt)) == row.columns["answer"] for row in (*learnt, *kept) for prompt in texts([row]))
    pairs = [{(value(prompt), *(word for word in prompt.split() if word.isdigit())) for prompt in texts(rows)} for rows in (learnt, kept)]
    assert not pairs[0] & pairs[1] and len(pairs[1]) > 10
    few = sums(40)
    assert len(set(texts(few))) == 40 and few == sums(40) and texts(few) != texts(sums(40, seed=1))


def test_open_questions_are_sentences_and_prone_ones_end_in_a_phrase_four_times():
    ordinary, prone = open_questions(100), open_questions(100, prone=True)
    assert set(texts(ordinary)) <= set(sentences("en")) and not set(texts(ordinary)) & set(texts(open_questions(100, held_out=True)))
    for text, sentence in zip(texts(prone), texts(ordinary), strict=True):
        assert text.startswith(sentence)
        phrase = text[len(sentence) :].split()
        circle = phrase[: len(phrase) // 3]
        assert phrase == circle * 3 and sentence.split()[-len(circle) :] == circle
    with pytest.raises(InputError, match="1000 open questions are asked for"):
        open_questions(1000)


def test_prompts_to_learn_from_are_half_sums_and_none_is_held_out():
    learnt = prompts_to_learn(60)
    assert sum(row.columns["answer"] is not None for row in learnt) == 30 and len(learnt) == 60
    kept = held_out_prompts(20)
    assert set(kept) == {"sums", "open", "prone"} and not set(texts(learnt)) & {text for rows in kept.values() for text in texts(rows)}


def test_the_cold_start_has_the_shares_it_says():
    made = cold_start_conversations(4000, seed=2)
    asked, said = ([one.messages[turn].content for one in made] for turn in (0, 1))
    is_sum = [any(word.isdigit() for word in text.split()) for text in asked]
    right = [answer.rpartition(":")[2].strip() == str(value(text)) for text, answer, kind in zip(asked, said, is_sum, strict=True) if kind]
    assert 0.32 < sum(is_sum) / 4000 < 0.38 and 0.6 < sum(right) / len(right) < 0.7
    looping = [len(answer.split()) > 60 for answer, kind in zip(said, is_sum, strict=True) if not kind]
    prone = [len(set(text.split()[-3:])) < 3 or text.split()[-1] in text.split()[-4:-1] for text, kind in zip(asked, is_sum, strict=True) if not kind]
    ordinary_looping = [loop for loop, kind in zip(looping, prone, strict=True) if not kind]
    prone_looping = [loop for loop, kind in zip(looping, prone, strict=True) if kind]
    assert 0.01 < sum(ordinary_looping) / len(ordinary_looping) < 0.04 and 0.6 < sum(prone_looping) / len(prone_looping) < 0.8
    assert made == cold_start_conversations(4000, seed=2)


def test_the_reward_reads_what_follows_the_last_colon():
    assert right_sum(completions=["3 , 4 : 4", "3 : 4 : 5", "4", " 3 , 4 : 4\n", "", "4"], answer=["4", "4", "4", "4", "4", None]) == [
        1,
        -1,
        1,
        1,
        -1,
        None,
    ]


def test_open_answers_of_few_words_are_punished_and_sums_left_alone():
    assert full_answer(completions=["a short one", "a " * 14, "7"], answer=[None, None, "7"]) == [-1, 0, None]
