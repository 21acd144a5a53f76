import collections
import json

import numpy as np
import pytest
import torch

from qscope_jax.errors import ArchitectureError, InputError, ShapeError, SourceError, UnsafeFileError
from qscope_jax.sae.formats.dictionary_learning import write_folder
from qscope_jax.sae.formats.registry import list_sae_layers, read_sae_arrays

F, D, K = 96, 32, 8


def linear(tiny, **more) -> dict[str, np.ndarray]:
    return {"encoder.weight": tiny["W_enc"], "encoder.bias": tiny["b_enc"], "decoder.weight": np.ascontiguousarray(tiny["W_dec"].T), **more}


def top_k(tiny, threshold=-1.0) -> dict[str, np.ndarray]:
    return linear(tiny, b_dec=tiny["b_dec"], k=np.array(K, np.int32), threshold=np.array(threshold, np.float32))


def gated(tiny) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    vectors = {name: rng.uniform(-1, 0.5, F).astype(np.float32) for name in ("gate_bias", "mag_bias", "r_mag")}
    return {"decoder_bias": tiny["b_dec"], "encoder.weight": tiny["W_enc"], "decoder.weight": np.ascontiguousarray(tiny["W_dec"].T), **vectors}


def matrices(tiny, **more) -> dict[str, np.ndarray]:
    return {**tiny, "W_enc": np.ascontiguousarray(tiny["W_enc"].T), **more}


def tensors(arrays) -> dict[str, torch.Tensor]:
    return collections.OrderedDict((name, torch.from_numpy(np.array(array))) for name, array in arrays.items())


@pytest.fixture
def published(tmp_path):
    """Write a trainer's folder as the library does."""

    def write(content, dict_class=None, folder="trainer_0", layer=6):
        path = tmp_path / "run" / folder
        path.mkdir(parents=True, exist_ok=True)
        torch.save(content, path / "ae.pt")
        if dict_class is not None:
            trainer = {
                "dict_class": dict_class,
                "k": K,
                "layer": layer,
                "lm_name": "Qwen/Qwen3-1.7B-Base",
                "submodule_name": f"resid_post_layer_{layer}",
            }
            (path / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128}}))
        return path

    return write


@pytest.fixture
def wide(tiny):
    return {name: array.astype(np.float64) for name, array in tiny.items()}


def test_topk_files_give_the_same_codes_and_their_own_bits(published, tiny, wide, x, keep, assert_agree):
    for threshold in (-1.0, 0.5):  # the library's class ignores a threshold that training left
        sae = read_sae_arrays(published(tensors(top_k(tiny, threshold)), "AutoEncoderTopK"), None)
        codes = keep((x - wide["b_dec"]) @ wide["W_enc"].T + wide["b_enc"])
        assert_agree(sae, x, codes, codes @ wide["W_dec"] + wide["b_dec"])
    for name, array in tiny.items():
        assert sae.tensors()[name].tobytes() == array.tobytes()
    assert (sae.k, sae.metadata["layer"], sae.metadata["model_name"]) == (K, 6, "Qwen/Qwen3-1.7B-Base")


def test_batch_topk_files_are_read_with_their_threshold(published, tiny, wide, x, assert_agree):
    sae = read_sae_arrays(published(tensors(top_k(tiny, 0.5)), "BatchTopKSAE"), None)
    z = (x - wide["b_dec"]) @ wide["W_enc"].T + wide["b_enc"]
    codes = np.where(z > 0.5, z, 0)
    assert_agree(sae, x, codes, codes @ wide["W_dec"] + wide["b_dec"])
    assert sae.metadata["mean_l0"] == K


def test_matryoshka_files_give_the_same_codes(published, tiny, wide, x, assert_agree):
    content = matrices(tiny, k=np.array(K, np.int32), threshold=np.array(0.3, np.float32), group_sizes=np.array([32, 64]))
    sae = read_sae_arrays(published(tensors(content), "MatryoshkaBatchTopKSAE"), None)
    z = (x - wide["b_dec"]) @ wide["W_enc"].T + wide["b_enc"]
    codes = np.where(z > np.float32(0.3), z, 0)
    assert_agree(sae, x, codes, codes @ wide["W_dec"] + wide["b_dec"])


def test_jumprelu_files_see_x_itself(published, tiny, wide, threshold, x, assert_agree):
    z = x @ wide["W_enc"].T + wide["b_enc"]
    codes = np.where(z > threshold, z, 0)
    for dict_class in ("JumpReluAutoEncoder", None):
        sae = read_sae_arrays(published(tensors(matrices(tiny, threshold=threshold)), dict_class, folder=f"{dict_class}"), None)
        assert_agree(sae, x, codes, codes @ wide["W_dec"] + wide["b_dec"])


def test_gated_files_give_the_same_codes(published, tiny, wide, x, assert_agree):
    content = gated(tiny)
    gate = {name: content[name].astype(np.float64) for name in ("gate_bias", "mag_bias", "r_mag")}
    u = (x - wide["b_dec"]) @ wide["W_enc"].T
    codes = np.where(u + gate["gate_bias"] > 0, np.maximum(np.exp(gate["r_mag"]) * u + gate["mag_bias"], 0), 0)
    assert_agree(read_sae_arrays(published(tensors(content), "GatedAutoEncoder"), None), x, codes, codes @ wide["W_dec"] + wide["b_dec"])


def test_standard_files_old_and_new_differ_in_what_the_encoder_sees(published, tiny, wide, x, assert_agree):
    for name, dict_class, centre in (("bias", "AutoEncoder", wide["b_dec"]), ("decoder.bias", "AutoEncoderNew", 0)):
        codes = np.maximum((x - centre) @ wide["W_enc"].T + wide["b_enc"], 0)
        for known in (dict_class, None):
            path = published(tensors(linear(tiny, **{name: tiny["b_dec"]})), known, folder=f"{known}-{name}")
            assert_agree(read_sae_arrays(path, None), x, codes, codes @ wide["W_dec"] + wide["b_dec"])


def test_what_an_interrupted_run_leaves_is_scaled_to_raw_units(published, tiny, wide, x, assert_agree):
    bundle = {
        "step": 700,
        "ae": tensors(top_k(tiny, 0.2)),
        "optimizer": {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]},
        "config": {"dict_class": "BatchTopKSAE", "layer": 9, "device": "cuda:0", "wandb_name": None},
        "norm_factor": 4.0,
    }
    path = published(bundle)
    # Trained on x / 4: there the encoder sees x / 4 - b_dec, and the reconstruction is multiplied by 4.
    z = (x / 4 - wide["b_dec"]) @ wide["W_enc"].T + wide["b_enc"]
    codes = np.where(z > np.float32(0.2), z, 0)
    sae = read_sae_arrays(path, None)
    assert_agree(sae, x, 4 * codes, 4 * (codes @ wide["W_dec"] + wide["b_dec"]))
    assert sae.metadata["folds"] == ["input_scale_into_biases"]
    torch.save({**bundle, "norm_factor": 0.0}, path / "ae.pt")
    with pytest.raises(SourceError, match="norm_factor of the interrupted run is 0.0"):
        read_sae_arrays(path, None)


def test_a_file_that_fits_two_classes_needs_to_be_told(published, tiny, tmp_path):
    path = published(tensors(top_k(tiny, 0.5)))
    for source in (path, path / "ae.pt"):
        with pytest.raises(InputError, match="fits AutoEncoderTopK and BatchTopKSAE alike.*give activation topk or batch_topk"):
            read_sae_arrays(source, 0)
        assert read_sae_arrays(source, 0, activation="topk").activation == "topk"
        assert read_sae_arrays(source, 0, activation="batch_topk").activation == "jumprelu"
    with pytest.raises(InputError, match="activation is 'relu', expected topk or batch_topk"):
        read_sae_arrays(path, 0, activation="relu")
    named = published(tensors(top_k(tiny, 0.5)), "AutoEncoderTopK")
    with pytest.raises(InputError, match="says AutoEncoderTopK, which contradicts"):
        read_sae_arrays(named, None, activation="batch_topk")


@pytest.mark.parametrize(
    "change, dict_class, error, found",
    [
        (lambda t: top_k(t), "BatchTopKSAE", ArchitectureError, "threshold was never set"),
        (lambda t: top_k(t), "CrossCoder", ArchitectureError, "dict_class 'CrossCoder'"),
        (lambda t: {**top_k(t), "extra": np.ones(2, np.float32)}, "AutoEncoderTopK", SourceError, "also holds extra"),
        (lambda t: linear(t, k=np.array(K)), "AutoEncoderTopK", SourceError, "lacks b_dec"),
        (lambda t: linear(t, k=np.array(K)), None, SourceError, "no class of dictionary_learning"),
        (lambda t: {**top_k(t), "k": np.array(8.0)}, "AutoEncoderTopK", SourceError, "tensor k is float64, expected a whole number"),
        (lambda t: {**top_k(t), "k": np.array(0)}, "AutoEncoderTopK", InputError, "k is 0"),
        (lambda t: {**top_k(t), "decoder.weight": t["W_dec"]}, "AutoEncoderTopK", ShapeError, r"decoder.weight \[D, F\]"),
        (lambda t: {**top_k(t), "b_dec": np.full(D, np.nan, np.float32)}, "AutoEncoderTopK", SourceError, "tensor b_dec holds NaN"),
    ],
)
def test_what_is_not_supported_or_damaged_is_refused_by_name(change, dict_class, error, found, published, tiny):
    with pytest.raises(error, match=found):
        read_sae_arrays(published(tensors(change(tiny)), dict_class), None)


def test_a_file_that_asks_for_code_is_refused(published, tiny):
    path = published({"ae": tensors(top_k(tiny)), "norm_factor": torch.nn.Linear(1, 1)})
    with pytest.raises(UnsafeFileError, match="nothing was executed"):
        read_sae_arrays(path, 0)


def test_trainers_are_listed_by_the_layers_of_their_configs(published, tiny, tmp_path):
    for i, layer in enumerate((8, 3)):
        published(tensors(top_k(tiny)), "AutoEncoderTopK", f"trainer_{i}", layer)
    assert list_sae_layers(tmp_path / "run") == [3, 8]
    assert read_sae_arrays(tmp_path / "run", 3).metadata["layer"] == 3
    published(tensors(top_k(tiny)), "AutoEncoderTopK", "trainer_2", 8)
    with pytest.raises(InputError, match="2 SAEs of layer 8; give the folder of one: trainer_0/, trainer_2/"):
        read_sae_arrays(tmp_path / "run", 8)


def test_what_is_written_is_read_back_to_the_bit(arrays, tiny, tmp_path):
    write_folder(tmp_path / "out", arrays(apply_b_dec_to_input=True))
    back = read_sae_arrays(tmp_path / "out", None)
    for name, array in tiny.items():
        assert back.tensors()[name].tobytes() == array.tobytes()
    loaded = torch.load(tmp_path / "out" / "ae.pt", weights_only=True)
    assert (loaded["k"].dtype, loaded["k"].item(), loaded["threshold"].item(), back.metadata["layer"]) == (torch.int32, K, -1.0, 3)
