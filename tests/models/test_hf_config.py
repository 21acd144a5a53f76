import json
from dataclasses import replace

import pytest

from qscope_jax.errors import ArchitectureError, ConfigError
from qscope_jax.models.config import Llama3Scaling, ModelConfig

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


MOE = HF | {
    "model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True,
}  # fmt: skip
LLAMA = {"model_type": "llama", "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    ("change", "dense"),
    [
        ({}, []),
        ({"mlp_only_layers": [0, 3]}, [0, 3]),
        ({"decoder_sparse_step": 2}, range(0, 28, 2)),
        ({"decoder_sparse_step": 3, "mlp_only_layers": [2]}, [layer for layer in range(28) if layer % 3 != 2 or layer == 2]),
        ({"num_experts": 0}, range(28)),
    ],
)
def test_experts_are_in_the_layers_that_both_keys_leave_them(change, dense):
    config = ModelConfig.from_hf(MOE | change)
    assert [layer for layer, kind in enumerate(config.feed_forwards) if kind == "dense"] == list(dense)
    written = json.loads(json.dumps(config.to_hf()))
    assert ModelConfig.from_hf(written) == config and change.items() <= written.items()
    # Written anew, without the keys that were read, it is the same decoder.
    assert ModelConfig.from_hf(replace(config, hf={}).to_hf()) == config


GEMMA = LLAMA | {"model_type": "gemma2", "num_hidden_layers": 6, "head_dim": 16}


def test_gemma_takes_the_defaults_of_transformers():
    from transformers import Gemma2Config

    theirs, ours = Gemma2Config(), ModelConfig.from_hf({k: v for k, v in GEMMA.items() if k != "head_dim"})
    assert (ours.head_dim, ours.num_kv_heads, ours.sliding_window) == (theirs.head_dim, theirs.num_key_value_heads, theirs.sliding_window)
    assert (ours.attention_softcap, ours.logit_softcap) == (theirs.attn_logit_softcapping, theirs.final_logit_softcapping)
    assert ours.attention_scale == theirs.query_pre_attn_scalar**-0.5 and ours.tie_embeddings == theirs.tie_word_embeddings
    assert ours.mixers == tuple(theirs.layer_types[:6]) and (ours.period, ours.max_positions) == (2, theirs.max_position_embeddings)
    for config in (ours, ModelConfig.from_hf(GEMMA | {"query_pre_attn_scalar": 144, "attn_logit_softcapping": None, "tie_word_embeddings": False})):
        written = json.loads(json.dumps(config.to_hf()))
        assert ModelConfig.from_hf(written) == config and isinstance(written["query_pre_attn_scalar"], int)


def test_a_family_of_its_own_keeps_its_settings():
    config = ModelConfig.from_hf(MOE)
    assert (config.num_experts, config.experts_per_token, config.d_expert, config.norm_expert_weights) == (8, 2, 24, True)
    llama = ModelConfig.from_hf(LLAMA | {"rope_scaling": LLAMA3, "rope_theta": 5e5})
    assert (llama.qk_norm, llama.head_dim, llama.num_kv_heads, llama.rope_theta) == (False, 8, 4, 5e5)
    assert llama.rope_scaling == Llama3Scaling(8.0, 1.0, 4.0, 8192)
    for one in (llama, ModelConfig.from_hf(LLAMA)):
        assert ModelConfig.from_hf(json.loads(json.dumps(one.to_hf()))) == one


@pytest.mark.parametrize(
    ("base", "change", "error", "message"),
    [
        (MOE, {"num_experts_per_tok": 9}, ConfigError, "9 of 8 experts"),
        (MOE, {"use_sliding_window": True}, ArchitectureError, r"\(qwen3_moe\): use_sliding_window=True"),
        (GEMMA, {"hidden_activation": "gelu"}, ArchitectureError, "hidden_activation='gelu'"),
        (GEMMA, {"use_bidirectional_attention": True}, ArchitectureError, "use_bidirectional_attention"),
        (GEMMA, {"layer_types": ["chunked_attention"] * 6}, ArchitectureError, "chunked_attention.* are not implemented"),
        (GEMMA, {"sliding_window": None}, ConfigError, "sliding_window is 0"),
        (LLAMA, {"mlp_bias": True}, ArchitectureError, "mlp_bias=True"),
        (LLAMA, {"rope_scaling": {"rope_type": "yarn"}}, ArchitectureError, "yarn"),
        (LLAMA, {"rope_scaling": LLAMA3 | {"factor": 0.5}}, ConfigError, "expected factor at least 1"),
        (LLAMA, {"rope_scaling": {"rope_type": "llama3"}}, ConfigError, "'factor' is missing"),
    ],
)
def test_variants_of_other_families_are_named(base, change, error, message):
    with pytest.raises(error, match=message):
        ModelConfig.from_hf(base | change)


def test_a_config_is_hashable_whatever_was_read_with_it():
    assert hash(ModelConfig.from_hf(HF)) == hash(ModelConfig.from_hf(HF | {"unknown": {"a": [1]}}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "model_type is 'mamba'; implemented: gemma2, llama, qwen3, qwen3_5"),
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
