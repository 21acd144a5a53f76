import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from qscope_jax.errors import InputError
from qscope_jax.features.steering import add_directions
from qscope_jax.models.decoder import Decoder
from qscope_jax.models.language_model import LanguageModel
from qscope_jax.parallel.mesh import make_mesh
from qscope_jax.parallel.rules import shard_tree
from qscope_jax.training.dapo.dapo import DAPO, PromptTask
from qscope_jax.training.dapo.dapo_config import DAPOConfig
from qscope_jax.training.dapo.rewards import load_rewards
from qscope_jax.training.loop import LoopConfig, train

STOP = 1
SETTINGS = DAPOConfig(
    steps=4, num_prompts=2, num_generations=4, max_prompt_length=8, max_completion_length=6, learning_rate=0.05, warmup_steps=0, weight_decay=0.0,
    remat=False, clip=1e9, eval_samples=2,
)  # fmt: skip


class Letters:
    """A token is a letter."""

    def decode(self, ids, skip_special_tokens=True):
        return "".join(chr(ord("a") + int(token) % 26) for token in ids)


def many_a(*, completions, **_):
    """Share of the letter a."""
    return [text.count("a") / max(len(text), 1) for text in completions]


def the_same(*, completions, **_):
    """A reward that never varies."""
    return [0.2] * len(completions)


@pytest.fixture(scope="module")
def model(tiny_config):
    decoder = jax.jit(lambda key: Decoder(tiny_config(2).unrolled(), key))(jax.random.key(0))
    return LanguageModel(decoder, tokenizer=Letters())


def task(reward="many_a", held_out=(4, 5)):
    prompts = [[3 + number, 40, 41] for number in range(6)]
    rewards = load_rewards({f"{__name__}:{reward}": 1.0})
    return PromptTask(prompts, [f"prompt {number}" for number in range(6)], {"answer": list(range(6))}, rewards, (STOP,), held_out)


@pytest.fixture(scope="module", autouse=True)
def importable():
    """Reward functions are found by import path."""
    import sys

    sys.modules.setdefault(__name__, sys.modules[__name__])


def edits(strength=6.0):
    return (add_directions(1, np.asarray(jax.random.normal(jax.random.key(5), (1, 32))), strength),)


def gradient(model, config=SETTINGS, reward="many_a", **settings):
    """Gradient of the first step, from Adam's first moment, and the metrics."""
    recipe = DAPO(model, task(reward), config, **settings)
    state, metrics = recipe.step(recipe.init(), next(recipe.stream()))
    moment = next(found.mu for found in jax.tree.leaves(state.optimizer, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(found, "mu"))
    return [np.asarray(leaf) / 0.1 for leaf in jax.tree.leaves(moment)], {name: float(value) for name, value in metrics.items()}, state


def equal(found, expected, tolerance=1e-6):
    largest = max(np.abs(leaf).max() for leaf in expected)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * largest)


@pytest.fixture(scope="module")
def plain(model):
    return gradient(model)


def test_a_step_says_what_it_drew_and_how_it_was_scored(plain):
    _, metrics, _ = plain
    assert metrics["groups/groups"] == 2 and metrics["groups/prompts"] == 2 and metrics["advantages/groups"] == 2
    assert 0 < metrics["length"] <= 6 and metrics["tokens"] == pytest.approx(8 * metrics["length"])
    assert metrics["entropy"] == pytest.approx(np.log(97), rel=0.1) and metrics["sampler_difference"] < 1e-4
    assert metrics["policy/ratio"] == pytest.approx(1) and metrics["policy/clip_low"] == metrics["policy/clip_high"] == 0


@pytest.mark.parametrize("parts", [2, 4])
def test_micro_batches_leave_the_gradient_unchanged(model, plain, parts):
    found, metrics, _ = gradient(model, replace(SETTINGS, micro_batches=parts))
    equal(found, plain[0])
    assert metrics["loss"] == pytest.approx(plain[1]["loss"], abs=1e-6)


def test_a_mesh_leaves_the_gradient_unchanged_and_rollouts_may_lie_on_another(model, plain):
    mesh = make_mesh("data=2,fsdp=2")
    spread = LanguageModel(shard_tree(model.decoder, mesh), mesh=mesh, tokenizer=Letters())
    found, metrics, _ = gradient(spread, rollout_mesh=make_mesh("data=4"))
    equal(found, plain[0], 5e-6)
    assert metrics["loss"] == pytest.approx(plain[1]["loss"], abs=1e-6) and metrics["length"] == plain[1]["length"]


def test_equal_rewards_change_nothing_and_are_said_within_a_few_steps(model, capsys):
    found, metrics, _ = gradient(model, reward="the_same")
    assert not any(np.any(leaf) for leaf in found) and metrics["zero_std"] == 1 and metrics["advantages/zero_variance"] == 2
    recipe = DAPO(model, task("the_same"), SETTINGS)
    state, stream = recipe.init(), recipe.stream()
    for _ in range(5):
        state, _ = recipe.step(state, next(stream))
    assert "was 0.2 for all 40 completions" in capsys.readouterr().err


def test_steering_with_alpha_zero_is_vanilla_to_the_bit(model, plain):
    found, metrics, _ = gradient(model, replace(SETTINGS, num_steered=1), edits=edits(0.0))
    for a, b in zip(found, plain[0], strict=True):
        np.testing.assert_array_equal(a, b)
    assert metrics["loss"] == plain[1]["loss"]


def test_a_steered_member_s_old_logprobs_are_the_unsteered_policy_s(model):
    """So its ratio is 1 and its gradient flows, though the sampler saw other probabilities."""
    recipe = DAPO(model, task(), replace(SETTINGS, num_steered=1), edits=edits())
    state = recipe.init()
    _, metrics = recipe.step(state, next(recipe.stream()))
    assert float(metrics["policy/ratio"]) == pytest.approx(1) and float(metrics["policy/clip_low"]) == 0
    assert metrics["sampler_difference"] < 1e-4 and "steered/reward_gap" in metrics and 0 < metrics["steered/token_share"] < 1


def test_the_policy_learns_what_is_rewarded_and_a_resumed_run_equals_the_uninterrupted_one_to_the_bit(model, tmp_path):
    config = replace(SETTINGS, steps=8, num_generations=8, dynamic_sampling=True, gen_batch_size=1, max_num_gen_batches=6)

    def recipe():
        return DAPO(model, task(), config)

    def loop(folder, steps, **changes):
        return LoopConfig(steps=steps, run_dir=str(tmp_path / folder), log_every=1, checkpoint_every=3, progress=False, **changes)

    through = train(recipe(), loop("whole", 8))
    train(recipe(), loop("parts", 4))
    resumed = train(recipe(), loop("parts", 8, resume=True))
    jax.tree.map(np.testing.assert_array_equal, resumed, through)
    whole, parts = ((tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "parts"))
    lines = [json.loads(line) for line in whole.splitlines()]
    first, second = ([line for line in map(json.loads, text.splitlines()) if not line.get("held_out")] for text in (whole, parts))
    assert first == second
    assert lines[-1]["held_out"] and lines[-1]["reward"] > 2 * max(lines[0]["reward"], 0.02)
    rates = [json.loads(line) for line in (tmp_path / "whole" / "rates.jsonl").read_text().splitlines()]
    assert all(rates[-1][name] > 0 for name in ("rollout_seconds", "scoring_seconds", "update_seconds"))


def test_several_updates_of_a_rollout_clip_and_keep_the_old_policy(model):
    config = replace(SETTINGS, num_iterations=3, num_mini_batches=2, learning_rate=0.3, beta=0.01)
    _, metrics, _ = gradient(model, config)
    assert metrics["policy/ratio"] != 1 and metrics["policy/old_kl"] > 0 and metrics["policy/kl"] > 0
    assert metrics["policy/clip_low"] + metrics["policy/clip_high"] > 0 and np.isfinite(metrics["loss"])
    assert metrics["staleness"] == 2.5, "six updates, the last of which comes after five others"


def test_too_few_groups_degrade_with_a_line_and_none_change_nothing(model, capsys):
    config = replace(SETTINGS, dynamic_sampling=True, max_num_gen_batches=2)
    recipe = DAPO(model, task("the_same"), config)
    first = recipe.init()
    before = np.asarray(first.parameters.embedding[...])
    state, metrics = recipe.step(first, next(recipe.stream()))
    np.testing.assert_array_equal(state.parameters.embedding[...], before)
    assert "the step changes nothing" in capsys.readouterr().err and metrics["groups/groups"] == 0 and metrics["groups/prompts"] == 4


def test_tasks_that_do_not_fit_are_refused(model):
    long = replace(task(), prompts=[[5] * 9] * 6)
    with pytest.raises(InputError, match="prompt 0 has 9 tokens, expected 1 to 8"):
        DAPO(model, long, SETTINGS)
    with pytest.raises(InputError, match="6 of them held out"):
        DAPO(model, task(held_out=tuple(range(6))), SETTINGS)
    with pytest.raises(InputError, match="steered members need edits"):
        DAPO(model, task(), replace(SETTINGS, num_steered=1))
    with pytest.raises(InputError, match="filter_metric is acc"):
        DAPO(model, task(), replace(SETTINGS, filter_metric="acc"))
