"""A weight with a low-rank update beside it, which takes the weight's place in a decoder."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class LowRank(nnx.Module):
    """`W + scale * B A` (Hu et al. 2021, arXiv 2106.09685), never multiplied out: `linear` applies both parts.

    Stacked layers give every array the same leading axis. No gradient reaches W.
    """

    def __init__(self, base: Float[Array, "*R O I"], lora_A: Float[Array, "*R W I"], lora_B: Float[Array, "*R O W"], scale: float):
        """Hold the arrays; W is the rank of the update."""
        self.base, self.lora_A, self.lora_B = nnx.Param(base), nnx.Param(lora_A), nnx.Param(lora_B)
        self.scale = scale

    def __getitem__(self, whole: object) -> "LowRank":
        """Itself: modules write `linear(x, self.q_proj[...])` whatever their weight is."""
        return self

    def multiplied_out(self) -> Float[Array, "*R O I"]:
        """The one matrix, summed in float32, in the dtype of W."""
        base = self.base[...]
        update = jnp.matmul(self.lora_B[...].astype(jnp.float32), self.lora_A[...].astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
        return (base.astype(jnp.float32) + self.scale * update).astype(base.dtype)
