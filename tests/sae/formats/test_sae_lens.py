import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from qscope_jax.errors import ArchitectureError, InputError, QscopeError, ShapeError, SourceError
from qscope_jax.sae.formats.registry import list_sae_layers, read_sae_arrays
from qscope_jax.sae.formats.sae_lens import write_folder

F, D, K = 96, 32, 8
CFG = {
    "architecture": "topk",
    "k": K,
    "d_in": D,
    "d_sae": F,
    "dtype": "float32",
    "device": "cpu",
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "reshape_activations": "none",
    "rescale_acts_by_decoder_norm": False,
    "metadata": {"sae_lens_version": "6.54.12", "model_name": "qwen3", "hook_name": "blocks.5.hook_resid_post", "l0": 7.5},
}


@pytest.fixture
def published(tmp_path, tiny):
    """Write a folder as SAELens does: W_enc is [D, F]."""

    def write(folder="sae", tensors=None, drop=(), **cfg) -> Path:
        path = tmp_path / folder
        path.mkdir(parents=True, exist_ok=True)
        content = {**tiny, "W_enc": np.ascontiguousarray(tiny["W_enc"].T), **(tensors or {})}
        save_file({name: array for name, array in content.items() if name not in drop}, path / "sae_weights.safetensors")
        settings = {key: value for key, value in {**CFG, **cfg}.items() if value is not None}
        (path / "cfg.json").write_text(json.dumps(settings))
        return path

    return write


def pre_activations(tiny, x, flag=True):
    wide = {name: array.astype(np.float64) for name, array in tiny.items()}
    return (x - wide["b_dec"] * flag) @ wide["W_enc"].T + wide["b_enc"], wide


@pytest.mark.parametrize("flag", [True, False])
def test_topk_files_give_the_same_codes_and_their_own_bits(flag, published, tiny, x, keep, assert_agree):
    sae = read_sae_arrays(published(apply_b_dec_to_input=flag), None)
    z, wide = pre_activations(tiny, x, flag)
    assert_agree(sae, x, keep(z), keep(z) @ wide["W_dec"] + wide["b_dec"])
    for name, array in tiny.items():
        assert sae.tensors()[name].tobytes() == array.tobytes(), name
    assert (sae.k, sae.activation, sae.apply_b_dec_to_input, sae.metadata["layer"], sae.metadata["folds"]) == (K, "topk", flag, 5, [])
    assert (sae.metadata["model_name"], sae.metadata["hook_name"]) == ("qwen3", "blocks.5.hook_resid_post")


def test_what_lies_as_we_hold_it_stays_mapped(published):
    sae = read_sae_arrays(published(), None)
    assert isinstance(sae.W_dec.base, np.memmap) and isinstance(sae.b_enc.base, np.memmap) and not sae.W_dec.flags.writeable


def test_selection_by_rescaled_activations_is_folded_into_the_weights(published, tiny, x, keep, assert_agree):
    sae = read_sae_arrays(published(rescale_acts_by_decoder_norm=True), None)
    z, wide = pre_activations(tiny, x)
    norms = np.linalg.norm(wide["W_dec"], axis=1)
    codes = keep(z * norms)
    assert ((codes > 0) != (keep(z) > 0)).any()
    assert_agree(sae, x, codes, (codes / norms) @ wide["W_dec"] + wide["b_dec"])
    assert sae.metadata["folds"] == ["unit_decoder"] and sae.metadata["unit_norm_decoder"]


def test_jumprelu_files_give_the_same_codes(published, tiny, threshold, x, assert_agree):
    sae = read_sae_arrays(published(tensors={"threshold": threshold}, architecture="jumprelu", k=None), None)
    z, wide = pre_activations(tiny, x)
    codes = np.where(z > threshold, z, 0)
    assert_agree(sae, x, codes, codes @ wide["W_dec"] + wide["b_dec"])
    logs = np.log(threshold + 1e-3)
    older = read_sae_arrays(published("old", tensors={"log_threshold": logs}, architecture="jumprelu", k=None), None)
    np.testing.assert_allclose(older.threshold, threshold + 1e-3, rtol=1e-6)


def test_standard_files_give_the_same_codes(published, tiny, x, assert_agree):
    sae = read_sae_arrays(published(architecture="standard", k=None), None)
    z, wide = pre_activations(tiny, x)
    assert_agree(sae, x, np.maximum(z, 0), np.maximum(z, 0) @ wide["W_dec"] + wide["b_dec"])


def test_gated_files_give_the_same_codes(published, tiny, x, assert_agree):
    rng = np.random.default_rng(3)
    gate = {"b_gate": rng.uniform(-1, 0.5, F), "b_mag": rng.uniform(-1, 0.5, F), "r_mag": rng.uniform(-0.5, 0.5, F)}
    gate = {name: array.astype(np.float32) for name, array in gate.items()}
    sae = read_sae_arrays(published(tensors=gate, drop={"b_enc"}, architecture="gated", k=None), None)
    wide = {name: array.astype(np.float64) for name, array in (tiny | gate).items()}
    u = (x - wide["b_dec"]) @ wide["W_enc"].T
    codes = np.where(u + wide["b_gate"] > 0, np.maximum(np.exp(wide["r_mag"]) * u + wide["b_mag"], 0), 0)
    assert_agree(sae, x, codes, codes @ wide["W_dec"] + wide["b_dec"])
    assert sae.metadata["folds"] == ["gate_to_threshold"]


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk"])
@pytest.mark.parametrize("rescale", [True, False])
def test_training_checkpoints_of_batch_topk_are_read_with_their_threshold(architecture, rescale, published, tiny, x, assert_agree):
    path = published(tensors={"topk_threshold": np.array(0.4)}, architecture=architecture, rescale_acts_by_decoder_norm=rescale, k=7.5)
    z, wide = pre_activations(tiny, x)
    norms = np.linalg.norm(wide["W_dec"], axis=1) if rescale else np.ones(F)
    codes = np.where(z * norms > 0.4, z * norms, 0)
    assert_agree(read_sae_arrays(path, None), x, codes, (codes / norms) @ wide["W_dec"] + wide["b_dec"])


@pytest.mark.parametrize("rescale", [True, False])
def test_a_scale_of_the_input_is_folded_from_the_training_folder(rescale, published, tiny, x, keep, assert_agree):
    path = published(normalize_activations="expected_average_only_in", rescale_acts_by_decoder_norm=rescale)
    with pytest.raises(InputError, match=r"add the training run's activation_scaler\.json"):
        read_sae_arrays(path, None)
    (path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 0.6, "has_whitening": False}))
    z, wide = pre_activations(tiny, 0.6 * x.astype(np.float64))
    norms = np.linalg.norm(wide["W_dec"], axis=1) / 0.6 if rescale else np.ones(F)
    codes = keep(z * norms)
    assert_agree(read_sae_arrays(path, None), x, codes, ((codes / norms) @ wide["W_dec"] + wide["b_dec"]) / 0.6)
    for value in (0, "x", -1):
        (path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": value}))
        with pytest.raises(SourceError, match="scaling_factor in activation_scaler"):
            read_sae_arrays(path, None)


def test_configs_of_before_version_6_are_migrated(published, tiny, x, keep, assert_agree):
    older = {
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": K},
        "normalize_activations": False,
        "hook_point": "blocks.7.hook_resid_pre",
        "hook_point_layer": 7,
        "model_name": "gpt2",
        "dtype": "torch.float32",
    }
    gone = dict.fromkeys(["architecture", "k", "metadata", "apply_b_dec_to_input", "reshape_activations", "rescale_acts_by_decoder_norm"])
    sae = read_sae_arrays(published(tensors={"scaling_factor": np.ones(F, np.float32)}, **{**gone, **older}), None)
    z, wide = pre_activations(tiny, x)
    assert_agree(sae, x, keep(z), keep(z) @ wide["W_dec"] + wide["b_dec"])
    assert (sae.metadata["layer"], sae.metadata["model_name"]) == (7, "gpt2")


@pytest.mark.parametrize(
    "changes, error, found",
    [
        ({"architecture": "transcoder"}, ArchitectureError, "architecture 'transcoder' of SAELens is not supported"),
        ({"architecture": "jumprelu_skip_transcoder"}, ArchitectureError, "'jumprelu_skip_transcoder'"),
        ({"architecture": "temporal"}, ArchitectureError, "'temporal'"),
        ({"architecture": "matching_pursuit"}, ArchitectureError, "'matching_pursuit'"),
        ({"architecture": "abstopk"}, ArchitectureError, "'abstopk'"),
        ({"architecture": "standard", "activation_fn": "tanh-relu"}, ArchitectureError, "'tanh-relu' is not supported"),
        ({"reshape_activations": "hook_z"}, ArchitectureError, "attention heads"),
        ({"normalize_activations": "layer_norm"}, ArchitectureError, r"token by token \(layer_norm\)"),
        ({"normalize_activations": "constant_norm_rescale"}, ArchitectureError, "constant_norm_rescale"),
        ({"tensors": {"scaling_factor": np.full(F, 2, np.float32)}}, ArchitectureError, "scaling_factor"),
        ({"k": "8"}, SourceError, "k in cfg.json is '8'"),
        ({"k": 97}, InputError, "k is 97"),
        ({"apply_b_dec_to_input": "yes"}, SourceError, "apply_b_dec_to_input is 'yes'"),
        ({"drop": {"b_dec"}}, SourceError, "lacks b_dec; a SAELens topk file has exactly"),
        ({"tensors": {"bonus": np.ones(1, np.float32)}}, SourceError, "also holds bonus"),
        ({"tensors": {"W_enc": np.ones((F, D), np.float32)}}, ShapeError, r"expected W_enc \[D, F\]"),
        ({"tensors": {"b_enc": np.full(F, np.nan, np.float32)}}, SourceError, "tensor b_enc holds NaN"),
        ({"tensors": {"b_enc": np.zeros(F, np.int32)}}, SourceError, "tensor b_enc is int32"),
    ],
)
def test_what_is_not_supported_or_damaged_is_refused_by_name(changes, error, found, published):
    with pytest.raises(error, match=found):
        read_sae_arrays(published(**changes), None)


def test_a_folder_of_sae_ids_is_a_collection(published, tmp_path):
    for layer in (2, 11):
        published(f"many/layer_{layer}", metadata={"hook_name": f"blocks.{layer}.hook_resid_post"})
    assert list_sae_layers(tmp_path / "many") == [2, 11]
    assert read_sae_arrays(tmp_path / "many", 11).metadata["layer"] == 11
    published("many/another", metadata={"hook_name": "blocks.2.hook_resid_post"})
    with pytest.raises(InputError, match="2 SAEs of layer 2; give the folder of one: another/, layer_2/"):
        read_sae_arrays(tmp_path / "many", 2)
    assert read_sae_arrays(tmp_path / "many" / "another", None).metadata["layer"] == 2


def test_the_weights_file_is_read_with_its_config(published):
    path = published()
    assert read_sae_arrays(path / "sae_weights.safetensors", None).metadata["layer"] == 5
    (path / "cfg.json").unlink()
    with pytest.raises(ArchitectureError, match="format of SAELens, .*its cfg.json says"):
        read_sae_arrays(path / "sae_weights.safetensors", None)


def test_every_truncation_is_one_clear_error(published):
    path = published() / "sae_weights.safetensors"
    data = path.read_bytes()
    for length in [*range(0, 600, 13), len(data) // 2, len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(SourceError, match=r"^[^\n]*sae_weights\.safetensors: [^\n]*$"):
            read_sae_arrays(path.parent, None)


def test_flipped_header_bytes_are_refused_or_change_only_values(published):
    path = published() / "sae_weights.safetensors"
    data = path.read_bytes()
    refused = 0
    for position in range(8 + int.from_bytes(data[:8], "little")):
        path.write_bytes(data[:position] + bytes([data[position] ^ 5]) + data[position + 1 :])
        try:
            assert read_sae_arrays(path.parent, None).W_enc.shape == (F, D)
        except QscopeError:
            refused += 1
    assert refused > 200


@pytest.mark.parametrize("activation", ["topk", "jumprelu", "batch_topk"])
@pytest.mark.parametrize("flag", [True, False])
def test_what_is_written_is_read_back_to_the_bit(activation, flag, arrays, threshold, tmp_path):
    sae = arrays(activation=activation, apply_b_dec_to_input=flag, threshold=None if activation == "topk" else threshold)
    write_folder(tmp_path / "out", sae)
    back = read_sae_arrays(tmp_path / "out", None)
    for name, array in sae.tensors().items():
        assert back.tensors()[name].dtype == array.dtype and back.tensors()[name].tobytes() == array.tobytes()
    assert (back.k, back.activation, back.apply_b_dec_to_input) == (K, "topk" if activation == "topk" else "jumprelu", flag)
    cfg = json.loads((tmp_path / "out" / "cfg.json").read_text())
    assert cfg["metadata"]["hf_hook_name"] == "model.layers.3" and cfg["metadata"]["hook_name"] == "blocks.3.hook_resid_post"
    assert cfg["d_in"] == D and cfg["normalize_activations"] == "none"
