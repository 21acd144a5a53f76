import json

import pytest

PROMPTS = ("My grandmother", "tea in the")


@pytest.fixture(scope="module")
def pair(model, saes) -> list[str]:
    return ["--model", model, "--sae", saes, "--layer", "1", "--max-new-tokens", "4"]


@pytest.fixture
def steered(qscope, pair, tmp_path):
    def run(*arguments: object) -> dict:
        answer = qscope("steer", *PROMPTS, *pair, *arguments, "--out", tmp_path / "o.json")
        assert answer.status == 0 and not answer.err, answer
        assert all(prompt in answer.out for prompt in PROMPTS)
        return json.loads((tmp_path / "o.json").read_text())

    return run


def texts(run: dict) -> list[list[int]]:
    return [one["token_ids"] for one in run["completions"]]


def test_doses_stand_beside_the_original_and_the_controls(steered):
    saved = steered("--feature", "3,5", "--strength", "-2,50", "--unit", "residual", "--controls", 2)
    found = [(run["kind"], run["strength"]) for run in saved["runs"]]
    edits = [("original", 0.0), ("steered", -2.0), ("steered", 50.0), ("opposite sign", 2.0), ("opposite sign", -50.0)]
    assert found == edits + [("random feature", -2.0), ("random feature", 50.0)] * 2
    drawn = [feature for run in saved["runs"][5::2] for feature in run["features"]]
    assert saved["residual_norm"] > 0 and len(set(drawn)) == 4 and not {3, 5} & set(drawn) and saved["runs"][0]["features"] == []
    assert all(0 <= share <= 1 for run in saved["runs"] for share in run["script_shares"].values())
    assert texts(saved["runs"][2]) != texts(saved["runs"][0])


@pytest.mark.parametrize("mode", ["clamp", "ablate", "project-out"])
def test_other_modes_run_each_strength(steered, mode):
    saved = steered("--feature", 3, "--mode", mode, "--strength", "30,60")
    found = [(run["kind"], run["strength"]) for run in saved["runs"]]
    assert found == [("original", 0.0), *([("ablate", 0.0)] if mode == "ablate" else [(mode, 30.0), (mode, 60.0)])]
    assert mode == "ablate" or texts(saved["runs"][2]) != texts(saved["runs"][0])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tea"], "--feature is missing"),
        (["", "--feature", "1"], "a prompt is empty"),
        (["tea", "--feature", "40"], "feature 40 is out of range"),
        (["tea", "--feature", "all"], "--feature is 'all', expected whole numbers"),
        (["tea", "--feature", "1", "--layer", "3"], "layer 3 is out of range"),
        (["tea", "--feature", "1", "--strength", ""], "--strength is '', expected numbers"),
        (["tea", "--feature", "1", "--strength", "nan"], "expected finite numbers"),
        (["tea", "--feature", "1", "--positions", "x"], "cannot read 'x'"),
        (["tea", "--feature", "1", "--mode", "clamp", "--controls", "1"], "use --unit and --controls with mode add"),
        (["tea", "--feature", "1,2", "--mode", "project-out"], "takes one feature, not 2"),
        (["tea", "--feature", "1", "--controls", "40"], "left to draw"),
        (["tea", "--feature", "1", "--norm-file", "none.txt"], "none.txt: no such file"),
        (["tea", "--feature", "1", "--out", "/proc/none/o.json"], "cannot be written"),
    ],
)
def test_bad_requests_are_refused(refused, pair, arguments, said):
    assert said in refused("steer", *pair, *arguments)


def test_an_empty_list_of_strengths_is_refused(refused, pair, tmp_path):
    (tmp_path / "o.yaml").write_text("strength: []\nfeature: 1\n")
    assert "strength and feature need at least one number" in refused("steer", "tea", *pair, "--config", tmp_path / "o.yaml")
