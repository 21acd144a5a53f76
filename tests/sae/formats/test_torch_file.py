import io
import os
import pickle
import random
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from collections import OrderedDict

import ml_dtypes
import numpy as np
import pytest
import torch

from qscope_jax.errors import InputError, QscopeError, SourceError, UnsafeFileError
from qscope_jax.sae.formats.torch_file import read_torch_file, torch_file_kinds, write_torch_file
from qscope_jax.sae.formats.torch_pickle import STORAGES, Storage, TensorRecord, emit_pickle

GENERATOR = np.random.default_rng(0)


def numbers(*shape, dtype="f4"):
    return (GENERATOR.standard_normal(shape) * 50).astype(dtype)


def mapped_in(array) -> np.memmap | None:
    while array is not None and not isinstance(array, np.memmap):
        array = array.base
    return array


def assert_same(array: np.ndarray, tensor: torch.Tensor):
    expected = tensor.detach()
    assert array.shape == tuple(expected.shape)
    if array.size:
        assert array.strides == tuple(step * array.itemsize for step in expected.stride())
    if expected.dtype == torch.bfloat16:
        assert array.dtype == ml_dtypes.bfloat16
        array, expected = array.view(np.uint16), expected.view(torch.uint16)
    np.testing.assert_array_equal(array, expected.numpy(), strict=True)


def archive(path, pickled: bytes, extra=(), prefix="archive", method=zipfile.ZIP_STORED):
    """A .pt file around any pickle; `extra` are (name, bytes) entries."""
    with zipfile.ZipFile(path, "w", method) as out:
        for name, content in [("data.pkl", pickled), ("version", b"3\n"), *extra]:
            out.writestr(f"{prefix}/{name}", content)
    return path


def one_tensor(path, size, stride, offset=0, numel=6, data=bytes(24)):
    record = TensorRecord(Storage(np.dtype("<f4"), "0", numel), offset, size, stride)
    return archive(path, emit_pickle({"w": record}), [("data/0", data)])


TORCH_CASES = {
    "float32": lambda: {"w": torch.randn(5, 7), "b": torch.randn(5)},
    "bfloat16": lambda: {"w": torch.randn(5, 7).bfloat16()},
    "every element type": lambda: {
        str(index): (torch.rand(3, 2) * 100).to(dtype)
        for index, dtype in enumerate(
            [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
        )
    },
    "int32 scalar": lambda: {"k": torch.tensor(50, dtype=torch.int32)},
    "transposed": lambda: {"w": torch.randn(5, 7).T, "p": torch.randn(2, 3, 4).permute(2, 0, 1)},
    "offset and stepped views": lambda: {"v": torch.randn(10, 6)[3:9:2, 1:4], "row": torch.arange(12.0)[5:]},
    "shared storage": lambda: (lambda w: {"w": w, "same": w, "transposed": w.T, "row": w[2]})(torch.randn(4, 3)),
    "parameters": lambda: {"w": torch.nn.Parameter(torch.randn(3, 3))},
    "empty": lambda: {"w": torch.zeros(0, 3), "b": torch.zeros(0)},
    "no tensors": lambda: {},
    "ordered dict": lambda: OrderedDict(w=torch.randn(2)),
    "state dict": lambda: torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).state_dict(),
    "unicode names": lambda: {"größe.权重": torch.ones(2)},
}


@pytest.mark.parametrize("case", TORCH_CASES)
def test_what_torch_saves_is_read_to_the_bit(case, tmp_path):
    torch.manual_seed(0)
    saved = TORCH_CASES[case]()
    torch.save(saved, tmp_path / "größe.sae.pt")
    read = read_torch_file(tmp_path / "größe.sae.pt", verify=True)
    assert list(read) == list(saved)
    for name, tensor in saved.items():
        assert_same(read[name], tensor)


def test_a_file_renamed_or_saved_to_a_stream_is_read(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
    os.rename(tmp_path / "a.pt", tmp_path / "b.pt")
    stream = io.BytesIO()
    torch.save({"w": torch.ones(2)}, stream)
    (tmp_path / "c.pt").write_bytes(stream.getvalue())
    assert read_torch_file(tmp_path / "b.pt")["w"].tolist() == read_torch_file(tmp_path / "c.pt")["w"].tolist() == [1, 1]


WRITTEN = {
    "w": numbers(5, 7),
    "transposed": numbers(5, 7).T,
    "stepped": numbers(10, 6)[1::3, ::2],
    "bfloat16": numbers(3, 2).astype(ml_dtypes.bfloat16),
    "k": np.array(50, np.int32),
    "empty": np.zeros((0, 4), np.float32),
    "big endian": numbers(4).astype(">f4"),
    "read only": np.broadcast_to(np.float32(3), (2, 3)),
    **{f"as {dtype.name}": np.arange(5).astype(dtype) for dtype in STORAGES.values()},
}


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_loads_what_is_written_in_weights_only_mode(mmap, tmp_path):
    write_torch_file(tmp_path / "x.pt", WRITTEN)
    loaded = torch.load(tmp_path / "x.pt", weights_only=True, mmap=mmap)
    assert list(loaded) == list(WRITTEN)
    for name, array in WRITTEN.items():
        assert_same(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"), loaded[name])


def test_what_is_written_is_read_back_aligned_and_intact(tmp_path):
    write_torch_file(tmp_path / "x.pt", WRITTEN)
    read = read_torch_file(tmp_path / "x.pt", verify=True)
    for name, array in WRITTEN.items():
        np.testing.assert_array_equal(read[name], array.astype(array.dtype.newbyteorder("=")), strict=True)
        base = mapped_in(read[name])
        assert (read[name].ctypes.data - base.ctypes.data) % 64 == 0
    assert zipfile.ZipFile(tmp_path / "x.pt").testzip() is None


def test_the_same_tensors_give_the_same_bytes_under_any_name(tmp_path):
    write_torch_file(tmp_path / "a.pt", {"w": WRITTEN["w"]})
    write_torch_file(tmp_path / "b.pt", {"w": np.asfortranarray(WRITTEN["w"])})
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


def test_strided_arrays_larger_than_a_block_are_written_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr("qscope_jax.sae.formats.torch_file._WRITE_BLOCK_BYTES", 100)
    array = numbers(70, 9).T
    write_torch_file(tmp_path / "x.pt", {"w": array})
    np.testing.assert_array_equal(read_torch_file(tmp_path / "x.pt", verify=True)["w"], array)


def test_entries_beyond_32_bit_sizes_are_written_as_zip64(tmp_path, monkeypatch):
    monkeypatch.setattr("qscope_jax.sae.formats.torch_file._ZIP64_BYTES", 500)
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 700)
    array = numbers(30, 9)
    write_torch_file(tmp_path / "x.pt", {"w": array, "b": array[0]})
    np.testing.assert_array_equal(read_torch_file(tmp_path / "x.pt", verify=True)["w"], array)
    for mmap in (False, True):
        np.testing.assert_array_equal(torch.load(tmp_path / "x.pt", weights_only=True, mmap=mmap)["b"], array[0])


def test_a_failed_write_leaves_the_old_file(tmp_path):
    write_torch_file(tmp_path / "x.pt", {"w": np.ones(2, np.float32)})
    before = (tmp_path / "x.pt").read_bytes()
    for wrong in ({"w": np.ones(2, np.complex64)}, {"w": np.ones(2, np.uint16)}, {"w": np.array(["a"])}):
        with pytest.raises(InputError, match="x.pt"):
            write_torch_file(tmp_path / "x.pt", wrong)
    assert (tmp_path / "x.pt").read_bytes() == before
    assert os.listdir(tmp_path) == ["x.pt"]


def test_tensors_are_read_only_views_of_one_map(tmp_path):
    torch.save({"a": torch.randn(4, 3), "b": torch.randn(4, 3).T}, tmp_path / "x.pt")
    read = read_torch_file(tmp_path / "x.pt")
    maps = {id(mapped_in(array)) for array in read.values()}
    assert len(maps) == 1 and mapped_in(read["a"]).mode == "r"
    with pytest.raises(ValueError, match="read-only"):
        read["a"][0, 0] = 1


def sparse_file(path, num_bytes: int) -> None:
    """A .pt file that stores one tensor as a hole of `num_bytes` (zip64), by hand: writing it takes no disk."""
    record = TensorRecord(Storage(np.dtype("<f4"), "0", num_bytes // 4), 0, (num_bytes // 4096, 1024), (1024, 1))
    central = b""
    with open(path, "wb") as out:
        for name, content, size in ((b"x/data/0", b"", num_bytes), (b"x/data.pkl", emit_pickle({"w": record}), None)):
            header, size = out.tell(), len(content) if size is None else size
            out.write(struct.pack("<4s5H3L2H", b"PK\x03\x04", 45, 0, 0, 0, 0, 0, 0, 0, len(name), 0) + name + content)
            out.seek(header + 30 + len(name) + size)
            fields = (b"PK\x01\x02", 45, 45, 0, 0, 0, 0, 0, 0xFFFFFFFF, 0xFFFFFFFF, len(name), 28, 0, 0, 0, 0, 0xFFFFFFFF)
            central += struct.pack("<4s6H3L5H2L", *fields) + name + struct.pack("<2H3Q", 1, 24, size, size, header)
        start = out.tell()
        end = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 2, 2, len(central), start)
        end += struct.pack("<4sLQL", b"PK\x06\x07", 0, start + len(central), 1)
        out.write(central + end + struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0))


def test_reading_a_file_of_five_gigabytes_reads_only_its_headers(tmp_path):
    sparse_file(tmp_path / "x.pt", 5 << 30)
    tracemalloc.start()
    array = read_torch_file(tmp_path / "x.pt")["w"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert array.shape == (5 << 18, 1024) and array[-1, -1] == 0
    assert peak < 1 << 20
    assert mapped_in(array) is not None


def test_damage_in_the_data_is_seen_only_when_asked_to_verify(tmp_path):
    write_torch_file(tmp_path / "x.pt", {"w": np.full(100, 7, np.float32)})
    data = (tmp_path / "x.pt").read_bytes()
    start = data.index(np.full(100, 7, np.float32).tobytes())
    (tmp_path / "x.pt").write_bytes(data[:start] + b"\x01" + data[start + 1 :])
    assert read_torch_file(tmp_path / "x.pt")["w"].shape == (100,)
    with pytest.raises(SourceError, match="CRC"):
        read_torch_file(tmp_path / "x.pt", verify=True)


@pytest.mark.parametrize(
    "size, stride, offset",
    [
        ((1 << 40,), (0,), 0),
        ((1 << 20, 1 << 20), (0, 0), 0),
        ((7,), (1,), 0),
        ((2,), (1,), 5),
        ((2, 3), (4, 1), 0),
        ((1,), (1,), 6),
        ((), (), 6),
        ((1,), (1,), 1 << 62),
        ((3, 2), (1 << 61, 1), 0),
        ((0,), (1,), 7),
        ((0, 1 << 62), (1, 1), 0),
        ((0, 2), (1, 1 << 62), 0),
        ((1,) * 9, (1,) * 9, 0),
    ],
)
def test_tensors_that_leave_or_repeat_their_storage_are_refused(size, stride, offset, tmp_path):
    path = one_tensor(tmp_path / "x.pt", size, stride, offset)
    with pytest.raises(UnsafeFileError, match="tensor 'w'"):
        read_torch_file(path)


@pytest.mark.parametrize("size, stride, offset", [((2, 3), (0, 1), 0), ((3, 2), (1, 1), 0), ((1, 6), (1 << 60, 1), 0), ((1,) * 8, (1,) * 8, 5)])
def test_overlapping_views_no_larger_than_their_storage_are_harmless(size, stride, offset, tmp_path):
    path = one_tensor(tmp_path / "x.pt", size, stride, offset, data=np.arange(6, dtype="<f4").tobytes())
    expected = torch.as_strided(torch.arange(6.0), size, stride, offset).numpy()
    np.testing.assert_array_equal(read_torch_file(path)["w"], expected)


def test_storages_of_another_size_or_absent_are_refused(tmp_path):
    with pytest.raises(UnsafeFileError, match="claims 6 float32 elements"):
        read_torch_file(one_tensor(tmp_path / "x.pt", (2,), (1,), data=bytes(20)))
    record = TensorRecord(Storage(np.dtype("<f4"), "../version", 0), 0, (0,), (1,))
    with pytest.raises(SourceError, match="archive lacks"):
        read_torch_file(archive(tmp_path / "x.pt", emit_pickle({"w": record})))


def test_a_pickle_that_calls_the_shell_is_refused_and_not_run(tmp_path):
    class Shell:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'called'}",)

    archive(tmp_path / "x.pt", pickle.dumps({"w": Shell()}, protocol=2))
    with pytest.raises(UnsafeFileError, match=r"x\.pt: its pickle asks for posix\.system"):
        read_torch_file(tmp_path / "x.pt")
    assert not (tmp_path / "called").exists()


def test_compressed_archives_two_pickles_and_huge_pickles_are_refused(tmp_path):
    pickled = emit_pickle({})
    with pytest.raises(UnsafeFileError, match="compressed"):
        read_torch_file(archive(tmp_path / "a.pt", pickled + bytes(500), method=zipfile.ZIP_DEFLATED))
    with pytest.raises(UnsafeFileError, match="2 entries named data.pkl"):
        read_torch_file(archive(tmp_path / "b.pt", pickled, [("sub/data.pkl", pickled)]))
    with pytest.raises(UnsafeFileError, match="1048577 bytes"):
        read_torch_file(archive(tmp_path / "c.pt", pickled + bytes((1 << 20) + 1 - len(pickled))))
    with pytest.raises(UnsafeFileError, match="0 entries named data.pkl"):
        with zipfile.ZipFile(tmp_path / "d.pt", "w") as out:
            out.writestr("archive/version", b"3\n")
        read_torch_file(tmp_path / "d.pt")


def test_byte_order_must_be_little(tmp_path):
    with pytest.raises(SourceError, match="byte order is b'big'"):
        read_torch_file(archive(tmp_path / "x.pt", emit_pickle({}), [("byteorder", b"big")]))
    assert read_torch_file(archive(tmp_path / "y.pt", emit_pickle({}), [("byteorder", b"little")])) == {}


@pytest.mark.parametrize(
    "saved, found",
    [
        (torch.ones(2), "holds a tensor"),
        ([torch.ones(2)], "holds a list"),
        ({"ae": {"w": torch.ones(2)}}, "'ae' holds a dict"),
        ({"w": torch.ones(2), "k": 3}, "'k' holds a int"),
        ({3: torch.ones(2)}, "key 3"),
    ],
)
def test_anything_but_a_flat_dict_of_tensors_is_refused(saved, found, tmp_path):
    torch.save(saved, tmp_path / "x.pt")
    with pytest.raises(SourceError, match=found):
        read_torch_file(tmp_path / "x.pt")


def test_kinds_describe_what_cannot_be_read_as_tensors(tmp_path):
    torch.save({"step": 3, "ae": {"w": torch.ones(2)}, "w": torch.ones(2), "activation": "TopK"}, tmp_path / "x.pt")
    assert torch_file_kinds(tmp_path / "x.pt") == {"step": "int", "ae": "dict", "w": "tensor", "activation": "str"}
    torch.save([1], tmp_path / "x.pt")
    assert torch_file_kinds(tmp_path / "x.pt") == {}


def test_negated_and_unsupported_tensors_are_refused_rather_than_misread(tmp_path):
    torch.save({"w": torch.ones(2, dtype=torch.complex64).conj().imag}, tmp_path / "x.pt")
    with pytest.raises(SourceError, match="negation"):
        read_torch_file(tmp_path / "x.pt")
    for tensor in (torch.ones(2, dtype=torch.uint16), torch.ones(2, dtype=torch.complex64), torch.eye(2).to_sparse()):
        torch.save({"w": tensor}, tmp_path / "x.pt")
        with pytest.raises(UnsafeFileError, match="asks for torch"):
            read_torch_file(tmp_path / "x.pt")


@pytest.mark.parametrize(
    "content, advice",
    [
        (b"", "cannot be read"),
        (b"PK", "not a PyTorch file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git-lfs pointer"),
        (pickle.dumps({"a": 1}), "not a PyTorch file"),
        (b"<!DOCTYPE html>", "not a PyTorch file"),
    ],
)
def test_files_of_another_kind_are_refused_with_advice(content, advice, tmp_path):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(SourceError, match=advice):
        read_torch_file(tmp_path / "x.pt")


def test_the_legacy_format_is_refused_with_advice(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(SourceError, match=r"legacy format.*torch >= 1\.6"):
        read_torch_file(tmp_path / "x.pt")


def test_missing_files_and_folders_are_refused(tmp_path):
    with pytest.raises(SourceError, match="no such file"):
        read_torch_file(tmp_path / "none.pt")
    with pytest.raises(SourceError, match="cannot be read"):
        read_torch_file(tmp_path)


def reads_or_refuses(path, data: bytes, good: dict[str, np.ndarray]) -> bool:
    """Whether `data` is refused; what is read instead must be whole arrays (headers do not protect the values)."""
    path.write_bytes(data)
    try:
        for array in read_torch_file(path).values():
            array.tobytes()
        verified = read_torch_file(path, verify=True)
    except QscopeError as error:
        assert str(error).isprintable() and str(path) in str(error)
        return True
    assert list(verified) == list(good)
    for name, array in good.items():
        np.testing.assert_array_equal(verified[name], array, strict=True)
    return False


def test_truncation_anywhere_is_refused(tmp_path):
    torch.save({"w": torch.randn(3, 4), "b": torch.randn(3)}, tmp_path / "good.pt")
    data = (tmp_path / "good.pt").read_bytes()
    for length in range(0, len(data), 3):
        assert reads_or_refuses(tmp_path / "cut.pt", data[:length], {})


def test_flipped_bytes_are_refused_or_change_nothing(tmp_path):
    good = {"w": numbers(3, 4), "b": numbers(3)}
    torch.save({name: torch.from_numpy(array) for name, array in good.items()}, tmp_path / "good.pt")
    data = (tmp_path / "good.pt").read_bytes()
    generator = random.Random(0)
    refused = 0
    for _ in range(800):
        changed = bytearray(data)
        for _ in range(generator.choice([1, 1, 2, 8])):
            changed[generator.randrange(len(data))] = generator.randrange(256)
        refused += reads_or_refuses(tmp_path / "flipped.pt", bytes(changed), good)
    assert refused > 300


def test_neither_import_nor_reading_nor_writing_imports_torch(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "x.pt")
    code = (
        "import sys\nfrom qscope_jax.sae.formats.torch_file import read_torch_file, write_torch_file\n"
        "write_torch_file(sys.argv[2], read_torch_file(sys.argv[1], verify=True))\nassert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "x.pt", tmp_path / "y.pt"], check=True, timeout=60)
    assert torch.load(tmp_path / "y.pt", weights_only=True)["w"].tolist() == [1, 1]
