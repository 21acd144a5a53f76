"""Many texts through a model and its SAEs, a batch at a time: of each text its table and its mean residual stream, and nothing of its tokens.

Which tokens count is decided text by text: a text is read the same alone and in any company.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from scipy.sparse import csr_array, vstack

from qscope_jax.data.batches import TokenBatch, pad_batch
from qscope_jax.data.buckets import bucket_length
from qscope_jax.errors import InputError
from qscope_jax.features.text_features import TextFeatures, last_codes, text_table
from qscope_jax.models.language_model import LanguageModel, forward
from qscope_jax.sae.autoencoder import SparseAutoencoder, SparseCode
from qscope_jax.sae.filtering import MAX_NORM_MULTIPLE, ordinary_tokens
from qscope_jax.sae.layer_sae import LayerSAE


@dataclass(frozen=True)
class ReadingConfig:
    """How texts are read."""

    drop_first: bool = True
    """Do not count the first token of a text."""
    max_norm_multiple: float = MAX_NORM_MULTIPLE
    """Do not count tokens whose norm exceeds this multiple of the median of their text; 0 counts all."""
    max_tokens: int = 512
    """Read at most so many tokens of a text, and no more than the model has positions."""
    batch_size: int = 16
    """Texts in a forward pass."""

    def __post_init__(self):
        """Check ranges."""
        if self.max_tokens < 1 or self.batch_size < 1 or self.max_norm_multiple < 0:
            found = f"max_tokens is {self.max_tokens}, batch_size {self.batch_size} and max_norm_multiple {self.max_norm_multiple}"
            raise InputError(f"{found}; expected 1 or more, 1 or more, and 0 or more")


@dataclass(frozen=True, eq=False)
class LayerReading:
    """What B texts did at a layer.

    Attributes:
        features: Their table.
        mean_streams: Mean residual stream over each text's counted tokens; 0 where none counts.
    """

    features: TextFeatures
    mean_streams: Float[np.ndarray, "B D"]


def read_texts(model: LanguageModel, saes: Sequence[LayerSAE], texts: Sequence[str], config: ReadingConfig | None = None) -> dict[int, LayerReading]:
    """Read texts through SAEs of distinct layers; one model pass serves all of them and stops at the highest.

    Raises:
        ShapeError: an SAE does not fit the model.
        InputError: no text, an empty text, no SAE, or a layer out of range or given twice.
    """
    config = config or ReadingConfig()
    layers = [sae.layer for sae in saes]
    if len(set(layers)) != len(layers) or not layers:
        raise InputError(f"SAEs of layers {layers}: give one or more, of each layer one")
    for sae in saes:
        sae.check_width(model.config.d_model, model.name)
        model.check_layer(sae.layer)
    ids = _token_ids(model, texts, config)
    # Texts of similar length share a batch, which saves padding.
    order = np.argsort([len(row) for row in ids], kind="stable")
    parts: dict[int, list[LayerReading]] = {layer: [] for layer in layers}
    for batch in _batches([ids[i] for i in order], config.batch_size):
        with jax.set_mesh(model.mesh):
            taps = jnp.asarray(layers, jnp.int32)
            out = forward(model.decoder, batch.tokens_BT, batch.segment_ids_BT, (), taps, stop_after=max(layers))
            assert out.residuals is not None
            for sae, x in zip(saes, out.residuals, strict=True):
                found = _read(sae.autoencoder, x, jnp.asarray(batch.segment_ids_BT), config.max_norm_multiple, config.drop_first)
                parts[sae.layer].append(_layer_reading(sae, batch, *found))
    places = np.argsort(order)
    return {layer: _joined(found, places) for layer, found in parts.items()}


def token_rows(model: LanguageModel, texts: Sequence[str], config: ReadingConfig) -> TokenBatch:
    """Texts as rows of tokens, cut where they are too long and padded to a bucketed length.

    Raises:
        InputError: no text, or an empty one.
    """
    return next(_batches(_token_ids(model, texts, config), len(texts)))


def counted_tokens(x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"], max_norm_multiple: float, drop_first: bool) -> Bool[Array, "B T"]:
    """True at tokens that count, by the median of their own row; see `ordinary_tokens`."""
    one = partial(ordinary_tokens, max_norm_multiple=max_norm_multiple, drop_first=drop_first)
    return jax.vmap(lambda x_TD, ids_T: one(x_TD[None], ids_T[None])[0])(x, segment_ids)


def _token_ids(model: LanguageModel, texts: Sequence[str], config: ReadingConfig) -> list[list[int]]:
    longest = min(config.max_tokens, model.config.max_positions)
    return [row[:longest] for row in model.tokenize(texts)]


def _batches(ids: Sequence[Sequence[int]], size: int) -> Iterator[TokenBatch]:
    for start in range(0, len(ids), size):
        rows = ids[start : start + size]
        yield pad_batch(rows, length=bucket_length(max(map(len, rows))))


@partial(jax.jit, static_argnames=("max_norm_multiple", "drop_first"))
def _read(
    sae: SparseAutoencoder, x: Array, segment_ids: Array, max_norm_multiple: float, drop_first: bool
) -> tuple[SparseCode, Bool[Array, "B T"], Float[Array, "B D"]]:
    counted_BT = counted_tokens(x, segment_ids, max_norm_multiple, drop_first)
    kept = jnp.where(counted_BT[..., None], x.astype(jnp.float32), jnp.float32(0))
    mean_BD = jnp.sum(kept, axis=1) / jnp.maximum(jnp.sum(counted_BT, axis=1, dtype=jnp.float32), 1)[:, None]
    return sae.encode(x.reshape(-1, x.shape[-1])), counted_BT, mean_BD


def _layer_reading(sae: LayerSAE, batch: TokenBatch, code: SparseCode, counted_BT: Array, mean_BD: Array) -> LayerReading:
    """The table of one batch; padding is left out."""
    real_BT = batch.segment_ids_BT > 0
    values_NK, indices_NK = (np.asarray(array).reshape(*real_BT.shape, -1)[real_BT] for array in (code.values, code.indices))
    counted_N = np.asarray(counted_BT)[real_BT]
    offsets = np.concatenate([[0], np.cumsum(real_BT.sum(axis=1))])
    table = text_table(values_NK, indices_NK, counted_N, offsets, sae.num_features)
    shape = (len(real_BT), sae.num_features)
    maxima, counts = (csr_array((stored, table.features, table.indptr), shape=shape) for stored in (table.maxima, table.counts))
    ends = offsets[1:] - 1
    last = last_codes(values_NK[ends], indices_NK[ends], sae.num_features)
    return LayerReading(TextFeatures(sae.layer, maxima, counts, last, np.asarray(counted_BT).sum(axis=1)), np.asarray(mean_BD))


def _joined(parts: Sequence[LayerReading], places: Int[np.ndarray, " B"]) -> LayerReading:
    tables = [part.features for part in parts]
    maxima, counts, last = (csr_array(vstack([getattr(one, name) for one in tables], format="csr")) for name in ("maxima", "firing_counts", "last"))
    whole = TextFeatures(tables[0].layer, maxima, counts, last, np.concatenate([one.counted_tokens for one in tables]))
    return LayerReading(whole.select(places), np.concatenate([part.mean_streams for part in parts])[places])
