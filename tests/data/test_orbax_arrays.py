import shutil

import ml_dtypes
import numpy as np
import pytest

from qscope_jax.data.orbax_arrays import read_arrays, write_arrays
from qscope_jax.errors import SourceError


@pytest.fixture
def tensors():
    made = np.random.default_rng(0).standard_normal((6, 4))
    dtypes = {"f4": np.float32, "f2": np.float16, "bf16": ml_dtypes.bfloat16, "f8": np.float64}
    return {name: made.astype(dtype) for name, dtype in dtypes.items()} | {"turned": made.astype(np.float32).T}


def test_arrays_come_back_to_the_bit(tensors, tmp_path):
    write_arrays(tmp_path / "x", tensors)
    back = read_arrays(tmp_path / "x")
    assert set(back) == set(tensors)
    for name, array in tensors.items():
        assert back[name].dtype == array.dtype and back[name].tobytes() == array.tobytes(), name


# What TensorStore had begun to read when the first piece was missing is collected later, and says so.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_folders_that_are_missing_foreign_or_torn_are_one_clear_error(tensors, tmp_path):
    (tmp_path / "empty").mkdir()
    write_arrays(tmp_path / "torn", tensors)
    shutil.rmtree(next(path for path in (tmp_path / "torn").rglob("d") if path.is_dir()))
    for name in ("missing", "empty", "torn"):
        with pytest.raises(SourceError, match=f"{name}: the Orbax checkpoint is damaged or incomplete [^\n]*$"):
            read_arrays(tmp_path / name)
