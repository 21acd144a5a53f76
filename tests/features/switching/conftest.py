"""A model whose residual stream is known: every layer adds nothing, so that it is the token's embedding throughout."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest

from qscope_jax.features.switching.code_switching import Response
from qscope_jax.models.decoder import Decoder
from qscope_jax.models.language_model import LanguageModel
from tests.features.switching.planted import planted_embedding, planted_head


@pytest.fixture(scope="session")
def planted_model(tiny_config, character_model) -> LanguageModel:
    def plant(path, leaf) -> jax.Array:
        name = jax.tree_util.keystr(path)
        if "embedding" in name or "head" in name:
            return jnp.asarray(planted_embedding() if "embedding" in name else planted_head())
        return jnp.full(leaf.shape, 1.0 if "norm" in name else 0.0, leaf.dtype)

    shape = jax.eval_shape(lambda: Decoder(tiny_config(tie_embeddings=False), jax.random.key(0)))
    return LanguageModel(jax.tree_util.tree_map_with_path(plant, shape), tokenizer=character_model.tokenizer)


@pytest.fixture(scope="session")
def answered(character_model) -> Callable[..., list[Response]]:
    """Factory of answers from (prompt, text) pairs, in one language unless another is named as the third."""

    def make(*pairs: tuple) -> list[Response]:
        return [
            Response(prompt, sample, text, *(language or ["th"]), "", tuple(character_model.tokenize([text])[0]), stopped=False)
            for sample, (prompt, text, *language) in enumerate(pairs)
        ]

    return make
