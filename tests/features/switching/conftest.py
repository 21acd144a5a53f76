"""A model whose residual stream is known: every layer adds nothing, so that it is the token's embedding throughout."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.features.switching.code_switching import Response
from qscope_jax.models.decoder import Decoder
from qscope_jax.models.language_model import LanguageModel

D, V = 32, 97


def planted_embedding() -> np.ndarray:
    """Dimension 0 says how near a switch is: the digit itself, 10 for Latin letters, 0 for what is neither. Dimension 1 is 1 throughout."""
    table = np.zeros((V, D), np.float32)
    table[:, 1] = 1
    for token in range(V):
        character = chr(token + 30)
        table[token, 0] = int(character) if character.isdecimal() else 10 * character.isalpha()
    return table


def planted_head() -> np.ndarray:
    """Latin letters are likely where dimension 0 is large, all else where dimension 1 is."""
    letters = np.array([chr(token + 30).isalpha() for token in range(V)])
    table = np.zeros((V, D), np.float32)
    table[letters, 0], table[~letters, 1] = 1.5, 2.0
    return table


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
