"""The sparse autoencoder: residual stream to sparse code and back."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from qscope_jax.sae.selection import largest_over_shards, pre_activations
from qscope_jax.sae.sparse import chosen_pre_activations, sparse_decode


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SparseCode:
    """Active features of N tokens.

    Attributes:
        values: Activations, descending in each row, never negative; a 0 is an empty slot (fewer than K features were active).
        indices: The features they belong to; void where the value is 0.
    """

    values: Float[Array, "N K"]
    indices: Int[Array, "N K"]


class SparseAutoencoder(nnx.Module):
    """Encoder, decoder and biases; row f of `W_dec` is the direction of feature f.

        z    = W_enc (x - [apply_b_dec_to_input] b_dec) + b_enc
        a    = topk_K(relu(z))             topk: the K largest, ties to the lower index
             | relu(z) * 1[z > threshold]  jumprelu, and batch_topk at inference; the K largest of those that pass
        xhat = a W_dec + b_dec

    Computed in float32 whatever the stream's dtype: rounding changes which features win.
    """

    def __init__(
        self,
        W_enc: Float[Array, "F D"],
        W_dec: Float[Array, "F D"],
        b_enc: Float[Array, " F"],
        b_dec: Float[Array, " D"],
        *,
        k: int,
        activation: str = "topk",
        apply_b_dec_to_input: bool = False,
        threshold: Float[Array, " F"] | None = None,
    ):
        """Hold the arrays.

        Args:
            W_enc: Encoder vectors.
            W_dec: Feature directions.
            b_enc: Encoder bias.
            b_dec: Decoder bias, added to every reconstruction.
            k: Slots of a code; for `topk` the number of active features.
            activation: `topk`, `batch_topk` or `jumprelu`.
            apply_b_dec_to_input: Whether the encoder sees x - b_dec.
            threshold: For `batch_topk` and `jumprelu`; strict.
        """
        self.W_enc, self.W_dec = nnx.Param(W_enc), nnx.Param(W_dec)
        self.b_enc, self.b_dec = nnx.Param(b_enc), nnx.Param(b_dec)
        if threshold is not None:
            self.threshold = nnx.Param(threshold)
        self.k, self.activation, self.apply_b_dec_to_input = k, activation, apply_b_dec_to_input

    @property
    def num_features(self) -> int:
        """F."""
        return self.W_enc.shape[-2]

    @property
    def d_model(self) -> int:
        """D."""
        return self.W_enc.shape[-1]

    def encoder_input(self, x_ND: Float[Array, "N D"]) -> Float[Array, "N D"]:
        """What the encoder multiplies: the stream in float32, less b_dec where the SAE is of that kind."""
        x = x_ND.astype(jnp.float32)
        return x - self.b_dec[...].astype(jnp.float32) if self.apply_b_dec_to_input else x

    def pre_activations(self, x_ND: Float[Array, "N D"], features: Int[Array, " W"] | None = None) -> Float[Array, "N W"]:
        """Pre-activations z of all features, or of some: then only their rows of the encoder are read."""
        W, b = self.W_enc[...], self.b_enc[...]
        if features is not None:
            W, b = W[features], b[features]
        return pre_activations(self.encoder_input(x_ND), W.astype(jnp.float32), b.astype(jnp.float32))

    def encode(self, x_ND: Float[Array, "N D"], *, k: int | None = None, allowed_F: Bool[Array, " F"] | None = None) -> SparseCode:
        """The sparse code of every token; its gradient reaches the encoder rows of active features, and only those.

        Args:
            x_ND: Residual stream.
            k: Slots, if not the SAE's own k.
            allowed_F: Features that may be active, if not all.
        """
        W, b = self.W_enc[...].astype(jnp.float32), self.b_enc[...].astype(jnp.float32)

        floor_F = None if self.activation == "topk" else self.threshold[...].astype(jnp.float32)
        chosen = largest_over_shards(self.encoder_input(x_ND), W, b, self.k if k is None else k, floor_F, allowed_F)
        values_NK, indices_NK = jax.lax.stop_gradient(chosen)
        return self.at(SparseCode(jnp.maximum(values_NK, 0), indices_NK), x_ND)

    def at(self, code: SparseCode, x_ND: Float[Array, "N D"]) -> SparseCode:
        """A code of `x_ND` computed before, differentiable in the stream and the encoder."""
        W, b = self.W_enc[...].astype(jnp.float32), self.b_enc[...].astype(jnp.float32)
        values_NK = chosen_pre_activations(code.values, code.indices, self.encoder_input(x_ND), W, b)
        return SparseCode(jnp.where(code.values > 0, values_NK, jnp.float32(0)), code.indices)

    def decode(self, code: SparseCode) -> Float[Array, "N D"]:
        """The reconstruction of every token, in float32."""
        return sparse_decode(code.values, code.indices, self.W_dec[...].astype(jnp.float32)) + self.b_dec[...].astype(jnp.float32)

    def direction(self, feature: int | Int[Array, ""]) -> Float[Array, " D"]:
        """The direction of a feature, as stored, not normalised."""
        return self.W_dec[...][feature].astype(jnp.float32)


def replace_params(sae: SparseAutoencoder, changes: dict[str, Array]) -> SparseAutoencoder:
    """A copy of an SAE with some parameters replaced."""

    def swap(path: Any, leaf: Array) -> Array:
        name = next((key.name for key in path if getattr(key, "name", None) in changes), None)
        return leaf if name is None else changes[name]

    return jax.tree_util.tree_map_with_path(swap, sae)


def densify(code: SparseCode, num_features: int) -> Float[Array, "N F"]:
    """The code as a dense array, for tests, plots and small dictionaries."""
    rows = jnp.arange(code.values.shape[0], dtype=jnp.int32)[:, None]
    return jnp.zeros((code.values.shape[0], num_features), code.values.dtype).at[rows, code.indices].add(code.values)
