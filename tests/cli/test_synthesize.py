import json

import pytest

from qscope_jax.data.tables import load_table

TEXTS = ["My grandmother made tea.", "the garden", "奶奶在花园里泡茶。", "tea in the garden."]


@pytest.fixture
def options(model, saes, tmp_path) -> list[object]:
    (tmp_path / "data.jsonl").write_text(json.dumps({"text": TEXTS[1]}) + "\n")
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    data = ["--data", tmp_path / "data.jsonl", "--pool", tmp_path / "pool.jsonl", "--least", 1, "--strength", 0.6]
    return ["run", "--model", model, "--sae", saes, "--layers", "1", *data, "--max-new-tokens", 4, "--attempts", 2, "--batch-size", 4]


def test_a_run_keeps_what_fires_and_goes_on_where_it_stopped(qscope, options, tmp_path):
    out = tmp_path / "out"
    answer = qscope("synthesize", *options, "--out", out, "--doses", "1,4")
    assert answer.status == 0 and not answer.err, answer
    result = json.loads((out / "result.json").read_text())
    kept = load_table(out / "kept.jsonl").rows if result["kept"] else ()
    assert result["targets"] > 3 and result["before"] < 1 and 0 < result["written"] <= 2 * result["targets"]
    assert len(kept) == result["kept"] and all(f"{row['layer']}/{row['feature']}" in row["fires"] for row in kept)
    methods = {row["method"] for row in result["budgets"]}
    assert methods == {"feature-driven synthesis", "random synthesis", "natural sampling"}
    assert result["budgets"][1]["written"] == result["written"] and "Data made for missing features" in (out / "report.html").read_text()
    lines = len((out / "candidates.jsonl").read_text().splitlines())
    again = qscope("synthesize", *options, "--out", out, "--doses", "1,4")
    assert f"{result['written']} texts were finished by an earlier run" in again.out
    assert json.loads((out / "result.json").read_text()) == result and len((out / "candidates.jsonl").read_text().splitlines()) == lines


def test_a_folder_is_gone_on_with_by_the_same_settings_only(refused, qscope, options, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "settings.json").write_text("{}")
    (tmp_path / "out" / "candidates.jsonl").touch()
    assert "holds a run whose" in refused("synthesize", *options, "--out", tmp_path / "out")


def test_a_run_that_was_refused_does_not_bind_the_next(refused, options, tmp_path):
    assert "doses are [0.0]" in refused("synthesize", *options, "--out", tmp_path / "out", "--doses", 0)
    assert "no chat template" in refused("synthesize", *options, "--out", tmp_path / "out", "--writer", "model")


def test_a_store_can_be_the_pool_and_one_of_other_saes_is_refused(qscope, refused, model, saes, options, tmp_path):
    data = ["--data", tmp_path / "pool.jsonl", "--layers", "1", "--max-length", 64]
    answer = qscope("store", "--model", model, "--sae", saes, *data, "--out", tmp_path / "store")
    assert answer.status == 0, answer
    counts = []
    for limit in ((), ("--pool-limit", 1)):
        assert qscope("cover", *options[1:-6], "--pool", tmp_path / "store", *limit, "--out", tmp_path / "c.json").status == 0
        counts.append(len(json.loads((tmp_path / "c.json").read_text())["targets"]))
    assert 0 < counts[1] < counts[0]
    manifest = json.loads((tmp_path / "store" / "manifest.json").read_text())
    (tmp_path / "store" / "manifest.json").write_text(json.dumps(manifest | {"k": {"1": 3}}))
    assert "give the --model and --sae of the store" in refused("cover", *options[1:-6], "--pool", tmp_path / "store")


def test_data_that_covers_everything_needs_nothing(qscope, options, tmp_path):
    answer = qscope("synthesize", *options, "--data", tmp_path / "pool.jsonl", "--out", tmp_path / "out")
    assert answer.status == 0 and "covers all of its" in answer.out


def test_rows_are_mixed(qscope, tmp_path):
    for name, count in (("real", 6), ("made", 3)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": f"{name} {i}"}) + "\n" for i in range(count)))
    answer = qscope("synthesize", "mix", "--real", tmp_path / "real.jsonl", "--synthetic", tmp_path / "made.jsonl", "--out", tmp_path / "m.jsonl")
    assert answer.status == 0 and "3 real and 3 synthetic rows" in answer.out
    assert sorted(load_table(tmp_path / "m.jsonl").column("origin")) == ["real"] * 3 + ["synthetic"] * 3


def test_answers_are_scored(qscope, tmp_path):
    rows = [("I cannot help.", True), ("Sure!", True), ("Sure!", False), ("Sure!", False), ("I'm sorry, but no.", False), ("Yes.", False)]
    lines = [json.dumps({"response": text, "harmful": harmful, "judged": text == "Yes."}) + "\n" for text, harmful in rows]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    qscope("synthesize", "score", "--answers", tmp_path / "a.jsonl", "--out", tmp_path / "s.json")
    saved = json.loads((tmp_path / "s.json").read_text())
    assert saved["accuracy"] == (0.5 + 0.75) / 2 and saved["attack_success"]["hits"] == 1 and saved["detector"] == "phrases"
    qscope("synthesize", "score", "--answers", tmp_path / "a.jsonl", "--out", tmp_path / "s.json", "--refused-column", "judged")
    assert json.loads((tmp_path / "s.json").read_text())["accuracy"] == (0 + 0.75) / 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--writer", "gpt"], "writer is 'gpt', expected steer, model or an endpoint's address"),
        (["--writer", "http://127.0.0.1:9/v1"], "needs --writer-model"),
        (["--writer", "model"], "no chat template"),
        (["--styles", "rude"], "style 'rude' is unknown"),
        (["--same-meaning"], "needs a judge"),
        (["--doses", "0"], "doses are [0.0]"),
        (["--budget", "0"], "budget is 0"),
    ],
)
def test_bad_requests_are_refused(refused, options, tmp_path, arguments, said):
    assert said in refused("synthesize", *options, "--out", tmp_path / "out", *arguments)


def test_bad_tables_are_refused(refused, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"response": "Sure!", "harmful": "perhaps"}\n')
    assert "line 1: column harmful holds 'perhaps'" in refused("synthesize", "score", "--answers", tmp_path / "a.jsonl")
    assert "--out is missing" in refused("synthesize", "mix", "--real", "a", "--synthetic", "b")
