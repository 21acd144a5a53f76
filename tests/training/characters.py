"""A small model that reads characters, and its documents, also for programs that tests start."""

import jax
import jax.numpy as jnp
import numpy as np

from qscope_jax.models.decoder import Decoder
from qscope_jax.models.language_model import LanguageModel
from qscope_jax.parallel.mesh import make_mesh
from qscope_jax.parallel.rules import leaf_name, parameter_sharding
from tests.small_config import small_config

OUTLIER = "~"


def make_model(axes: str = "") -> LanguageModel:
    """Two layers, 32 wide; a character is a token, and one of them has a stream hundreds of times as large as the others."""
    rng, mesh = np.random.default_rng(0), make_mesh(axes)

    def draw(path, leaf) -> jax.Array:
        name = jax.tree_util.keystr(path)
        weights = np.ones(leaf.shape) if "norm" in name else 0.2 * rng.standard_normal(leaf.shape)
        if "embedding" in name:
            weights[codes(OUTLIER)] *= 500
        place = parameter_sharding(leaf_name(path), leaf.shape, mesh)
        return jax.make_array_from_callback(leaf.shape, place, lambda index: jnp.asarray(weights[index], leaf.dtype))

    decoder = jax.tree_util.tree_map_with_path(draw, jax.eval_shape(lambda: Decoder(small_config(2), jax.random.key(0))))
    return LanguageModel(decoder, mesh=mesh, tokenizer=lambda texts, add_special_tokens: {"input_ids": [codes(text) for text in texts]})


def make_documents(count: int = 200, seed: int = 0, shortest: int = 3) -> list[str]:
    """Documents of `shortest` to 20 random characters, some of which hold the outlier."""
    rng = np.random.default_rng(seed)
    texts = ["".join(map(chr, rng.integers(33, 126, rng.integers(shortest, 21)))) for _ in range(count)]
    return [text[:2] + OUTLIER + text[3:] if index % 3 == 0 else text for index, text in enumerate(texts)]


def codes(text: str) -> list[int]:
    """Tokens of a text."""
    return [ord(character) - 30 for character in text]
