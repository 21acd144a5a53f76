import json

import pytest
import yaml

from qscope_jax.cli.dapo import read_layer_features, read_rewards
from qscope_jax.errors import ConfigError
from qscope_jax.models.language_model import load_model

SMALL = """
template: plain
rewards: ["exact_match=1", "length=0.5,soft_punish_cache=2"]
num_prompts: 2
num_generations: 3
max_prompt_length: 32
max_completion_length: 6
steps: 2
learning_rate: 0.01
warmup_steps: 0
remat: false
log_every: 1
progress: false
holdout_share: 0.3
eval_samples: 2
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("options") / "small.yaml"
    path.write_text(SMALL)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"tea {number}", "answer": "garden"}) + "\n" for number in range(8)))
    return path


def test_a_run_leaves_options_metrics_by_part_a_page_and_a_model(qscope, refused, model, small, data, tmp_path):
    run = tmp_path / "run"
    answer = qscope("dapo", "train", data, "--config", small, "--model", model, "--out", run)
    assert answer.status == 0 and "held-out prompts" in answer.out
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 2] and lines[-1]["held_out"] and "pass@2" in lines[-1]
    assert {"reward/exact_match", "reward/length", "policy/ratio", "entropy", "accuracy", "repeating"} <= set(lines[0])
    assert (run / "page.html").is_file() and yaml.safe_load((run / "config.yaml").read_text())["num_generations"] == 3
    assert load_model(run / "model").config.d_model == 16
    assert "already holds a run" in refused("dapo", "train", data, "--config", small, "--model", model, "--out", run)


def test_a_run_past_its_entropy_ends_there_and_says_so(qscope, model, small, data, tmp_path):
    run = tmp_path / "run"
    answer = qscope("dapo", "train", data, "--config", small, "--model", model, "--out", run, "--max-entropy", 0.01)
    assert answer.status == 0 and "Ended after step 1: the policy's entropy is" in answer.out and "above max_entropy 0.01" in answer.out
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 1] and lines[-1]["held_out"] and (run / "model").is_dir()


@pytest.mark.parametrize("flags", [("--steer-unit", "raw"), ("--steer-control", "random")])
def test_one_member_is_steered_along_a_feature_or_at_random(qscope, model, saes, small, data, tmp_path, flags):
    run = tmp_path / "run"
    steering = ("--sae", saes, "--num-steered", 1, "--steer-features", "1:4,7", "--steer-alpha", 2.0, *flags)
    assert qscope("dapo", "train", data, "--config", small, "--model", model, "--out", run, *steering).status == 0
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert 0 < line["steered/token_share"] < 1 and "steered/reward_gap" in line


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--num-generations", 1), "num_generations is 1"),
        (("--num-steered", 1), "give both, or neither"),
        (("--num-steered", 1, "--steer-features", "x:1"), "expected LAYER:FEATURE"),
        (("--rewards", "nothing"), "reward 'nothing' is not known"),
        (("--rewards", "exact_match=much"), "its weight or an option cannot be read"),
        (("--rewards", "exact_match=1,column=solution"), "asks for a column 'solution'"),
        (("--max-prompt-length", 1), "tokens, expected 1 to 1"),
        (("--max-completion-length", 4000), "expected 1 to"),
        (("--num-mini-batches", 4), "cannot be split into 4 mini-batches"),
        (("--filter-metric", "acc"), "filter_metric is acc"),
    ],
)
def test_what_cannot_be_is_said_in_one_line_and_leaves_nothing(refused, model, small, data, tmp_path, flags, said):
    run = tmp_path / "run"
    assert said in refused("dapo", "train", data, "--config", small, "--model", model, "--out", run, *flags)
    assert not run.exists()


def test_made_prompts_are_evaluated_on_their_own_kinds_or_on_what_is_given(data):
    from qscope_jax.cli.dapo import Config, _prompts

    rows, held_out = _prompts(Config(data="tiny", out="run", limit=20))
    assert len(rows) == 20 + 80 and held_out == tuple(range(20, 100)) and rows[20].columns["answer"] and rows[99].columns["answer"] is None
    rows, held_out = _prompts(Config(data="tiny", out="run", limit=20, eval_data=str(data)))
    assert held_out == tuple(range(20, 28)) and rows[20].columns["answer"] == "garden"
    assert _prompts(Config(data="tiny", out="run", limit=20, holdout_share=0.0))[1] == ()


def test_rewards_are_read_with_weights_and_options():
    found = read_rewards(["numeric", "length=0.5,soft_punish_cache=64", "my.module:reward=2"])
    assert found == {"numeric": {"weight": 1.0}, "length": {"weight": 0.5, "soft_punish_cache": 64}, "my.module:reward": {"weight": 2.0}}
    for wrong in (["numeric", "numeric=2"], ["=1"], ["length=1,cache"]):
        with pytest.raises(ConfigError, match="expected NAME"):
            read_rewards(wrong)


def test_features_are_read_by_layer():
    assert read_layer_features(["18:4711", "20:1,2"]) == {18: [4711], 20: [1, 2]}
    with pytest.raises(ConfigError, match="each layer once"):
        read_layer_features(["18:1", "18:2"])
