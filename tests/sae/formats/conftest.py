"""One tiny SAE for every format, tokens for it, and what its codes and reconstructions have to be."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from qscope_jax.sae.arrays import SAEArrays
from qscope_jax.sae.autoencoder import densify
from qscope_jax.sae.layer_sae import from_arrays

F, D, K = 96, 32, 8


@pytest.fixture
def tiny() -> dict[str, np.ndarray]:
    """Tensors in our orientation: decoder rows of many norms, b_dec far from 0, and encoder biases that leave some tokens fewer than K features."""
    rng = np.random.default_rng(0)
    W_enc = rng.standard_normal((F, D)) / np.sqrt(D)
    W_dec = W_enc * rng.uniform(0.3, 3, (F, 1)) + 0.1 * rng.standard_normal((F, D))
    drawn = {"W_enc": W_enc, "W_dec": W_dec, "b_enc": rng.uniform(-2.6, -0.3, F), "b_dec": rng.standard_normal(D)}
    return {name: array.astype(np.float32) for name, array in drawn.items()}


@pytest.fixture
def threshold() -> np.ndarray:
    return np.random.default_rng(1).uniform(0, 1, F).astype(np.float32)


@pytest.fixture
def x(tiny) -> np.ndarray:
    """[40, D] tokens, the last eight of which have fewer than K positive pre-activations."""
    rng = np.random.default_rng(2)
    x = 1.5 * rng.standard_normal((40, D))
    x[32:] *= 0.2
    for centre in (0, tiny["b_dec"].astype(np.float64)):
        positive = ((x - centre) @ tiny["W_enc"].astype(np.float64).T + tiny["b_enc"] > 0).sum(axis=1)
        assert (positive < K).any() and (positive > K).any()
    return x.astype(np.float32)


@pytest.fixture
def arrays(tiny) -> Callable[..., SAEArrays]:
    """Factory of the tiny SAE as we hold it."""
    return lambda layer=3, **changes: SAEArrays(**{**tiny, "k": K, "metadata": {"layer": layer}, **changes})


@pytest.fixture
def run() -> Callable[[SAEArrays, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Codes [N, F] and reconstructions of an SAE, as the library computes them."""

    def run(sae: SAEArrays, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        slots = sae if sae.activation == "topk" else dataclasses.replace(sae, k=sae.num_features)
        loaded = from_arrays(slots, 0)
        code = loaded.encode(x)
        return np.asarray(densify(code, sae.num_features)), np.asarray(loaded.decode(code))

    return run


@pytest.fixture
def keep() -> Callable[[np.ndarray, int], np.ndarray]:
    """The k largest positive entries of each row, the rest 0."""

    def keep(z: np.ndarray, k: int = K) -> np.ndarray:
        out = np.zeros_like(z)
        rows = np.arange(len(z))[:, None]
        best = np.argsort(-z, axis=1, kind="stable")[:, :k]
        out[rows, best] = np.maximum(z[rows, best], 0)
        return out

    return keep


@pytest.fixture
def assert_agree(run) -> Callable[..., None]:
    """Check an SAE against codes and reconstructions that a test worked out by the format's own rule, in float64."""

    def assert_agree(sae: SAEArrays, x: np.ndarray, codes: np.ndarray, xhat: np.ndarray) -> None:
        found, rebuilt = run(sae, x)
        assert (codes > 0).any() and (codes == 0).any()
        np.testing.assert_array_equal(found > 0, codes > 0)
        np.testing.assert_allclose(found, codes, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(rebuilt, xhat, rtol=1e-5, atol=1e-5)

    return assert_agree
