"""What texts light up: sparse codes token by token, and their sums by text and by feature."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from qscope_jax.data.batches import pad_batch
from qscope_jax.data.buckets import bucket_length
from qscope_jax.errors import InputError
from qscope_jax.models.language_model import LanguageModel, forward
from qscope_jax.sae.autoencoder import SparseAutoencoder, SparseCode
from qscope_jax.sae.filtering import MAX_NORM_MULTIPLE, ordinary_tokens
from qscope_jax.sae.layer_sae import LayerSAE

BATCH_TEXTS = 32


@dataclass(frozen=True, eq=False)
class Readout:
    """Sparse codes of B texts at one layer, on the host.

    Attributes:
        layer: 0-based layer.
        num_features: F.
        texts: The texts.
        token_ids: Tokens of each text, without padding.
        values: For each text [T, K], activations; 0 is an empty slot.
        indices: For each text [T, K], the features they belong to.
        norms: For each text [T], norm of the residual stream.
        counted: For each text [T], tokens that count: not the first, not an outlier of the norm (unless asked for).
    """

    layer: int
    num_features: int
    texts: tuple[str, ...]
    token_ids: tuple[tuple[int, ...], ...]
    # T differs from text to text.
    values: tuple[Float[np.ndarray, "_T K"], ...]
    indices: tuple[Int[np.ndarray, "_T K"], ...]
    norms: tuple[Float[np.ndarray, " _T"], ...]
    counted: tuple[Bool[np.ndarray, " _T"], ...]

    def __len__(self) -> int:
        """B."""
        return len(self.texts)

    def activation(self, text: int, feature: int) -> Float[np.ndarray, " T"]:
        """Activation of a feature at every token of a text.

        Raises:
            InputError: there is no such feature.
        """
        if not 0 <= feature < self.num_features:
            raise InputError(f"feature {feature} is out of range; the readout of layer {self.layer} has features 0 to {self.num_features - 1}")
        return np.where(self.indices[text] == feature, self.values[text], 0).sum(axis=1)

    def text_sums(self) -> tuple[Float[np.ndarray, "B F"], Int[np.ndarray, "B F"], Int[np.ndarray, " B"]]:
        """For each text and feature the summed activation and the number of firing tokens, and each text's number of counted tokens."""
        sums = np.zeros((len(self), self.num_features))
        fires = np.zeros((len(self), self.num_features), np.int64)
        tokens = np.array([int(counted.sum()) for counted in self.counted])
        for text in range(len(self)):
            self._add_text(text, sums[text], fires[text])
        return sums, fires, tokens

    def text_means(self) -> Float[np.ndarray, "B F"]:
        """Mean activation of every feature over each text's counted tokens; 0 for a text without any."""
        sums, _, tokens = self.text_sums()
        return sums / np.maximum(tokens, 1)[:, None]

    def means(self) -> tuple[Float[np.ndarray, " F"], Float[np.ndarray, " F"]]:
        """Mean activation and firing rate of every feature over all counted tokens."""
        sums, fires = np.zeros(self.num_features), np.zeros(self.num_features, np.int64)
        for text in range(len(self)):
            self._add_text(text, sums, fires)
        return sums / max(self.counted_tokens, 1), fires / max(self.counted_tokens, 1)

    @property
    def counted_tokens(self) -> int:
        """Tokens that count, of all texts."""
        return int(sum(counted.sum() for counted in self.counted))

    def top(self, text: int, count: int, *, by: str = "max") -> list[tuple[int, float]]:
        """Strongest features of a text, by `max` or `mean` activation over its counted tokens (over all, where none counts), strongest first."""
        if by not in ("max", "mean"):
            raise InputError(f"rank features by 'max' or 'mean', not {by!r}")
        counted = self.counted[text] if self.counted[text].any() else np.ones_like(self.counted[text])
        scores = np.zeros(self.num_features)
        values, indices = self.values[text][counted], self.indices[text][counted]
        (np.maximum if by == "max" else np.add).at(scores, indices.ravel(), values.ravel())
        scores /= 1 if by == "max" else counted.sum()
        best = np.argsort(-scores, kind="stable")[:count]
        return [(int(feature), float(scores[feature])) for feature in best if scores[feature] > 0]

    def _add_text(self, text: int, sums_F: np.ndarray, fires_F: np.ndarray) -> None:
        """Add a text's activations and firing tokens to running sums."""
        counted = self.counted[text]
        values, indices = self.values[text][counted], self.indices[text][counted]
        active = values > 0
        np.add.at(sums_F, indices[active], values[active])
        np.add.at(fires_F, indices[active], 1)


def read_features(
    model: LanguageModel,
    saes: Sequence[LayerSAE],
    texts: Sequence[str],
    *,
    drop_first: bool = True,
    max_norm_multiple: float = MAX_NORM_MULTIPLE,
) -> dict[int, Readout]:
    """Read texts through one or several SAEs; one model pass a batch serves all of them and stops at the highest.

    Args:
        model: The model.
        saes: SAEs of distinct layers.
        texts: Texts.
        drop_first: Do not count the first token of a text (it is read all the same).
        max_norm_multiple: Do not count tokens whose norm exceeds this multiple of the batch's median; 0 counts all.

    Returns:
        A readout for each layer.

    Raises:
        ShapeError: an SAE does not fit the model.
        InputError: no text, an empty text, or a layer out of range or given twice.
    """
    _check_saes(model, saes)
    return _read(model, saes, model.tokenize(texts), tuple(texts), drop_first, max_norm_multiple, BATCH_TEXTS)


def read_token_features(
    model: LanguageModel,
    saes: Sequence[LayerSAE],
    token_ids: Sequence[Sequence[int]],
    *,
    drop_first: bool = True,
    max_norm_multiple: float = MAX_NORM_MULTIPLE,
    batch_texts: int | None = None,
) -> dict[int, Readout]:
    """As `read_features`, of the very tokens, such as sampled ones, whose text may be split into others.

    Args:
        model: The model.
        saes: SAEs of distinct layers.
        token_ids: Tokens of each text.
        drop_first: Do not count the first token of a text.
        max_norm_multiple: As there.
        batch_texts: Texts that are read at a time; fewer where they are long.

    Raises:
        ShapeError: an SAE does not fit the model.
        InputError: no tokens, an id outside of the vocabulary, or a layer out of range or given twice.
    """
    _check_saes(model, saes)
    ids = [list(row) for row in token_ids]
    if not ids or not all(ids):
        raise InputError("there are no token ids to read, or none of one text; give at least one for each")
    if outside := [(row, token) for row, tokens in enumerate(ids) for token in tokens if not 0 <= token < model.config.vocab_size]:
        raise InputError(f"text {outside[0][0]} has token id {outside[0][1]}; {model.name} has 0 to {model.config.vocab_size - 1}")
    texts = tuple(model.tokenizer.decode(row, skip_special_tokens=False) for row in ids)
    return _read(model, saes, ids, texts, drop_first, max_norm_multiple, batch_texts or BATCH_TEXTS)


def token_texts(model: LanguageModel, token_ids: Sequence[int]) -> list[str]:
    """What each token reads as by itself; part of a character shows as the replacement sign."""
    return [model.tokenizer.decode([token]) for token in token_ids]


@partial(jax.jit, static_argnames=("max_norm_multiple", "drop_first"))
def read_codes(
    sae: SparseAutoencoder, x_BTD: jax.Array, segment_ids: jax.Array, max_norm_multiple: float, drop_first: bool
) -> tuple[SparseCode, jax.Array, jax.Array]:
    """Codes of all B * T tokens, the norms of their streams [B, T], and which of them count [B, T]; padding does not."""
    counted = ordinary_tokens(x_BTD, segment_ids, max_norm_multiple=max_norm_multiple, drop_first=drop_first)
    return sae.encode(x_BTD.reshape(-1, x_BTD.shape[-1])), jnp.linalg.norm(x_BTD.astype(jnp.float32), axis=-1), counted


def _check_saes(model: LanguageModel, saes: Sequence[LayerSAE]) -> None:
    if not saes:
        raise InputError("no SAE given to read features with")
    layers = [sae.layer for sae in saes]
    if len(set(layers)) != len(layers):
        raise InputError(f"SAEs of layers {layers}: give of each layer one; read two of a layer in two calls")
    for sae in saes:
        sae.check_width(model.config.d_model, model.name)
        model.check_layer(sae.layer)


def _read(
    model: LanguageModel,
    saes: Sequence[LayerSAE],
    ids: Sequence[Sequence[int]],
    texts: tuple[str, ...],
    drop_first: bool,
    max_norm_multiple: float,
    batch_texts: int,
) -> dict[int, Readout]:
    parts: dict[int, list[tuple]] = {sae.layer: [] for sae in saes}
    taps = jnp.asarray(list(parts), jnp.int32)
    for start in range(0, len(ids), batch_texts):
        rows = ids[start : start + batch_texts]
        batch = pad_batch(rows, length=bucket_length(max(map(len, rows))))
        with jax.set_mesh(model.mesh):
            out = forward(model.decoder, batch.tokens_BT, batch.segment_ids_BT, (), taps, stop_after=max(parts))
            assert out.residuals is not None
            for sae, x in zip(saes, out.residuals, strict=True):
                code, norms, counted = read_codes(sae.autoencoder, x, jnp.asarray(batch.segment_ids_BT), max_norm_multiple, drop_first)
                shape = (*batch.tokens_BT.shape, -1)
                arrays = [np.asarray(a) for a in (code.values.reshape(shape), code.indices.reshape(shape), norms, counted)]
                for row, length in enumerate((batch.segment_ids_BT > 0).sum(axis=1)):
                    parts[sae.layer].append((tuple(batch.tokens_BT[row, :length].tolist()), *(a[row, :length] for a in arrays)))
    return {
        sae.layer: Readout(sae.layer, sae.num_features, texts, *(tuple(column) for column in zip(*parts[sae.layer], strict=True))) for sae in saes
    }
