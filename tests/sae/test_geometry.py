import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.sae import geometry
from qscope_jax.sae.arrays import SAEArrays
from qscope_jax.sae.geometry import code_geometry, largest_cosines
from qscope_jax.sae.layer_sae import from_arrays

F, D = 37, 8


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    W_enc, W_dec = (rng.standard_normal((F, D)).astype(np.float32) * rng.uniform(0.5, 2, (F, 1)).astype(np.float32) for _ in range(2))
    return SAEArrays(W_enc, W_dec, np.zeros(F, np.float32), np.zeros(D, np.float32), k=2)


def unit(rows):
    rows = rows.astype(np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def largest_other(rows):
    cosines = unit(rows) @ unit(rows).T
    np.fill_diagonal(cosines, -1)
    return cosines.max(axis=1)


@pytest.mark.parametrize("elements", [1, 10 * F, 12 * F, 2**24])
def test_the_geometry_equals_float64_whatever_the_blocks(arrays, monkeypatch, elements):
    monkeypatch.setattr(geometry, "_BLOCK_ELEMENTS", elements)
    found = code_geometry(from_arrays(arrays, 0).autoencoder)
    np.testing.assert_allclose(found.decoder_max_cosine_F, largest_other(arrays.W_dec), atol=1e-6)
    np.testing.assert_allclose(found.encoder_max_cosine_F, largest_other(arrays.W_enc), atol=1e-6)
    np.testing.assert_allclose(found.encoder_decoder_cosine_F, np.sum(unit(arrays.W_enc) * unit(arrays.W_dec), axis=1), atol=1e-6)
    np.testing.assert_allclose(found.decoder_norm_F, np.linalg.norm(arrays.W_dec, axis=1), rtol=1e-6)
    np.testing.assert_allclose(found.encoder_norm_F, np.linalg.norm(arrays.W_enc, axis=1), rtol=1e-6)
    summary = found.summary()
    assert summary["decoder_max_cosine"] == pytest.approx(largest_other(arrays.W_dec).mean(), abs=1e-6)
    norms = np.linalg.norm(arrays.W_dec, axis=1)
    assert (summary["decoder_norm_min"], summary["decoder_norm"], summary["decoder_norm_max"]) == pytest.approx(
        (norms.min(), norms.mean(), norms.max()), rel=1e-6
    )


def test_no_program_holds_all_pairs_of_features(arrays, monkeypatch):
    monkeypatch.setattr(geometry, "_BLOCK_ELEMENTS", 4 * F)
    shapes = []
    whole = geometry._block_cosines

    def watched(rows, among, start, size, other):
        shapes.append((size, among.shape[0]))
        return whole(rows, among, start, size, other)

    monkeypatch.setattr(geometry, "_block_cosines", watched)
    code_geometry(from_arrays(arrays, 0).autoencoder)
    assert set(shapes) == {(4, F)} and len(shapes) == 2 * -(-F // 4)


def test_opposite_rows_are_no_duplicates_and_rows_of_zeros_are_like_none():
    rows = jnp.asarray([[1.0, 0], [-2, 0], [0, 0], [3, 0.0]])
    assert largest_cosines(rows, rows, other=True).tolist() == [1, 0, 0, 1]
    assert largest_cosines(rows[:1], rows[:1], other=True).tolist() == [-1]
    assert largest_cosines(rows[:3], rows).tolist() == [1, 1, 0]
