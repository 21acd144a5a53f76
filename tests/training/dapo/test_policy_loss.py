from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.errors import ConfigError, InputError
from qscope_jax.parallel.mesh import make_mesh
from qscope_jax.training.dapo.policy_loss import PolicyCounts, PolicyLossConfig, policy_counts, policy_loss

B, T, WIDTH = 6, 5, 9
RNG = np.random.default_rng(0)
OLD = RNG.uniform(-3, -0.1, (B, T))
NEW = OLD + RNG.normal(0, 0.6, (B, T))
REFERENCE = OLD + RNG.normal(0, 0.6, (B, T))
ADVANTAGES = np.array([1.5, -0.5, 0.0, -2.0, 0.7, 1.0])
LENGTHS = np.array([5, 3, 4, 5, 1, 0])  # the last row is fully masked
MASK = np.arange(T) < LENGTHS[:, None]
SETTINGS = {
    "dapo": {},
    "grpo": {"loss_type": "grpo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "bnpo": {"loss_type": "bnpo"},
    "sequence": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "dual clip": {"delta": 1.4},
    "reference": {"beta": 0.3},
}


@partial(jax.jit, static_argnames="config")
def value_and_gradient(new, old, advantages, mask, counts, reference, config):
    def loss(logp):
        return policy_loss(logp, old, advantages, mask, counts, config, width=WIDTH, reference_logp_BT=reference)

    (value, sums), gradient = jax.value_and_grad(loss, has_aux=True)(new)
    return value, gradient, sums


def run(config, new=NEW, old=OLD, advantages=ADVANTAGES, mask=MASK, counts=None, reference=REFERENCE):
    """Loss, gradient on the log-probabilities, and sums."""
    arrays = [jnp.asarray(array, jnp.float32) for array in (new, old, advantages)]
    counts = policy_counts(jnp.asarray(mask)) if counts is None else counts
    given = jnp.asarray(reference, jnp.float32) if config.beta else None
    return jax.tree.map(np.asarray, value_and_gradient(*arrays, jnp.asarray(mask), counts, given, config))


def by_formula(config, new=NEW, old=OLD, advantages=ADVANTAGES, mask=MASK, reference=REFERENCE):
    """The loss of a whole step in float64, from the papers' equations, token by token."""
    rows = []
    for row in range(len(new)):
        places = np.flatnonzero(mask[row])
        mean = np.mean(new[row, places] - old[row, places]) if len(places) else 0.0
        rows.append([])
        for t in places:
            r = np.exp(mean if config.importance_sampling_level == "sequence" else new[row, t] - old[row, t])
            clipped = min(max(r, 1 - config.epsilon), 1 + config.epsilon_high)
            r = r if config.delta is None else min(r, config.delta)
            d = reference[row, t] - new[row, t]
            rows[-1].append(-min(r * advantages[row], clipped * advantages[row]) + config.beta * (np.exp(d) - d - 1))
    total, tokens = sum(map(sum, rows)), sum(map(len, rows))
    if config.loss_type in ("dapo", "bnpo"):
        return total / tokens
    return total / (len(rows) * WIDTH) if config.loss_type == "dr_grpo" else sum(sum(row) / max(len(row), 1) for row in rows) / len(rows)


@pytest.mark.parametrize(
    "A, r, delta, value, gradient",
    [
        (1, 0.5, None, -0.5, -0.5),
        (1, 1, None, -1, -1),
        (1, 1.25, None, -1.25, -1.25),
        (1, 1.3, None, -1.28, 0),
        (-1, 0.79, None, 0.8, 0),
        (-1, 1, None, 1, 1),
        (-1, 1.3, None, 1.3, 1.3),
        (-1, 4, None, 4, 4),
        (-1, 4, 3.0, 3, 0),
        (1, 4, 3.0, -1.28, 0),
    ],
)
def test_a_token_has_the_loss_and_gradient_by_hand(A, r, delta, value, gradient):
    config = PolicyLossConfig(delta=delta)
    found = run(config, np.full((1, 1), np.log(r)), np.zeros((1, 1)), np.array([A]), np.ones((1, 1), bool))
    np.testing.assert_allclose([found[0], found[1].item()], [value, gradient], rtol=1e-6)


def test_a_symmetric_clip_stops_gains_sooner():
    config = PolicyLossConfig(epsilon_high=0.2)
    value, gradient, _ = run(config, np.full((1, 1), np.log(1.25)), np.zeros((1, 1)), np.ones(1), np.ones((1, 1), bool))
    np.testing.assert_allclose([value, gradient.item()], [-1.2, 0], rtol=1e-6)


@pytest.mark.parametrize("masked_row", [False, True])
def test_rows_of_one_and_three_tokens_are_added_up_as_by_hand(masked_row):
    """At r = 1 a token's loss is -A: -1 in the row of one, 0.5 in the row of three."""
    rows = 3 if masked_row else 2
    mask = np.arange(3) < np.array([1, 3, 0])[:rows, None]
    zeros, advantages = np.zeros((rows, 3)), np.array([1, -0.5, 1])[:rows]
    expected = {"dapo": 0.125, "bnpo": 0.125, "grpo": -0.5 / rows, "dr_grpo": 0.5 / (rows * 3)}
    for loss_type, value in expected.items():
        arrays = [jnp.asarray(array, jnp.float32) for array in (zeros, zeros, advantages)]
        config, marks = PolicyLossConfig(loss_type=loss_type), jnp.asarray(mask)
        found, _ = policy_loss(*arrays, marks, policy_counts(marks), config, width=3)
        np.testing.assert_allclose(found, value, rtol=1e-6, err_msg=loss_type)


def test_on_policy_the_gradient_is_minus_the_advantage_by_the_tokens_of_the_step():
    _, gradient, sums = run(PolicyLossConfig(), old=NEW)
    np.testing.assert_allclose(gradient, np.where(MASK, -ADVANTAGES[:, None] / LENGTHS.sum(), 0), rtol=1e-6)
    assert sums["ratio"] == LENGTHS.sum() and sums["clip_low"] == sums["clip_high"] == sums["old_kl"] == 0


def test_the_policy_before_may_be_the_policy_itself_and_gets_no_gradient():
    mask, advantages = jnp.asarray(MASK), jnp.asarray(ADVANTAGES, jnp.float32)

    def loss(logp):
        return policy_loss(logp, logp, advantages, mask, policy_counts(mask), PolicyLossConfig(), width=WIDTH)[0]

    gradient = jax.jit(jax.grad(loss))(jnp.asarray(NEW, jnp.float32))
    np.testing.assert_allclose(gradient, np.where(MASK, -ADVANTAGES[:, None] / LENGTHS.sum(), 0), rtol=1e-6)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_loss_and_gradient_equal_the_papers_formulas_in_double_precision(settings):
    config = PolicyLossConfig(**settings)
    value, gradient, _ = run(config)
    np.testing.assert_allclose(value, by_formula(config), rtol=1e-5)
    for row, t in [(0, 2), (1, 0), (3, 4), (4, 0), (5, 1)]:
        step = np.zeros((B, T))
        step[row, t] = 1e-6
        slope = (by_formula(config, NEW + step) - by_formula(config, NEW - step)) / 2e-6
        np.testing.assert_allclose(gradient[row, t], slope, atol=1e-6)


@pytest.mark.parametrize("settings", [s for name, s in SETTINGS.items() if name != "bnpo"], ids=[name for name in SETTINGS if name != "bnpo"])
def test_micro_batches_their_order_and_padding_change_neither_loss_nor_gradient(settings):
    config = PolicyLossConfig(**settings)
    value, gradient, sums = run(config)
    counts = policy_counts(jnp.asarray(MASK))
    wide = [np.pad(array, ((0, 0), (0, 2)), constant_values=fill) for array, fill in ((NEW, 50), (OLD, -50), (REFERENCE, 9), (MASK, 0))]
    total, parts, added = 0.0, np.zeros((B, T + 2)), {name: 0.0 for name in sums}
    for rows in ([5, 2], [0, 4], [3, 1]):
        new, old, reference, mask = (array[rows] for array in wide)
        found = run(config, new, old, ADVANTAGES[rows], mask, counts, reference)
        total, parts[rows] = total + found[0], found[1]
        added = {name: added[name] + found[2][name] for name in added}
    np.testing.assert_allclose(total, value, atol=1e-6)
    np.testing.assert_allclose(parts, np.pad(gradient, ((0, 0), (0, 2))), atol=1e-6)
    for name, expected in sums.items():
        np.testing.assert_allclose(added[name], expected, rtol=1e-5, err_msg=name)


def test_a_mesh_changes_neither_loss_nor_gradient():
    mesh = make_mesh("data=2")
    rows = jax.NamedSharding(mesh, jax.P("data"))
    config = PolicyLossConfig()
    arrays = [jax.device_put(jnp.asarray(array, jnp.float32), rows) for array in (NEW, OLD, ADVANTAGES)]
    mask = jax.device_put(jnp.asarray(MASK), rows)
    found = value_and_gradient(*arrays, mask, policy_counts(mask), None, config)
    for ours, expected in zip(found[:2], run(config)[:2], strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_the_mean_of_micro_batches_means_is_what_bnpo_is():
    config, counts = PolicyLossConfig(loss_type="bnpo"), policy_counts(jnp.asarray(MASK))
    halves = [slice(0, 3), slice(3, 6)]
    found = sum(run(config, NEW[h], OLD[h], ADVANTAGES[h], MASK[h], counts)[0] for h in halves)
    expected = np.mean([by_formula(config, NEW[h], OLD[h], ADVANTAGES[h], MASK[h]) for h in halves])
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("rubbish", [1000.0, -1000.0, np.inf, -np.inf, np.nan])
def test_what_is_masked_may_hold_anything(settings, rubbish):
    config = PolicyLossConfig(**settings)
    expected = run(config)
    found = run(config, *(np.where(MASK, array, rubbish) for array in (NEW, OLD)), reference=np.where(MASK, REFERENCE, rubbish))
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert not found[1][~MASK].any()


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_step_without_active_tokens_has_loss_and_gradient_zero(settings):
    value, gradient, sums = run(PolicyLossConfig(**settings), mask=np.zeros((B, T), bool))
    assert value == 0 and not gradient.any() and not any(sums.values())


def test_advantages_of_zero_have_gradient_zero_however_far_the_policy_went():
    value, gradient, _ = run(PolicyLossConfig(), old=NEW - 400, advantages=np.zeros(B))
    assert value == 0 and not gradient.any()


@pytest.mark.parametrize("distance", [300.0, -300.0])
def test_far_log_ratios_stay_finite(distance):
    for settings in SETTINGS.values():
        value, gradient, sums = run(PolicyLossConfig(**settings), old=NEW - distance, reference=NEW + distance)
        assert np.isfinite(value) and np.isfinite(gradient).all() and all(np.isfinite(total) for total in sums.values())


def test_a_steered_sampler_s_log_probabilities_would_leave_no_gradient():
    """Under steering a token was likely that is unlikely without: r is small, A < 0, and the clip holds."""
    unlikely, likely = np.full((1, 4), -6.0), np.full((1, 4), -0.5)
    arguments = {"advantages": np.array([-2.474874]), "mask": np.ones((1, 4), bool)}
    assert not run(PolicyLossConfig(), unlikely, likely, **arguments)[1].any()
    np.testing.assert_allclose(run(PolicyLossConfig(), unlikely, unlikely, **arguments)[1], np.full((1, 4), 2.474874 / 4), rtol=1e-6)


def test_sums_count_clipped_tokens_and_estimate_divergences():
    _, _, sums = run(PolicyLossConfig(delta=1.4, beta=0.3))
    r, A = np.exp(NEW - OLD), ADVANTAGES[:, None]
    d = REFERENCE - NEW
    expected = {
        "clip_low": (A < 0) & (r < 0.8),
        "clip_high": (A > 0) & (r > 1.28),
        "clip_dual": (A < 0) & (r > 1.4),
        "ratio": r,
        "old_kl": r - 1 - np.log(r),
        "kl": np.exp(d) - d - 1,
    }
    assert set(sums) == set(expected) and all((values * MASK).any() for values in expected.values())
    for name, values in expected.items():
        np.testing.assert_allclose(sums[name], (values * MASK).sum(), rtol=1e-5, err_msg=name)


def test_the_divergence_is_positive_however_small():
    _, _, sums = run(PolicyLossConfig(beta=0.1), reference=NEW + 1e-4)
    np.testing.assert_allclose(sums["kl"], 0.5e-8 * LENGTHS.sum(), rtol=1e-2)


def test_rows_that_fill_a_batch_up_are_not_counted():
    real = jnp.asarray([True] * 5 + [False])
    counts = policy_counts(jnp.asarray(MASK), real)
    assert counts == PolicyCounts(jnp.float32(LENGTHS.sum()), jnp.float32(5)) and policy_counts(jnp.asarray(MASK)).rows == 6
    config = PolicyLossConfig(loss_type="grpo")
    np.testing.assert_allclose(run(config, counts=counts)[0], by_formula(config, NEW[:5], OLD[:5], ADVANTAGES[:5], MASK[:5]), rtol=1e-5)


def test_half_precision_is_computed_in_single():
    new, old = (jnp.asarray(array, jnp.bfloat16) for array in (NEW, OLD))
    mask, advantages = jnp.asarray(MASK), jnp.asarray(ADVANTAGES, jnp.float32)
    value, _ = policy_loss(new, old, advantages, mask, policy_counts(mask), PolicyLossConfig(), width=WIDTH)
    expected = by_formula(PolicyLossConfig(), *(np.asarray(array, np.float64) for array in (new, old)))
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_unusual_settings_are_advised_against():
    assert not PolicyLossConfig().advice and not PolicyLossConfig(**SETTINGS["sequence"]).advice
    assert "meant for loss_type grpo" in PolicyLossConfig(importance_sampling_level="sequence").advice
    assert "size of micro-batches" in PolicyLossConfig(loss_type="bnpo").advice


@pytest.mark.parametrize(
    "settings, line",
    [
        ({"loss_type": "ppo"}, "loss_type is 'ppo'"),
        ({"importance_sampling_level": "row"}, "importance_sampling_level is 'row'"),
        ({"epsilon": 1.0}, "epsilon is 1.0"),
        ({"epsilon": 0.3}, "epsilon_high is 0.28, expected at least epsilon"),
        ({"epsilon_high": float("nan")}, "epsilon_high is nan"),
        ({"delta": 1.1}, "delta is 1.1, expected at least 1 [+] epsilon_high"),
        ({"beta": -0.1}, "beta is -0.1"),
    ],
)
def test_settings_out_of_range_are_refused_in_one_line(settings, line):
    with pytest.raises(ConfigError, match=line) as caught:
        PolicyLossConfig(**settings)
    assert "\n" not in str(caught.value)


def test_the_reference_and_its_weight_belong_together():
    arrays = [jnp.asarray(array, jnp.float32) for array in (NEW, OLD, ADVANTAGES)]
    mask = jnp.asarray(MASK)
    with pytest.raises(InputError, match="are missing"):
        policy_loss(*arrays, mask, policy_counts(mask), PolicyLossConfig(beta=0.1), width=WIDTH)
    with pytest.raises(InputError, match="given for nothing"):
        policy_loss(*arrays, mask, policy_counts(mask), PolicyLossConfig(), width=WIDTH, reference_logp_BT=arrays[0])
    with pytest.raises(InputError, match="has 0 tokens"):
        policy_loss(*arrays, mask, policy_counts(mask), PolicyLossConfig(), width=0)
