import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.errors import ConfigError
from qscope_jax.features.store import dictionary_facts as module
from qscope_jax.features.store.dictionary_facts import dictionary_facts


def expected(model, sae, entries):
    """In float64, without blocks."""
    directions = np.asarray(sae.autoencoder.W_dec[...], np.float64)
    decoder = model.decoder
    head = np.asarray((decoder.embedding if model.config.tie_embeddings else decoder.head)[...], np.float64)
    logits = directions * np.asarray(decoder.final_norm[...], np.float64) @ head.T
    unit = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -np.inf)
    return np.sort(logits, axis=1)[:, ::-1], np.sort(cosines, axis=1)[:, ::-1], logits, cosines


@pytest.mark.parametrize("block", [2**24, 5 * 200])
def test_tokens_and_neighbours_are_those_of_a_plain_computation(character_model, saes, block, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", block)
    found = dictionary_facts(character_model, saes[0], entries=4)
    by_logit, by_cosine, logits, cosines = expected(character_model, saes[0], 4)
    scale = np.abs(logits).max()
    np.testing.assert_allclose(found.promoted_logits, by_logit[:, :4], atol=1e-5 * scale)
    np.testing.assert_allclose(found.suppressed_logits, by_logit[:, :-5:-1], atol=1e-5 * scale)
    np.testing.assert_allclose(found.cosines, by_cosine[:, :4], atol=1e-5)
    rows = np.arange(24)[:, None]
    np.testing.assert_allclose(logits[rows, found.promoted], found.promoted_logits, atol=1e-5 * scale)
    np.testing.assert_allclose(logits[rows, found.suppressed], found.suppressed_logits, atol=1e-5 * scale)
    np.testing.assert_allclose(cosines[rows, found.neighbours], found.cosines, atol=1e-5)


def test_the_direction_moves_the_logits_by_what_is_said(character_model, saes):
    """A stream of unit root mean square, moved a little along the direction, through the model's own final norm and head."""
    found = dictionary_facts(character_model, saes[0], entries=3)
    model, step, feature = character_model, 1e-3, 7
    direction = np.asarray(saes[0].autoencoder.W_dec[...], np.float64)[feature]
    x = np.random.default_rng(0).standard_normal(32)
    x -= (x @ direction) / (direction @ direction) * direction  # along the direction the norm itself would move
    x /= np.sqrt(np.mean(x**2))

    def logits(stream):
        normed = stream / np.sqrt(np.mean(stream**2) + model.config.norm_eps) * np.asarray(model.decoder.final_norm[...])
        table = model.decoder.embedding if model.config.tie_embeddings else model.decoder.head
        return normed @ np.asarray(table[...], np.float64).T

    change = (logits(x + step * direction) - logits(x - step * direction)) / (2 * step)
    np.testing.assert_allclose(change[found.promoted[feature]], found.promoted_logits[feature], rtol=1e-3)


def test_more_entries_than_there_are_give_what_there_is(character_model, saes):
    found = dictionary_facts(character_model, saes[0], entries=10_000)
    assert found.promoted.shape == (24, character_model.config.vocab_size) and found.neighbours.shape == (24, 23)
    assert jnp.all(jnp.asarray(found.neighbours) != jnp.arange(24)[:, None])
    with pytest.raises(ConfigError, match="entries is 0"):
        dictionary_facts(character_model, saes[0], entries=0)
