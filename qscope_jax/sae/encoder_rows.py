"""A few rows of an encoder by themselves: what reads, penalises or traces chosen features without the rest of the SAE in memory."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qscope_jax.errors import InputError
from qscope_jax.parallel.rules import on_host
from qscope_jax.sae.layer_sae import LayerSAE
from qscope_jax.sae.selection import pre_activations


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EncoderRows:
    """The encoder's rows of S features, in float32.

    Attributes:
        W_SD: Encoder vectors.
        b_S: Their biases; where the encoder sees x - b_dec, b_dec is in them: b_enc - W_enc b_dec.
    """

    W_SD: Float[Array, "S D"]
    b_S: Float[Array, " S"]

    def __call__(self, x_ND: Float[Array, "N D"]) -> Float[Array, "N S"]:
        """Pre-activations: no threshold, no top-k, negative ones too; float32 whatever the stream's dtype. Differentiable in the stream."""
        return pre_activations(x_ND.astype(jnp.float32), self.W_SD, self.b_S)

    def tensors(self) -> dict[str, np.ndarray]:
        """The arrays on the host, for writing: `W` and `b`."""
        return {"W": np.asarray(self.W_SD), "b": np.asarray(self.b_S)}

    def activations(self, x_ND: Float[Array, "N D"]) -> Float[Array, "N S"]:
        """Positive parts of the pre-activations."""
        return jnp.maximum(self(x_ND), jnp.float32(0))


def encoder_rows(sae: LayerSAE, features: Sequence[int]) -> EncoderRows:
    """Take features' rows out of an SAE, in the order given; only they are copied, to one device.

    In a run of several processes all must call this.

    Raises:
        InputError: no feature, or one that the SAE does not have.
    """
    if not len(features):
        raise InputError(f"no feature of layer {sae.layer} is given; give at least one")
    chosen = np.asarray([sae.check_feature(int(feature)) for feature in features])
    inner = sae.autoencoder
    W_SD = on_host(inner.W_enc[...][chosen]).astype(np.float32)
    b_S = on_host(inner.b_enc[...][chosen]).astype(np.float64)
    if inner.apply_b_dec_to_input:
        b_S = b_S - W_SD.astype(np.float64) @ on_host(inner.b_dec[...]).astype(np.float64)
    return EncoderRows(jnp.asarray(W_SD), jnp.asarray(b_S.astype(np.float32)))
