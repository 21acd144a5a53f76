import sys

import ml_dtypes
import numpy as np
import pytest

from converters import convert_sae
from converters.convert_sae import convert
from qscope_jax.data.hub import open_source
from qscope_jax.errors import ArchitectureError, InputError, SourceError
from qscope_jax.sae import qwen_scope, safetensors_format
from qscope_jax.sae.arrays import SAEArrays
from qscope_jax.sae.formats.registry import list_sae_layers, read_sae_arrays

F, D, K = 1024, 3, 50
RELEASED = f"SAE-Res-Toy-Base-W1K-L0_{K}"


def arrays(layer: int, dtype=np.float32, **changes) -> SAEArrays:
    rng = np.random.default_rng(layer)
    tensors = {name: rng.standard_normal(shape).astype(dtype) for name, shape in dict(W_enc=(F, D), W_dec=(F, D), b_enc=F, b_dec=D).items()}
    tensors["b_enc"][:2] = [0.0, -0.0]
    return SAEArrays(**{**tensors, "k": K, **changes})


@pytest.fixture
def released(tmp_path):
    """Layers 0, 1 and 3 in Qwen-Scope's files."""
    for layer in (0, 1, 3):
        (tmp_path / RELEASED).mkdir(exist_ok=True)
        qwen_scope.write_layer(tmp_path / RELEASED / f"layer{layer}.sae.pt", arrays(layer))
    return tmp_path / RELEASED


def assert_same(a: SAEArrays, b: SAEArrays) -> None:
    assert (a.k, a.activation, a.apply_b_dec_to_input) == (b.k, b.activation, b.apply_b_dec_to_input)
    for name, array in a.tensors().items():
        assert array.dtype == b.tensors()[name].dtype and array.tobytes() == b.tensors()[name].tobytes(), name


def test_there_and_back_is_the_same_to_the_bit(released, tmp_path, capsys):
    ours, back = tmp_path / "ours", tmp_path / "back" / RELEASED
    assert convert(str(released), ours, "safetensors") == [0, 1, 3] == list_sae_layers(ours)
    assert convert(str(ours), back, "qwen_scope") == [0, 1, 3] == list_sae_layers(back)
    for layer in (0, 1, 3):
        assert_same(read_sae_arrays(ours, layer), arrays(layer))
        assert (back / f"layer{layer}.sae.pt").read_bytes() == (released / f"layer{layer}.sae.pt").read_bytes()
    assert capsys.readouterr().out.count("1024 features of width 3, k 50, read back equal") == 6
    assert read_sae_arrays(ours, 1).metadata["format"] == "qwen_scope"


@pytest.mark.parametrize(("layers", "expected"), [("all", [0, 1, 3]), ("3", [3]), ("0-1", [0, 1]), ("3,0-1,1", [0, 1, 3])])
def test_only_the_layers_asked_for_are_written(layers, expected, released, tmp_path):
    assert convert(str(released), tmp_path / "ours", "safetensors", layers) == expected == list_sae_layers(tmp_path / "ours")


def test_a_given_k_is_kept(tmp_path):
    (tmp_path / "plain").mkdir()
    qwen_scope.write_layer(tmp_path / "plain" / "layer0.sae.pt", arrays(0))
    with pytest.raises(InputError, match="give k"):
        convert(str(tmp_path / "plain"), tmp_path / "ours", "qwen_scope")
    assert not (tmp_path / "ours").exists()
    convert(str(tmp_path / "plain"), tmp_path / "ours", "safetensors", k=7)
    assert read_sae_arrays(tmp_path / "ours", 0).k == 7


def test_narrower_types_become_float32_without_loss(tmp_path):
    narrow = arrays(0, ml_dtypes.bfloat16)
    safetensors_format.write_folder(tmp_path / "ours", {0: narrow})
    convert(str(tmp_path / "ours"), tmp_path / RELEASED, "qwen_scope")
    for name, array in read_sae_arrays(tmp_path / RELEASED, 0).tensors().items():
        assert array.dtype == np.float32 and array.tobytes() == narrow.tensors()[name].astype(np.float32).tobytes()
    wide = arrays(0, np.float64)
    safetensors_format.write_folder(tmp_path / "wide", {0: wide})
    with pytest.raises(InputError, match="float64"):
        convert(str(tmp_path / "wide"), tmp_path / "narrowed", "qwen_scope")
    assert not (tmp_path / "narrowed").exists()
    convert(str(tmp_path / "wide"), tmp_path / "copy", "safetensors")
    assert_same(read_sae_arrays(tmp_path / "copy", 0), wide)


def test_what_qwen_scopes_files_cannot_hold_is_refused(tmp_path):
    gated = arrays(0, activation="jumprelu", threshold=np.ones(F, np.float32))
    safetensors_format.write_folder(tmp_path / "gated", {0: gated})
    with pytest.raises(ArchitectureError, match="plain top-k SAEs only"):
        convert(str(tmp_path / "gated"), tmp_path / "new", "qwen_scope")
    assert not (tmp_path / "new").exists()
    convert(str(tmp_path / "gated"), tmp_path / "same", "safetensors")
    assert_same(read_sae_arrays(tmp_path / "same", 0), gated)


@pytest.mark.parametrize("name", ["SAE-Res-Toy-W2K-L0_50", "SAE-Res-Toy-W1K-L0_100"])
def test_a_destination_named_like_another_release_is_refused(name, released, tmp_path):
    with pytest.raises(InputError, match="the SAEs have 1024 and 50; rename the folder"):
        convert(str(released), tmp_path / name, "qwen_scope")
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("to", ["safetensors", "qwen_scope"])
def test_a_destination_is_replaced_whole_and_only_when_asked(to, released, tmp_path):
    destination = tmp_path / "there"
    convert(str(released), destination, to)
    with pytest.raises(SourceError, match="exists; pass --overwrite"):
        convert(str(released), destination, to, "0")
    convert(str(released), destination, to, "0", overwrite=True)
    assert list_sae_layers(destination) == [0] and len(list(destination.iterdir())) == (2 if to == "safetensors" else 1)


def test_neither_the_source_nor_a_folder_of_something_else_is_overwritten(released, tmp_path):
    for source, destination in ((released, released), (released / "layer0.sae.pt", released), (released, tmp_path)):
        with pytest.raises(InputError, match="holds the source"):
            convert(str(source), destination, "safetensors", overwrite=True)
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("dear")
    with pytest.raises(SourceError, match="does not hold SAEs"):
        convert(str(released), tmp_path / "letters", "safetensors", overwrite=True)
    assert (tmp_path / "letters" / "dear.txt").exists() and list_sae_layers(released) == [0, 1, 3]
    (tmp_path / "empty").mkdir()
    assert convert(str(released), tmp_path / "empty", "safetensors", overwrite=True) == [0, 1, 3]


@pytest.mark.parametrize("layers", ["", "x", "-3", "3-1", "0-1-3", "0,,1", "1-99999"])
def test_unreadable_layers_are_refused(layers, released, tmp_path):
    for to in ("safetensors", "qwen_scope"):
        with pytest.raises(InputError, match="write all, 5, 0-3 or 0-3,7"):
            convert(str(released), tmp_path / "new", to, layers)


def test_a_layer_that_is_not_there_is_refused(released, tmp_path):
    with pytest.raises(InputError, match="has no layer 2; it has 0, 1, 3"):
        convert(str(released), tmp_path / "new", "safetensors", "0-3")
    with pytest.raises(SourceError, match="no such folder"):
        convert(str(tmp_path / "nothing"), tmp_path / "new", "safetensors")


@pytest.mark.parametrize("to", ["safetensors", "qwen_scope"])
def test_a_write_that_does_not_read_back_equal_is_an_error(to, released, tmp_path, monkeypatch):
    module = safetensors_format if to == "safetensors" else qwen_scope
    honest = module.read_layer

    def flipped(source, layer, **settings):
        found = honest(source, layer, **settings)
        if source.name == str(released):
            return found
        b_enc = found.b_enc.copy()
        b_enc[0] = -0.0
        return SAEArrays(found.W_enc, found.W_dec, b_enc, found.b_dec, found.k)

    monkeypatch.setattr(module, "read_layer", flipped)
    with pytest.raises(SourceError, match="layer 0: b_enc differs after writing"):
        convert(str(released), tmp_path / "new", to)


def test_a_mistake_is_one_line_and_status_2(released, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["convert_sae", str(released), str(tmp_path / "new"), "--to", "safetensors", "--layers", "9"])
    assert convert_sae.main() == 2
    error = capsys.readouterr().err
    assert error.startswith("convert_sae: error: ") and error.count("\n") == 1
    monkeypatch.setattr(sys, "argv", [*sys.argv[:-1], "0"])
    assert convert_sae.main() == 0 and open_source(tmp_path / "new").has("sae.json")
