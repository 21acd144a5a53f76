"""The tour's random model with two random SAEs, as if they had been trained."""

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.demo.tour import Tour
from qscope_jax.sae.autoencoder import SparseAutoencoder
from qscope_jax.sae.layer_sae import LayerSAE


@pytest.fixture(scope="module")
def with_saes(shrink) -> Iterator[Tour]:
    """The tour after a training; a module's tests share it."""
    with pytest.MonkeyPatch.context() as patch:
        tour = shrink(patch)
        rng = np.random.default_rng(0)
        W = [jnp.asarray(rng.standard_normal((64, 32)), jnp.float32) for _ in range(2)]
        tour.saes = [LayerSAE(SparseAutoencoder(w, w, jnp.zeros(64), jnp.zeros(32), k=4), layer, {}) for layer, w in enumerate(W)]
        tour.alive = {layer: np.ones(64, bool) for layer in (0, 1)}
        yield tour
