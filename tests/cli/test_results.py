import json
from dataclasses import dataclass

import numpy as np
import pytest

from qscope_jax.cli.results import check_writable, write_result
from qscope_jax.errors import SourceError


@dataclass(frozen=True)
class Config:
    layers: tuple[int, ...] = (1, 2)


def test_results_are_json_that_any_reader_takes(tmp_path):
    write_result(str(tmp_path / "a/b.json"), "verb", Config(), {"x": np.float32(0.5), "y": {3: float("nan")}, "z": np.arange(2)})
    assert json.loads((tmp_path / "a/b.json").read_text(), parse_constant=pytest.fail) == {
        "verb": "verb", "config": {"layers": [1, 2]}, "x": 0.5, "y": {"3": None}, "z": [0, 1],
    }  # fmt: skip


def test_no_name_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_writable("")
    write_result("", "verb", Config(), {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("folder", [False, True])
def test_a_writable_place_is_accepted_without_a_trace(tmp_path, folder):
    check_writable(str(tmp_path / "new/deep/out"), folder=folder)
    assert not list(tmp_path.iterdir())


def test_places_that_cannot_be_written_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for path, folder in ((tmp_path / "file/out.json", False), (tmp_path, False), (tmp_path / "file", True), ("/proc/none/out.json", False)):
        with pytest.raises(SourceError, match="cannot be written|is a folder"):
            check_writable(str(path), folder=folder)
