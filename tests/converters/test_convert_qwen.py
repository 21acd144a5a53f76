import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from converters import convert_qwen
from qscope_jax.data.hub import open_source
from qscope_jax.errors import SourceError
from qscope_jax.models import conversion
from qscope_jax.models.config import ModelConfig
from qscope_jax.models.conversion import StoredModel, differing_tensors
from qscope_jax.models.decoder import Decoder
from qscope_jax.models.weights import SINGLE_FILE, save_decoder

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_config) -> Path:
    """Folder of a random float32 Qwen3 of two layers."""
    config = ModelConfig.from_hf(tiny_config(layers=2).to_hf())
    rng = np.random.default_rng(0)
    draw = lambda leaf: np.asarray(0.3 * rng.standard_normal(leaf.shape), leaf.dtype)  # noqa: E731
    decoder = jax.tree.map(draw, jax.eval_shape(lambda: Decoder(config, jax.random.key(0))))
    save_decoder(decoder, folder := tmp_path_factory.mktemp("model") / "hf")
    return folder


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the program in this process: status, and lines on stdout and stderr."""

    def call(*arguments: object) -> tuple[int, list[str], list[str]]:
        monkeypatch.setattr(sys, "argv", ["convert_qwen", *map(str, arguments)])
        status = convert_qwen.main()
        captured = capsys.readouterr()
        return status, captured.out.splitlines(), captured.err.splitlines()

    return call


@pytest.fixture
def refused(run):
    """Run the program, which must refuse in one line with status 2; the line."""

    def call(*arguments: object) -> str:
        status, _, errors = run(*arguments)
        assert status == 2 and len(errors) == 1 and errors[0].startswith("convert_qwen: error: "), errors
        return errors[0]

    return call


def test_both_directions_are_verified_to_the_bit_and_by_a_prompt(run, model, tmp_path):
    status, said, errors = run(model, tmp_path / "orbax", "--to", "orbax", "--verify")
    assert (status, errors) == (0, []) and "every bit is as it should be, and a prompt has the same logits" in said[0]
    assert run(tmp_path / "orbax", tmp_path / "back", "--to", "hf", "--verify")[0] == 0
    assert (tmp_path / "back" / "config.json").read_bytes() == (model / "config.json").read_bytes()
    assert not list(differing_tensors(StoredModel(open_source(model)), StoredModel(open_source(tmp_path / "back"))))


def test_what_is_rounded_is_said(run, refused, model, tmp_path):
    assert "25 tensors of float32 lose precision as bfloat16; pass --lossy" in refused(model, tmp_path / "a", "--to", "hf", "--dtype", "bfloat16")
    status, said, _ = run(model, tmp_path / "a", "--to", "hf", "--dtype", "bfloat16", "--lossy", "--verify")
    assert status == 0 and said[0].endswith("25 of 25 tensors are rounded from float32 to bfloat16") and "every bit" in said[1]


def test_a_verification_that_fails_keeps_the_folder_out_of_its_place(run, refused, model, tmp_path, monkeypatch):
    real = conversion.write_orbax_group
    spoil = lambda folder, group, arrays: real(folder, group, {name: x + (name == "model.norm.weight") for name, x in arrays.items()})  # noqa: E731
    monkeypatch.setattr(conversion, "write_orbax_group", spoil)
    assert "tensor model.norm.weight differs after writing" in refused(model, tmp_path / "out", "--to", "orbax", "--verify")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(conversion, "write_orbax_group", real)
    assert run(model, tmp_path / "out", "--to", "orbax", "--verify")[0] == 0  # nothing of the spoilt one is taken for finished


def test_other_logits_fail_a_verification(refused, model, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(convert_qwen, "_logits", lambda source, dtype: calls.append(source) or np.array(len(calls)))
    assert "gives other logits" in refused(model, tmp_path / "out", "--to", "orbax", "--verify")


def test_an_interruption_is_one_line_and_the_same_command_goes_on(run, model, tmp_path, monkeypatch):
    real = conversion.write_orbax_group

    def interrupt(folder, group, arrays):
        if group == "shared":
            raise KeyboardInterrupt
        real(folder, group, arrays)

    monkeypatch.setattr(conversion, "write_orbax_group", interrupt)
    status, _, errors = run(model, tmp_path / "out", "--to", "orbax")
    assert status == 130 and len(errors) == 1 and "the same command goes on" in errors[0]
    assert not (tmp_path / "out").exists()
    written = []
    monkeypatch.setattr(conversion, "write_orbax_group", lambda folder, group, arrays: written.append(group) or real(folder, group, arrays))
    assert run(model, tmp_path / "out", "--to", "orbax", "--verify")[0] == 0
    assert written == ["shared"]


def test_mistakes_are_one_line_and_write_nothing(refused, model, tmp_path):
    out = tmp_path / "out"
    assert "no such folder" in refused(tmp_path / "none" / "of" / "these", out, "--to", "hf")
    (broken := tmp_path / "broken").mkdir()
    (broken / "config.json").write_text('{"model_type": "mamba"}')
    assert "model_type is 'mamba'" in refused(broken, out, "--to", "hf")
    shutil.copyfile(model / "config.json", broken / "config.json")
    assert "neither model.safetensors.index.json nor model.safetensors" in refused(broken, out, "--to", "hf")
    (broken / "model.safetensors.index.json").write_text('{"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}')
    assert "has no file model-00001-of-00002.safetensors" in refused(broken, out, "--to", "orbax")
    (out / "x").mkdir(parents=True)
    assert "exists; pass --overwrite" in refused(model, out, "--to", "hf")
    assert "is not replaced" in refused(model, out, "--to", "hf", "--overwrite")
    assert "cannot be written" in refused(model, "/proc/none/out", "--to", "hf")
    assert [path.name for path in out.iterdir()] == ["x"]


def test_a_conversion_imports_neither_torch_nor_transformers(model, tmp_path):
    program = (
        "import sys; from pathlib import Path; from converters.convert_qwen import convert\n"
        "convert(sys.argv[1], Path(sys.argv[2]), 'orbax', verify=True)\nprint(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program, model, tmp_path / "out"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]" and done.stderr == "", done.stderr


def test_a_missing_shard_of_an_orbax_source_is_named(run, model, tmp_path):
    assert run(model, tmp_path / "orbax", "--to", "orbax")[0] == 0
    shutil.rmtree(tmp_path / "orbax" / "weights" / "layer_00001")
    with pytest.raises(SourceError, match="layer_00001/.* is missing"):
        convert_qwen.convert(str(tmp_path / "orbax"), tmp_path / "back", "hf")
    assert not (tmp_path / "back" / SINGLE_FILE).exists()
