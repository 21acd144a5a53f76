"""How active every feature is on every language, summed batch by batch, and the features that this makes a language's or nobody's."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qscope_jax.errors import InputError
from qscope_jax.features.classify.text_reading import counted_tokens
from qscope_jax.features.languages import monolinguality_of_means, rank_features
from qscope_jax.features.switching.language_corpus import Corpus, CorpusBatch, CorpusConfig, Report, check_tokens, corpus_batches
from qscope_jax.models.language_model import LanguageModel, forward
from qscope_jax.sae.autoencoder import SparseAutoencoder
from qscope_jax.sae.layer_sae import LayerSAE

_CONTROL_SHARE = 0.1


@dataclass(frozen=True, eq=False)
class LanguageSums:
    """Sums over the counted tokens of K languages at one layer.

    Attributes:
        layer: 0-based layer.
        languages: Labels.
        sums_KF: Summed activation of every feature; what a token's code leaves out counts as 0.
        fires_KF: Tokens at which it fires.
        tokens_K: Tokens that count.
    """

    layer: int
    languages: tuple[str, ...]
    sums_KF: Float[np.ndarray, "K F"]
    fires_KF: Int[np.ndarray, "K F"]
    tokens_K: Int[np.ndarray, " K"]

    def means(self) -> Float[np.ndarray, "K F"]:
        """Mean activation (mu) over all counted tokens of a language; not a mean of its texts' means."""
        return self.sums_KF / self.tokens_K[:, None]

    def monolinguality(self) -> Float[np.ndarray, "K F"]:
        """Monolinguality (nu) for every language; see `qscope_jax.monolinguality`."""
        return monolinguality_of_means(self.means())

    def place(self, language: str) -> int:
        """Where a language stands.

        Raises:
            InputError: it is not there.
        """
        if language not in self.languages:
            raise InputError(f"no text of language {language!r}; there are {', '.join(self.languages)}")
        return self.languages.index(language)


def language_sums(
    model: LanguageModel, saes: Sequence[LayerSAE], corpus: Corpus, config: CorpusConfig | None = None, *, report: Report = None
) -> dict[int, LanguageSums]:
    """Read texts through SAEs of distinct layers; one model pass a batch serves all of them and stops at the highest. Added up in float64.

    Args:
        model: The model.
        saes: SAEs; all of them are in memory.
        corpus: Texts of each language.
        config: How they are read.
        report: Called with the tokens of each batch.

    Raises:
        ShapeError: an SAE does not fit the model.
        InputError: no SAE, a layer out of range or given twice, an empty or unlabelled text, one language alone, or one with too few tokens.
    """
    config = config or CorpusConfig()
    layers = [sae.layer for sae in saes]
    if len(set(layers)) != len(layers) or not layers:
        raise InputError(f"SAEs of layers {layers}: give one or more, of each layer one")
    for sae in saes:
        sae.check_width(model.config.d_model, model.name)
        model.check_layer(sae.layer)
    sums = {sae.layer: _empty_sums(sae, tuple(corpus)) for sae in saes}
    for batch in corpus_batches(model, corpus, config):
        _add_batch(model, saes, batch, config, sums)
        if report:
            report(int((batch.tokens.segment_ids_BT > 0).sum()))
    for found in sums.values():
        check_tokens(found.languages, found.tokens_K, config)
    return sums


def rank_language_features(sums: LanguageSums, language: str, count: int) -> Int[np.ndarray, " S"]:
    """The features of highest monolinguality for a language, highest first.

    Raises:
        InputError: the language is not there, or fewer features than `count` are more active on it than on the others.
    """
    nu_F = sums.monolinguality()[sums.place(language)]
    found = int((nu_F > 0).sum())
    if not 1 <= count <= found:
        raise InputError(
            f"{count} features of language {language} at layer {sums.layer}: {found} are more active on it than on others; ask for 1 to those"
        )
    return rank_features(nu_F, count)


def control_features(sums: LanguageSums, count: int, *, seed: int = 0) -> Int[np.ndarray, " S"]:
    """Control: features that belong to no language, drawn at random.

    Drawn from the tenth (or from `count`, if that is more) whose |nu| is smallest, on the language where it is largest and in units of their own
    mean activation, among features that fire on every language. Layers draw apart under one seed.

    Raises:
        InputError: fewer features than `count` fire on every language.
    """
    alive = np.flatnonzero((sums.fires_KF > 0).all(axis=0))
    if not 1 <= count <= len(alive):
        raise InputError(
            f"{count} random features at layer {sums.layer}: {len(alive)} fire on every language; ask for 1 to those, or give more texts"
        )
    unevenness = np.abs(sums.monolinguality()[:, alive]).max(axis=0) / sums.means()[:, alive].mean(axis=0)
    pool = alive[np.argsort(unevenness, kind="stable")[: max(count, int(_CONTROL_SHARE * len(alive)))]]
    return np.random.default_rng([seed, sums.layer]).permutation(pool)[:count]


def _empty_sums(sae: LayerSAE, languages: tuple[str, ...]) -> LanguageSums:
    shape = (len(languages), sae.num_features)
    return LanguageSums(sae.layer, languages, np.zeros(shape), np.zeros(shape, np.int64), np.zeros(len(languages), np.int64))


def _add_batch(model: LanguageModel, saes: Sequence[LayerSAE], batch: CorpusBatch, config: CorpusConfig, sums: dict[int, LanguageSums]) -> None:
    segment_ids = batch.tokens.segment_ids_BT
    taps = jnp.asarray([sae.layer for sae in saes], jnp.int32)
    with jax.set_mesh(model.mesh):
        out = forward(model.decoder, batch.tokens.tokens_BT, segment_ids, (), taps, stop_after=max(sums))
        assert out.residuals is not None
        for sae, x in zip(saes, out.residuals, strict=True):
            read = _read(sae.autoencoder, x, jnp.asarray(segment_ids), config.max_norm_multiple)
            values_BTA, indices_BTA, counted_BT = (np.asarray(array) for array in read)
            _add(sums[sae.layer], values_BTA, indices_BTA, counted_BT, batch.languages_B)


def _add(
    sums: LanguageSums,
    values_BTA: Float[np.ndarray, "B T A"],
    indices_BTA: Int[np.ndarray, "B T A"],
    counted_BT: Bool[np.ndarray, "B T"],
    languages_B: Int[np.ndarray, " B"],
) -> None:
    """Add a batch's codes, of A slots a token, to the sums of the languages in it."""
    num_features = sums.sums_KF.shape[1]
    for place in np.unique(languages_B[languages_B >= 0]).tolist():
        own = counted_BT & (languages_B == place)[:, None]
        values, indices = values_BTA[own], indices_BTA[own]
        active = values > 0
        sums.sums_KF[place] += np.bincount(indices[active], weights=values[active], minlength=num_features)
        sums.fires_KF[place] += np.bincount(indices[active], minlength=num_features)
        sums.tokens_K[place] += int(own.sum())


@partial(jax.jit, static_argnames="max_norm_multiple")
def _read(
    sae: SparseAutoencoder, x_BTD: Array, segment_ids: Array, max_norm_multiple: float
) -> tuple[Float[Array, "B T A"], Int[Array, "B T A"], Bool[Array, "B T"]]:
    counted_BT = counted_tokens(x_BTD, segment_ids, max_norm_multiple, drop_first=True)
    code = sae.encode(x_BTD.reshape(-1, x_BTD.shape[-1]))
    shape = (*x_BTD.shape[:2], -1)
    return code.values.reshape(shape), code.indices.reshape(shape), counted_BT
