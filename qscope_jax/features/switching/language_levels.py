"""alpha: how far each chosen feature's pre-activation usually reaches on each language, which is the ceiling that SASFT holds it to."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qscope_jax.errors import InputError, ShapeError
from qscope_jax.features.classify.text_reading import counted_tokens
from qscope_jax.features.switching.language_corpus import Corpus, CorpusConfig, Report, check_tokens, corpus_batches
from qscope_jax.models.decoder import Decoder
from qscope_jax.models.language_model import LanguageModel
from qscope_jax.sae.encoder_rows import EncoderRows


def estimate_levels(
    model: LanguageModel,
    rows: Sequence[EncoderRows],
    layers: Sequence[int],
    texts: Corpus,
    config: CorpusConfig | None = None,
    *,
    report: Report = None,
) -> tuple[Float[np.ndarray, "M K S"], Int[np.ndarray, " K"]]:
    """Mean pre-activation of S features at each of M layers over all counted tokens of each of K languages.

    A language's mean is over its tokens, not over its texts; negative pre-activations are in it, so it may be negative itself. A token counts if
    it counts at every layer. Only the chosen encoder rows are read; sums are in float64, the means in float32.

    Args:
        model: The base model, before training.
        rows: Encoder rows for each layer, all of as many features.
        layers: 0-based layers.
        texts: Texts of each language, in the order of K.
        config: How they are read.
        report: Called with the tokens of each batch.

    Returns:
        alpha_MKS, and tokens_K, the number of tokens that count.

    Raises:
        InputError: layers missing, out of range or given twice, an empty or unlabelled text, one language alone, one with too few tokens, or a
            mean that is not finite.
        ShapeError: rows are not as wide as the model, or of different numbers of features.
    """
    config = config or CorpusConfig()
    if not len(layers) or len(set(layers)) != len(layers) or len(rows) != len(layers):
        raise InputError(f"{len(rows)} sets of encoder rows for layers {list(layers)}; give one for each layer, and no layer twice")
    size = rows[0].b_S.shape[0]
    for layer, one in zip(layers, rows, strict=True):
        model.check_layer(layer)
        if one.W_SD.shape != (size, model.config.d_model):
            found = f"encoder rows of layer {layer} have shape {list(one.W_SD.shape)}"
            raise ShapeError(f"{found}, expected [{size}, {model.config.d_model}] for {model.name}; they are of another SAE")
    languages = tuple(texts)
    sums_MKS, tokens_K = np.zeros((len(layers), len(languages), size)), np.zeros(len(languages), np.int64)
    taps = jnp.asarray(layers, jnp.int32)
    for batch in corpus_batches(model, texts, config):
        segment_ids = batch.tokens.segment_ids_BT
        with jax.set_mesh(model.mesh):
            read = _levels(model.decoder, tuple(rows), batch.tokens.tokens_BT, segment_ids, taps, max(layers), config.max_norm_multiple)
        levels_MBTS, counted_BT = (np.asarray(array) for array in read)
        for place in np.unique(batch.languages_B[batch.languages_B >= 0]).tolist():
            own = counted_BT & (batch.languages_B == place)[:, None]
            sums_MKS[:, place] += levels_MBTS[:, own].sum(axis=1, dtype=np.float64)
            tokens_K[place] += int(own.sum())
        if report:
            report(int((segment_ids > 0).sum()))
    check_tokens(languages, tokens_K, config)
    alpha_MKS = (sums_MKS / tokens_K[:, None]).astype(np.float32)
    if not (finite := np.isfinite(alpha_MKS).all(axis=(0, 2))).all():
        label = languages[int(np.argmin(finite))]
        raise InputError(f"{model.name}: pre-activations on language {label} are not finite; load the model in bfloat16 or float32")
    return alpha_MKS, tokens_K


@partial(jax.jit, static_argnames=("stop_after", "max_norm_multiple"))
def _levels(
    decoder: Decoder,
    rows: tuple[EncoderRows, ...],
    tokens_BT: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    taps: Int[Array, " M"],
    stop_after: int,
    max_norm_multiple: float,
) -> tuple[Float[Array, "M B T S"], Bool[Array, "B T"]]:
    """Pre-activations at every token, and whether it counts."""
    residuals = decoder(tokens_BT, segment_ids=segment_ids, taps=taps, stop_after=stop_after).residuals
    assert residuals is not None
    found = [one(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:2], -1) for one, x in zip(rows, residuals, strict=True)]
    counted = [counted_tokens(x, segment_ids, max_norm_multiple, drop_first=True) for x in residuals]
    return jnp.stack(found), jnp.stack(counted).all(axis=0)
