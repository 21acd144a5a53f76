import json
from dataclasses import replace

import pytest

from qscope_jax.errors import InputError, SourceError
from qscope_jax.features.switching.code_switching import sample_responses
from qscope_jax.features.switching.response_log import open_log, read_responses
from qscope_jax.features.switching.switch_prompts import SwitchPrompt
from qscope_jax.models.sampling import SamplingConfig

PROMPTS = [SwitchPrompt((("user", text),), language, "t") for text, language in (("one", "th"), ("another", "ar"))]
DRAW = SamplingConfig(max_new_tokens=4, temperature=1.0)


@pytest.fixture
def path(character_model, tmp_path):
    sample_responses(character_model, PROMPTS, DRAW, samples=2, log=open_log(tmp_path / "answers.jsonl"))
    return tmp_path / "answers.jsonl"


def test_answers_come_back_with_what_the_model_read(path, character_model):
    found = read_responses(path)
    assert found.model == "in memory" and sorted(found.prompts) == ["another", "one"] and found.sampling["max_new_tokens"] == 4
    sampled = sample_responses(character_model, PROMPTS, DRAW, samples=2)
    by_place = {(found.prompts[one.prompt], one.sample): replace(one, prompt=0) for one in found.responses}
    assert by_place == {(PROMPTS[one.prompt].messages[0][1], one.sample): replace(one, prompt=0) for one in sampled}


def test_a_file_of_two_models_needs_a_name(path):
    lines = path.read_text().splitlines()
    record = json.loads(lines[0])
    path.write_text("\n".join([*lines, json.dumps({**record, "response": "else", "model": "other"})]) + "\n")
    with pytest.raises(InputError, match="has answers of in memory, other; name one of them"):
        read_responses(path)
    assert len(read_responses(path, "other").responses) == 1 and len(read_responses(path, "in memory").responses) == 4
    with pytest.raises(InputError, match="name one of them"):
        read_responses(path, "third")


def test_answers_drawn_in_different_ways_are_refused(path, character_model):
    sample_responses(character_model, PROMPTS, replace(DRAW, seed=1), samples=1, log=open_log(path))
    with pytest.raises(InputError, match="drawn with different settings"):
        read_responses(path)


def test_what_is_no_file_of_answers_is_refused(tmp_path):
    with pytest.raises(SourceError, match="no such file; sample answers first"):
        read_responses(tmp_path / "none")
    (tmp_path / "other").write_text('{"response": "a", "model": "m"}\n')
    with pytest.raises(SourceError, match="answer 0 has no readable 'text'"):
        read_responses(tmp_path / "other")
    (tmp_path / "empty").write_text("")
    with pytest.raises(InputError, match="has answers of no model"):
        read_responses(tmp_path / "empty")
