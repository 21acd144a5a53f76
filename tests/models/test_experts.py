from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from qscope_jax.models import experts
from qscope_jax.models.experts import MixtureOfExperts, mix
from qscope_jax.parallel.mesh import make_mesh

D, I = 12, 20  # noqa: E741
FORMS = ["blocks", "grouped"]


def operands(tokens: int, count: int, chosen: int, routing: str = "even") -> tuple[jax.Array, ...]:
    """Tokens, weights, distinct experts of each token, and the experts' projections."""
    rng = np.random.default_rng(tokens + count)
    favour = {"even": np.ones(count), "skewed": 10.0 ** -np.arange(count), "few": np.r_[np.ones(chosen), np.full(count - chosen, 1e-12)]}[routing]
    numbers = np.stack([rng.choice(count, chosen, replace=False, p=favour / favour.sum()) for _ in range(tokens)])
    x, weights = rng.standard_normal((tokens, D)), rng.random((tokens, chosen))
    gate, up, down = (rng.standard_normal(shape) * 0.3 for shape in ((count, I, D), (count, I, D), (count, D, I)))
    arrays = (jnp.asarray(array, jnp.float32) for array in (x, weights, gate, up, down))
    x, weights, gate, up, down = arrays
    return x, weights, jnp.asarray(numbers, jnp.int32), jnp.stack([gate, up], axis=1), down


def plain(x, weights, numbers, gate_up, down) -> np.ndarray:
    """Token by token, expert by expert, in double precision."""
    out = np.zeros(x.shape)
    for n, k in np.ndindex(*numbers.shape):
        g, u, d = (np.asarray(array[numbers[n, k]], np.float64) for array in (gate_up[:, 0], gate_up[:, 1], down))
        hidden = g @ np.asarray(x[n], np.float64)
        out[n] += float(weights[n, k]) * (d @ (hidden / (1 + np.exp(-hidden)) * (u @ np.asarray(x[n], np.float64))))
    return out


@pytest.mark.parametrize("how", ["reference", *FORMS])
@pytest.mark.parametrize(("tokens", "count", "chosen"), [(1, 6, 2), (3, 16, 4), (40, 5, 5), (70, 8, 3)])
@pytest.mark.parametrize("routing", ["even", "skewed", "few"])
def test_every_form_sums_the_chosen_experts_of_every_token(how, tokens, count, chosen, routing):
    arrays = operands(tokens, count, chosen, routing)
    got = jax.jit(lambda *arrays: mix(*arrays, how=how))(*arrays)
    np.testing.assert_allclose(got, plain(*arrays), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", FORMS)
@pytest.mark.parametrize("routing", ["even", "few"])
def test_every_form_has_the_gradients_of_the_reference(how, routing):
    x, weights, numbers, *projections = operands(30, 6, 2, routing)

    def gradients(how):
        def loss(x, weights, *projections):
            return jnp.sum(jnp.sin(mix(x, weights, numbers, *projections, how=how)))

        return jax.jit(jax.grad(loss, argnums=range(4)))(x, weights, *projections)

    for one, other in zip(gradients(how), gradients("reference"), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["reference", *FORMS])
def test_experts_on_four_shards_give_what_they_give_on_one_and_no_weight_travels(how):
    x, weights, numbers, *projections = operands(30, 8, 3, "skewed")
    mesh = make_mesh("data=2,expert=4")

    def run(x, weights, *projections):
        def loss(x, weights, *projections):
            out = mix(x, weights, numbers, *projections, how=how)
            return jnp.sum(jnp.sin(out)), out

        return jax.value_and_grad(loss, argnums=range(4), has_aux=True)(x, weights, *projections)

    (_, expected), wanted = jax.jit(run)(x, weights, *projections)
    split = NamedSharding(mesh, PartitionSpec("expert"))
    held = [jax.device_put(w, split) for w in projections]
    with jax.set_mesh(mesh):
        program = jax.jit(run)
        (_, got), grads = program(x, weights, *held)
        text = jax.jit(lambda *arrays: mix(*arrays[:2], numbers, *arrays[2:], how=how)).lower(x, weights, *held).compile().as_text()
    for one, two in zip((got, *grads), (expected, *wanted), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5)
    assert "all-gather" not in text and "all-to-all" not in text and text.count("all-reduce(") == 1


@pytest.fixture
def module(tiny_config) -> MixtureOfExperts:
    config = tiny_config(feed_forwards=("moe",) * 3, num_experts=6, experts_per_token=2, d_expert=20)
    return MixtureOfExperts(config, jax.random.key(0))


@pytest.mark.parametrize("normed", [False, True])
def test_a_router_chooses_the_most_probable_experts(module, normed):
    module.norm_expert_weights = normed
    x = np.random.default_rng(0).standard_normal((9, 32)) * 20
    weights, numbers = module.route(jnp.asarray(x, jnp.float32))
    scores = x @ np.asarray(module.router[...], np.float64).T
    probabilities = np.exp(scores - scores.max(axis=1, keepdims=True))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    np.testing.assert_array_equal(numbers, np.argsort(-probabilities, axis=1)[:, :2])
    expected = -np.sort(-probabilities, axis=1)[:, :2]
    np.testing.assert_allclose(weights, expected / expected.sum(axis=1, keepdims=True) if normed else expected, rtol=1e-4)


def test_a_router_in_half_precision_decides_in_float32(module):
    # In bfloat16 both scores would be 256, and the lower number would win.
    router = jnp.zeros((6, 32), jnp.bfloat16).at[2, 0].set(256).at[4, 0].set(256).at[4, 1].set(0.5)
    module.router = nnx.Param(router)
    x = jnp.zeros((1, 32), jnp.bfloat16).at[0, :2].set(1)
    weights, numbers = module.route(x)
    assert numbers[0].tolist() == [4, 2] and weights.dtype == jnp.bfloat16


def test_a_token_gets_the_same_whatever_stands_beside_it(module):
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 25, 32)), jnp.float32)
    together = module(x)
    for row, place in ((0, 0), (1, 13)):
        np.testing.assert_allclose(module(x[row : row + 1, place : place + 1])[0, 0], together[row, place], rtol=1e-4, atol=1e-6)


def test_accelerators_take_grouped_products_and_a_cpu_takes_blocks(monkeypatch):
    assert experts.strategy() == "blocks"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert experts.strategy() == "grouped"


def test_a_layer_without_room_for_its_experts_is_refused(tiny_config):
    config = tiny_config(feed_forwards=("moe",) * 3, num_experts=6, experts_per_token=2, d_expert=20)
    for change in ({"experts_per_token": 7}, {"experts_per_token": 0}, {"d_expert": 0}):
        with pytest.raises(Exception, match="none or too many"):
            replace(config, **change)
