"""Feed-forward modules."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from qscope_jax.models.config import ModelConfig
from qscope_jax.models.linear import linear

_ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": partial(jax.nn.gelu, approximate=True)}


class GatedMLP(nnx.Module):
    """Gated feed-forward (Shazeer 2020): `down(act(gate(x)) * up(x))`; with SiLU it is SwiGLU."""

    def __init__(self, config: ModelConfig, key: jax.Array):
        """Random weights: normal with standard deviation 0.02, output projection scaled down with depth."""
        self.activation = config.activation
        keys = jax.random.split(key, 3)
        shapes = ((config.d_ff, config.d_model), (config.d_ff, config.d_model), (config.d_model, config.d_ff))
        scales = (0.02, 0.02, 0.02 / math.sqrt(2 * config.num_layers))
        self.gate_proj, self.up_proj, self.down_proj = (
            nnx.Param((jax.random.normal(k, shape, jnp.float32) * scale).astype(config.dtype))
            for k, shape, scale in zip(keys, shapes, scales, strict=True)
        )

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The layer's contribution to the residual stream."""
        hidden_BTI = _ACTIVATIONS[self.activation](linear(x_BTD, self.gate_proj[...])) * linear(x_BTD, self.up_proj[...])
        return linear(hidden_BTI, self.down_proj[...])
