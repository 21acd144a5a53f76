from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.sae import sparse
from qscope_jax.sae.sparse import chosen_pre_activations, combine_rows, dot_rows, residual_rows, scatter_rows, scatter_scalars, sparse_decode

N, F, D, K = 7, 40, 12, 5
FORMS = ["dense", "gather", "scan"]


@pytest.fixture
def arrays():
    """A code with negative values, with a feature that every token shares, and with empty slots that repeat a feature of their row."""
    rng = np.random.default_rng(0)
    indices = np.stack([rng.permutation(F)[:K] for _ in range(N)]).astype(np.int32)
    indices[:, 1] = 3
    indices[:, 2] = np.where(indices[:, 2] == 3, 4, indices[:, 2])
    values = rng.standard_normal((N, K)).astype(np.float32)
    values[2:4, 3:], indices[2:4, 3:] = 0, indices[2:4, :1]
    x, y, W, b, g = (rng.standard_normal(shape).astype(np.float32) for shape in ((N, D), (N, D), (F, D), F, (N, K)))
    return {name: jnp.asarray(array) for name, array in dict(values=values, indices=indices, x=x, y=y, W=W, b=b, g=g).items()}


def one_hot(a) -> jax.Array:
    """[N, K, F]: where each slot lies."""
    return jax.nn.one_hot(a["indices"], F, dtype=jnp.float32)


def assert_close(got, expected):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), got, expected)


def with_gradients(function, *inputs):
    """Output, and the gradient of a fixed projection of it with respect to every input."""

    def both(*inputs):
        out, backward = jax.vjp(function, *inputs)
        return out, backward(jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape))

    return jax.jit(both)(*inputs)


@pytest.mark.parametrize("how", FORMS)
def test_combining_rows_equals_the_dense_product_with_all_gradients(how, arrays):
    a = arrays
    got = with_gradients(lambda v, W: combine_rows(v, a["indices"], W, how), a["values"], a["W"])
    assert_close(got, with_gradients(lambda v, W: jnp.einsum("nk,nkf,fd->nd", v, one_hot(a), W), a["values"], a["W"]))


@pytest.mark.parametrize("how", FORMS)
def test_products_with_rows_equal_the_dense_product_with_all_gradients(how, arrays):
    a = arrays
    got = with_gradients(lambda y, W: dot_rows(y, a["indices"], W, how), a["y"], a["W"])
    assert_close(got, with_gradients(lambda y, W: jnp.einsum("nd,nkf,fd->nk", y, one_hot(a), W), a["y"], a["W"]))


@pytest.mark.parametrize("how", FORMS)
def test_what_decoding_leaves_and_its_products_equal_the_dense_ones(how, arrays):
    a = arrays
    rest, along = jax.jit(partial(residual_rows, how=how))(a["y"], a["values"], a["indices"], a["W"])
    expected = a["y"] - jnp.einsum("nk,nkf,fd->nd", a["values"], one_hot(a), a["W"])
    assert_close(rest, expected)
    np.testing.assert_allclose(along, jnp.einsum("nd,nkf,fd->nk", expected, one_hot(a), a["W"]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", FORMS)
def test_scattering_rows_equals_the_dense_product_with_all_gradients(how, arrays):
    a = arrays
    got = with_gradients(lambda v, y: scatter_rows(v, a["indices"], y, F, how), a["values"], a["y"])
    assert_close(got, with_gradients(lambda v, y: jnp.einsum("nk,nkf,nd->fd", v, one_hot(a), y), a["values"], a["y"]))


@pytest.mark.parametrize("tokens, features", [(1, 40), (37, 8), (300, 64), (50, 4000)])
def test_rows_of_features_that_fire_rarely_or_often_are_summed_whole(tokens, features):
    # A skewed code: some features fire for every token, most for none, so that rows need from no turn of the loop to many.
    rng = np.random.default_rng(tokens)
    share = rng.random(features) ** 6
    indices = np.stack([rng.choice(features, K, replace=False, p=share / share.sum()) for _ in range(tokens)]).astype(np.int32)
    values, y = rng.standard_normal((tokens, K)).astype(np.float32), rng.standard_normal((tokens, D)).astype(np.float32)
    expected = np.zeros((features, D))
    np.add.at(expected, indices, values[..., None].astype(np.float64) * y[:, None])
    np.testing.assert_allclose(
        scatter_rows(jnp.asarray(values), jnp.asarray(indices), jnp.asarray(y), features, "scan"), expected, rtol=1e-4, atol=1e-4
    )


def test_entries_are_sorted_alike_by_one_key_and_by_two():
    features = jnp.asarray(np.random.default_rng(0).integers(0, 7, 60), jnp.int32)
    expected = np.argsort(np.asarray(features), kind="stable")
    for number in (7, 2**30):
        np.testing.assert_array_equal(sparse._sort_entries(features, number), expected)


def test_scattering_scalars_equals_the_dense_sum_with_its_gradient(arrays):
    got = with_gradients(lambda v: scatter_scalars(v, arrays["indices"], F), arrays["values"])
    assert_close(got, with_gradients(lambda v: jnp.einsum("nk,nkf->f", v, one_hot(arrays)), arrays["values"]))


@pytest.mark.parametrize("how", FORMS)
def test_sparse_decoding_and_its_backward_pass_equal_the_dense_ones(how, arrays, monkeypatch):
    monkeypatch.setattr(sparse, "strategy", lambda *sizes: how)
    a = arrays
    got = with_gradients(lambda v, W: sparse_decode(v, a["indices"], W), a["values"], a["W"])
    assert_close(got, with_gradients(lambda v, W: jnp.einsum("nk,nkf,fd->nd", v, one_hot(a), W), a["values"], a["W"]))


@pytest.mark.parametrize("how", FORMS)
def test_selected_pre_activations_and_their_backward_pass_equal_the_dense_ones(how, arrays, monkeypatch):
    monkeypatch.setattr(sparse, "strategy", lambda *sizes: how)
    a = arrays
    z = a["x"] @ a["W"].T + a["b"]
    got = with_gradients(
        lambda x, W, b: chosen_pre_activations(jnp.take_along_axis(z, a["indices"], axis=1), a["indices"], x, W, b), a["x"], a["W"], a["b"]
    )
    assert_close(got, with_gradients(lambda x, W, b: jnp.einsum("nf,nkf->nk", x @ W.T + b, one_hot(a)), a["x"], a["W"], a["b"]))


def test_no_gradient_reaches_the_array_of_pre_activations(arrays):
    a = arrays
    z = a["x"] @ a["W"].T + a["b"]
    gradient = jax.grad(
        lambda z: jnp.sum(chosen_pre_activations(jnp.take_along_axis(z, a["indices"], axis=1), a["indices"], a["x"], a["W"], a["b"]))
    )(z)
    assert not np.any(gradient)


@pytest.mark.parametrize("how", ["gather", "scan"])
def test_nothing_of_tokens_by_features_is_kept_for_or_made_in_the_backward_pass(how, arrays, monkeypatch):
    monkeypatch.setattr(sparse, "strategy", lambda *sizes: how)
    a = arrays

    def rebuild(W_enc, W_dec, b, x):
        z = jax.lax.stop_gradient(x @ W_enc.T + b)
        return sparse_decode(chosen_pre_activations(jnp.take_along_axis(z, a["indices"], axis=1), a["indices"], x, W_enc, b), a["indices"], W_dec)

    out, backward = jax.vjp(rebuild, a["W"], a["W"], a["b"], a["x"])
    kept = [leaf.shape for leaf in jax.tree.leaves(backward)]
    assert kept and not [shape for shape in kept if N in shape and F in shape]
    made = shapes_in(jax.make_jaxpr(backward)(out).jaxpr)
    assert (F, D) in made and not [shape for shape in made if N in shape and F in shape]


def shapes_in(jaxpr) -> set[tuple[int, ...]]:
    """Shapes of every value that a program computes, in its loops and branches too."""
    found = {variable.aval.shape for equation in jaxpr.eqns for variable in equation.outvars}
    inner = (jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")) for equation in jaxpr.eqns)
    return found.union(*(shapes_in(value.jaxpr) for values in inner for value in values if hasattr(value, "jaxpr")))


@pytest.mark.parametrize("backend, features, width, k, expected", [
    ("cpu", 1024, 128, 32, "dense"), ("cpu", 32768, 2048, 50, "scan"), ("tpu", 32768, 2048, 50, "dense"), ("gpu", 32768, 2048, 50, "gather"),
])  # fmt: skip
def test_the_form_follows_backend_and_sizes(backend, features, width, k, expected, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert sparse.strategy(features, width, k) == expected
