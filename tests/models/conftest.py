"""Random decoders, and transformers' Qwen3 as the reference of this package."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

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
}
LENGTH = 600


@pytest.fixture(scope="session")
def random_decoder() -> Callable[..., Decoder]:
    """Factory of decoders whose every weight matters: gains are not 1, and products keep their operands' scale."""

    def make(config: ModelConfig, seed: int = 0) -> Decoder:
        generator = np.random.default_rng(seed)

        def draw(path, leaf) -> jax.Array:
            normal = generator.standard_normal(leaf.shape)
            gain = "norm" in jax.tree_util.keystr(path)
            return jnp.asarray((1 + 0.3 * normal if gain else normal * leaf.shape[-1] ** -0.5).astype(leaf.dtype))

        return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(lambda: Decoder(config, jax.random.key(0))))

    return make


@dataclass(frozen=True)
class Reference:
    """A transformers model with perturbed random weights, the folder that it saved, and what it computes."""

    model: object
    folder: Path

    @cached_property
    def tokens(self) -> np.ndarray:
        """Two rows of `LENGTH` random tokens."""
        return np.random.default_rng(1).integers(0, self.model.config.vocab_size, (2, LENGTH)).astype(np.int32)

    @cached_property
    def outputs(self) -> tuple[np.ndarray, np.ndarray]:
        """Logits, and the residual stream after every layer [L, B, T, D], taken by hooks: `hidden_states[-1]` is after the final norm."""
        import torch

        residuals = []
        hooks = [layer.register_forward_hook(lambda module, inputs, output: residuals.append(output.numpy())) for layer in self.model.model.layers]
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
    from transformers import Qwen3Config, Qwen3ForCausalLM

    settings = dict(_SHAPES[shape])
    rope = {"rope_type": "default", "rope_theta": settings.pop("rope_theta")}
    config = Qwen3Config(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, rope_parameters=rope, **settings)
    model = Qwen3ForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        normal = torch.randn(parameter.shape, generator=generator)
        parameter.data = 1 + 0.3 * normal if "norm" in name else normal * parameter.shape[-1] ** -0.5
    model.save_pretrained(folder)
    return Reference(model, folder)


@pytest.fixture(params=list(_SHAPES))
def reference(request, make_reference) -> Reference:
    """Every shape of reference in turn."""
    return make_reference(request.param)
