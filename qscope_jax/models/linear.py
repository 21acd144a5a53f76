"""Products and norms with their precision said in one place."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qscope_jax.models.low_rank import LowRank


def precision_for(dtype: jnp.dtype) -> jax.lax.Precision:
    """Matmul precision for operands of `dtype`: float32 means float32.

    GPUs would otherwise round float32 operands to TF32 and TPUs to bfloat16, which changes which features a top-k selects.
    """
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else jax.lax.Precision.DEFAULT


def linear(x: Float[Array, "*B I"], w_OI: Float[Array, "O I"] | LowRank) -> Float[Array, "*B O"]:
    """`x @ w.T` with the weight as Hugging Face stores it, [out, in]: loading is a plain copy and no transpose is ever made.

    A weight that the checkpoint keeps in another dtype than the activations is cast to theirs. A weight with a low-rank update is applied in
    its two parts.
    """
    if isinstance(w_OI, LowRank):
        update = linear(linear(x, w_OI.lora_A[...]), w_OI.lora_B[...])
        return linear(x, jax.lax.stop_gradient(w_OI.base[...])) + jnp.asarray(w_OI.scale, x.dtype) * update
    contract = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, w_OI.astype(x.dtype), contract, precision=precision_for(x.dtype))


def rms_norm(x: Float[Array, "*B D"], w_D: Float[Array, " D"], eps: float, unit_offset: bool = False) -> Float[Array, "*B D"]:
    """Root-mean-square norm over the last axis, statistics in float32.

    The result is cast to the input's dtype before it is multiplied by w (Qwen3, Llama), or, with `unit_offset`, multiplied by 1 + w and
    then cast (Gemma, Qwen3.5).
    """
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (normed * (1 + w_D.astype(jnp.float32))).astype(x.dtype) if unit_offset else normed.astype(x.dtype) * w_D.astype(x.dtype)


def soft_cap(x: Float[Array, "*B"], cap: float) -> Float[Array, "*B"]:
    """`cap * tanh(x / cap)`, or x where `cap` is 0."""
    return cap * jnp.tanh(x / cap) if cap else x
