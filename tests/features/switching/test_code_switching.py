from dataclasses import replace

import numpy as np
import pytest

from qscope_jax.errors import InputError
from qscope_jax.features.proportions import wilson
from qscope_jax.features.switching.code_switching import (
    SAMPLING,
    Response,
    compare_ratios,
    first_switched_token,
    is_switched,
    sample_responses,
    script_tokens,
    switch_ratios,
    target_script,
)
from qscope_jax.features.switching.response_log import open_log
from qscope_jax.features.switching.switch_prompts import SwitchPrompt

SHORT = replace(SAMPLING, max_new_tokens=6, temperature=2.0)
PROMPTS = [SwitchPrompt((("user", "." * length + str(length)),), ("th", "ar")[length % 2], "t") for length in (3, 40, 1, 7, 20)]


class ByteTokenizer:
    """A byte is a token."""

    def decode(self, ids, skip_special_tokens=False):
        return bytes(ids).decode(errors="replace")

    def batch_decode(self, rows):
        return [self.decode(row) if max(row) < 256 else "你" * (row[0] == 300) for row in rows]


def answers(*texts: tuple[int, str], language: str = "th", task: str = "") -> list[Response]:
    return [Response(prompt, sample, text, language, task) for sample, (prompt, text) in enumerate(texts)]


def test_targets_have_scripts_of_their_own():
    assert [target_script(code) for code in ("zh", "ru", "ko", "th", "ja")] == ["Han", "Cyrillic", "Hangul", "Thai", "Hiragana+Katakana"]
    for code in ("en", "vi", "sr"):
        with pytest.raises(InputError, match=f"'{code}' is written in Latin letters"):
            target_script(code)
    with pytest.raises(InputError, match="'tlh' has no known script; name the script"):
        target_script("tlh")


def test_one_character_is_enough():
    assert is_switched("a long answer, with one 字 in it", "Han") and not is_switched("a long answer。", "Han") and not is_switched("", "Han")


def test_the_first_switched_token_is_where_its_character_begins():
    ids = list("à la 你好".encode())
    assert first_switched_token(ByteTokenizer(), ids, "Han") == len("à la ".encode())
    assert first_switched_token(ByteTokenizer(), list("你".encode()), "Han") == 0
    assert first_switched_token(ByteTokenizer(), list("é ü".encode()), "Han") is None
    # Bytes that are no character are not taken for its beginning.
    assert first_switched_token(ByteTokenizer(), [255] * 9 + list("你".encode()), "Han") == 9


def test_the_first_switched_token_of_characters_is_their_place(character_model):
    text = "12 34 a b"
    ids = character_model.tokenize([text])[0]
    assert first_switched_token(character_model.tokenizer, ids, "Latin") == 6


def test_items_of_the_vocabulary_that_contain_the_script_are_found():
    mask = script_tokens(ByteTokenizer(), 302, "Han")
    assert mask.shape == (302,) and np.flatnonzero(mask).tolist() == [300]
    assert script_tokens(ByteTokenizer(), 302, "Latin").sum() == 52


def test_answers_are_as_sampled_as_the_papers_do():
    assert (SAMPLING.temperature, SAMPLING.top_p, SAMPLING.top_k, SAMPLING.max_new_tokens) == (1.0, 0.8, 0, 2048)


def test_an_answer_depends_on_its_prompt_and_number_alone(character_model):
    found = sample_responses(character_model, PROMPTS, SHORT, samples=4, batch_size=8)
    assert [(one.prompt, one.sample) for one in found] == [(prompt, sample) for prompt in range(5) for sample in range(4)]
    assert {(one.language, one.task) for one in found[:4]} == {("ar", "t")} and len({one.text for one in found[:4]}) > 1
    assert all(one.text == character_model.tokenizer.decode(list(one.token_ids[: len(one.text)])) for one in found)
    smaller = sample_responses(character_model, PROMPTS, SHORT, samples=2, batch_size=4)
    assert smaller == [one for one in found if one.sample < 2]
    assert sample_responses(character_model, PROMPTS[2:3], SHORT, samples=4) == [replace(one, prompt=0) for one in found if one.prompt == 2]


def test_repeated_prompts_are_answered_anew(character_model):
    found = sample_responses(character_model, [PROMPTS[0], PROMPTS[0]], SHORT, samples=4)
    assert found[:4] != [replace(one, prompt=0) for one in found[4:]]


def test_what_is_sampled_follows_the_renderer_and_shows_progress(character_model):
    told = []
    found = sample_responses(
        character_model, PROMPTS[:2], SHORT, samples=1, batch_size=1, render=lambda prompt: prompt.language, progress=lambda *n: told.append(n)
    )
    assert told == [(0, 2), (1, 2), (2, 2)]
    direct = character_model.generate(["th"], replace(SHORT, temperature=0.0))[0]
    assert sample_responses(character_model, PROMPTS[1:2], replace(SHORT, temperature=0.0), samples=1, render=lambda _: "th")[0].text == direct.text
    assert found[0].text != found[1].text


def test_finished_answers_are_taken_from_the_log(character_model, tmp_path, monkeypatch):
    whole = sample_responses(character_model, PROMPTS, SHORT, samples=2)
    sample_responses(character_model, PROMPTS[:3], SHORT, samples=2, log=open_log(tmp_path / "log"))
    drawn = []
    generate = type(character_model).generate

    def counting(self, prompts, *arguments, **settings):
        drawn.extend(prompts)
        return generate(self, prompts, *arguments, **settings)

    monkeypatch.setattr(type(character_model), "generate", counting)
    log = open_log(tmp_path / "log")
    assert sample_responses(character_model, PROMPTS, SHORT, samples=2, log=log) == whole
    assert len(drawn) == 4 and len(log) == 10
    assert sample_responses(character_model, PROMPTS, SHORT, samples=2, log=open_log(tmp_path / "log")) == whole and len(drawn) == 4
    other = sample_responses(character_model, PROMPTS, replace(SHORT, seed=1), samples=2, log=log)
    assert other != whole and len(log) == 20


def test_prompts_that_do_not_fit_are_refused_before_any_is_answered(character_model):
    with pytest.raises(InputError, match="prompt 1 has 42 tokens and 1000 may follow; in memory has 1024 positions"):
        sample_responses(character_model, PROMPTS, replace(SHORT, max_new_tokens=1000))
    with pytest.raises(InputError, match="prompt 0 has 0 tokens"):
        sample_responses(character_model, PROMPTS, SHORT, render=lambda _: " ")
    with pytest.raises(InputError, match="5 prompts, 0 samples"):
        sample_responses(character_model, PROMPTS, SHORT, samples=0)


def test_ratios_are_of_all_by_language_and_by_task():
    found = [
        *answers((0, "字"), (0, "a"), (1, "b"), (1, "字 c"), task="x"),
        *answers((2, "b"), (2, "c"), language="ar", task="y"),
    ]
    rows = switch_ratios(found, "Han", samples=200)
    assert [(row.group, row.name, row.prompts, row.responses, row.switched) for row in rows] == [
        ("all", "", 3, 6, 2), ("language", "ar", 1, 2, 0), ("language", "th", 2, 4, 2), ("task", "x", 2, 4, 2), ("task", "y", 1, 2, 0),
    ]  # fmt: skip
    assert rows[0].ratio == 2 / 6 and rows[0].low < 2 / 6 < rows[0].high
    assert (rows[1].ratio, rows[1].low, rows[1].high) == tuple(wilson(0, 2))
    assert [row.group for row in switch_ratios(answers((0, "a")), "Han")] == ["all", "language"]


def test_answers_to_one_prompt_that_switch_together_widen_the_interval():
    texts = [(prompt, "字" if prompt < 10 else "a") for prompt in range(100) for _ in range(8)]
    row = switch_ratios(answers(*texts), "Han")[0]
    assert row.high - row.low > 2 * (wilson(80, 800).high - wilson(80, 800).low)


def test_two_models_are_compared_prompt_by_prompt():
    before = answers(*((prompt, "字" if prompt % 4 == 0 else "a") for prompt in range(80) for _ in range(2)))
    after = answers(*((prompt, "字" if prompt % 8 == 0 else "a") for prompt in range(80) for _ in range(2)))
    row = compare_ratios(before, after, "Han")[0]
    assert (row.group, row.before, row.after, row.change, row.relative) == ("all", 0.25, 0.125, -0.125, -0.5)
    assert row.low < -0.125 < row.high < 0
    silent = compare_ratios(after, answers(*((prompt, "a") for prompt in range(80) for _ in range(2))), "Han")[0]
    assert silent.after == 0 and silent.relative == -1 and silent.high < 0
    assert np.isnan(compare_ratios(before[2:4], before[2:4], "Han")[0].relative)


def test_models_that_answered_different_prompts_cannot_be_compared():
    for other in (answers((1, "a")), answers((0, "a"), language="ar"), []):
        with pytest.raises(InputError, match="different prompts"):
            compare_ratios(answers((0, "a")), other, "Han")
    with pytest.raises(InputError, match="no answers"):
        switch_ratios([], "Han")


def test_sampling_compiles_once_for_batches_of_a_size(character_model, count_compilations):
    sample_responses(character_model, PROMPTS[:1], SHORT, samples=8, batch_size=4)
    with count_compilations() as compiled:
        sample_responses(character_model, PROMPTS[2:4], replace(SHORT, seed=5), samples=8, batch_size=4)
    assert compiled.count == 0
