import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qscope_jax.errors import ArchitectureError, ShapeError, SourceError
from qscope_jax.sae.formats.registry import list_sae_layers, read_sae_arrays
from qscope_jax.sae.formats.sparsify import write_folder

F, D, K = 96, 32, 8
CFG = {
    "activation": "topk",
    "expansion_factor": 3,
    "normalize_decoder": False,
    "num_latents": 0,
    "k": K,
    "multi_topk": False,
    "skip_connection": False,
    "transcode": False,
    "d_in": D,
}


@pytest.fixture
def published(tmp_path, tiny):
    def write(folder="layers.4", tensors=None, drop=(), **cfg):
        path = tmp_path / "run" / folder
        path.mkdir(parents=True, exist_ok=True)
        names = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
        content = {theirs: tiny[ours] for theirs, ours in names.items()} | (tensors or {})
        save_file({name: array for name, array in content.items() if name not in drop}, path / "sae.safetensors")
        (path / "cfg.json").write_text(json.dumps({**CFG, **cfg}))
        return path

    return write


def test_sparsify_files_give_the_same_codes(published, tiny, x, keep, assert_agree):
    sae = read_sae_arrays(published(), None)
    wide = {name: array.astype(np.float64) for name, array in tiny.items()}
    codes = keep(np.maximum((x - wide["b_dec"]) @ wide["W_enc"].T + wide["b_enc"], 0))
    assert_agree(sae, x, codes, codes @ wide["W_dec"] + wide["b_dec"])
    assert (sae.k, sae.apply_b_dec_to_input, sae.metadata["layer"]) == (K, True, 4)
    for name, array in tiny.items():
        assert sae.tensors()[name].tobytes() == array.tobytes() and isinstance(sae.tensors()[name].base, np.memmap)


def test_a_run_is_a_collection_of_its_hookpoints(published, tmp_path):
    for folder in ("layers.4", "layers.12/seed0"):
        published(folder)
    assert list_sae_layers(tmp_path / "run") == [4, 12]
    assert read_sae_arrays(tmp_path / "run", 12).metadata["layer"] == 12


@pytest.mark.parametrize(
    "changes, error, found",
    [
        ({"transcode": True}, ArchitectureError, "transcoder"),
        ({"skip_connection": True}, ArchitectureError, "skip connection"),
        ({"activation": "groupmax"}, ArchitectureError, "groupmax"),
        ({"signed": True}, ArchitectureError, "by magnitude"),
        ({"tensors": {"W_skip": np.ones((D, D), np.float32)}}, SourceError, "also holds W_skip"),
        ({"drop": {"W_dec"}}, SourceError, "lacks W_dec"),
        ({"tensors": {"W_dec": np.ones((D, F), np.float32)}}, ShapeError, r"W_dec \[F, D\]"),
        ({"d_in": 31}, SourceError, "says d_in 31"),
        ({"k": None}, SourceError, "k in cfg.json is None"),
        ({"tensors": {"b_dec": np.full(D, np.inf, np.float32)}}, SourceError, "tensor b_dec holds NaN or inf"),
    ],
)
def test_what_is_not_supported_or_damaged_is_refused_by_name(changes, error, found, published):
    with pytest.raises(error, match=found):
        read_sae_arrays(published(**changes), None)


def test_what_is_written_is_read_back_to_the_bit_and_holds_nothing_else(arrays, tiny, tmp_path):
    write_folder(tmp_path / "layers.3", arrays(apply_b_dec_to_input=True))
    back = read_sae_arrays(tmp_path / "layers.3", None)
    for name, array in tiny.items():
        assert back.tensors()[name].tobytes() == array.tobytes()
    assert set(load_file(tmp_path / "layers.3" / "sae.safetensors")) == {"encoder.weight", "encoder.bias", "W_dec", "b_dec"}
    cfg = json.loads((tmp_path / "layers.3" / "cfg.json").read_text())
    assert (cfg["normalize_decoder"], cfg["num_latents"], cfg["d_in"], back.metadata["layer"]) == (False, F, D, 3)


def test_only_unit_decoders_are_marked_for_normalisation(arrays, tiny, tmp_path):
    unit = tiny["W_dec"] / np.linalg.norm(tiny["W_dec"], axis=1, keepdims=True)
    write_folder(tmp_path / "layers.0", arrays(apply_b_dec_to_input=True, W_dec=unit))
    assert json.loads((tmp_path / "layers.0" / "cfg.json").read_text())["normalize_decoder"] is True
