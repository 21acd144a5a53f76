import sys
from typing import NamedTuple

import numpy as np
import pytest

from converters import convert_sae
from qscope_jax.data.resumable import verify_manifest
from qscope_jax.errors import QscopeError
from qscope_jax.sae.arrays import SAEArrays
from qscope_jax.sae.formats.own_format import write_folder
from qscope_jax.sae.formats.qwen_scope import write_layer
from qscope_jax.sae.formats.registry import list_sae_layers, read_sae_arrays
from qscope_jax.sae.layer_sae import load_sae

F, D, K = 1024, 3, 50
RELEASED = f"SAE-Res-Toy-Base-W1K-L0_{K}"


def arrays(layer: int, **changes) -> SAEArrays:
    rng = np.random.default_rng(layer)
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in dict(W_enc=(F, D), W_dec=(F, D), b_enc=F, b_dec=D).items()}
    tensors["b_enc"][:2] = [0.0, -0.0]
    return SAEArrays(**{**tensors, "k": K, **changes})


@pytest.fixture
def released(tmp_path):
    """Layers 0, 1 and 3 in Qwen-Scope's files."""
    for layer in (0, 1, 3):
        (tmp_path / RELEASED).mkdir(exist_ok=True)
        write_layer(tmp_path / RELEASED / f"layer{layer}.sae.pt", arrays(layer))
    return tmp_path / RELEASED


class Answer(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the program in this process."""

    def run(source, destination, to, *options) -> Answer:
        monkeypatch.setattr(sys, "argv", ["convert_sae", str(source), str(destination), "--to", to, *map(str, options)])
        return Answer(convert_sae.main(), *capsys.readouterr())

    return run


@pytest.fixture
def refused(run):
    """Run the program, which must refuse in one line with status 2; the line."""

    def refused(*arguments) -> str:
        answer = run(*arguments)
        lines = [line for line in answer.err.splitlines() if line.strip()]
        assert answer.status == 2 and len(lines) == 1 and lines[0].startswith("convert_sae: error: "), answer
        return lines[0]

    return refused


def test_there_and_back_is_the_same_to_the_bit(released, run, tmp_path):
    ours, back = tmp_path / "ours", tmp_path / "back" / RELEASED
    answers = [run(released, ours, "safetensors"), run(ours, back, "qwen_scope")]
    for answer in answers:
        assert answer.status == 0 and answer.out.count("1024 features of width 3, k 50; read back equal to the bit") == 3
    for layer in (0, 1, 3):
        assert (back / f"layer{layer}.sae.pt").read_bytes() == (released / f"layer{layer}.sae.pt").read_bytes()
    assert list_sae_layers(back) == [0, 1, 3] and verify_manifest(back) == []
    assert read_sae_arrays(ours, 1).metadata["format"] == "qwen_scope"


@pytest.mark.parametrize("to", ["orbax", "sae_lens", "sparsify", "dictionary_learning"])
def test_a_release_becomes_what_other_libraries_read(to, released, run, tmp_path):
    answer = run(released, tmp_path / "out", to, "--layers", "1,3")
    folded = to in ("sparsify", "dictionary_learning")
    assert answer.status == 0 and answer.out.count("folds: b_dec_into_input" if folded else "equal to the bit") == 2
    assert "2 layers in the" in answer.out and load_sae(tmp_path / "out", 3).k == K


@pytest.mark.parametrize(("layers", "expected"), [("all", [0, 1, 3]), ("3", [3]), ("0-1", [0, 1]), ("3,0-1,1", [0, 1, 3])])
def test_only_the_layers_asked_for_are_written(layers, expected, released, run, tmp_path):
    assert run(released, tmp_path / "ours", "safetensors", "--layers", layers).status == 0
    assert list_sae_layers(tmp_path / "ours") == expected


@pytest.mark.parametrize("layers", ["", "x", "-3", "3-1", "0-1-3", "0,,1", "1-99999"])
def test_unreadable_layers_are_refused(layers, released, refused, tmp_path):
    assert "write all, 5, 0-3 or 0-3,7" in refused(released, tmp_path / "new", "safetensors", f"--layers={layers}")


def test_what_is_not_there_is_named(released, refused, tmp_path):
    assert "has no layer 2; it has 0, 1, 3" in refused(released, tmp_path / "new", "safetensors", "--layers", "0-3")
    assert "no such folder" in refused(tmp_path / "nothing", tmp_path / "new", "safetensors")
    assert not (tmp_path / "new").exists()


def test_a_missing_k_is_asked_for(released, run, refused, tmp_path):
    released.rename(tmp_path / "plain")
    assert "give k" in refused(tmp_path / "plain", tmp_path / "new", "safetensors")
    assert run(tmp_path / "plain", tmp_path / "new", "safetensors", "--k", 7).status == 0
    assert read_sae_arrays(tmp_path / "new", 0).k == 7


def test_a_loss_is_refused_then_allowed_and_told(run, refused, tmp_path):
    write_folder(tmp_path / "jump", {0: arrays(0, activation="jumprelu", threshold=np.ones(F, np.float32))})
    assert "qwen_scope holds top-k SAEs only" in refused(tmp_path / "jump", tmp_path / "new", "qwen_scope")
    assert "needs k, the mean L0" in refused(tmp_path / "jump", tmp_path / "new", "qwen_scope", "--lossy")
    answer = run(tmp_path / "jump", tmp_path / "new", "qwen_scope", "--lossy", "--k", 12)
    assert answer.status == 0 and "changed: jumprelu (a threshold for each feature) became topk with k 12" in answer.out
    assert "bfloat16 cannot hold the values of" in refused(tmp_path / "jump", tmp_path / "b", "sae_lens", "--dtype", "bfloat16")
    answer = run(tmp_path / "jump", tmp_path / "b", "sae_lens", "--dtype", "bfloat16", "--lossy")
    assert "changed: W_enc, W_dec, b_enc, b_dec rounded to bfloat16" in answer.out


def test_a_destination_is_replaced_whole_and_only_when_asked(released, run, refused, tmp_path):
    run(released, tmp_path / "there", "sae_lens")
    assert "exists; pass --overwrite" in refused(released, tmp_path / "there", "safetensors")
    assert run(released, tmp_path / "there", "safetensors", "--layers", 0, "--overwrite").status == 0
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == ["layer0.safetensors", "manifest.json", "sae.json"]


def test_neither_the_source_nor_a_folder_of_something_else_is_overwritten(released, run, refused, tmp_path):
    for source, destination in ((released, released), (released / "layer0.sae.pt", released), (released, tmp_path)):
        assert "holds the source" in refused(source, destination, "safetensors", "--overwrite")
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("dear")
    assert "is not replaced" in refused(released, tmp_path / "letters", "safetensors", "--overwrite")
    assert (tmp_path / "letters" / "dear.txt").exists() and list_sae_layers(released) == [0, 1, 3]
    (tmp_path / "empty").mkdir()
    assert run(released, tmp_path / "empty", "safetensors").status == 0


def test_an_interrupted_run_says_so_and_resumes(released, run, tmp_path, monkeypatch):
    honest, calls = convert_sae._sentence, []

    def interrupt(layer):
        calls.append(layer)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return honest(layer)

    monkeypatch.setattr(convert_sae, "_sentence", interrupt)
    answer = run(released, tmp_path / "out", "sparsify")
    assert answer.status == 130 and "the same command goes on" in answer.err and not (tmp_path / "out").exists()
    answer = run(released, tmp_path / "out", "sparsify")
    assert answer.status == 0 and answer.out.count("finished by an earlier run") == 2
    assert list_sae_layers(tmp_path / "out") == [0, 1, 3]


def test_what_is_ambiguous_is_asked_for(tmp_path, released, run, refused):
    run(released, tmp_path / "dl", "dictionary_learning", "--layers", "1")
    folder = tmp_path / "dl" / "resid_post_layer_1" / "trainer_0"
    (folder / "config.json").unlink()
    assert "give activation topk or batch_topk" in refused(tmp_path / "dl", tmp_path / "new", "sae_lens")
    assert run(tmp_path / "dl", tmp_path / "new", "sae_lens", "--activation", "topk").status == 0


def test_a_defect_of_ours_keeps_its_traceback(released, run, tmp_path, monkeypatch):
    monkeypatch.setattr(convert_sae, "convert", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(released, tmp_path / "out", "sparsify")
    assert not issubclass(ZeroDivisionError, QscopeError)
