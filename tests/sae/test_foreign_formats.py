import json

import pytest

from qscope_jax.data.hub import open_source
from qscope_jax.sae.foreign_formats import foreign_folder, foreign_tensors
from qscope_jax.sae.formats.source_files import source_files

FOLDERS = [
    ("SAELens", {"cfg.json": {}, "sae_weights.safetensors": None}),
    ("SAELens", {"layer3/cfg.json": {}, "layer3/sae_weights.safetensors": None}),
    ("sparsify", {"config.json": {}, "layers.3/cfg.json": {}, "layers.3/sae.safetensors": None}),
    ("dictionary_learning", {"trainer_0/ae.pt": None, "trainer_0/config.json": {"trainer": {"dict_class": "AutoEncoderTopK"}}}),
    ("dictionary_learning", {"ae.pt": None}),
    ("Llama Scope", {"hyperparams.json": {}, "checkpoints/final.safetensors": None}),
    ("Llama Scope R1", {"config.json": {}, "sae_weights.safetensors": None}),
    ("Llamascopium", {"config.json": {"sae_type": "sae"}, "sae_weights.safetensors": None}),
    ("Gemma Scope", {"layer_3/width_16k/average_l0_50/params.npz": None}),
    ("Gemma Scope 2", {"config.json": {"architecture": "jump_relu"}, "params.safetensors": None}),
    ("zactheaipm/qwenscope", {"config.json": {"hidden_dim": 8, "dict_size": 32, "k": 4}, "weights.safetensors": None}),
    (None, {"config.json": {"model_type": "qwen3"}, "model.safetensors": None}),
    (None, {"cfg.json": {}, "other/sae.safetensors": None}),
    (None, {"notparams.npz": None, "readme.md": None}),
]


@pytest.mark.parametrize("expected, files", FOLDERS)
def test_folders_are_told_apart_by_their_files(expected, files, tmp_path):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("" if content is None else json.dumps(content))
    source = open_source(tmp_path)
    assert foreign_folder(source, source_files(source)) == expected


@pytest.mark.parametrize(
    "expected, names",
    [
        ("dictionary_learning (TopK or BatchTopK)", "encoder.weight encoder.bias decoder.weight b_dec k threshold"),
        ("dictionary_learning (Gated)", "encoder.weight decoder.weight decoder_bias gate_bias mag_bias r_mag"),
        ("dictionary_learning, as an interrupted run leaves it", "step ae optimizer config norm_factor"),
        ("sparsify", "encoder.weight encoder.bias W_dec b_dec"),
        ("OpenAI sparse_autoencoder", "encoder.weight decoder.weight pre_bias latent_bias stats_last_nonzero activation activation_state_dict"),
        ("Goodfire", "encoder_linear.weight encoder_linear.bias decoder_linear.weight decoder_linear.bias"),
        ("SAELens or dictionary_learning (JumpReLU)", "W_enc W_dec b_enc b_dec threshold"),
        ("Gemma Scope", "w_enc w_dec b_enc b_dec threshold"),
        ("Llamascopium", "W_E W_D b_E b_D"),
        (None, "W_enc W_dec b_enc b_dec"),
        (None, "model.embed_tokens.weight"),
        (None, ""),
    ],
)
def test_single_files_are_told_apart_by_their_tensors(expected, names):
    assert foreign_tensors(names.split()) == expected
