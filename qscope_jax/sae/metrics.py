"""How faithful SAEs are on texts: how well they rebuild the stream, and what the model loses when it runs on what they rebuilt."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from qscope_jax.data.batches import TokenBatch
from qscope_jax.errors import InputError
from qscope_jax.models.decoder import Decoder
from qscope_jax.models.edits import where
from qscope_jax.models.language_model import LanguageModel, forward
from qscope_jax.models.scoring import token_divergences, token_losses
from qscope_jax.sae.edits import SpliceReconstruction
from qscope_jax.sae.filtering import MAX_NORM_MULTIPLE, first_tokens, median_norm, ordinary_tokens
from qscope_jax.sae.geometry import code_geometry
from qscope_jax.sae.layer_sae import LayerSAE
from qscope_jax.sae.reconstruction import ReconstructionMetrics, reconstruction_sums


@dataclass(frozen=True)
class EvaluationConfig:
    """Which tokens an evaluation counts."""

    batch_size: int = 16
    """Texts a forward pass."""
    drop_first: bool = True
    """Leave the first token of every text out."""
    max_norm_multiple: float = MAX_NORM_MULTIPLE
    """Leave tokens out whose norm exceeds this multiple of the median; 0 keeps all."""
    densities: bool = False
    """Also give the histogram of log10 firing rates, over ordinary tokens and over all."""
    geometry: bool = False
    """Also compare the SAE's directions with each other: takes 4 F^2 D operations."""


def evaluate_sae(
    model: LanguageModel, saes: Sequence[LayerSAE], texts: Sequence[str], config: EvaluationConfig | None = None, *, splice: bool = True
) -> dict[int, dict[str, Any]]:
    """Reconstruction and, with `splice`, cross-entropy metrics of SAEs on texts, by layer; one model pass serves all layers.

    Every metric of `ReconstructionMetrics.result` comes as it is, over ordinary tokens, and with the suffix `_all` over all tokens but
    padding. What lies between: `first_tokens` of texts, and `outlier_tokens` of too large a norm. `damaged_tokens`, whose stream is NaN or
    infinite, count nowhere else. `CodeGeometry.summary` and the histogram of firing rates come where the config asks for them.

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
    layers = [sae.layer for sae in saes]
    if not layers or len(set(layers)) != len(layers):
        raise InputError(f"SAEs of layers {layers}: give one or more, and of each layer one; compare two of a layer in two calls")
    found = {layer: _LayerSums() for layer in layers}
    for start in range(0, len(texts), config.batch_size):
        batch = model.batch(texts[start : start + config.batch_size])
        segment_ids = jnp.asarray(batch.segment_ids_BT)
        with jax.set_mesh(model.mesh):
            out = forward(model.decoder, batch.tokens_BT, segment_ids, (), jnp.asarray(layers, jnp.int32), stop_after=None if splice else max(layers))
            assert out.residuals is not None
            for place, sae in enumerate(saes):
                x = out.residuals[place]
                counted = count_tokens(x, segment_ids, config.max_norm_multiple, config.drop_first)
                found[sae.layer].add(sae, x, counted)
                if out.logits is not None:
                    found[sae.layer].add_splice(splice_sums(model.decoder, sae, batch, x, out.logits, counted, config))
    return {sae.layer: found[sae.layer].result(sae, config) for sae in saes}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CountedTokens:
    """Which tokens of a batch count, and how many do not.

    Attributes:
        ordinary_BT: Those of the metrics as such.
        every_BT: Those of the metrics with the suffix `_all`.
        first: First tokens left out of `ordinary_BT`.
        outliers: Tokens left out of it for their norm.
        damaged: Tokens in neither, as their stream is NaN or infinite.
    """

    ordinary_BT: Bool[Array, "B T"]
    every_BT: Bool[Array, "B T"]
    first: Int[Array, ""]
    outliers: Int[Array, ""]
    damaged: Int[Array, ""]


@partial(jax.jit, static_argnames=("max_norm_multiple", "drop_first"))
def count_tokens(x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"], max_norm_multiple: float, drop_first: bool) -> CountedTokens:
    """Sort the tokens of a batch; see `ordinary_tokens`. Damaged ones take no part in the median that outliers are measured by."""
    finite_BT = jnp.all(jnp.isfinite(x), axis=-1)
    every_BT = (segment_ids > 0) & finite_BT
    within_BT = ordinary_tokens(x, jnp.where(finite_BT, segment_ids, 0), max_norm_multiple=max_norm_multiple, drop_first=False)
    first_BT = every_BT & first_tokens(segment_ids) if drop_first else jnp.zeros_like(every_BT)
    ordinary_BT = within_BT & ~first_BT
    return CountedTokens(
        ordinary_BT, every_BT, jnp.sum(first_BT), jnp.sum(every_BT & ~within_BT & ~first_BT), jnp.sum((segment_ids > 0) & ~finite_BT)
    )


def splice_sums(
    decoder: Decoder, sae: LayerSAE, batch: TokenBatch, x: Array, clean: Array, counted: CountedTokens, config: EvaluationConfig
) -> dict[str, float]:
    """Sums of cross-entropy and divergence with the layer's stream intact, reconstructed, zeroed, and replaced by its mean.

    Tokens that the filter leaves out keep their stream in every variant. Predictions that are not finite with the stream intact count in
    none.
    """
    tokens, segment_ids = jnp.asarray(batch.tokens_BT), jnp.asarray(batch.segment_ids_BT)
    norms = jnp.linalg.norm(x.astype(jnp.float32), axis=-1)
    limit = config.max_norm_multiple * median_norm(norms, counted.every_BT) if config.max_norm_multiple else jnp.float32(jnp.finfo(jnp.float32).max)
    mask = counted.ordinary_BT
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


class _LayerSums:
    """What is added up for one layer."""

    def __init__(self):
        self.ordinary, self.every = ReconstructionMetrics(), ReconstructionMetrics()
        self.left_out = {"first_tokens": 0, "outlier_tokens": 0, "damaged_tokens": 0}
        self.spliced: dict[str, float] = {}

    def add(self, sae: LayerSAE, x: Array, counted: CountedTokens) -> None:
        masks = (counted.ordinary_BT.reshape(-1), counted.every_BT.reshape(-1))
        both = reconstruction_sums(sae.autoencoder, x.reshape(-1, x.shape[-1]), masks)
        for metrics, sums in zip((self.ordinary, self.every), both, strict=True):
            metrics.add_sums(sums)
        for name, count in zip(self.left_out, (counted.first, counted.outliers, counted.damaged), strict=True):
            self.left_out[name] += int(count)

    def add_splice(self, sums: dict[str, float]) -> None:
        for name, value in sums.items():
            self.spliced[name] = self.spliced.get(name, 0.0) + value

    def result(self, sae: LayerSAE, config: EvaluationConfig) -> dict[str, Any]:
        found: dict[str, Any] = self.ordinary.result() | {f"{name}_all": value for name, value in self.every.result().items()}
        found |= self.left_out | (splice_scores(self.spliced) if self.spliced else {})
        if config.densities:
            found |= {"density_histogram": self.ordinary.density_histogram(), "density_histogram_all": self.every.density_histogram()}
        return found | (code_geometry(sae.autoencoder).summary() if config.geometry else {})


@jax.jit
def _splice_losses(
    logits: Float[Array, "B T V"], clean: Float[Array, "B T V"], tokens_BT: Int[Array, "B T"], segment_ids: Int[Array, "B T"]
) -> tuple[Array, Array, Array]:
    losses, mask = token_losses(logits, tokens_BT, segment_ids)
    scored = mask & jnp.all(jnp.isfinite(clean[:, :-1]), axis=-1)
    sums = (jnp.sum(jnp.where(scored, values, jnp.float32(0))) for values in (losses, token_divergences(logits, clean, segment_ids)))
    loss, divergence = sums
    return loss, jnp.sum(scored, dtype=jnp.float32), divergence
