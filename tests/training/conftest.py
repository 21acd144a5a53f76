"""The small model that reads characters, and streams of tokens and activations made with it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from qscope_jax.data.batches import BatchConfig
from qscope_jax.models.language_model import LanguageModel
from qscope_jax.training.activation_cache import CacheConfig, cache_activations
from qscope_jax.training.tokens import TokenStream
from tests.training import characters


@pytest.fixture(scope="session")
def model() -> LanguageModel:
    """See `characters.make_model`."""
    return characters.make_model()


@pytest.fixture(scope="session")
def documents() -> Callable[..., list[str]]:
    """See `characters.make_documents`."""
    return characters.make_documents


@pytest.fixture(scope="session")
def token_stream(documents) -> Callable[..., TokenStream]:
    """Factory of streams of 4 packed rows of 24 tokens; keywords are those of `BatchConfig`."""
    return lambda texts=None, **settings: TokenStream(documents() if texts is None else texts, characters.codes, BatchConfig(4, 24, **settings))


@pytest.fixture(scope="session")
def cache(model, token_stream, tmp_path_factory) -> Path:
    """Folder of the activations of both layers at 1,000 tokens, in shards of 300."""
    folder = tmp_path_factory.mktemp("activations") / "cache"
    cache_activations(model, token_stream(epochs=1), CacheConfig((0, 1), max_tokens=1000, shard_tokens=300), folder)
    return folder
