"""The tiny SAE, written by this project for other libraries to load, and tokens to compare codes on. Needs the `peers` extra."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qscope_jax.sae.arrays import SAEArrays
from qscope_jax.sae.autoencoder import densify
from qscope_jax.sae.conversion import ConversionConfig, convert
from qscope_jax.sae.formats.own_format import write_folder
from qscope_jax.sae.layer_sae import LayerSAE, from_arrays

F, D, K, LAYER = 96, 32, 8, 3


@pytest.fixture
def x() -> np.ndarray:
    """[300, D] tokens, some with fewer than K positive pre-activations."""
    rng = np.random.default_rng(2)
    return (rng.standard_normal((300, D)) * np.repeat([1.5, 0.3], 150)[:, None]).astype(np.float32)


@pytest.fixture
def tiny(x) -> Callable[..., SAEArrays]:
    """Factory of the tiny SAE: decoder rows of many norms, b_dec far from 0."""
    rng = np.random.default_rng(0)
    W_enc = rng.standard_normal((F, D)) / np.sqrt(D)
    W_dec = W_enc * rng.uniform(0.3, 3, (F, 1)) + 0.1 * rng.standard_normal((F, D))
    drawn = {"W_enc": W_enc, "W_dec": W_dec, "b_enc": rng.uniform(-2.6, -0.3, F), "b_dec": rng.standard_normal(D)}
    tensors = {name: array.astype(np.float32) for name, array in drawn.items()}
    positive = (x @ tensors["W_enc"].T + tensors["b_enc"] > 0).sum(axis=1)
    assert (positive < K).any() and (positive > K).any()
    return lambda **changes: SAEArrays(**{**tensors, "k": K, "metadata": {"layer": LAYER, "model_name": "Qwen/Qwen3-1.7B-Base"}, **changes})


@pytest.fixture
def converted(tmp_path) -> Callable[[SAEArrays, str], Path]:
    """Write an SAE in our format, convert it, return the destination."""

    def run(sae: SAEArrays, to: str) -> Path:
        write_folder(tmp_path / "ours", {LAYER: sae})
        convert(tmp_path / "ours", tmp_path / to, ConversionConfig(to))
        return tmp_path / to

    return run


@pytest.fixture
def codes(x) -> Callable[[SAEArrays | LayerSAE], tuple[np.ndarray, np.ndarray]]:
    """Codes [N, F] and reconstructions of `x` as this library computes them."""

    def run(sae: SAEArrays | LayerSAE) -> tuple[np.ndarray, np.ndarray]:
        if isinstance(sae, SAEArrays):
            sae = from_arrays(sae if sae.activation == "topk" else dataclasses.replace(sae, k=sae.num_features), LAYER)
        code = sae.encode(x)
        return np.asarray(densify(code, sae.num_features)), np.asarray(sae.decode(code))

    return run


@pytest.fixture
def assert_agree() -> Callable[[tuple, tuple], None]:
    """Check that two pairs of codes and reconstructions have the same active features and the same values within rounding."""

    def check(found: tuple[np.ndarray, np.ndarray], expected: tuple[np.ndarray, np.ndarray]) -> None:
        np.testing.assert_array_equal(found[0] > 0, expected[0] > 0)
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(found[1], expected[1], rtol=1e-5, atol=1e-5)

    return check
