import json

import pytest

from qscope_jax.errors import ArchitectureError, ConfigError
from qscope_jax.models.config import ModelConfig

HF = {
    "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128, "rope_theta": 1000000, "rms_norm_eps": 1e-06, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "max_position_embeddings": 40960, "attention_bias": False, "hidden_act": "silu", "rope_scaling": None, "sliding_window": None,
    "use_sliding_window": False, "eos_token_id": 151645, "bos_token_id": 151643, "use_cache": True,
}  # fmt: skip


def test_a_published_config_is_read():
    config = ModelConfig.from_hf(HF)
    assert (config.num_layers, config.d_model, config.num_heads, config.num_kv_heads, config.head_dim) == (28, 1024, 16, 8, 128)
    assert (config.rope_theta, config.tie_embeddings, config.dtype, config.eos_token_ids) == (1e6, True, "bfloat16", (151645,))
    assert (config.period, config.repeats, config.unrolled().period, config.unrolled().repeats) == (1, 28, 28, 1)


def test_both_spellings_of_rope_and_dtype_are_the_same_config():
    renamed = {key: value for key, value in HF.items() if key not in ("rope_theta", "rope_scaling", "torch_dtype")}
    new = renamed | {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000}, "dtype": "bfloat16"}
    assert ModelConfig.from_hf(new) == ModelConfig.from_hf(HF)


def test_defaults_are_those_of_transformers():
    from transformers import Qwen3Config

    theirs = Qwen3Config()
    required = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    ours = ModelConfig.from_hf({key: HF[key] for key in required} | {"num_attention_heads": 32})
    assert (ours.head_dim, ours.num_kv_heads, ours.norm_eps) == (theirs.head_dim, theirs.num_key_value_heads, theirs.rms_norm_eps)
    assert (ours.tie_embeddings, ours.max_positions) == (theirs.tie_word_embeddings, theirs.max_position_embeddings)
    assert ours.rope_theta == theirs.to_dict()["rope_parameters"]["rope_theta"]
    assert ModelConfig.from_hf(HF | {"num_key_value_heads": None}).num_kv_heads == 16


def test_writing_a_config_and_reading_it_gives_the_same(tiny_config):
    for config in (ModelConfig.from_hf(HF), tiny_config(eos_token_ids=(3, 4), bos_token_id=1), tiny_config(tie_embeddings=True)):
        assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config
    assert ModelConfig.from_hf(HF).to_hf()["use_cache"] is True


def test_a_config_is_hashable_whatever_was_read_with_it():
    assert hash(ModelConfig.from_hf(HF)) == hash(ModelConfig.from_hf(HF | {"unknown": {"a": [1]}}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "model_type is 'mamba'; implemented: qwen3"),
        ({"attention_bias": True}, "attention_bias=True is not implemented, expected False"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"layer_types": ["full_attention"] * 27 + ["sliding_attention"]}, "layer_types=.*expected 28 times full_attention"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "linear"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config=.*fp8"),
    ],
)
def test_variants_that_are_not_implemented_are_named(change, message):
    with pytest.raises(ArchitectureError, match=message):
        ModelConfig.from_hf(HF | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": "wide"}, "does not look like a qwen3 config"),
        ({"hidden_size": None}, "does not look like a qwen3 config"),
        ({"rope_parameters": "default"}, "does not look like a qwen3 config"),
        ({"num_hidden_layers": 0}, "needs one mixer and one feed-forward"),
        ({"vocab_size": 0}, "vocab_size is 0, expected a positive integer"),
        ({"num_key_value_heads": 5}, "16 query heads cannot share 5 key/value heads"),
        ({"head_dim": 127}, "head_dim is 127"),
        ({"torch_dtype": "int8"}, "dtype is 'int8', expected one of float32"),
    ],
)
def test_impossible_values_are_config_errors(change, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_hf(HF | change)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"])
def test_a_missing_key_is_named(key):
    with pytest.raises(ConfigError, match=f"required key '{key}' is missing"):
        ModelConfig.from_hf({name: value for name, value in HF.items() if name != key})


def test_layer_kinds_are_checked(tiny_config):
    with pytest.raises(ArchitectureError, match="layer kinds .'gated_delta'. are not implemented"):
        tiny_config(mixers=("full_attention", "gated_delta", "full_attention"))
    with pytest.raises(ConfigError, match="got 2 and 3"):
        tiny_config(mixers=("full_attention",) * 2)
    with pytest.raises(ConfigError, match="attention is 'flash', expected one of auto, reference, cudnn"):
        tiny_config(attention="flash")


@pytest.mark.parametrize("period", [2, -1])
def test_a_period_must_divide_the_layers(tiny_config, period):
    with pytest.raises(ConfigError, match=f"a period of {period} layers does not divide 3"):
        tiny_config(period=period)
