import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from qscope_jax.errors import SourceError
from qscope_jax.sae.formats.mapped_tensors import map_safetensors, read_npz, write_safetensors


@pytest.fixture
def tensors():
    rng = np.random.default_rng(0)
    return {"a": rng.standard_normal((5, 3)).astype(np.float32).T, "b": rng.standard_normal(4).astype(ml_dtypes.bfloat16), "c": np.array(0.5)}


def test_safetensors_are_written_as_torch_reads_them_and_mapped_back(tensors, tmp_path):
    write_safetensors(tmp_path / "x.safetensors", tensors)
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded["b"].dtype == torch.bfloat16 and loaded["c"].shape == ()
    for name, array in map_safetensors(tmp_path / "x.safetensors").items():
        np.testing.assert_array_equal(array, tensors[name], strict=True)
        np.testing.assert_array_equal(loaded[name].float().numpy(), tensors[name].astype(np.float32))
        assert isinstance(array.base, np.memmap) and not array.flags.writeable


def test_a_file_that_is_missing_or_empty_is_one_clear_error(tmp_path):
    (tmp_path / "empty.safetensors").write_bytes(b"")
    for name in ("empty", "missing"):
        with pytest.raises(SourceError, match=rf"{name}\.safetensors: [^\n]*$"):
            map_safetensors(tmp_path / f"{name}.safetensors")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_files_are_read_whole(save, tmp_path):
    arrays = {"a": np.arange(6.0).reshape(2, 3), "b": np.asfortranarray(np.ones((3, 2), np.float32))}
    save(tmp_path / "x.npz", **arrays)
    for name, array in read_npz(tmp_path / "x.npz").items():
        np.testing.assert_array_equal(array, arrays[name], strict=True)
