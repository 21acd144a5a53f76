import json

import pytest

from qscope_jax.cli.code_switch import Config
from qscope_jax.cli.main import main
from qscope_jax.features.scripts import find_script
from qscope_jax.features.switching.code_switching import SAMPLES, SAMPLING

SHORT = ("--max-new-tokens", 6, "--samples", 3)


@pytest.fixture
def prompts(tmp_path):
    rows = [
        {"prompt": "My grandmother", "language": "en", "task": "home"},
        {"prompt": "made tea in", "language": "en", "task": "tea"},
        {"messages": [{"role": "user", "content": "the garden."}], "language": "fr", "task": "home"},
        {"prompt": "奶奶在花园里", "language": "ja", "task": "home"},
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def measured(qscope, model, prompts, tmp_path):
    """Measure, and read what was written."""

    def measure(*arguments) -> dict:
        answer = qscope("code-switch", "measure", "--prompts", prompts, "--model", model, *SHORT, "--out", tmp_path / "o.json", *arguments)
        assert answer.status == 0, answer.err
        return json.loads((tmp_path / "o.json").read_text()) | {"said": answer.out, "warned": answer.err}

    return measure


def test_switches_are_counted_by_language_and_task(measured, tmp_path):
    saved = measured("--languages", "en", "fr", "--page", tmp_path / "p.html", "--responses", tmp_path / "a.jsonl")
    (found,) = saved["models"].values()
    assert saved["verb"] == "code-switch measure" and saved["script"] == "Han" and saved["prompts"] == 3 and not saved["warned"]
    rows = {(row["group"], row["name"]): row for row in found["ratios"]}
    assert list(rows) == [("all", ""), ("language", "en"), ("language", "fr"), ("task", "home"), ("task", "tea")]
    answers = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    switched = sum(find_script(one["text"], "Han") >= 0 for one in answers)
    assert len(answers) == 9 == rows["all", ""]["responses"] and 0 < switched == rows["all", ""]["switched"] < 9
    assert len(found["examples"]) == min(switched, 5) and found["examples"][0]["prompt_text"] in ("My grandmother", "made tea in", "the garden.")
    assert "answers with Han" in saved["said"] and "Switched answers" in (tmp_path / "p.html").read_text(encoding="utf-8")


def test_finished_answers_are_not_sampled_again(measured, tmp_path, monkeypatch):
    files = ("--languages", "en", "--responses", tmp_path / "a.jsonl")
    first = measured(*files)
    monkeypatch.setattr("qscope_jax.features.switching.code_switching.continue_prompts", None)
    again = measured(*files)
    assert again["models"] == first["models"]


def test_two_models_are_compared_on_the_same_prompts(qscope, model, prompts, tmp_path):
    other = tmp_path / "other"
    other.symlink_to(model)
    options = ("--prompts", prompts, "--languages", "en", "--models", model, other, *SHORT)
    answer = qscope("code-switch", "measure", *options, "--out", tmp_path / "o.json", "--page", tmp_path / "p.html")
    assert answer.status == 0 and f"{other} beside {model}" in answer.out.replace("\n", " ")
    saved = json.loads((tmp_path / "o.json").read_text())
    assert list(saved["models"]) == [model, str(other)] and list(saved["changes"]) == [str(other)]
    assert all(row["change"] == 0 for row in saved["changes"][str(other)])


def test_a_named_template_is_used_and_its_end_stops_an_answer(measured, tmp_path):
    measured("--languages", "en", "--template", "plain", "--responses", tmp_path / "a.jsonl")
    records = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert {one["prompt_text"] for one in records} == {"My grandmother\n\n", "made tea in\n\n"}
    assert records[0]["sampling"]["stop_token_ids"] == [0]
    measured("--languages", "en", "--template", "plain", "--no-chat", "--responses", tmp_path / "b.jsonl")
    assert "\\n" not in json.loads((tmp_path / "b.jsonl").read_text().splitlines()[0])["prompt_text"]


def test_a_model_is_asked_as_it_was_trained(qscope, model, prompts, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "model").symlink_to(model)

    def read(name: str, *arguments) -> dict:
        options = ("--languages", "en", *SHORT, "--responses", tmp_path / name, *arguments)
        assert qscope("code-switch", "measure", "--prompts", prompts, "--model", run / "model", *options).status == 0
        return json.loads((tmp_path / name).read_text().splitlines()[0])

    (run / "config.yaml").write_text("template: ''\nresponse_marker: ''\nturn_end: ''\nmodel: tiny\n")
    assert read("a")["prompt_text"].endswith("\n\n")
    (run / "config.yaml").write_text("template: chatml\nresponse_marker: ''\nturn_end: ''\nmodel: other\n")
    assert read("b")["prompt_text"].startswith("<|im_start|>user\n") and read("c", "--template", "plain")["prompt_text"].endswith("\n\n")
    (run / "config.yaml").write_text("steps: 3\n")
    assert read("d")["prompt_text"] in ("My grandmother", "made tea in")


def test_answers_take_half_of_a_small_model_s_positions(qscope, model, prompts, tmp_path):
    options = ("--languages", "en", "--limit", 1, "--samples", 1, "--responses", tmp_path / "a.jsonl")
    assert qscope("code-switch", "measure", "--prompts", prompts, "--model", model, *options).status == 0
    assert json.loads((tmp_path / "a.jsonl").read_text().splitlines()[0])["sampling"]["max_new_tokens"] == 64


def test_the_embedded_corpus_has_prompts_of_its_own(tmp_path, capsys):
    options = ["--limit", "2", "--samples", "1", "--max-new-tokens", "4", "--language", "ko", "--out", str(tmp_path / "o.json")]
    assert main(["code-switch", "measure", *options]) == 0
    saved = json.loads((tmp_path / "o.json").read_text())
    rows = saved["models"]["tiny"]["ratios"]
    assert saved["script"] == "Hangul" and saved["prompts"] == 10 and {row["name"] for row in rows} == {"", "ar", "en", "fr", "ru", "zh"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "prompts in 'ja' (1 of 4) are written in Han themselves; leave them out"),
        (["--language", "vi"], "'vi' is written in Latin letters"),
        (["--language", "tlh"], "'tlh' has no known script"),
        (["--script", "Runes"], "script is 'Runes', expected one of Latin, Han"),
        (["--languages", "ar"], "has no prompts in ar; it has en, fr, ja"),
        (["--languages", "en", "--max-new-tokens", "2048"], "prompt 0 has"),
        (["--samples", "0"], "samples is 0, expected 1 or more"),
        (["--top-p", "0"], "top_p is 0.0"),
        (["--models", "a", "a"], "models are a, a; name each of them once"),
        (["--language-column", "lang"], "line 1: has no column 'lang'"),
    ],
)
def test_what_cannot_be_measured_is_refused(refused, model, prompts, arguments, said):
    assert said in refused("code-switch", "measure", "--prompts", prompts, "--model", model, *SHORT, *arguments)


def test_prompts_that_quote_the_script_are_said(measured, prompts):
    with prompts.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"prompt": "say 茶", "language": "en"}) + "\n")
    saved = measured("--languages", "en")
    assert saved["prompts_with_script"] == 1 and "1 of 3 prompts contain Han themselves" in saved["warned"]


def test_defaults_are_the_library_s():
    config = Config()
    found = (config.samples, config.temperature, config.top_p, config.top_k)
    assert found == (SAMPLES, SAMPLING.temperature, SAMPLING.top_p, SAMPLING.top_k) and config.max_new_tokens == 0
