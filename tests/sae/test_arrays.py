import ml_dtypes
import numpy as np
import pytest

from qscope_jax.errors import ArchitectureError, InputError, ShapeError, SourceError
from qscope_jax.sae import arrays as module
from qscope_jax.sae.arrays import SAEArrays, check_floating, decoder_rows_are_unit, row_blocks

F, D = 6, 4


def sae(**changes) -> SAEArrays:
    fields = {"W_enc": np.ones((F, D)), "W_dec": np.ones((F, D)), "b_enc": np.ones(F), "b_dec": np.ones(D), "k": 2, **changes}
    return SAEArrays(**fields)


@pytest.mark.parametrize("changes", [{}, {"k": F}, {"activation": "jumprelu", "threshold": np.zeros(F), "k": 0}])
def test_arrays_that_fit_are_accepted(changes):
    assert sae(**changes).validate("x") is None


def test_sizes_are_those_of_the_encoder():
    assert (sae().num_features, sae().d_model) == (F, D)
    assert list(sae().tensors()) == ["W_enc", "W_dec", "b_enc", "b_dec"]


@pytest.mark.parametrize(
    "name, shape",
    [
        ("W_enc", (F, D, 1)),
        ("W_enc", (0, D)),
        ("W_dec", (D, F)),
        ("W_dec", (F, D, 1)),
        ("b_enc", (D,)),
        ("b_dec", (F,)),
        ("b_dec", ()),
        ("threshold", (1,)),
    ],
)
def test_a_shape_that_disagrees_is_named(name, shape):
    with pytest.raises(ShapeError, match=f"somewhere: {name} has shape"):
        sae(**{name: np.ones(shape)}).validate("somewhere")


@pytest.mark.parametrize("activation", ["jumprelu", "batch_topk"])
def test_a_missing_threshold_is_a_shape_error(activation):
    with pytest.raises(ShapeError, match="needs a threshold"):
        sae(activation=activation).validate("x")


def test_unknown_activations_and_impossible_k_are_refused():
    with pytest.raises(ArchitectureError, match="'softmax'"):
        sae(activation="softmax").validate("x")
    for k in (0, -1, F + 1):
        with pytest.raises(InputError, match=f"k is {k}"):
            sae(k=k).validate("x")


@pytest.mark.parametrize("dtype", ["f8", "f4", "f2", ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_value_that_is_not_finite_is_found_in_any_block(dtype, value, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK_BYTES", 64)
    array = np.ones((50, 5), dtype)
    check_floating("W_enc", array, "x.pt")
    array[37, 2] = value
    with pytest.raises(SourceError, match=r"x\.pt: tensor W_enc holds NaN or infinite"):
        check_floating("W_enc", array, "x.pt")


def test_tensors_of_whole_numbers_are_refused():
    with pytest.raises(SourceError, match="b_enc is int32"):
        check_floating("b_enc", np.ones(3, np.int32), "x.pt")


def test_unit_rows_are_measured_in_every_block(monkeypatch):
    monkeypatch.setattr(module, "_BLOCK_BYTES", 64)
    W_dec_FD = np.random.default_rng(0).standard_normal((50, 8)).astype(np.float32)
    assert not decoder_rows_are_unit(W_dec_FD)
    W_dec_FD /= np.linalg.norm(W_dec_FD, axis=1, keepdims=True)
    assert decoder_rows_are_unit(W_dec_FD)
    assert decoder_rows_are_unit(W_dec_FD.astype(np.float64)) and not decoder_rows_are_unit(np.zeros((1, 3)))
    W_dec_FD[49] *= 1.01
    assert not decoder_rows_are_unit(W_dec_FD)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (1,), (7,), (1000, 3), (3, 10_000)])
def test_blocks_cover_an_array_once(shape, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK_BYTES", 256)
    array = np.arange(np.prod(shape)).reshape(shape)
    pieces = [array[block] for block in row_blocks(array)]
    assert sum(map(len, pieces)) == len(array) if array.size else not pieces
    assert all(piece.nbytes <= max(256, array[:1].nbytes) for piece in pieces)
    if pieces:
        np.testing.assert_array_equal(np.concatenate(pieces), array)
