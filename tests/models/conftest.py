"""Random decoders, and transformers' models as the references of this package."""

import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.models.config import ModelConfig
from qscope_jax.models.decoder import Decoder

_SHAPES = {
    "tied": dict(tie_word_embeddings=True, num_attention_heads=4, num_key_value_heads=2, head_dim=12, rope_theta=1e4),
    "untied": dict(tie_word_embeddings=False, num_attention_heads=4, num_key_value_heads=4, head_dim=8, rope_theta=1e6),
    "one key/value head": dict(tie_word_embeddings=False, num_attention_heads=3, num_key_value_heads=1, head_dim=16, rope_theta=5e5),
    "experts": dict(
        family="Qwen3Moe", num_attention_heads=4, num_key_value_heads=2, head_dim=12, rope_theta=1e4, num_experts=6, num_experts_per_tok=2,
        moe_intermediate_size=20, norm_topk_prob=False,
    ),
    "experts in some layers": dict(
        family="Qwen3Moe", num_attention_heads=4, num_key_value_heads=2, head_dim=8, rope_theta=1e6, num_experts=5, num_experts_per_tok=3,
        moe_intermediate_size=16, norm_topk_prob=True, mlp_only_layers=[1], tie_word_embeddings=True,
    ),
    "llama": dict(family="Llama", num_attention_heads=4, num_key_value_heads=2, rope_theta=1e4),
    "llama, scaled": dict(
        family="Llama", num_attention_heads=4, num_key_value_heads=1, head_dim=12, rope_theta=5e5, tie_word_embeddings=True,
        rope=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=128),
    ),
    "gemma": dict(
        family="Gemma2", num_attention_heads=4, num_key_value_heads=2, head_dim=12, rope_theta=1e4, sliding_window=9, query_pre_attn_scalar=20,
        attn_logit_softcapping=3.0, final_logit_softcapping=5.0, layers=4,
    ),
    # A first token's memory read is as small as its query and key are unlike; the norm behind it would blow rounding up tenfold were epsilon small.
    "delta": dict(
        family="Qwen3_5", num_attention_heads=4, num_key_value_heads=2, head_dim=16, rope_theta=1e4, rms_norm_eps=0.1, layers=4,
        rope=dict(rope_type="default", partial_rotary_factor=0.25), full_attention_interval=2, linear_num_key_heads=2, linear_num_value_heads=6,
        linear_key_head_dim=8, linear_value_head_dim=12,
    ),
    "delta, tied, wrapped": dict(
        family="Qwen3_5", wrapped=True, num_attention_heads=2, num_key_value_heads=1, head_dim=16, rope_theta=1e7, tie_word_embeddings=True,
        rope=dict(rope_type="default", partial_rotary_factor=0.5, mrope_interleaved=True, mrope_section=[2, 1, 1]), layers=4, rms_norm_eps=0.1,
        linear_num_key_heads=3, linear_num_value_heads=3, linear_key_head_dim=12, linear_value_head_dim=8, linear_conv_kernel_dim=3,
    ),
    "delta, experts": dict(
        family="Qwen3_5Moe", num_attention_heads=4, num_key_value_heads=2, head_dim=16, rope_theta=1e4, layers=4, full_attention_interval=2,
        rope=dict(rope_type="default", partial_rotary_factor=0.25), linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
        linear_value_head_dim=8, rms_norm_eps=0.1, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=20,
        shared_expert_intermediate_size=28,
    ),
}  # fmt: skip
_VISION = dict(depth=1, hidden_size=16, intermediate_size=24, num_heads=2, out_hidden_size=32, num_position_embeddings=16)
LENGTH = 600


@pytest.fixture(scope="session")
def random_decoder() -> Callable[..., Decoder]:
    """Factory of decoders whose every weight matters: gains are not 1, and products keep their operands' scale.

    A layer's weights depend on its number alone, not on how layers are stacked.
    """

    def make(config: ModelConfig, seed: int = 0) -> Decoder:
        def draw(path, leaf) -> jax.Array:
            name, place = _place(path)
            entropy = (seed, zlib.crc32(name.encode()))
            if name.startswith("layers"):
                normal = np.stack([_normal((*entropy, repeat * config.period + place), leaf.shape[1:]) for repeat in range(leaf.shape[0])])
            else:
                normal = _normal(entropy, leaf.shape)
            return jnp.asarray(1 + 0.3 * normal if "norm" in name else normal * leaf.shape[-1] ** -0.5, leaf.dtype)

        return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(lambda: Decoder(config, jax.random.key(0))))

    return make


@pytest.fixture(scope="session")
def by_layer() -> Callable[[Decoder], dict[str, np.ndarray]]:
    """The arrays of a decoder (or of its gradient) by name and layer, however layers are stacked."""

    def split(decoder: Decoder) -> dict[str, np.ndarray]:
        arrays: dict[str, np.ndarray] = {}
        for path, leaf in jax.tree_util.tree_flatten_with_path(decoder)[0]:
            name, place = _place(path)
            array = np.asarray(leaf)
            layers = {f"{name}.{repeat * decoder.config.period + place}": part for repeat, part in enumerate(array)}
            arrays |= layers if name.startswith("layers") else {name: array}
        return arrays

    return split


def _place(path) -> tuple[str, int]:
    """Name of a leaf without its place in the period, and that place."""
    text = jax.tree_util.keystr(path)
    place = re.match(r"\.layers\[(\d+)\]", text)
    return re.sub(r"\[\d+\]|\.value|^\.", "", text), int(place[1]) if place else 0


def _normal(seed: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


@dataclass(frozen=True)
class Reference:
    """A transformers model with perturbed random weights, the folder that it saved, and what it computes."""

    model: Any
    folder: Path

    @cached_property
    def tokens(self) -> np.ndarray:
        """Two rows of `LENGTH` random tokens."""
        return np.random.default_rng(1).integers(0, self.model.config.get_text_config().vocab_size, (2, LENGTH)).astype(np.int32)

    @cached_property
    def outputs(self) -> tuple[np.ndarray, np.ndarray]:
        """Logits, and the residual stream after every layer [L, B, T, D], taken by hooks: `hidden_states[-1]` is after the final norm."""
        import torch

        residuals = []
        inner = getattr(self.model.model, "language_model", self.model.model)
        hooks = [layer.register_forward_hook(lambda module, inputs, output: residuals.append(output.numpy())) for layer in inner.layers]
        with torch.no_grad():
            logits = self.model(torch.from_numpy(self.tokens).long()).logits.numpy()
        for hook in hooks:
            hook.remove()
        return logits, np.stack(residuals)


@pytest.fixture(scope="session")
def make_reference(tmp_path_factory) -> Callable[[str], Reference]:
    """Factory of references by the name of their shape, each made once."""
    made: dict[str, Reference] = {}

    def make(shape: str) -> Reference:
        if shape not in made:
            made[shape] = _make_reference(shape, tmp_path_factory.mktemp("reference"))
        return made[shape]

    return make


def _make_reference(shape: str, folder: Path) -> Reference:
    import torch
    import transformers

    settings: dict[str, Any] = dict(_SHAPES[shape])
    family = settings.pop("family", "Qwen3")
    rope = {"rope_theta": settings.pop("rope_theta"), **settings.pop("rope", {"rope_type": "default"})}
    sizes = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=settings.pop("layers", 3))
    wrapped = settings.pop("wrapped", False)
    name = f"{family}TextConfig" if hasattr(transformers, f"{family}TextConfig") else f"{family}Config"
    config = getattr(transformers, name)(**sizes, rope_parameters=rope, **settings)
    if wrapped:
        tied = settings.get("tie_word_embeddings", False)
        config = getattr(transformers, f"{family}Config")(text_config=config.to_dict(), vision_config=_VISION, tie_word_embeddings=tied)
    model = getattr(transformers, f"{family}{'ForConditionalGeneration' if wrapped else 'ForCausalLM'}")(config).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        normal = torch.randn(parameter.shape, generator=generator)
        offset = 0 if family.startswith("Qwen3_5") and "linear_attn" not in name else 1  # what such a norm adds to the 1 that it has anyway
        parameter.data = offset + 0.3 * normal if "norm" in name else normal * parameter.shape[-1] ** -0.5
    model.save_pretrained(folder)
    return Reference(model, folder)


@pytest.fixture(params=list(_SHAPES))
def reference(request, make_reference) -> Reference:
    """Every shape of reference in turn."""
    return make_reference(request.param)


class NumberTokenizer:
    """A tokenizer whose texts are the token ids, written out."""

    def __call__(self, texts: list[str], add_special_tokens: bool) -> dict[str, list[list[int]]]:
        return {"input_ids": [[int(number) for number in text.split()] for text in texts]}

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return " ".join(map(str, ids))

    def apply_chat_template(self, turns: list[dict[str, str]], tokenize: bool, add_generation_prompt: bool) -> str:
        return " ".join(f"1 {turn['content']} 2" for turn in turns) + " 3"


@pytest.fixture(scope="session")
def number_tokenizer() -> NumberTokenizer:
    """Texts are token ids, written out."""
    return NumberTokenizer()
