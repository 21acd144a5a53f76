import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from qscope_jax.data.files import read_json
from qscope_jax.errors import InputError, ShapeError, SourceError
from qscope_jax.training.activation_files import RowsFile, holds_cache, read_cache


@pytest.fixture
def copy(cache, tmp_path):
    """A cache to damage."""
    return shutil.copytree(cache, tmp_path / "copy")


def change(copy, **values):
    """Replace values of the manifest; `...` removes one."""
    path = copy / "manifest.json"
    path.write_text(json.dumps({name: value for name, value in (read_json(path) | values).items() if value is not ...}))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_rows_appended_in_parts_are_a_safetensors_file_that_begins_its_data_at_a_page(tmp_path, dtype):
    rows = np.random.default_rng(0).standard_normal((10, 6)).astype(dtype)
    with RowsFile(tmp_path / "file") as file:
        for part in (rows[:3], rows[3:3], rows[3:][:, :]):
            file.append(part)
    found = load_file(tmp_path / "file")
    assert list(found) == ["residuals"] and found["residuals"].dtype == dtype and found["residuals"].tobytes() == rows.tobytes()
    assert (tmp_path / "file").stat().st_size == 4096 + rows.nbytes


def test_a_file_whose_writing_failed_is_no_safetensors_file(tmp_path):
    with pytest.raises(ZeroDivisionError), RowsFile(tmp_path / "file") as file:
        file.append(np.ones((2, 3), np.float32))
        raise ZeroDivisionError
    assert (tmp_path / "file").read_bytes()[:8] == bytes(8)


def test_the_rows_of_a_shard_are_mapped_not_read(cache):
    found = read_cache(cache)
    rows = found.map_rows(1, 3)
    assert rows.shape == (100, 32) and rows.dtype == ml_dtypes.bfloat16 and not rows.flags.owndata and not rows.flags.writeable
    assert found.shards == 4 and found.bits == np.uint16


def test_whole_files_pass_with_and_without_checksums(cache):
    for verify in (False, True):
        read_cache(cache).check((1, 0), d_model=32, verify=verify)


@pytest.mark.parametrize(
    ("layers", "width", "error", "said"),
    [
        ((), 32, InputError, "one or more"),
        ((1, 1), 32, InputError, "none of them twice"),
        ((2,), 32, InputError, "no activations of layer 2; it has layers 0, 1"),
        ((1,), 64, ShapeError, "rows are 32 wide, expected 64"),
    ],
)
def test_layers_that_are_not_there_and_other_widths_are_refused(cache, layers, width, error, said):
    with pytest.raises(error, match=said):
        read_cache(cache).check(layers, d_model=width)


def test_missing_and_short_files_of_the_layers_asked_for_are_named(copy):
    (copy / "shard000001/layer1.safetensors").unlink()
    torn = copy / "shard000002/layer1.safetensors"
    torn.write_bytes(torn.read_bytes()[:-1])
    with pytest.raises(SourceError, match=r"shard000001/layer1.safetensors, shard000002/layer1.safetensors: missing, short or changed"):
        read_cache(copy).check((0, 1))
    read_cache(copy).check((0,), verify=True)
    for shard in (0, 3):
        (copy / f"shard00000{shard}/layer1.safetensors").unlink()
    with pytest.raises(SourceError, match="and 1 more"):
        read_cache(copy).check((1,))


def test_one_flipped_bit_is_found_by_its_checksum(copy):
    path = copy / "shard000001/layer0.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    read_cache(copy).check((0,))
    with pytest.raises(SourceError, match="shard000001/layer0.safetensors: missing, short or changed"):
        read_cache(copy).check((0,), verify=True)


def test_rows_of_another_shape_than_the_manifest_says_are_refused(copy):
    shutil.copy(copy / "shard000003/layer0.safetensors", copy / "shard000000/layer0.safetensors")
    with pytest.raises(SourceError, match=r"holds bfloat16 \[100, 32\] as `residuals`, expected bfloat16 \[300, 32\]"):
        read_cache(copy).map_rows(0, 0)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"format": ...}, "not the manifest of a finished activation cache"),
        ({"format_version": 9}, "version 9"),
        ({"d_model": ...}, "d_model"),
        ({"tokens": 0}, "sizes or types make no sense"),
        ({"tokens": "many"}, "damaged"),
        ({"layers": 3}, "damaged"),
        ({"dtype": "int3"}, "types make no sense"),
    ],
)
def test_damaged_manifests_are_refused_in_one_line(copy, values, said):
    change(copy, **values)
    with pytest.raises(SourceError, match=said) as error:
        read_cache(copy)
    assert "\n" not in str(error.value) and not holds_cache(copy)


def test_other_folders_are_no_cache(cache, tmp_path):
    assert holds_cache(cache) and not holds_cache(tmp_path)
    with pytest.raises(SourceError, match="has no manifest.json"):
        read_cache(tmp_path)
