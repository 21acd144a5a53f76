"""How faithful an SAE is: reconstruction metrics, each with its formula, and cross-entropy when the reconstruction is spliced in."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qscope_jax.data.batches import TokenBatch
from qscope_jax.errors import InputError
from qscope_jax.models.decoder import Decoder
from qscope_jax.models.edits import where
from qscope_jax.models.language_model import LanguageModel, forward
from qscope_jax.models.scoring import next_token_loss, token_divergences
from qscope_jax.sae.autoencoder import SparseAutoencoder
from qscope_jax.sae.edits import SpliceReconstruction
from qscope_jax.sae.filtering import MAX_NORM_MULTIPLE, median_norm, ordinary_tokens
from qscope_jax.sae.layer_sae import LayerSAE
from qscope_jax.sae.sparse import scatter_scalars


@jax.jit
def reconstruction_sums(sae: SparseAutoencoder, x_ND: Float[Array, "N D"], mask_N: Bool[Array, " N"]) -> dict[str, Array]:
    """Sums over counted tokens from which every metric follows, beside the stream's mean `mean_D`.

    `x2` is the sum of squares about that mean: about 0, a stream with a large mean would lose its variance to float32's rounding.
    """
    x = x_ND.astype(jnp.float32)
    code = sae.encode(x)
    rebuilt = sae.decode(code)
    weight_N = mask_N.astype(jnp.float32)
    tokens = jnp.sum(weight_N)
    mean_D = jnp.einsum("n,nd->d", weight_N, x, precision=jax.lax.Precision.HIGHEST) / jnp.maximum(tokens, 1)
    norm_x, norm_rebuilt = jnp.linalg.norm(x, axis=-1), jnp.linalg.norm(rebuilt, axis=-1)
    active_NK = (code.values > 0) & mask_N[:, None]
    cosine_N = jnp.sum(x * rebuilt, axis=-1) / jnp.maximum(norm_x * norm_rebuilt, jnp.float32(1e-8))
    return {
        "tokens": tokens,
        "mean_D": mean_D,
        "x2": jnp.sum(weight_N * jnp.sum(jnp.square(x - mean_D), axis=-1)),
        "e2": jnp.sum(weight_N * jnp.sum(jnp.square(x - rebuilt), axis=-1)),
        "active": jnp.sum(active_NK, dtype=jnp.float32),
        "activation": jnp.sum(jnp.where(active_NK, code.values, jnp.float32(0))),
        "cosine": jnp.sum(weight_N * cosine_N),
        "l2_ratio": jnp.sum(weight_N * norm_rebuilt / jnp.where(norm_x < 1e-4, jnp.float32(1), norm_x)),
        "fired_F": scatter_scalars(active_NK.astype(jnp.float32), code.indices, sae.num_features),
    }


class ReconstructionMetrics:
    """Sums of `reconstruction_sums` over batches, added in float64 on the host, and one quotient at the end."""

    def __init__(self):
        """Begin with nothing counted."""
        self._sums: dict[str, np.ndarray] = {}

    def add(self, sae: SparseAutoencoder, x_ND: Float[Array, "N D"], mask_N: Bool[Array, " N"]) -> None:
        """Count a batch."""
        new = {name: np.asarray(value, np.float64) for name, value in reconstruction_sums(sae, x_ND, mask_N).items()}
        old = self._sums or {name: np.zeros_like(value) for name, value in new.items()}
        sums = {name: old[name] + value for name, value in new.items()}
        # Chan et al. 1983: means are pooled, and sums of squares about them gain what lies between the means.
        share = new["tokens"] / max(float(sums["tokens"]), 1.0)
        apart_D = new["mean_D"] - old["mean_D"]
        sums["mean_D"] = old["mean_D"] + share * apart_D
        sums["x2"] = sums["x2"] + old["tokens"] * share * np.sum(np.square(apart_D))
        self._sums = sums

    @property
    def firing_rate(self) -> Float[np.ndarray, " F"]:
        """Share of counted tokens at which each feature fires."""
        return self._sums["fired_F"] / max(float(self._sums["tokens"]), 1.0)

    def result(self) -> dict[str, float]:
        """The metrics, over all counted tokens.

        `fvu` = sum |e|^2 / sum |x - mean x|^2; `explained_variance` = 1 - fvu; `mse` = mean |e|^2; `l0`, `l1` = mean count and sum of
        activations; `cossim` = mean cosine of x and its reconstruction; `l2_ratio` = mean |xhat| / |x|; `dead_fraction` = share of
        features that never fired on these `tokens`; `dense_fraction` = share that fired on more than a tenth of them.
        """
        s, tokens = self._sums, max(float(self._sums["tokens"]), 1.0)
        fvu = float(s["e2"] / s["x2"]) if s["x2"] > 0 else float("nan")
        return {
            "tokens": float(s["tokens"]),
            "fvu": fvu,
            "explained_variance": 1.0 - fvu,
            "mse": float(s["e2"] / tokens),
            "l0": float(s["active"] / tokens),
            "l1": float(s["activation"] / tokens),
            "cossim": float(s["cosine"] / tokens),
            "l2_ratio": float(s["l2_ratio"] / tokens),
            "dead_fraction": float(np.mean(s["fired_F"] == 0)),
            "dense_fraction": float(np.mean(self.firing_rate > 0.1)),
        }


@dataclass(frozen=True)
class EvaluationConfig:
    """Which tokens an evaluation counts."""

    batch_size: int = 16
    """Texts a forward pass."""
    drop_first: bool = True
    """Leave the first token of every text out."""
    max_norm_multiple: float = MAX_NORM_MULTIPLE
    """Leave tokens out whose norm exceeds this multiple of the median; 0 keeps all."""


def evaluate_sae(
    model: LanguageModel, saes: Sequence[LayerSAE], texts: Sequence[str], config: EvaluationConfig | None = None, *, splice: bool = True
) -> dict[int, dict[str, float]]:
    """Reconstruction and, with `splice`, cross-entropy metrics of SAEs on texts, by layer; one model pass serves all layers.

    Every metric comes as it is, over ordinary tokens, and with the suffix `_all` over all tokens but padding.

    Raises:
        ShapeError: an SAE does not fit the model.
        InputError: a layer out of range or given twice, no text, or an empty one.
    """
    config = config or EvaluationConfig()
    if not len(texts):
        raise InputError("there are no texts to evaluate on; give at least one")
    for sae in saes:
        sae.check_width(model.config.d_model, model.name)
        model.check_layer(sae.layer)
    ordinary, every = ({sae.layer: ReconstructionMetrics() for sae in saes} for _ in range(2))
    layers = [sae.layer for sae in saes]
    if not layers or len(set(layers)) != len(layers):
        raise InputError(f"SAEs of layers {layers}: give one or more, and of each layer one; compare two of a layer in two calls")
    spliced: dict[int, dict[str, float]] = {layer: {} for layer in layers}
    for start in range(0, len(texts), config.batch_size):
        batch = model.batch(texts[start : start + config.batch_size])
        segment_ids = jnp.asarray(batch.segment_ids_BT)
        with jax.set_mesh(model.mesh):
            out = forward(model.decoder, batch.tokens_BT, segment_ids, (), jnp.asarray(layers, jnp.int32), stop_after=None if splice else max(layers))
        assert out.residuals is not None
        for sae, x in zip(saes, out.residuals, strict=True):
            mask = ordinary_tokens(x, segment_ids, max_norm_multiple=config.max_norm_multiple, drop_first=config.drop_first)
            flat = x.reshape(-1, x.shape[-1])
            ordinary[sae.layer].add(sae.autoencoder, flat, mask.reshape(-1))
            every[sae.layer].add(sae.autoencoder, flat, segment_ids.reshape(-1) > 0)
            if out.logits is not None:
                with jax.set_mesh(model.mesh):
                    sums = splice_sums(model.decoder, sae, batch, x, out.logits, config)
                for name, value in sums.items():
                    spliced[sae.layer][name] = spliced[sae.layer].get(name, 0.0) + value
    results = {}
    for layer in layers:
        both = ordinary[layer].result() | {f"{name}_all": value for name, value in every[layer].result().items()}
        results[layer] = both | (splice_scores(spliced[layer]) if splice else {})
    return results


def splice_sums(decoder: Decoder, sae: LayerSAE, batch: TokenBatch, x: Array, clean: Array, config: EvaluationConfig) -> dict[str, float]:
    """Sums of cross-entropy and divergence with the layer's stream intact, reconstructed, zeroed, and replaced by its mean.

    Tokens that the filter leaves out keep their stream in every variant.
    """
    tokens, segment_ids = jnp.asarray(batch.tokens_BT), jnp.asarray(batch.segment_ids_BT)
    mask = ordinary_tokens(x, segment_ids, max_norm_multiple=config.max_norm_multiple, drop_first=config.drop_first)
    norms = jnp.linalg.norm(x.astype(jnp.float32), axis=-1)
    limit = config.max_norm_multiple * median_norm(norms, segment_ids > 0) if config.max_norm_multiple else jnp.float32(jnp.inf)
    kept = jnp.sum(mask, dtype=jnp.float32)
    mean_D = jnp.sum(jnp.where(mask[..., None], x.astype(jnp.float32), jnp.float32(0)), axis=(0, 1)) / jnp.maximum(kept, 1)
    place = where(slice(1 if config.drop_first else 0, None))
    ce, weight, _ = _splice_losses(clean, clean, tokens, segment_ids)
    sums = {"tokens": float(weight), "ce_clean": float(ce)}
    for name, constant in (("sae", None), ("zero", jnp.zeros_like(mean_D)), ("mean", mean_D)):
        edit = SpliceReconstruction(
            sae.autoencoder, jnp.int32(sae.layer), mean_D if constant is None else constant, jnp.asarray(constant is not None), place, limit
        )
        out = forward(decoder, tokens, segment_ids, (edit,))
        assert out.logits is not None
        ce, _, kl = _splice_losses(out.logits, clean, tokens, segment_ids)
        sums |= {f"ce_{name}": float(ce), f"kl_{name}": float(kl)}
    return sums


def splice_scores(sums: dict[str, float]) -> dict[str, float]:
    """`ce_loss_score` = (CE_zero - CE_sae) / (CE_zero - CE_clean), the same against mean ablation, and `kl_div_score` = 1 - KL_sae / KL_zero."""
    tokens = max(sums["tokens"], 1.0)
    means = {name: value / tokens for name, value in sums.items() if name != "tokens"}
    score: dict[str, Any] = {f"{name}": value for name, value in means.items()}
    for baseline, suffix in (("zero", ""), ("mean", "_mean_ablation")):
        gap = means[f"ce_{baseline}"] - means["ce_clean"]
        score[f"ce_loss_score{suffix}"] = (means[f"ce_{baseline}"] - means["ce_sae"]) / gap if gap else float("nan")
    score["kl_div_score"] = 1.0 - means["kl_sae"] / means["kl_zero"] if means["kl_zero"] else float("nan")
    return score


@jax.jit
def _splice_losses(
    logits: Float[Array, "B T V"], clean: Float[Array, "B T V"], tokens_BT: Int[Array, "B T"], segment_ids: Int[Array, "B T"]
) -> tuple[Array, Array, Array]:
    loss, weight = next_token_loss(logits, tokens_BT, segment_ids)
    return loss, weight, jnp.sum(token_divergences(logits, clean, segment_ids))
