import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.demo.chapters import sentence
from qscope_jax.features.readout import read_features
from qscope_jax.sae.autoencoder import SparseAutoencoder
from qscope_jax.sae.layer_sae import LayerSAE


@pytest.fixture
def read(tour):
    """The tour with two random SAEs, and what they make of its sentence."""
    rng = np.random.default_rng(0)
    W = [jnp.asarray(rng.standard_normal((64, 32)), jnp.float32) for _ in range(2)]
    tour.saes = [LayerSAE(SparseAutoencoder(w, w, jnp.zeros(64), jnp.zeros(32), k=4), layer, {}) for layer, w in enumerate(W)]
    return tour, read_features(tour.model, tour.saes, [tour.sentence])


def test_each_layer_shows_its_features_of_highest_mean_without_the_first_token(read):
    tour, readouts = read
    chapter = sentence.run(tour)
    for layer, readout in readouts.items():
        shown = chapter.data["strongest"][layer]
        assert [(item["feature"], item["mean"]) for item in shown] == list(readout.top(0, 3, by="mean"))
        for item in shown:
            np.testing.assert_array_equal(item["activations"], readout.activation(0, item["feature"]))
            assert item["mean"] == pytest.approx(np.mean(item["activations"][1:]), rel=1e-5)
    assert "".join(chapter.data["tokens"]) == tour.sentence and not chapter.checks


def test_a_sentence_of_one_token_is_told_without_a_peak(read):
    tour, _ = read
    tour.sentence = "."
    chapter = sentence.run(tour)
    assert len(chapter.data["tokens"]) == 1 and "strongest feature" not in chapter.summary
