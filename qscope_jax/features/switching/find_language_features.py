"""From texts of several languages to the features of one of them, with the levels that training needs."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from qscope_jax.errors import InputError
from qscope_jax.features.switching.language_corpus import Corpus, CorpusConfig, Report, check_corpus
from qscope_jax.features.switching.language_features import LanguageFeatures
from qscope_jax.features.switching.language_levels import estimate_levels
from qscope_jax.features.switching.language_sums import LanguageSums, control_features, language_sums, rank_language_features
from qscope_jax.models.language_model import LanguageModel
from qscope_jax.sae.encoder_rows import EncoderRows, encoder_rows
from qscope_jax.sae.layer_sae import LayerSAE

LAYERS_AT_ONCE = 4
"""SAEs in memory at a time; one of them can take 3 GB."""


@dataclass(frozen=True)
class _Chosen:
    """The features of one layer: their rows, and how active they are on the K languages that they were chosen by."""

    layer: int
    features_S: Int[np.ndarray, " S"]
    scores_S: Float[np.ndarray, " S"]
    rows: EncoderRows
    means_KS: Float[np.ndarray, "K S"]
    rates_KS: Float[np.ndarray, "K S"]
    tokens_K: Int[np.ndarray, " K"]


def find_language_features(
    model: LanguageModel,
    saes: Iterable[LayerSAE],
    texts: Corpus,
    language: str,
    *,
    count: int = 2,
    features: Mapping[int, Sequence[int]] | None = None,
    random_seed: int | None = None,
    level_texts: Corpus | None = None,
    sae_name: str = "",
    config: CorpusConfig | None = None,
    report: Report = None,
) -> LanguageFeatures:
    """Choose a language's features at each layer, and measure how active they are on every language (SASFT, arXiv 2507.14894).

    Features are chosen by monolinguality, from activations as the SAE gives them; levels are means of pre-activations. The two are different
    quantities on purpose: the rise before a switch happens below the threshold of activation.

    Args:
        model: The base model, before training.
        saes: SAEs of distinct layers; they may be loaded as they are asked for, a few at a time.
        texts: Texts of each language, `language` among them.
        language: The language whose features are looked for.
        count: Features of each layer.
        features: Features of each layer, instead of those of highest monolinguality; kept in their order.
        random_seed: Control: features that belong to no language, drawn with this seed, instead of the language's.
        level_texts: Texts to measure levels on, by default `texts`; those that are missing there for `language` itself are taken from `texts`.
        sae_name: Where the SAEs are from, by default what their files say.
        config: How texts are read.
        report: Called with the tokens of each batch; every text is read once to choose and once to measure.

    Raises:
        ShapeError: an SAE does not fit the model.
        InputError: no SAE, two of a layer, a layer out of range; a language without a label, alone, not there, or of too few tokens; features
            that are not there, not as many at each layer, or given both by hand and at random.
    """
    config = config or CorpusConfig()
    check_corpus(texts, language)
    if level_texts is not None:
        check_corpus(level_texts)
    _check_choice(count, features, random_seed)
    levels_on = texts if level_texts is None else level_texts if language in level_texts else {language: texts[language], **level_texts}
    found: list[_Chosen] = []
    for group in _groups(saes):
        sae_name = sae_name or str(group[0].metadata.get("source", "in memory"))
        if features is not None:
            for sae in group:
                _check_given(sae, features)
        for layer, sums in language_sums(model, group, texts, config, report=report).items():
            sae = next(one for one in group if one.layer == layer)
            found.append(_choose(sae, sums, language, count, features, random_seed))
    layers = tuple(one.layer for one in found)
    if features is not None and set(features) != set(layers):
        raise InputError(f"features of layers {sorted(features)} are given and SAEs of layers {sorted(layers)}; give the same layers")
    rows = tuple(one.rows for one in found)
    alpha_MKS, tokens_K = estimate_levels(model, rows, layers, levels_on, config, report=report)
    how = "given" if features is not None else "random" if random_seed is not None else "monolinguality"
    return LanguageFeatures(
        language=language,
        languages=tuple(levels_on),
        layers=layers,
        features_MS=np.stack([one.features_S for one in found]),
        scores_MS=np.stack([one.scores_S for one in found]).astype(np.float32),
        alpha_MKS=alpha_MKS,
        tokens_K=tokens_K,
        model=model.name,
        sae=sae_name,
        rows=rows,
        facts={"chosen": how, "random_seed": random_seed, "reading": asdict(config), **_activity(found, tuple(texts), language)},
    )


def _check_choice(count: int, features: Mapping[int, Sequence[int]] | None, random_seed: int | None) -> None:
    if features is not None and random_seed is not None:
        raise InputError("features are given by hand and asked for at random; choose one")
    if count < 1:
        raise InputError(f"{count} features of each layer are asked for; ask for at least 1")
    if features is not None:
        sizes = {len(chosen) for chosen in features.values()}
        if len(sizes) != 1 or 0 in sizes or any(len(set(chosen)) != len(chosen) for chosen in features.values()):
            given = {layer: list(chosen) for layer, chosen in features.items()}
            raise InputError(f"features {given} are given; expected as many for each layer, 1 or more, and none of them twice")


def _check_given(sae: LayerSAE, features: Mapping[int, Sequence[int]]) -> None:
    if sae.layer not in features:
        raise InputError(f"no features are given for layer {sae.layer}; give them for each layer")
    for feature in features[sae.layer]:
        sae.check_feature(int(feature))


def _groups(saes: Iterable[LayerSAE]) -> Iterator[list[LayerSAE]]:
    source, layers = iter(saes), set()
    while group := list(itertools.islice(source, LAYERS_AT_ONCE)):
        if twice := [sae.layer for sae in group if sae.layer in layers]:
            raise InputError(f"two SAEs of layer {twice[0]} are given; give of each layer one")
        layers |= {sae.layer for sae in group}
        yield group
    if not layers:
        raise InputError("no SAE given to look for language features with")


def _choose(sae: LayerSAE, sums: LanguageSums, language: str, count: int, features: Mapping[int, Sequence[int]] | None, seed: int | None) -> _Chosen:
    if features is not None:
        chosen = np.asarray(features[sae.layer], np.int64)
    elif seed is not None:
        chosen = control_features(sums, count, seed=seed)
    else:
        chosen = rank_language_features(sums, language, count)
    scores_S = sums.monolinguality()[sums.place(language), chosen]
    rates_KS = sums.fires_KF[:, chosen] / sums.tokens_K[:, None]
    return _Chosen(sae.layer, chosen, scores_S, encoder_rows(sae, chosen.tolist()), sums.means()[:, chosen], rates_KS, sums.tokens_K)


def _activity(found: Sequence[_Chosen], languages: tuple[str, ...], language: str) -> dict[str, Any]:
    """How active the features are, in JSON's terms: lists by layer, language and feature, and the language of the second highest mean."""
    others = [label for label in languages if label != language]
    places = [languages.index(label) for label in others]
    return {
        "languages": list(languages),
        "tokens": [one.tokens_K.tolist() for one in found],
        "means": [one.means_KS.tolist() for one in found],
        "rates": [one.rates_KS.tolist() for one in found],
        "runner_up": [[others[place] for place in one.means_KS[places].argmax(axis=0)] for one in found],
    }
