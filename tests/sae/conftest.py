"""A small model that reads characters, for everything that needs residual streams."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.models.decoder import Decoder
from qscope_jax.models.language_model import LanguageModel


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
