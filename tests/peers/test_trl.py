"""The policy loss and the shaping of TRL's GRPO trainer, on the same inputs as ours. Needs the `peers` extra."""

from collections import defaultdict
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")
GRPOTrainer = pytest.importorskip("trl.trainer.grpo_trainer").GRPOTrainer

from trl.rewards import get_repetition_penalty_reward, get_soft_overlong_punishment  # noqa: E402

from qscope_jax.training.dapo.policy_loss import PolicyLossConfig, policy_counts, policy_loss  # noqa: E402
from qscope_jax.training.dapo.shaping import ngram_repetition_penalty, soft_overlong_punishment  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

B, T, WIDTH = 8, 12, 20
RNG = np.random.default_rng(0)
OLD = RNG.uniform(-4, -0.05, (B, T)).astype(np.float32)
NEW = (OLD + RNG.normal(0, 0.5, (B, T))).astype(np.float32)
REFERENCE = (OLD + RNG.normal(0, 0.5, (B, T))).astype(np.float32)
ADVANTAGES = RNG.normal(0, 1.5, B).astype(np.float32)
MASK = np.arange(T) < np.array([12, 1, 7, 5, 12, 3, 9, 0])[:, None]


def theirs(config):
    """Loss, gradient on the log-probabilities and clipped shares of TRL's own method, on a trainer that has just what it reads."""
    logps = torch.tensor(NEW, requires_grad=True)
    accelerator = SimpleNamespace(num_processes=1, gather=lambda x: x, gather_for_metrics=lambda x: x, reduce=lambda x, reduction="sum": x)
    trainer = SimpleNamespace(
        loss_type=config.loss_type,
        epsilon_low=config.epsilon,
        epsilon_high=config.epsilon_high,
        importance_sampling_level=config.importance_sampling_level,
        beta=config.beta,
        max_completion_length=WIDTH,
        args=SimpleNamespace(delta=config.delta, use_bias_correction_kl=False, steps_per_generation=1),
        current_gradient_accumulation_steps=1,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        _entropy_bonus_enabled=False,
        model=SimpleNamespace(training=True),
        accelerator=accelerator,
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *arguments, **settings: (logps, torch.zeros(B, T), None),
    )
    inputs = {
        "prompt_ids": torch.zeros(B, 2, dtype=torch.long),
        "prompt_mask": torch.ones(B, 2, dtype=torch.long),
        "completion_ids": torch.zeros(B, T, dtype=torch.long),
        "completion_mask": torch.tensor(MASK).long(),
        "advantages": torch.tensor(ADVANTAGES),
        "old_per_token_logps": torch.tensor(OLD),
        "ref_per_token_logps": torch.tensor(REFERENCE),
        "num_items_in_batch": torch.tensor(MASK.sum()),
    }
    loss = GRPOTrainer._compute_loss(trainer, trainer.model, inputs)
    loss.backward()
    return loss.item(), logps.grad.numpy(), {name: values[0] for name, values in trainer._metrics["train"].items()}


def ours(config):
    arrays, mask = [jnp.asarray(array) for array in (OLD, ADVANTAGES)], jnp.asarray(MASK)
    counts, reference = policy_counts(mask), jnp.asarray(REFERENCE) if config.beta else None

    def loss(logp):
        return policy_loss(logp, *arrays, mask, counts, config, width=WIDTH, reference_logp_BT=reference)

    (value, sums), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(NEW))
    return value, gradient, {name: total / counts.tokens for name, total in sums.items()}


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo", "bnpo"])
@pytest.mark.parametrize("settings", [{}, {"epsilon_high": 0.2}, {"delta": 1.5}, {"beta": 0.04}, {"importance_sampling_level": "sequence"}], ids=str)
def test_loss_and_gradient_equal_those_of_trl(loss_type, settings):
    config = PolicyLossConfig(loss_type=loss_type, **settings)
    (value, gradient, metrics), (expected, their_gradient, their_metrics) = ours(config), theirs(config)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, their_gradient, atol=1e-6)
    if config.importance_sampling_level == "token" and config.delta is None:  # theirs counts sequences there, and capped ratios
        np.testing.assert_allclose(metrics["clip_low"], their_metrics["clip_ratio/low_mean"], rtol=1e-5)
        np.testing.assert_allclose(metrics["clip_high"], their_metrics["clip_ratio/high_mean"], rtol=1e-5)
    if config.beta:
        np.testing.assert_allclose(metrics["kl"], their_metrics["kl"], rtol=1e-5)


def test_shaping_equals_that_of_trl():
    completions = [RNG.integers(0, 4, length).tolist() for length in range(40)]
    punished = soft_overlong_punishment(np.arange(40), max_completion_len=30, soft_punish_cache=12)
    np.testing.assert_allclose(punished, get_soft_overlong_punishment(30, 12)(completion_ids=completions))
    for size in (1, 2, 3):
        expected = get_repetition_penalty_reward(size, -0.7)(completion_ids=completions)
        np.testing.assert_allclose([ngram_repetition_penalty(ids, ngram_size=size, max_penalty=-0.7) for ids in completions], expected)
