"""Interventions that read the stream through an SAE: clamp, ablate, and splicing the reconstruction in."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from qscope_jax.models.edits import EditContext, Where, check_fit
from qscope_jax.sae.autoencoder import SparseAutoencoder, SparseCode


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ClampFeatures:
    """Set the activations of W features to given values, keeping what the SAE does not explain.

    `h + sum_w (target_w - a_w) d_w`, with a the true code of h: the same as decoding the edited code and adding the SAE's error, so that
    a value which the feature already has changes nothing. Ablation is a target of 0.

    Attributes:
        sae: The SAE of the layer.
        layer: Layer after which the edit acts.
        features_W: Features; none of them twice.
        targets_BW: Their activations after the edit, for each row of the batch (or one row for all).
        where: Positions and phases.
    """

    sae: SparseAutoencoder
    layer: Int[Array, ""]
    features_W: Int[Array, " W"]
    targets_BW: Float[Array, "B W"]
    where: Where

    def check(self, num_layers: int, d_model: int, rows: int) -> None:
        """See `qscope_jax.models.edits.Edit.check`."""
        check_fit(self.layer, self.sae.d_model, self.targets_BW.shape[0], num_layers, d_model, rows)

    def touches(self, layer: Int[Array, ""]) -> Bool[Array, ""]:
        """Whether this is the edit's layer."""
        return self.layer == layer

    def __call__(self, x_BTD: Float[Array, "B T D"], layer: Int[Array, ""], context: EditContext) -> Float[Array, "B T D"]:
        """Clamp where the edit acts; elsewhere the stream is untouched to the bit."""
        batch, length, width = x_BTD.shape
        code = self.sae.encode(x_BTD.reshape(-1, width))
        actual_BTW = feature_activations(code, self.features_W).reshape(batch, length, -1)
        change_BTW = self.targets_BW[:, None] - actual_BTW
        directions_WD = self.sae.W_dec[...][self.features_W].astype(jnp.float32)
        shift = jnp.einsum("btw,wd->btd", change_BTW, directions_WD, precision=jax.lax.Precision.HIGHEST)
        active = self.where.mask(context)[..., None] & jnp.any(change_BTW != 0, axis=-1, keepdims=True)
        return jnp.where(active, (x_BTD.astype(jnp.float32) + shift).astype(x_BTD.dtype), x_BTD)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SpliceReconstruction:
    """Replace the stream by the SAE's reconstruction, or by a constant: what a metric of faithfulness compares.

    Attributes:
        sae: The SAE of the layer.
        layer: Layer after which the edit acts.
        constant_D: Put in place of the stream instead, where `use_constant` is true (zero or mean ablation).
        use_constant: Which of the two.
        where: Positions and phases.
        largest_norm: Tokens of a larger norm are left alone, as they are left out of training and of the metric.
    """

    sae: SparseAutoencoder
    layer: Int[Array, ""]
    constant_D: Float[Array, " D"]
    use_constant: Bool[Array, ""]
    where: Where
    largest_norm: Float[Array, ""]

    def check(self, num_layers: int, d_model: int, rows: int) -> None:
        """See `qscope_jax.models.edits.Edit.check`."""
        check_fit(self.layer, self.sae.d_model, 1, num_layers, d_model, rows)

    def touches(self, layer: Int[Array, ""]) -> Bool[Array, ""]:
        """Whether this is the edit's layer."""
        return self.layer == layer

    def __call__(self, x_BTD: Float[Array, "B T D"], layer: Int[Array, ""], context: EditContext) -> Float[Array, "B T D"]:
        """Replace where the edit acts."""
        flat_ND = x_BTD.reshape(-1, x_BTD.shape[-1]).astype(jnp.float32)
        rebuilt = jnp.where(self.use_constant, self.constant_D, self.sae.decode(self.sae.encode(flat_ND))).reshape(x_BTD.shape)
        ordinary = jnp.linalg.norm(flat_ND, axis=-1).reshape(x_BTD.shape[:-1]) <= self.largest_norm
        return jnp.where((self.where.mask(context) & ordinary)[..., None], rebuilt.astype(x_BTD.dtype), x_BTD)


def feature_activations(code: SparseCode, features_W: Int[Array, " W"]) -> Float[Array, "N W"]:
    """Activation of chosen features in a sparse code; 0 where they are not active."""
    hit_NKW = code.indices[..., None] == features_W
    return jnp.sum(jnp.where(hit_NKW, code.values[..., None], jnp.float32(0)), axis=-2)
