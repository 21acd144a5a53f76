"""Texts of three made languages for the character model, SAEs in which one language has a feature of its own, and a model whose stream is known."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.features.switching.code_switching import Response
from qscope_jax.features.switching.language_corpus import CorpusConfig
from qscope_jax.models.decoder import Decoder
from qscope_jax.models.language_model import LanguageModel
from qscope_jax.sae.autoencoder import SparseAutoencoder
from qscope_jax.sae.layer_sae import LayerSAE
from tests.features.switching.planted import planted_embedding, planted_head

PLANTED = {1: 9, 2: 4}
"""The feature of language `zh` at each layer."""


@pytest.fixture(scope="session")
def corpus() -> dict[str, list[str]]:
    """Languages of unequal size, each of letters of its own; some texts are longer than 16 tokens, one holds an outlier of the norm."""
    rng = np.random.default_rng(5)
    letters = {"en": "abcdefgh", "zh": "QRSTUVWX", "ru": "01234567"}
    lengths = {"en": [9, 20, 12], "zh": [5, 16, 7, 18], "ru": [30, 6]}
    texts = {code: ["".join(rng.choice(list(letters[code]), size)) for size in lengths[code]] for code in letters}
    texts["en"][0] = texts["en"][0][:4] + "~" + texts["en"][0][5:]
    return texts


@pytest.fixture(scope="session")
def few() -> CorpusConfig:
    """A handful of tokens is enough, batches are small."""
    return CorpusConfig(batch_tokens=200, min_tokens=10)


@pytest.fixture(scope="session")
def language_saes(character_model, saes, corpus) -> list[LayerSAE]:
    """SAEs of layers 1 and 2 with random weights, but for a feature of each that reads what tokens of `zh` have and others lack."""
    return [_planted(character_model, saes[layer], corpus, feature) for layer, feature in PLANTED.items()]


@pytest.fixture(scope="session")
def planted_model(tiny_config, character_model) -> LanguageModel:
    """A model in which every layer adds nothing, so that the residual stream is the token's embedding throughout."""

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


def _planted(model, sae: LayerSAE, corpus, feature: int) -> LayerSAE:
    inner = sae.autoencoder
    parts = [(code, np.asarray(model.residuals([text], [sae.layer]).values[0, 0, 1 : len(text)])) for code, texts in corpus.items() for text in texts]
    x = np.concatenate([streams for _, streams in parts]).astype(np.float64)
    own = np.concatenate([np.full(len(streams), code == "zh") for code, streams in parts])
    x, own = x[(usual := np.linalg.norm(x, axis=1) < 1e3)], own[usual]
    weights = np.linalg.lstsq(np.c_[x, np.ones(len(x))], np.where(own, 1.0, -1.0), rcond=None)[0]
    scale = 3 * np.std(x @ np.asarray(inner.W_enc[...]).T)
    W, b = np.asarray(inner.W_enc[...]).copy(), np.asarray(inner.b_enc[...]).copy()
    less = sae.layer == 2  # one of each kind
    W[feature], b[feature] = scale * weights[:-1], scale * (weights[-1] + less * weights[:-1] @ np.asarray(inner.b_dec[...]))
    changed = SparseAutoencoder(jnp.asarray(W), inner.W_dec[...], jnp.asarray(b), inner.b_dec[...], k=inner.k, apply_b_dec_to_input=less)
    return LayerSAE(changed, sae.layer, {"source": "made"})
