import json

import ml_dtypes
import numpy as np
import pytest

from qscope_jax.errors import ShapeError, SourceError
from qscope_jax.models import safetensors_file
from qscope_jax.models.safetensors_file import TensorEntry, read_header, write_file

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16, np.float64, np.int64, np.int32, np.int16, np.int8, np.uint8, np.bool_]


def write(path, arrays: dict[str, np.ndarray]) -> None:
    write_file(path, [(name, array.shape, array.dtype) for name, array in arrays.items()], arrays.values())


def read(entry: TensorEntry, dtype=None) -> np.ndarray:
    out = np.empty(entry.shape, dtype or entry.dtype)
    entry.read_rows(out)
    return out


def write_raw(path, header: object, data: bytes = b"\0" * 64, length: int | None = None) -> None:
    """A file with a header that need not fit the data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    made = {np.dtype(dtype).name: (generator.standard_normal((5, 3, 2)) * 50).astype(dtype) for dtype in DTYPES}
    return made | {"scalar": np.float32(2.5).reshape(()), "empty": np.zeros((0, 4), np.float32), "transposed": np.arange(6.0).reshape(2, 3).T}


def test_every_dtype_and_shape_comes_back_as_written(tmp_path, arrays):
    write(tmp_path / "a.safetensors", arrays)
    entries = read_header(tmp_path / "a.safetensors")
    assert list(entries) == list(arrays)
    for name, array in arrays.items():
        assert entries[name].dtype == array.dtype and entries[name].shape == array.shape
        assert read(entries[name]).tobytes() == array.tobytes()


def test_the_safetensors_package_reads_what_is_written_and_the_reverse(tmp_path, arrays):
    from safetensors.numpy import load_file, save_file

    write(tmp_path / "ours.safetensors", arrays)
    theirs = load_file(tmp_path / "ours.safetensors")
    assert theirs.keys() == arrays.keys() and all(np.array_equal(theirs[name], array) for name, array in arrays.items())
    save_file({name: np.ascontiguousarray(array).reshape(array.shape) for name, array in arrays.items()}, tmp_path / "theirs.safetensors")
    entries = read_header(tmp_path / "theirs.safetensors")
    assert all(np.array_equal(read(entries[name]), array) for name, array in arrays.items())


def test_rows_are_read_alone(tmp_path, arrays):
    write(tmp_path / "a.safetensors", arrays)
    for name in ("float32", "bfloat16"):
        out = np.empty((2, 3, 2), np.float32)
        read_header(tmp_path / "a.safetensors")[name].read_rows(out, 3)
        assert np.array_equal(out, arrays[name][3:].astype(np.float32))


def test_a_tensor_larger_than_a_block_is_read_and_cast_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_file, "_BLOCK", 64)
    array = np.random.default_rng(0).standard_normal((37, 5)).astype(np.float32)
    write(tmp_path / "a.safetensors", {"x": array})
    entry = read_header(tmp_path / "a.safetensors")["x"]
    assert np.array_equal(read(entry), array)
    assert np.array_equal(read(entry, ml_dtypes.bfloat16), array.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_a_value_that_is_not_finite_is_refused(tmp_path, dtype, value):
    array = np.ones((9, 7), dtype)
    array[8, 6] = value
    write(tmp_path / "a.safetensors", {"x": array})
    with pytest.raises(ShapeError, match="tensor x holds NaN or infinite values"):
        read(read_header(tmp_path / "a.safetensors")["x"])


def test_the_largest_finite_values_are_accepted(tmp_path):
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16, np.float64):
        largest = ml_dtypes.finfo(dtype).max
        array = np.asarray([largest, -largest, 0, -0.0], dtype)
        write(tmp_path / "a.safetensors", {"x": array})
        assert read(read_header(tmp_path / "a.safetensors")["x"]).tobytes() == array.tobytes()


def test_a_value_that_the_wanted_dtype_cannot_hold_is_refused(tmp_path):
    write(tmp_path / "a.safetensors", {"x": np.full(3, 1e5, np.float32)})
    entry = read_header(tmp_path / "a.safetensors")["x"]
    assert np.array_equal(read(entry, ml_dtypes.bfloat16), np.full(3, 1e5, ml_dtypes.bfloat16))
    with pytest.raises(ShapeError, match="tensor x holds values too large for float16; load it as float32"):
        read(entry, np.float16)


@pytest.mark.parametrize("cut", [1, 100, 160])
def test_a_file_cut_anywhere_is_refused(tmp_path, cut):
    path = tmp_path / "a.safetensors"
    write(path, {"x": np.ones(16, np.float32)})
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - cut])
    with pytest.raises(SourceError, match="truncated"):
        read_header(path)


def test_a_file_that_shrinks_after_its_header_was_read_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    write(path, {"x": np.ones(16, np.float32)})
    entry = read_header(path)["x"]
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(SourceError, match="ends inside tensor x; the file is truncated"):
        read(entry)
    path.unlink()
    with pytest.raises(SourceError, match="cannot be read .No such file"):
        read(entry)


def entry(dtype: object = "F32", shape: object = (4, 4), offsets: object = (0, 64)) -> dict[str, object]:
    return {"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{not json", "is not safetensors JSON"),
        (b"\xff\xfe", "is not safetensors JSON"),
        (b"[" * 100_000, "is not safetensors JSON"),
        ([1], "is not safetensors JSON"),
        ({"x": 1}, "the header entry of x is malformed"),
        ({"x": {"dtype": "F32"}}, "the header entry of x is malformed"),
        (entry(shape="44"), "the header entry of x is malformed"),
        (entry(shape=[4.0, 4.0]), "the header entry of x is malformed"),
        (entry(offsets=[0]), "the header entry of x is malformed"),
        (entry(offsets=["0", "64"]), "the header entry of x is malformed"),
        (entry(dtype=["F32"]), "the header entry of x is malformed"),
        (entry(dtype="F8_E4M3"), "tensor x has dtype F8_E4M3; readable are"),
        (entry(shape=[4, 5]), "declares shape .4, 5. but 64 bytes"),
        (entry(shape=[-4, -4]), "declares shape"),
        (entry(shape=[2**32, 2**32], offsets=[0, 0]), "declares shape"),
        (entry(offsets=[-64, 0]), "declares shape"),
        (entry(offsets=[64, 128]), "the file is truncated"),
    ],
)
def test_a_damaged_header_is_a_source_error(tmp_path, header, message):
    write_raw(tmp_path / "a.safetensors", header)
    with pytest.raises(SourceError, match=message) as caught:
        read_header(tmp_path / "a.safetensors")
    assert "\n" not in str(caught.value)


def test_a_header_longer_than_the_file_is_not_read(tmp_path):
    write_raw(tmp_path / "a.safetensors", entry(), length=2**60)
    with pytest.raises(SourceError, match="cannot hold a safetensors header"):
        read_header(tmp_path / "a.safetensors")


def test_an_empty_or_missing_file_is_a_source_error(tmp_path):
    (tmp_path / "empty").touch()
    with pytest.raises(SourceError, match="0 bytes cannot hold"):
        read_header(tmp_path / "empty")
    with pytest.raises(SourceError, match="cannot be read .No such file"):
        read_header(tmp_path / "missing")


def test_a_write_that_fails_leaves_nothing_behind(tmp_path):
    def data():
        yield np.ones(4, np.float32)
        raise RuntimeError("the device is gone")

    with pytest.raises(RuntimeError):
        write_file(tmp_path / "a.safetensors", [("x", (4,), np.dtype(np.float32)), ("y", (4,), np.dtype(np.float32))], data())
    with pytest.raises(ValueError, match="wrote .* bytes, expected"):
        write_file(tmp_path / "a.safetensors", [("x", (4,), np.dtype(np.float32))], [np.ones(3, np.float32)])
    assert list(tmp_path.iterdir()) == []
