import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from qscope_jax.errors import ArchitectureError, InputError
from qscope_jax.sae.formats.registry import read_sae_arrays

F, D = 96, 32
GOODFIRE = ("encoder_linear.weight", "encoder_linear.bias", "decoder_linear.weight", "decoder_linear.bias")
DEEPSEEK = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")


def content(tiny, names) -> dict[str, np.ndarray]:
    return dict(zip(names, (tiny["W_enc"], tiny["b_enc"], np.ascontiguousarray(tiny["W_dec"].T), tiny["b_dec"]), strict=True))


@pytest.mark.parametrize("names, expected", [(GOODFIRE, "goodfire"), (DEEPSEEK, "deepseek")])
def test_relu_files_of_goodfire_and_deepseek_give_the_same_codes(names, expected, tiny, x, assert_agree, tmp_path):
    torch.save({name: torch.from_numpy(array) for name, array in content(tiny, names).items()}, tmp_path / "x.pt")
    sae = read_sae_arrays(tmp_path / "x.pt", 19)
    wide = {name: array.astype(np.float64) for name, array in tiny.items()}
    codes = np.maximum(x @ wide["W_enc"].T + wide["b_enc"], 0)
    assert_agree(sae, x, codes, codes @ wide["W_dec"] + wide["b_dec"])
    assert (sae.metadata["format"], sae.metadata["layer"], sae.metadata["hook_name"]) == (expected, 19, "blocks.19.hook_resid_post")
    with pytest.raises(InputError, match="whose activation is relu; leave activation out"):
        read_sae_arrays(tmp_path / "x.pt", 19, activation="topk")


def test_goodfire_as_safetensors_stays_mapped(tiny, tmp_path):
    save_file(content(tiny, GOODFIRE), tmp_path / "x.safetensors")
    sae = read_sae_arrays(tmp_path / "x.safetensors", 19)
    assert isinstance(sae.W_enc.base, np.memmap)
    np.testing.assert_array_equal(sae.W_dec, tiny["W_dec"])


@pytest.mark.parametrize(
    "suffix, names, expected",
    [
        (
            ".pt",
            "encoder.weight decoder.weight pre_bias latent_bias stats_last_nonzero latents_activation_frequency latents_mean_square",
            "OpenAI's sparse_autoencoder, .*normalises each token",
        ),
        (".safetensors", " ".join(DEEPSEEK), "Llama Scope, .*hyperparams.json"),
        (".safetensors", " ".join((*DEEPSEEK, "log_jumprelu_threshold")), "Llama Scope R1, .*config.json"),
        (".safetensors", "encoder.weight encoder.bias W_dec b_dec", r"sparsify, .*cfg\.json"),
        (".safetensors", "W_enc W_dec b_enc b_dec threshold", r"SAELens, .*cfg\.json"),
        (".safetensors", "W_enc W_dec b_enc b_dec s_gate b_gate mean_norm tgt_mean_norm", "saex, .*input scale"),
        (".safetensors", "W_E W_D b_E b_D", "Llamascopium, .*config.json"),
        (".safetensors", "w_enc w_dec b_enc b_dec threshold", r"Gemma Scope 2, .*params\.safetensors"),
    ],
)
def test_a_file_that_does_not_say_enough_is_refused_with_what_is_missing(suffix, names, expected, tmp_path):
    arrays = {name: np.ones((4, 4), np.float32) for name in names.split()}
    if suffix == ".pt":
        activation = {"activation": "TopK", "activation_state_dict": {"k": 32, "postact_fn": "ReLU"}}
        torch.save({name: torch.from_numpy(array) for name, array in arrays.items()} | activation, tmp_path / "x.pt")
    else:
        save_file(arrays, tmp_path / "x.safetensors")
    with pytest.raises(ArchitectureError, match=f"is in the format of {expected}"):
        read_sae_arrays(tmp_path / f"x{suffix}", 0, k=2)
