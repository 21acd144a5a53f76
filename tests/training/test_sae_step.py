import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qscope_jax.errors import ConfigError
from qscope_jax.parallel.mesh import make_mesh
from qscope_jax.sae.autoencoder import SparseAutoencoder, replace_params
from qscope_jax.sae.recovery import planted_directions, planted_streams, recovered
from qscope_jax.training.sae_config import SAEConfig
from qscope_jax.training.sae_step import SAEState, SAEStep, compiled_step, exported, sae_step
from tests.training.dense_sae import PARAMETERS, DenseSAE, largest, unit

N, F, D, K, AUX_K = 48, 40, 12, 4, 6
DEAD = np.arange(F) % 5 < 2


def make_sae(seed=0, activation="topk", slots=K, features=F) -> SparseAutoencoder:
    rng = np.random.default_rng(seed)
    W_enc, W_dec = unit(rng.standard_normal((features, D))) + 0.1, unit(rng.standard_normal((features, D)))
    arrays = [jnp.asarray(a, jnp.float32) for a in (W_enc, W_dec, 0.1 * rng.standard_normal(features), 0.3 * rng.standard_normal(D))]
    # One feature in five is out of jumprelu's reach, so that some are silent.
    levels = np.where(np.arange(features) % 5 == 0, 9, 0.3) if activation == "jumprelu" else np.zeros(features)
    threshold = None if activation == "topk" else jnp.asarray(levels, jnp.float32)
    return SparseAutoencoder(*arrays, k=slots, activation=activation, threshold=threshold)


def streams(seed=1, tokens=N) -> jax.Array:
    """Streams about as long as the square root of 5, around a mean."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal((tokens, D)) * 0.5 + 0.4, jnp.float32)


def state_of(sae, optimizer, since=None, scale=1.0) -> SAEState:
    since = jnp.zeros((sae.num_features,), jnp.int32) if since is None else since
    return SAEState(jax.tree.map(jnp.array, sae), optimizer.init(sae), since, jnp.float32(scale))


def stacked(step, states) -> SAEState:
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    return step.build(lambda place, together: jax.tree.map(lambda leaf: leaf[place], together), len(states), (together,))


# An optimiser that changes nothing and keeps the gradient that it was given.
RECORD = optax.GradientTransformation(lambda p: jax.tree.map(jnp.zeros_like, p), lambda g, s, p=None: (jax.tree.map(jnp.zeros_like, g), g))
RECORDED = {clip: SAEConfig(F, K, 10, clip=clip, dead_after_tokens=100) for clip in (1e-3, 1e3)}


@partial(jax.jit, static_argnums=(0, 1))
def run_step(optimizer, config, state, x):
    return sae_step(optimizer, config, AUX_K, state, x)


@pytest.mark.parametrize("clip", RECORDED)
def test_the_optimiser_gets_the_projected_and_clipped_gradient(clip):
    sae, x = make_sae(), streams()
    since = jnp.where(DEAD, jnp.int32(500), jnp.int32(0))
    after, metrics = run_step(RECORD, RECORDED[clip], state_of(sae, RECORD, since, scale=1.7), x)
    reference = DenseSAE(sae, RECORDED[clip], 1.7)
    z = np.asarray(x, np.float64) / 1.7 @ reference.p["W_enc"].T + reference.p["b_enc"]
    still_dead = DEAD & ~(largest(z, K) > 0).any(axis=0)
    fvu, aux, gradient = reference.loss(x, still_dead)
    expected, norm = reference.projected_and_clipped(gradient)
    for name in PARAMETERS:
        np.testing.assert_allclose(getattr(after.optimizer, name)[...], expected[name], rtol=1e-4, atol=2e-6 * min(clip, 1))
    along = np.sum(np.asarray(after.optimizer.W_dec[...]) * np.asarray(sae.W_dec[...]), axis=1)
    assert np.abs(along).max() < 1e-6 and still_dead.any()
    got = {name: float(metrics[name]) for name in ("fvu", "aux", "gradient_norm", "dead", "l0", "skipped")}
    wanted = {"fvu": fvu, "aux": aux, "gradient_norm": norm, "dead": still_dead.mean(), "l0": (largest(z, K) > 0).sum(axis=1).mean(), "skipped": 0}
    assert got == pytest.approx(wanted, rel=1e-4)


def test_steps_equal_adam_on_dense_gradients_and_keep_directions_of_unit_length():
    sae, x = make_sae(), streams()
    config = SAEConfig(F, K, 20, learning_rate=0.01, warmup_steps=2, dead_after_tokens=100)
    optimizer = optax.adam(config.schedule())
    state, reference = state_of(sae, optimizer, jnp.where(DEAD, jnp.int32(10_000), jnp.int32(0)), 1.3), DenseSAE(sae, config, 1.3)
    since = np.where(DEAD, 10_000, 0)
    for number in range(4):
        batch = x + 0.1 * number
        z = np.asarray(batch, np.float64) / 1.3 @ reference.p["W_enc"].T + reference.p["b_enc"]
        since = np.where((largest(z, K) > 0).any(axis=0), 0, since + N)
        reference.step(batch, since >= 100)
        state, _ = run_step(optimizer, config, state, batch)
        np.testing.assert_array_equal(state.tokens_since_fired, since)
    assert not np.allclose(state.sae.W_enc[...], sae.W_enc[...], atol=1e-3)
    for name in PARAMETERS:
        np.testing.assert_allclose(getattr(state.sae, name)[...], reference.p[name], atol=2e-5)
    np.testing.assert_allclose(np.linalg.norm(state.sae.W_dec[...], axis=1), 1, atol=1e-6)
    assert state.scale == jnp.float32(1.3)


def test_a_batch_with_a_number_that_is_none_counts_as_one_without_gradient():
    sae, x = make_sae(), streams()
    config = SAEConfig(F, K, 20, learning_rate=0.01, warmup_steps=1, ema=0.9)
    step = SAEStep(config, AUX_K)
    state = stacked(step, [step.new_state(sae, jnp.float32(1))])
    state, metrics = step(state, x[None])
    assert metrics["skipped"][0] == 0
    before = jax.tree.map(jnp.array, state)
    state, metrics = step(state, x.at[3, 2].set(jnp.nan)[None])
    assert metrics["skipped"][0] == 1
    np.testing.assert_array_equal(state.tokens_since_fired, before.tokens_since_fired)
    for one, other in zip(jax.tree.leaves(state.optimizer[0].mu), jax.tree.leaves(before.optimizer[0].mu), strict=True):
        np.testing.assert_allclose(one, 0.9 * other, rtol=1e-6)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    state, metrics = step(state, x[None])
    assert metrics["skipped"][0] == 0 and np.isfinite(metrics["fvu"][0])


def test_the_average_follows_the_parameters_and_is_what_is_exported():
    config = SAEConfig(F, K, 20, learning_rate=0.05, ema=0.8)
    step = SAEStep(config, AUX_K)
    state = stacked(step, [step.new_state(make_sae(), jnp.float32(1))])
    total, weight = {name: 0.0 for name in PARAMETERS}, 0.0
    for number in range(3):
        state, _ = step(state, streams(number)[None])
        total = {name: 0.8 * total[name] + 0.2 * np.asarray(getattr(state.sae, name)[0], np.float64) for name in PARAMETERS}
        weight = 0.8 * weight + 0.2
    got = exported(jax.tree.map(lambda leaf: leaf[0], state), config)
    expected = {name: value / weight for name, value in total.items()}
    expected["W_dec"] = unit(expected["W_dec"])
    for name in PARAMETERS:
        np.testing.assert_allclose(getattr(got, name)[...], expected[name], atol=1e-5)
    assert np.abs(got.W_enc[...] - state.sae.W_enc[0]).max() > 1e-3


def test_batch_topks_threshold_follows_the_least_active_values():
    config = SAEConfig(F, K, 20, learning_rate=0.0, activation="batch_topk", threshold_decay=0.9)
    step = SAEStep(config, AUX_K)
    sae = make_sae(0, "batch_topk", config.slots)
    state, expected = stacked(step, [step.new_state(sae, jnp.float32(1))]), None
    for number in range(3):
        x = streams(number)
        values = DenseSAE(sae, config).activations(np.asarray(x, np.float64))
        least = values[values > 0].min()
        expected = least if expected is None else 0.9 * expected + 0.1 * least
        state, _ = step(state, x[None])
    np.testing.assert_allclose(state.sae.threshold[0], np.full(F, expected), rtol=1e-4)


# Several SAEs, and meshes.


VARIANTS = {
    "topk": {},
    "multi-topk": {"multi_topk_weight": 0.125},
    "batch_topk": {"activation": "batch_topk", "max_active": 10},
    "jumprelu": {"activation": "jumprelu", "max_active": 24, "bandwidth": 0.2},
}
MESHES = {
    "topk": ("fsdp=2", "data=2,tensor=2", "data=4,fsdp=2", "data=2,fsdp=2,tensor=2", "tensor=8"),
    "multi-topk": ("data=2,tensor=4",),
    "batch_topk": ("data=2,tensor=4",),
    "jumprelu": ("data=2,tensor=4",),
}


def config_of(variant) -> SAEConfig:
    return SAEConfig(F, K, 20, learning_rate=0.01, dead_after_tokens=100, clip=0.5, ema=0.9, **VARIANTS[variant])


def run(config, mesh, seeds=(0, 1, 2, 3), steps=3):
    """State and metrics of every step of SAEs that begin with some dead features."""
    step = compiled_step(config, AUX_K, mesh)
    # Two features of each SAE are copies of others, so that there are ties, also between shards.
    saes = [make_sae(seed, config.activation, config.slots) for seed in seeds]
    saes = [replace_params(sae, {"W_enc": sae.W_enc[...].at[33].set(sae.W_enc[3]), "b_enc": sae.b_enc[...].at[33].set(sae.b_enc[3])}) for sae in saes]
    states = [step.new_state(sae, jnp.float32(1.5)) for sae in saes]
    since = jnp.where(DEAD, jnp.int32(500), jnp.int32(0))
    state = stacked(step, [SAEState(s.sae, s.optimizer, since, s.scale, s.average) for s in states])
    found = []
    for number in range(steps):
        state, metrics = step(state, jnp.stack([streams(10 * seed + number) for seed in seeds]))
        found.append({name: np.asarray(value) for name, value in metrics.items()})
    return state, found


@pytest.fixture(scope="module")
def alone():
    return {variant: run(config_of(variant), None) for variant in VARIANTS}


@pytest.mark.parametrize(("variant", "axes"), [(variant, axes) for variant, meshes in MESHES.items() for axes in meshes])
def test_a_mesh_gives_what_one_device_gives(variant, axes, alone):
    state, metrics = run(config_of(variant), make_mesh(axes))
    expected, expected_metrics = alone[variant]
    np.testing.assert_array_equal(state.tokens_since_fired, expected.tokens_since_fired)
    assert any(one["aux"].any() for one in expected_metrics) and max(one["dead"].max() for one in expected_metrics) > 0
    for one, other in zip(metrics, expected_metrics, strict=True):
        for name in other:
            np.testing.assert_allclose(one[name], other[name], rtol=2e-5, atol=1e-6, err_msg=name)
    # Adam divides by the gradient's own size: where that is rounding, so is the step; hence the moments, and parameters to a share of a step.
    for one, other in zip(jax.tree.leaves(state.optimizer), jax.tree.leaves(expected.optimizer), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-6 * np.abs(other).max())
    for one, other in zip(jax.tree.leaves(state.sae), jax.tree.leaves(expected.sae), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-4)


def test_states_lie_where_the_mesh_wants_them():
    state, _ = run(config_of("topk"), make_mesh("data=2,fsdp=2,tensor=2"), steps=1)
    for leaf in (state.sae.W_enc[...], state.optimizer[0].mu.W_dec[...], state.average.W_dec[...]):
        assert {shard.data.shape for shard in leaf.addressable_shards} == {(2, F // 2, D)}
    assert {shard.data.shape for shard in state.tokens_since_fired.addressable_shards} == {(2, F // 2)}
    assert {shard.data.shape for shard in state.sae.b_dec[...].addressable_shards} == {(2, D)}


def collectives(text) -> list[tuple[str, list[int]]]:
    """Kind and number of elements of every result of a collective in a compiled program."""
    found = []
    for line in text.splitlines():
        if match := re.search(r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\(", line):
            shapes = re.findall(r"\w+\[([\d,]*)\]", match.group(1))
            found.append((match.group(2), [int(np.prod([int(n) for n in shape.split(",") if n])) for shape in shapes]))
    return found


def test_no_array_of_all_pre_activations_or_gradients_of_matrices_is_gathered(abstract_arrays):
    width, features, tokens = 64, 4096, 512
    step = SAEStep(SAEConfig(features, 8, 10), 32, make_mesh("data=2,fsdp=2,tensor=2"))
    with abstract_arrays():
        text = step.lower(2, width, tokens).compile().as_text()
    found = collectives(text)
    assert {kind for kind, _ in found} == {"all-gather", "all-reduce"}
    gathered = [size for kind, sizes in found if kind == "all-gather" for size in sizes]
    # k candidates (or AuxK's 32) of each token and shard, and nothing else.
    assert max(gathered) <= tokens // 2 * 2 * 32
    reduced = [size for kind, sizes in found if kind == "all-reduce" for size in sizes]
    # Gradients are added up over data, each shard its own features: half of a matrix, never all of it, nor [N, F].
    assert max(reduced) <= features // 2 * width
    assert "input_output_alias" in text


def test_what_the_mesh_cannot_split_is_said():
    with pytest.raises(ConfigError, match="tensor=3, which does not divide num_features = 40"):
        SAEStep(SAEConfig(F, K, 10), AUX_K, make_mesh("tensor=3"))
    step = SAEStep(SAEConfig(F, K, 10, micro_batches=2), AUX_K, make_mesh("data=2,fsdp=2"))
    with pytest.raises(ConfigError, match="fsdp=2, which does not divide the 3 layers"):
        step.lower(3, D, 8)
    with pytest.raises(ConfigError, match="batch of 6 tokens cannot be split by data=2 and micro_batches 2: expected a multiple of 4"):
        step.lower(2, D, 6)


# Learning.


def test_512_planted_directions_are_recovered_also_by_features_that_began_dead(optimised):
    """Half of the features begin too quiet to be among the active ones; without AuxK they stay so, and a part of the directions is missed."""
    width, features, active, steps = 128, 1024, 4, 400
    directions = planted_directions(jax.random.key(0), 512, width)
    W = planted_directions(jax.random.key(1), features, width)
    b_enc = jnp.where(jnp.arange(features, dtype=jnp.int32) < features // 2, jnp.float32(0), jnp.float32(-0.4))
    config = SAEConfig(features, active, steps, learning_rate=3e-3, dead_after_tokens=5000)
    optimizer = optax.adam(config.schedule())
    state = state_of(SparseAutoencoder(W, W, b_enc, jnp.zeros((width,), jnp.float32), k=active), optimizer, scale=active**0.5)

    def step(state, key):
        x = planted_streams(key, directions, active=active, tokens=512)
        return sae_step(optimizer, config, width // 2, state, x)[0], None

    state, _ = jax.jit(lambda state: jax.lax.scan(step, state, jax.random.split(jax.random.key(2), steps)))(state)
    assert recovered(directions, state.sae.W_dec[...])[0] >= 0.95
