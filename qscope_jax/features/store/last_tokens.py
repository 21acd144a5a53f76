"""Codes of the last token of many texts: all that a footprint needs, so that long prompts take no more memory than short ones."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int
from scipy.sparse import csr_array, vstack

from qscope_jax.data.batches import pad_batch
from qscope_jax.data.buckets import bucket_length
from qscope_jax.errors import InputError
from qscope_jax.features.text_features import last_codes
from qscope_jax.models.language_model import LanguageModel, forward
from qscope_jax.sae.autoencoder import SparseAutoencoder, SparseCode
from qscope_jax.sae.layer_sae import LayerSAE


def read_last_tokens(
    model: LanguageModel,
    saes: Sequence[LayerSAE],
    texts: Sequence[str],
    *,
    batch_size: int = 16,
    max_tokens: int = 2048,
    progress: Callable[[int], None] | None = None,
) -> dict[int, csr_array]:
    """Read the last token of every text through one or several SAEs; one model pass a batch serves all, and stops at the highest.

    Texts are read in the order of their lengths, which keeps padding and compilations few, and given back in their own.

    Args:
        model: The model.
        saes: SAEs of distinct layers.
        texts: Texts.
        batch_size: Texts in a forward pass.
        max_tokens: Of a longer text only so many tokens are read, those at its end; never more than the model has positions.
        progress: Called after each batch with the texts read so far.

    Returns:
        A sparse table [texts, F] for each layer, as `TextFeatures.last`.

    Raises:
        ShapeError: an SAE does not fit the model.
        InputError: no text, an empty text, or a layer out of range or given twice.
    """
    layers = [sae.layer for sae in saes]
    if not layers or len(set(layers)) != len(layers):
        raise InputError(f"SAEs of layers {layers}: give one or more, of each layer one")
    for sae in saes:
        sae.check_width(model.config.d_model, model.name)
        model.check_layer(sae.layer)
    longest = min(max_tokens, model.config.max_positions)
    ids = [row[-longest:] for row in model.tokenize(texts)]
    order = sorted(range(len(ids)), key=lambda text: len(ids[text]))
    parts: dict[int, list[csr_array]] = {layer: [] for layer in layers}
    for start in range(0, len(order), batch_size):
        rows = [ids[text] for text in order[start : start + batch_size]]
        for layer, code in _read_batch(model, saes, rows, batch_size).items():
            parts[layer].append(code)
        if progress:
            progress(start + len(rows))
    back = np.argsort(order)
    return {layer: csr_array(vstack(codes, format="csr"))[back] for layer, codes in parts.items()}


def _read_batch(model: LanguageModel, saes: Sequence[LayerSAE], rows: list[list[int]], batch_size: int) -> dict[int, csr_array]:
    # The last batch is filled up with copies, so that it is no shape of its own to compile.
    filled = rows + [rows[0]] * (batch_size - len(rows))
    batch = pad_batch(filled, length=bucket_length(max(map(len, filled))))
    last_B = jnp.asarray([len(row) - 1 for row in filled], jnp.int32)
    taps = jnp.asarray([sae.layer for sae in saes], jnp.int32)
    codes = {}
    with jax.set_mesh(model.mesh):
        out = forward(model.decoder, batch.tokens_BT, batch.segment_ids_BT, (), taps, stop_after=max(sae.layer for sae in saes))
        assert out.residuals is not None
        for sae, x in zip(saes, out.residuals, strict=True):
            code = _encode_last(sae.autoencoder, x, last_B)
            values, indices = np.asarray(code.values)[: len(rows)], np.asarray(code.indices)[: len(rows)]
            codes[sae.layer] = last_codes(values.astype(np.float32), indices, sae.num_features)
    return codes


@jax.jit
def _encode_last(sae: SparseAutoencoder, x_BTD: Array, last_B: Int[Array, " B"]) -> SparseCode:
    return sae.encode(jnp.take_along_axis(x_BTD, last_B[:, None, None], axis=1)[:, 0])
