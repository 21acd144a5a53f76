import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.models.language_model import forward, load_model


def assert_close(got, expected, tolerance):
    """Largest difference, as a share of the largest magnitude."""
    expected = np.asarray(expected)
    assert np.abs(np.asarray(got) - expected).max() <= tolerance * np.abs(expected).max()

@pytest.mark.parametrize("scan", [True, False])
def test_every_layer_and_the_logits_equal_those_of_transformers(reference, scan):
    model = load_model(reference.folder, scan=scan)
    logits, residuals = reference.outputs
    out = forward(model.decoder, reference.tokens, np.ones_like(reference.tokens), taps=jnp.arange(3, dtype=jnp.int32))
    for layer in range(3):
        assert_close(out.residuals[layer], residuals[layer], 1e-4)
        print(np.abs(np.asarray(out.residuals[layer])-residuals[layer]).max()/np.abs(residuals[layer]).max())
    assert_close(out.logits, logits, 1e-4)
