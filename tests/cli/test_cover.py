import json

import pytest

from qscope_jax.data.tables import load_table
from qscope_jax.features.generation.generators import Reply

TEXTS = ["My grandmother made tea.", "the garden", "奶奶在花园里泡茶。"]


@pytest.fixture
def data(tmp_path) -> str:
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return str(tmp_path / "data.jsonl")


@pytest.fixture
def cover(qscope, model, saes, data, tmp_path):
    def run(*arguments: object) -> dict:
        answer = qscope("cover", "--model", model, "--sae", saes, "--data", data, *arguments, "--out", tmp_path / "o.json")
        assert answer.status == 0 and not answer.err, answer
        return json.loads((tmp_path / "o.json").read_text()) | {"said": answer.out}

    return run


@pytest.fixture
def table(tmp_path) -> str:
    rows = [{"layer": 1, "feature": feature, "explanation": f"about {feature}", "score": feature / 40} for feature in range(40)]
    (tmp_path / "targets.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "targets.jsonl")


def test_data_covers_all_that_it_fires_itself(cover, data, tmp_path):
    saved = cover("--pool", data, "--least", 1, "--layers", "0,2", "--page", tmp_path / "p.html", "--missing", tmp_path / "m.jsonl")
    assert saved["coverage"] == 1 and saved["missing"] == 0 and set(saved["layers"]) == {"0", "2"}
    assert saved["weak"] == sum(0 < target["texts"] < 5 for target in saved["targets"])
    assert "What the data covers" in (tmp_path / "p.html").read_text()
    assert len(load_table(tmp_path / "m.jsonl")) == saved["weak"]


def test_targets_of_a_table_are_counted_in_the_data(cover, data, table, tmp_path):
    saved = cover("--targets", table, "--weak", 1, "--missing", tmp_path / "m.jsonl")
    own = cover("--pool", data, "--least", 1, "--layers", 1)
    fired = {target["feature"]: target["texts"] for target in own["targets"]}
    assert [(target["feature"], target["texts"]) for target in saved["targets"]] == [(f, fired.get(f, 0)) for f in range(20, 40)]
    assert [row["feature"] for row in load_table(tmp_path / "m.jsonl").rows] == [f for f in range(20, 40) if f not in fired]
    assert len(cover("--targets", table, "--tau", 0.0)["targets"]) == 40


class Judge:
    """Finds even features useful; does not answer about feature 3."""

    name = "a judge"

    def __call__(self, conversations, **settings):
        assert settings["max_tokens"] == 900
        asked = [int(conversation[1]["content"].split()[-1]) for conversation in conversations]
        return [Reply("", "HTTP 503") if feature == 3 else Reply(str(float(feature % 2 == 0))) for feature in asked]


def test_a_judge_scores_what_has_no_score_and_what_it_failed_on_is_no_target(cover, tmp_path, monkeypatch):
    monkeypatch.setattr("qscope_jax.cli.cover.open_endpoint", lambda *arguments, **settings: Judge())
    rows = [{"layer": 1, "feature": feature, "explanation": f"about {feature}", "score": None} for feature in range(6)]
    # What explain wrote: the score is the explanation's.
    rows += [{"layer": 1, "feature": 6, "explanation": "about 6", "score": 0.1, "scores": {"detection": 0.1}}]
    rows += [{"layer": 1, "feature": 7, "explanation": "about 7", "score": 0.9, "scores": {"detection": 0.9}}]
    (tmp_path / "e.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scored = tmp_path / "s.jsonl"
    saved = cover("--targets", tmp_path / "e.jsonl", "--judge", "http://h/v1", "--judge-model", "m", "--judge-tokens", 900, "--scored", scored)
    assert [target["feature"] for target in saved["targets"]] == [0, 2, 4, 6] and saved["judge_failures"] == {"1/3": "HTTP 503"}
    assert [target["feature"] for target in cover("--targets", scored)["targets"]] == [0, 2, 4, 6]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--targets", "none.jsonl"], "none.jsonl: no such file"),
        (["--weak", "0"], "weak is 0"),
        (["--threshold", "-1"], "threshold is -1"),
        (["--pool", ""], "give --targets, a table of them, or --pool"),
        (["--pool", "tiny:de"], "the embedded corpus has tiny:en"),
        (["--layers", "7", "--pool", "tiny:en", "--pool-limit", "4"], "layer 7 is out of range"),
        (["--judge", "http://127.0.0.1:9", "--judge-model", "m"], "a judge scores explanations"),
        (["--out", "/proc/none/o.json"], "cannot be written"),
    ],
)
def test_bad_requests_are_refused(refused, model, saes, data, arguments, said):
    assert said in refused("cover", "--model", model, "--sae", saes, "--data", data, *arguments)


def test_a_judge_needs_an_address_and_a_model(refused, table):
    assert "is no address" in refused("cover", "--targets", table, "--judge", "gpt")
    assert "needs --judge-model" in refused("cover", "--targets", table, "--judge", "http://127.0.0.1:9/v1")
