"""Hugging Face `config.json`, read into a `ModelConfig` and written from one: a reader and a writer for each family.

A variant that is not implemented is refused by name, never approximated.
"""

from collections.abc import Callable, Mapping
from typing import Any

from qscope_jax.errors import ArchitectureError, ConfigError
from qscope_jax.models.config import Llama3Scaling, ModelConfig


def read_hf(config: Mapping[str, Any]) -> ModelConfig:
    """The decoder that a `config.json` describes.

    Raises:
        ArchitectureError: a family, or a variant of one, that is not implemented.
        ConfigError: a required key is missing or of the wrong type.
    """
    family = config.get("model_type")
    if family not in _READERS:
        raise ArchitectureError(f"config.json: model_type is {family!r}; implemented: {', '.join(sorted(_READERS))}")
    try:
        return ModelConfig(family=family, hf=dict(config), **_READERS[family](config))
    except KeyError as error:
        raise ConfigError(f"config.json ({family}): required key {error} is missing") from error
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"config.json ({family}): {error}; the file does not look like a {family} config") from error


def write_hf(config: ModelConfig) -> dict[str, Any]:
    """The keys of `config.json` that this decoder determines."""
    keys = {"model_type": config.family, **_write_shared(config), **_WRITERS[config.family](config)}
    if "text_config" not in config.hf:
        return keys
    inner = {**config.hf["text_config"], **keys, "model_type": f"{config.family}_text"}
    outer = {key: keys[key] for key in ("model_type", "tie_word_embeddings", "dtype")}
    return {**outer, "text_config": {key: value for key, value in inner.items() if key != "architectures"}}


def _read_shared(config: Mapping[str, Any], *, head_dim: int | None, tied: bool = False) -> dict[str, Any]:
    """Fields that all families spell alike. The defaults are those of transformers, where an absent key is not the same as a null one.

    Args:
        config: The Hugging Face config.
        head_dim: Width of a head where the key is absent; None is the model's width over its heads.
        tied: Whether the head is the embedding where the key is absent.
    """
    _refuse(config, "attention_bias", (False, None))
    _refuse(config, "quantization_config", (None,))
    heads, width = int(config["num_attention_heads"]), int(config["hidden_size"])
    eos = config.get("eos_token_id")
    rope = _rope(config)
    return dict(
        vocab_size=int(config["vocab_size"]),
        d_model=width,
        d_ff=int(config["intermediate_size"]),
        num_heads=heads,
        head_dim=int(config.get("head_dim", head_dim) or width // heads),
        rope_theta=float(rope.get("rope_theta", config.get("rope_theta", 1e4))),
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        tie_embeddings=bool(config.get("tie_word_embeddings", tied)),
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
        eos_token_ids=() if eos is None else (int(eos),) if isinstance(eos, int) else tuple(int(i) for i in eos),
        bos_token_id=config.get("bos_token_id"),
    )


def _write_shared(config: ModelConfig) -> dict[str, Any]:
    eos = config.eos_token_ids
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_positions,
        "attention_bias": False,
        "dtype": config.dtype,
        "torch_dtype": config.dtype,
        "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else list(eos),
        "bos_token_id": config.bos_token_id,
    }


def _read_qwen3(config: Mapping[str, Any], kv_heads: int = 32) -> dict[str, Any]:
    _refuse(config, "hidden_act", ("silu", None))
    _refuse(config, "use_sliding_window", (False, None))
    _refuse_scaling(config)
    num_layers = int(config["num_hidden_layers"])
    if (kinds := config.get("layer_types")) is not None and list(kinds) != ["full_attention"] * num_layers:
        raise ArchitectureError(f"config.json ({config['model_type']}): layer_types={kinds!r}, expected {num_layers} times full_attention")
    shared = _read_shared(config, head_dim=128)
    return shared | dict(
        num_kv_heads=int(config.get("num_key_value_heads", kv_heads) or shared["num_heads"]),
        mixers=("full_attention",) * num_layers,
        feed_forwards=("dense",) * num_layers,
        max_positions=int(config.get("max_position_embeddings", 32768)),
    )


def _write_qwen3(config: ModelConfig) -> dict[str, Any]:
    return {"architectures": ["Qwen3ForCausalLM"], "hidden_act": "silu"}


def _read_qwen3_moe(config: Mapping[str, Any]) -> dict[str, Any]:
    """As Qwen3, with experts in every layer but those of `mlp_only_layers` and those that `decoder_sparse_step` leaves out."""
    # transformers' class has no default of its own for the width of a head.
    shared = _read_qwen3({"head_dim": None, **config}, kv_heads=4)
    return shared | dict(
        feed_forwards=_qwen3_moe_layers(config, len(shared["mixers"])),
        num_experts=_num_experts(config),
        experts_per_token=int(config.get("num_experts_per_tok", 8)),
        d_expert=int(config.get("moe_intermediate_size", 768)),
        norm_expert_weights=bool(config.get("norm_topk_prob", False)),
    )


def _qwen3_moe_layers(config: Mapping[str, Any], num_layers: int) -> tuple[str, ...]:
    dense, step = set(config.get("mlp_only_layers") or ()), int(config.get("decoder_sparse_step", 1))
    sparse = [layer not in dense and _num_experts(config) > 0 and (layer + 1) % step == 0 for layer in range(num_layers)]
    return tuple("moe" if chosen else "dense" for chosen in sparse)


def _num_experts(config: Mapping[str, Any]) -> int:
    return int(config.get("num_experts", config.get("num_local_experts", 128)))


def _write_qwen3_moe(config: ModelConfig) -> dict[str, Any]:
    # Two keys say which layers have experts, in more ways than one: those that were read stay if they say what is so.
    dense = [layer for layer, kind in enumerate(config.feed_forwards) if kind == "dense"]
    said = config.hf and _qwen3_moe_layers(config.hf, config.num_layers) == config.feed_forwards
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "hidden_act": "silu",
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.experts_per_token,
        "moe_intermediate_size": config.d_expert,
        "norm_topk_prob": config.norm_expert_weights,
        **({} if said else {"mlp_only_layers": dense, "decoder_sparse_step": 1}),
    }


def _read_qwen3_5(config: Mapping[str, Any]) -> dict[str, Any]:
    _refuse(config, "hidden_act", ("silu", None))
    _refuse(config, "attn_output_gate", (True, None))
    _refuse_scaling(config)
    num_layers, rope = int(config["num_hidden_layers"]), _rope(config)
    interval = int(config.get("full_attention_interval", 4))
    kinds = config.get("layer_types") or ["linear_attention" if (layer + 1) % interval else "full_attention" for layer in range(num_layers)]
    shared = _read_shared(config, head_dim=256)
    width = shared["head_dim"] * float(rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 0.25)))
    return shared | dict(
        num_kv_heads=int(config.get("num_key_value_heads", 4)),
        mixers=tuple("gated_delta" if kind == "linear_attention" else kind for kind in kinds),
        feed_forwards=("dense",) * num_layers,
        rotary_dim=int(width),
        unit_offset_norms=True,
        attention_gate=True,
        delta_key_heads=int(config.get("linear_num_key_heads", 16)),
        delta_value_heads=int(config.get("linear_num_value_heads", 32)),
        delta_key_dim=int(config.get("linear_key_head_dim", 128)),
        delta_value_dim=int(config.get("linear_value_head_dim", 128)),
        delta_conv=int(config.get("linear_conv_kernel_dim", 4)),
        max_positions=int(config.get("max_position_embeddings", 32768)),
    )


def _write_qwen3_5(config: ModelConfig) -> dict[str, Any]:
    rope = {**_rope(_text(config.hf)), "rope_type": "default", "rope_theta": config.rope_theta}
    return {
        "architectures": ["Qwen3_5ForCausalLM"],
        "hidden_act": "silu",
        "layer_types": ["linear_attention" if mixer == "gated_delta" else mixer for mixer in config.mixers],
        "rope_parameters": {**rope, "partial_rotary_factor": config.rotary_width / config.head_dim},
        "linear_num_key_heads": config.delta_key_heads,
        "linear_num_value_heads": config.delta_value_heads,
        "linear_key_head_dim": config.delta_key_dim,
        "linear_value_head_dim": config.delta_value_dim,
        "linear_conv_kernel_dim": config.delta_conv,
    }


def _read_qwen3_5_moe(config: Mapping[str, Any]) -> dict[str, Any]:
    """As Qwen3.5, with experts and one shared by all tokens in every layer."""
    _refuse(config, "mlp_only_layers", (None, []))
    shared_width = int(config.get("shared_expert_intermediate_size", 512))
    fields = _read_qwen3_5({"num_key_value_heads": 2, "intermediate_size": shared_width, **config})
    return fields | dict(
        feed_forwards=("moe",) * len(fields["mixers"]),
        num_experts=int(config.get("num_experts", 256)),
        experts_per_token=int(config.get("num_experts_per_tok", 8)),
        d_expert=int(config.get("moe_intermediate_size", 512)),
        d_shared_expert=shared_width,
        norm_expert_weights=True,
    )


def _write_qwen3_5_moe(config: ModelConfig) -> dict[str, Any]:
    return _write_qwen3_5(config) | {
        "architectures": ["Qwen3_5MoeForCausalLM"],
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.experts_per_token,
        "moe_intermediate_size": config.d_expert,
        "shared_expert_intermediate_size": config.d_shared_expert,
    }


def _wrapped(reader: Callable[[Mapping[str, Any]], dict[str, Any]]) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """Reader of the wrapper with a vision tower, whose text decoder has a config of its own; what both say, the wrapper decides."""

    def read(config: Mapping[str, Any]) -> dict[str, Any]:
        own = {key: config[key] for key in ("tie_word_embeddings", "dtype", "torch_dtype") if config.get(key) is not None}
        return reader({"model_type": config["model_type"], **_text(config), **own})

    return read


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return config.get("text_config") or config


def _read_llama(config: Mapping[str, Any]) -> dict[str, Any]:
    _refuse(config, "hidden_act", ("silu", None))
    _refuse(config, "mlp_bias", (False, None))
    _refuse(config, "pretraining_tp", (1, None))
    num_layers, rope = int(config["num_hidden_layers"]), _rope(config)
    scaling = None
    if _rope_type(rope) == "llama3":
        factor, low, high = (float(rope[name]) for name in ("factor", "low_freq_factor", "high_freq_factor"))
        scaling = Llama3Scaling(factor, low, high, int(rope["original_max_position_embeddings"]))
    else:
        _refuse_scaling(config)
    shared = _read_shared(config, head_dim=None)
    return shared | dict(
        num_kv_heads=int(config.get("num_key_value_heads") or shared["num_heads"]),
        mixers=("full_attention",) * num_layers,
        feed_forwards=("dense",) * num_layers,
        qk_norm=False,
        rope_scaling=scaling,
        max_positions=int(config.get("max_position_embeddings", 2048)),
    )


def _write_llama(config: ModelConfig) -> dict[str, Any]:
    keys: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "mlp_bias": False, "rope_scaling": None}
    if (scaling := config.rope_scaling) is not None:
        rope = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_positions,
        }
        keys |= {"rope_scaling": rope, "rope_parameters": {"rope_theta": config.rope_theta, **rope}}
    return keys


def _read_gemma2(config: Mapping[str, Any]) -> dict[str, Any]:
    _refuse(config, "hidden_activation", ("gelu_pytorch_tanh", None))
    _refuse(config, "use_bidirectional_attention", (False, None))
    _refuse_scaling(config)
    num_layers = int(config["num_hidden_layers"])
    kinds = config.get("layer_types") or [("sliding_attention", "full_attention")[layer % 2] for layer in range(num_layers)]
    shared = _read_shared(config, head_dim=256, tied=True)
    return shared | dict(
        num_kv_heads=int(config.get("num_key_value_heads", 4) or shared["num_heads"]),
        mixers=tuple(kinds),
        feed_forwards=("dense",) * num_layers,
        qk_norm=False,
        unit_offset_norms=True,
        output_norms=True,
        activation="gelu_tanh",
        scale_embeddings=True,
        sliding_window=int(config.get("sliding_window", 4096) or 0),
        attention_scale=float(config.get("query_pre_attn_scalar", 256)) ** -0.5,
        attention_softcap=float(config.get("attn_logit_softcapping", 50.0) or 0),
        logit_softcap=float(config.get("final_logit_softcapping", 30.0) or 0),
        max_positions=int(config.get("max_position_embeddings", 8192)),
    )


def _write_gemma2(config: ModelConfig) -> dict[str, Any]:
    scalar = config.attention_scale**-2
    return {
        "architectures": ["Gemma2ForCausalLM"],
        "hidden_activation": "gelu_pytorch_tanh",
        "layer_types": list(config.mixers),
        "sliding_window": config.sliding_window,
        "query_pre_attn_scalar": round(scalar) if abs(scalar - round(scalar)) < 1e-6 * scalar else scalar,
        "attn_logit_softcapping": config.attention_softcap or None,
        "final_logit_softcapping": config.logit_softcap or None,
    }


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def _rope_type(rope: Mapping[str, Any]) -> str:
    return rope.get("rope_type", rope.get("type", "default"))


_READERS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "gemma2": _read_gemma2,
    "llama": _read_llama,
    "qwen3": _read_qwen3,
    "qwen3_moe": _read_qwen3_moe,
    "qwen3_5": _wrapped(_read_qwen3_5),
    "qwen3_5_text": _read_qwen3_5,
    "qwen3_5_moe": _wrapped(_read_qwen3_5_moe),
    "qwen3_5_moe_text": _read_qwen3_5_moe,
}
_WRITERS: dict[str, Callable[[ModelConfig], dict[str, Any]]] = {
    "gemma2": _write_gemma2,
    "llama": _write_llama,
    "qwen3": _write_qwen3,
    "qwen3_moe": _write_qwen3_moe,
    "qwen3_5": _write_qwen3_5,
    "qwen3_5_text": _write_qwen3_5,
    "qwen3_5_moe": _write_qwen3_5_moe,
    "qwen3_5_moe_text": _write_qwen3_5_moe,
}


def _refuse(config: Mapping[str, Any], key: str, allowed: tuple[Any, ...]) -> None:
    if config.get(key) not in allowed:
        raise ArchitectureError(f"config.json ({config['model_type']}): {key}={config[key]!r} is not implemented, expected {allowed[0]!r}")


def _refuse_scaling(config: Mapping[str, Any]) -> None:
    if _rope_type(rope := _rope(config)) != "default":
        raise ArchitectureError(f"config.json ({config['model_type']}): rotary scaling {rope!r} is not implemented for this family")
