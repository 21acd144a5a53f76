"""Products and norms with their precision said in one place."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def precision_for(dtype: jnp.dtype) -> jax.lax.Precision:
    """Matmul precision for operands of `dtype`: float32 means float32.

    GPUs would otherwise round float32 operands to TF32 and TPUs to bfloat16, which changes which features a top-k selects.
    """
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else jax.lax.Precision.DEFAULT


def linear(x: Float[Array, "*B I"], w_OI: Float[Array, "O I"]) -> Float[Array, "*B O"]:
    """`x @ w.T` with the weight as Hugging Face stores it, [out, in]: loading is a plain copy and no transpose is ever made.

    A weight that the checkpoint keeps in another dtype than the activations is cast to theirs.
    """
    contract = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, w_OI.astype(x.dtype), contract, precision=precision_for(x.dtype))


def rms_norm(x: Float[Array, "*B D"], w_D: Float[Array, " D"], eps: float) -> Float[Array, "*B D"]:
    """Root-mean-square norm over the last axis, statistics in float32, cast to the input's dtype before the gain (as Qwen3 does)."""
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * scale).astype(x.dtype) * w_D.astype(x.dtype)
