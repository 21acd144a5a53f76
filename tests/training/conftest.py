"""A small model that reads characters, its documents, and the token streams made of them."""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.data.batches import BatchConfig
from qscope_jax.models.decoder import Decoder
from qscope_jax.models.language_model import LanguageModel
from qscope_jax.training.activation_cache import CacheConfig, cache_activations
from qscope_jax.training.tokens import TokenStream

OUTLIER = "~"


@pytest.fixture(scope="session")
def model(tiny_config) -> LanguageModel:
    """Two layers, 32 wide; a character is a token, and one of them has a stream hundreds of times as large as the others."""
    rng = np.random.default_rng(0)

    def draw(path, leaf) -> jax.Array:
        name = jax.tree_util.keystr(path)
        weights = np.ones(leaf.shape) if "norm" in name else 0.2 * rng.standard_normal(leaf.shape)
        if "embedding" in name:
            weights[_characters(OUTLIER)] *= 500
        return jnp.asarray(weights, leaf.dtype)

    decoder = jax.tree_util.tree_map_with_path(draw, jax.eval_shape(lambda: Decoder(tiny_config(2), jax.random.key(0))))
    return LanguageModel(decoder, tokenizer=lambda texts, add_special_tokens: {"input_ids": [_characters(text) for text in texts]})


@pytest.fixture(scope="session")
def documents() -> Callable[..., list[str]]:
    """Factory of documents of `shortest` to 20 random characters, some of which hold the outlier."""

    def make(count: int = 200, seed: int = 0, shortest: int = 3) -> list[str]:
        rng = np.random.default_rng(seed)
        texts = ["".join(map(chr, rng.integers(33, 126, rng.integers(shortest, 21)))) for _ in range(count)]
        return [text[:2] + OUTLIER + text[3:] if index % 3 == 0 else text for index, text in enumerate(texts)]

    return make


@pytest.fixture(scope="session")
def token_stream(documents) -> Callable[..., TokenStream]:
    """Factory of streams of 4 packed rows of 24 tokens; keywords are those of `BatchConfig`."""
    return lambda texts=None, **settings: TokenStream(documents() if texts is None else texts, _characters, BatchConfig(4, 24, **settings))


@pytest.fixture(scope="session")
def cache(model, token_stream, tmp_path_factory) -> Path:
    """Folder of the activations of both layers at 1,000 tokens, in shards of 300."""
    folder = tmp_path_factory.mktemp("activations") / "cache"
    cache_activations(model, token_stream(epochs=1), CacheConfig((0, 1), max_tokens=1000, shard_tokens=300), folder)
    return folder


def _characters(text: str) -> list[int]:
    return [ord(character) - 30 for character in text]
