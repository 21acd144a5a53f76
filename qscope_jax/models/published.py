"""Configs of published backbones: as much of each public `config.json` as says how large the model is and how it computes.

Source: the repositories `Qwen/*`, `meta-llama/Llama-3.1-8B` and `google/gemma-2-*` on the Hugging Face hub; of Qwen3.5, which also sees, the part
`text_config`. Base and instruct models of a name are alike in these keys. (Those of Qwen3.5 are checked only by the sizes they add up to.)
"""

from typing import Any

_QWEN3 = {
    "model_type": "qwen3", "vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128, "rope_theta": 1e6, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768, "dtype": "bfloat16",
}  # fmt: skip
_QWEN3_5 = {
    "model_type": "qwen3_5_text", "vocab_size": 248320, "head_dim": 256, "full_attention_interval": 4, "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_num_key_heads": 16, "rms_norm_eps": 1e-6, "attn_output_gate": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25}, "max_position_embeddings": 262144,
    "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip
_GEMMA2 = {
    "model_type": "gemma2", "vocab_size": 256000, "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096, "rope_theta": 1e4,
    "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "max_position_embeddings": 8192, "dtype": "bfloat16",
}  # fmt: skip


def _sizes(width: int, hidden: int, layers: int, heads: int, **further: Any) -> dict[str, Any]:
    return {"hidden_size": width, "intermediate_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, **further}


PUBLISHED: dict[str, dict[str, Any]] = {
    "Qwen3-1.7B": _QWEN3 | _sizes(2048, 6144, 28, 16, tie_word_embeddings=True),
    "Qwen3-8B": _QWEN3 | _sizes(4096, 12288, 36, 32, tie_word_embeddings=False),
    "Qwen3-30B-A3B": _QWEN3
    | _sizes(2048, 6144, 48, 32, model_type="qwen3_moe", num_key_value_heads=4, tie_word_embeddings=False)
    | {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True},
    "Qwen3.5-2B": _QWEN3_5 | _sizes(2048, 6144, 24, 8, num_key_value_heads=2, linear_num_value_heads=16, tie_word_embeddings=True),
    "Qwen3.5-9B": _QWEN3_5 | _sizes(4096, 12288, 32, 16, num_key_value_heads=4, linear_num_value_heads=32),
    "Qwen3.5-27B": _QWEN3_5 | _sizes(5120, 17408, 64, 24, num_key_value_heads=4, linear_num_value_heads=48),
    "Qwen3.5-35B-A3B": _QWEN3_5
    | _sizes(2048, 6144, 40, 16, model_type="qwen3_5_moe_text", num_key_value_heads=2, linear_num_value_heads=32)
    | {"num_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512},
    "Llama-3.1-8B": _sizes(4096, 14336, 32, 32, model_type="llama", num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False)
    | {"rope_theta": 5e5, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "dtype": "bfloat16"}
    | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                        "original_max_position_embeddings": 8192}},
    "Gemma-2-2B": _GEMMA2 | _sizes(2304, 9216, 26, 8, num_key_value_heads=4),
    "Gemma-2-9B": _GEMMA2 | _sizes(3584, 14336, 42, 16, num_key_value_heads=8),
}  # fmt: skip
"""Hugging Face config by the name of the model."""
