"""Readouts written by hand, and a small model that reads characters with random SAEs on it."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.features.readout import Readout
from qscope_jax.models.decoder import Decoder
from qscope_jax.models.language_model import LanguageModel
from qscope_jax.sae.autoencoder import SparseAutoencoder
from qscope_jax.sae.layer_sae import LayerSAE

F, K = 24, 4


@pytest.fixture(scope="session")
def readout_of() -> Callable[..., Readout]:
    """Factory of readouts from the activations of each text, written as rows of tokens by features; the first token does not count."""

    def make(*texts: Sequence[Sequence[float]], layer: int = 0, counted: Sequence[Sequence[bool]] | None = None) -> Readout:
        dense = [np.asarray(text, np.float32) for text in texts]
        # Strongest first, as a code comes; features that do not fire fill the last slots with a 0.
        order = [np.argsort(-a, axis=1, kind="stable") for a in dense]
        kept = [np.arange(len(a)) > 0 for a in dense] if counted is None else [np.asarray(row) for row in counted]
        return Readout(
            layer=layer,
            num_features=dense[0].shape[1],
            texts=tuple(f"text {i}" for i in range(len(dense))),
            token_ids=tuple(tuple(range(len(a))) for a in dense),
            values=tuple(np.take_along_axis(a, o, axis=1) for a, o in zip(dense, order, strict=True)),
            indices=tuple(order),
            norms=tuple(np.ones(len(a), np.float32) for a in dense),
            counted=tuple(kept),
        )

    return make


class CharacterTokenizer:
    """A character is a token."""

    def __call__(self, texts: list[str], add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(character) - 30 for character in text] for text in texts]}

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(chr(i + 30) for i in ids)

    def batch_decode(self, rows: list[list[int]], skip_special_tokens: bool = False) -> list[str]:
        return [self.decode(row) for row in rows]


@pytest.fixture(scope="session")
def character_model(tiny_config) -> LanguageModel:
    """Three layers, 32 wide, weights large enough for streams and logits to differ between tokens; `~` is an outlier of the norm."""
    decoder = jax.jit(lambda key: _sharpened(Decoder(tiny_config(), key)))(jax.random.key(0))
    return LanguageModel(decoder, tokenizer=CharacterTokenizer())


@pytest.fixture(scope="session")
def saes() -> list[LayerSAE]:
    """An SAE with random weights for each of the three layers."""
    return [_random_sae(layer) for layer in range(3)]


def _sharpened(decoder: Decoder) -> Decoder:
    def sharpen(path, w: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path)
        w = w if "norm" in name else 10 * w
        return w.at[ord("~") - 30].multiply(1000) if "embedding" in name else w

    return jax.tree_util.tree_map_with_path(sharpen, decoder)


def _random_sae(layer: int) -> LayerSAE:
    rng = np.random.default_rng(layer)
    W_enc, W_dec, b_enc, b_dec = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((F, 32), (F, 32), (F,), (32,)))
    return LayerSAE(SparseAutoencoder(W_enc, W_dec, b_enc, b_dec, k=K), layer)
