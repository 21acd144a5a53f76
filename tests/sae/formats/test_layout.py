import numpy as np
import pytest

from qscope_jax.errors import ShapeError, SourceError
from qscope_jax.sae.formats.layout import Layout, transposed

LAYOUT = Layout(
    "toy",
    {"W_enc": "enc", "W_dec": "dec", "b_enc": "be", "b_dec": "bd", "k": "k"},
    frozenset({"W_dec"}),
    optional=frozenset({"k"}),
    ignored=frozenset({"step"}),
)


def file(F=5, D=3, **changes):
    rng = np.random.default_rng(0)
    made = {"enc": rng.standard_normal((F, D)), "dec": rng.standard_normal((D, F)), "be": rng.standard_normal(F), "bd": rng.standard_normal(D)}
    return {name: array for name, array in {**made, **changes}.items() if array is not None}


def test_put_undoes_take():
    content = file(k=np.array(2))
    taken = LAYOUT.take(content, "x")
    assert taken["W_dec"].shape == (5, 3) and taken["W_dec"].flags.c_contiguous and taken["W_enc"] is content["enc"]
    back = LAYOUT.put(taken)
    assert list(back) == ["enc", "dec", "be", "bd", "k"]
    for name, array in content.items():
        np.testing.assert_array_equal(back[name], array)


def test_orientation_follows_the_format_where_shapes_do_not_tell():
    content = file(4, 4)
    np.testing.assert_array_equal(LAYOUT.take(content, "x")["W_dec"], content["dec"].T)
    np.testing.assert_array_equal(LAYOUT.take(content, "x")["W_enc"], content["enc"])


def test_ignored_tensors_may_be_of_any_kind_and_are_left_out():
    assert set(LAYOUT.take(file(step=np.array(["x"])), "x")) == {"W_enc", "W_dec", "b_enc", "b_dec"}


@pytest.mark.parametrize(
    "changes, error, found",
    [
        ({"be": None, "bd": None}, SourceError, "x: lacks bd, be; a toy file has bd, be, dec, enc and perhaps k"),
        ({"more": np.ones(1), "be": None}, SourceError, "lacks be and also holds more"),
        ({"dec": np.ones((5, 3))}, ShapeError, r"found enc \(5, 3\), dec \(5, 3\), .*; expected enc \[F, D\], dec \[D, F\]"),
        ({"k": np.ones(1, np.int32)}, ShapeError, r"k \[\]"),
        ({"k": np.array(1.0)}, SourceError, "tensor k is float64, expected a whole number"),
        ({"enc": np.ones((5, 3), np.int32)}, SourceError, "tensor enc is int32"),
        ({"bd": np.array([0, np.inf, 0])}, SourceError, "tensor bd holds NaN or infinite"),
        ({"enc": np.ones((0, 3)), "dec": np.ones((3, 0)), "be": np.ones(0)}, ShapeError, "none empty"),
        ({"enc": np.ones(3)}, ShapeError, "expected enc"),
    ],
)
def test_what_does_not_fit_is_named(changes, error, found):
    with pytest.raises(error, match=found):
        LAYOUT.take(file(**changes), "x")


def test_blocks_of_a_transposition_fit_together(monkeypatch):
    monkeypatch.setattr("qscope_jax.sae.arrays._BLOCK_BYTES", 100)
    matrix = np.random.default_rng(0).standard_normal((17, 11))
    np.testing.assert_array_equal(transposed(matrix), matrix.T)
    assert transposed(np.asfortranarray(matrix)).base is not None
