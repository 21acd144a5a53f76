from dataclasses import replace

import pytest

from qscope_jax.errors import InputError
from qscope_jax.features.switching.code_switching import sample_responses
from qscope_jax.features.switching.switch_points import matched_points, switch_points
from qscope_jax.features.switching.switch_prompts import SwitchPrompt
from qscope_jax.models.sampling import SamplingConfig

PROMPTS = ["?", "??", "???"]


def test_a_switch_is_the_first_token_of_the_script(planted_model, answered):
    responses = answered((1, "12 34 ab c"), (0, "1 2"), (2, "x"))
    first, second = switch_points(planted_model, PROMPTS, responses, "Latin")
    assert (first.prompt, first.place, chr(first.token + 30)) == (1, 6, "a") and (second.prompt, second.place) == (2, 0)
    read = planted_model.tokenizer.decode
    assert read(first.before) == "??12 34 " and read(list(first.answer_ids)) == "12 34 ab c" and read(second.before) == "???"


def test_the_stop_token_is_no_part_of_an_answer(planted_model, answered):
    stopped = replace(answered((0, "12a3"))[0], stopped=True)
    (point,) = switch_points(planted_model, PROMPTS, [stopped], "Latin")
    assert len(point.answer_ids) == 3 and point.place == 2


def test_sampled_answers_have_what_is_needed(character_model):
    prompts = [SwitchPrompt((("user", text),), "th") for text in ("1", "22")]
    responses = sample_responses(character_model, prompts, SamplingConfig(max_new_tokens=6, temperature=3.0), samples=4)
    points = switch_points(character_model, ["1", "22"], responses, "Latin")
    assert len(points) == sum(any(c.isalpha() for c in one.text) for one in responses) > 0
    assert all(chr(point.token + 30).isalpha() for point in points)


def test_matches_are_long_enough_and_of_the_same_prompt_first(planted_model, answered):
    responses = answered(
        (0, "1234a"), (0, "55555"), (0, "66"), (1, "777777"), (1, "888888", "ar"), (2, "9999999")
    )  # fmt: skip
    points = switch_points(planted_model, PROMPTS, responses, "Latin")
    found = matched_points(planted_model, points, PROMPTS, responses, "Latin", matches=2)
    texts = [planted_model.tokenizer.decode(list(one.answer_ids)) for one in found]
    assert texts[0] == "55555" and texts[1] in ("777777", "9999999") and {one.place for one in found} == {4}
    assert matched_points(planted_model, [], PROMPTS, responses, "Latin") == []
    assert len(matched_points(planted_model, points, PROMPTS, responses, "Latin", matches=9)) == 3
    draws = {matched_points(planted_model, points, PROMPTS, responses, "Latin", matches=2, seed=seed)[1].prompt for seed in range(8)}
    assert draws == {1, 2}


def test_answers_that_tell_nothing_are_refused(planted_model, answered):
    with pytest.raises(InputError, match="none of 1 answers contains Latin"):
        switch_points(planted_model, PROMPTS, answered((0, "12")), "Latin")
    with pytest.raises(InputError, match="none of 0 answers"):
        switch_points(planted_model, PROMPTS, [], "Latin")
    with pytest.raises(InputError, match="to prompt 3, there are 3"):
        switch_points(planted_model, PROMPTS, answered((3, "a")), "Latin")
    with pytest.raises(InputError, match="answer 0 to prompt 0 has no tokens"):
        switch_points(planted_model, PROMPTS, [replace(answered((0, "a"))[0], token_ids=())], "Latin")
    with pytest.raises(InputError, match="0 answers to compare"):
        matched_points(planted_model, [], PROMPTS, answered((0, "a")), "Latin", matches=0)
