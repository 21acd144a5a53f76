"""A small model that reads characters, for everything that needs residual streams; small SAEs and their metrics in float64."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.models.decoder import Decoder
from qscope_jax.models.language_model import LanguageModel
from qscope_jax.sae.arrays import SAEArrays


@pytest.fixture(scope="session")
def character_model(tiny_config) -> LanguageModel:
    """Three layers, 32 wide, weights large enough for streams and logits to differ between tokens; a character is a token."""
    rng = np.random.default_rng(0)

    def draw(path, leaf) -> jax.Array:
        weights = np.ones(leaf.shape) if "norm" in jax.tree_util.keystr(path) else 0.2 * rng.standard_normal(leaf.shape)
        return jnp.asarray(weights, leaf.dtype)

    decoder = jax.tree_util.tree_map_with_path(draw, jax.eval_shape(lambda: Decoder(tiny_config(), jax.random.key(0))))
    return LanguageModel(decoder, tokenizer=_read_characters)


@pytest.fixture(scope="session")
def sentences() -> Callable[[int], list[str]]:
    """Factory of texts of 9 to 16 random characters."""

    def make(count: int, seed: int = 0) -> list[str]:
        rng = np.random.default_rng(seed)
        return ["".join(map(chr, rng.integers(33, 127, rng.integers(9, 17)))) for _ in range(count)]

    return make


def _read_characters(texts: list[str], add_special_tokens: bool = True) -> dict[str, list[list[int]]]:
    return {"input_ids": [[ord(character) - 30 for character in text] for text in texts]}


@pytest.fixture(scope="session")
def random_sae() -> Callable[..., SAEArrays]:
    """Factory of SAEs with tied directions, 64 features, 32 wide, k 5: poor ones, but their reconstructions resemble the streams."""

    def make(seed: int = 0, b_dec: float = 0.0, F: int = 64, D: int = 32) -> SAEArrays:
        rng = np.random.default_rng(seed)
        W = rng.standard_normal((F, D)).astype(np.float32)
        W /= np.linalg.norm(W, axis=1, keepdims=True)
        return SAEArrays(W, W.copy(), (-W @ np.full(D, b_dec) + 0.1).astype(np.float32), np.full(D, b_dec, np.float32), k=5)

    return make


@pytest.fixture(scope="session")
def oracle() -> Callable[..., dict[str, float]]:
    """Every metric of batches of streams [N, D], in float64, by the formulas as peers write them."""
    return _metrics


def _metrics(sae: SAEArrays, batches: list[np.ndarray]) -> dict[str, float]:
    batches = [np.asarray(batch, np.float64) for batch in batches]
    codes = [_code(sae, batch) for batch in batches]
    rebuilt = [code @ sae.W_dec + sae.b_dec for code in codes]
    errors = [x - xhat for x, xhat in zip(batches, rebuilt, strict=True)]
    x, xhat, e, code = (np.concatenate(parts) for parts in (batches, rebuilt, errors, codes))
    squares = [np.sum(error**2, axis=1) for error in errors]
    rate = (code > 0).mean(axis=0)
    fvu = np.sum(e**2) / np.sum((x - x.mean(axis=0)) ** 2)
    legacy = [1 - square / np.sum((batch - batch.mean(axis=0)) ** 2, axis=1) for square, batch in zip(squares, batches, strict=True)]
    per_dimension = [np.sum(error.var(axis=0)) / np.sum(batch.var(axis=0)) for error, batch in zip(errors, batches, strict=True)]
    power = np.mean([np.mean(np.sum(batch**2, axis=1)) for batch in batches])
    per_element = np.mean([np.mean(batch**2) for batch in batches])
    norms, norms_rebuilt = np.linalg.norm(x, axis=1), np.linalg.norm(xhat, axis=1)
    return {
        "tokens": len(x),
        "fvu": fvu,
        "explained_variance": 1 - fvu,
        "mse": np.mean(np.concatenate(squares)),
        "l0": np.mean(np.sum(code > 0, axis=1)),
        "l1": np.mean(np.sum(code, axis=1)),
        "cossim": np.mean(np.sum(x * xhat, axis=1) / np.maximum(norms * norms_rebuilt, 1e-8)),
        "l2_ratio": np.mean(norms_rebuilt / norms),
        "relative_reconstruction_bias": np.mean(norms_rebuilt**2) / np.mean(np.sum(x * xhat, axis=1)),
        "frac_alive": np.mean(rate > 0),
        "dead_fraction": np.mean(rate == 0),
        "dense_fraction_1_percent": np.mean(rate > 0.01),
        "dense_fraction": np.mean(rate > 0.1),
        "explained_variance_legacy": np.mean(np.concatenate(legacy)),
        "frac_variance_explained": np.mean([1 - share for share in per_dimension]),
        "saebench_mse": np.mean(np.concatenate([square / len(square) for square in squares])),
        "saebench_explained_variance": 1 - np.mean([square.mean() for square in squares]) / (power - per_element**2),
    }


def _code(sae: SAEArrays, x: np.ndarray) -> np.ndarray:
    z = x @ sae.W_enc.T.astype(np.float64) + sae.b_enc
    order = np.argsort(-z, axis=1, kind="stable")[:, : sae.k]
    code = np.zeros_like(z)
    np.put_along_axis(code, order, np.maximum(np.take_along_axis(z, order, axis=1), 0), axis=1)
    return code
