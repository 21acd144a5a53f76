"""Cards in the format that Neuronpedia imports: the batch files of SAEDashboard's NeuronpediaRunner.

    batch-0.json ...        some features each, with their contexts, histogram and logits
    skipped_indexes.json    features without a card or that never fire, which Neuronpedia shows as dead
    explanations.jsonl      a line for each explained feature, in the columns of Neuronpedia's own exports

The fields are those of `NeuronpediaDashboardBatch.to_dict` (SAEDashboard, sae_dashboard/neuronpedia/neuronpedia_dashboard.py), with the two more
that Neuronpedia's convert-saedashboard-to-neuronpedia-export.py asks for, `sae_id_suffix` and `qualifying_token_index`. What a card does not
hold stays empty: alignment with neurons, correlations, and the histogram of all logits.
"""

import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qscope_jax.data.files import atomic_path, write_json
from qscope_jax.errors import ConfigError, InputError, SourceError
from qscope_jax.features.explain.feature_card import Context, FeatureCard
from qscope_jax.features.store.feature_store import FeatureStore

_SKIPPED_FILE = "skipped_indexes.json"
# Marks the highest contexts; those of an interval have its bounds and its share of all texts.
_TOP = (-1.0, -1.0)
_DIGITS = 3


@dataclass(frozen=True)
class NeuronpediaSource:
    """What Neuronpedia is to know of where features are from.

    Attributes:
        model_id: Its name of the model, such as `qwen3-1.7b`.
        sae_set: Name of the set of SAEs, without a layer, such as `qwenscope-res-32k`.
        layer: 0-based layer.
        num_features: F.
        texts: Texts that the cards are from.
        context_tokens: Tokens of a context, at most.
        dataset: Name of the corpus.
    """

    model_id: str
    sae_set: str
    layer: int
    num_features: int
    texts: int
    context_tokens: int
    dataset: str = ""

    def __post_init__(self):
        """Check the names."""
        if not self.model_id or not self.sae_set:
            raise ConfigError(f"Neuronpedia needs the names of a model and of a set of SAEs, not {self.model_id!r} and {self.sae_set!r}")


def source_of(store: FeatureStore, layer: int, context_tokens: int, *, model_id: str = "", sae_set: str = "") -> NeuronpediaSource:
    """Where a store's features are from. Names that are not given are made from the store's, in the letters that Neuronpedia allows.

    Raises:
        InputError: the store has no such layer.
    """
    corpus = store.facts.get("plan", {}).get("data", {}).get("data", "")
    names = model_id or _name(store.model), sae_set or _name(store.sae)
    return NeuronpediaSource(*names, store.check_layer(layer), store.num_features[layer], store.num_texts, context_tokens, str(corpus))


def write_neuronpedia(
    folder: str | os.PathLike[str],
    cards: Iterable[FeatureCard],
    source: NeuronpediaSource,
    *,
    token_text: Callable[[int], str],
    batch_features: int = 128,
    explained_by: Mapping[int, str] | None = None,
) -> Path:
    """Write the folder, whole or not at all, and return it; an older export there is replaced. Cards are taken a batch at a time.

    Args:
        folder: Where it appears.
        cards: Cards of one layer. Features that never fire are only listed.
        source: Where they are from.
        token_text: What a token reads as by itself.
        batch_features: Features in a file.
        explained_by: Who explained a feature, such as the name of a model, by the feature; those that are not there are of nobody known.

    Raises:
        SourceError: the folder holds something else, or cannot be written.
        InputError: a card is of another layer.
    """
    target = Path(folder).expanduser()
    if target.exists() and not (target / _SKIPPED_FILE).is_file() and not (target.is_dir() and not any(target.iterdir())):
        raise SourceError(f"{folder}: holds something else than an export for Neuronpedia; choose another folder or remove it")
    written: set[int] = set()
    by = explained_by or {}
    with atomic_path(target, directory=True) as temporary, open(temporary / "explanations.jsonl", "w", encoding="utf-8") as explanations:
        alive = _firing(cards, source)
        for number in itertools.count():
            batch = list(itertools.islice(alive, batch_features))
            if not batch:
                break
            features = [_feature(card, source, token_text) for card in batch]
            _write(temporary / f"batch-{number}.json", {**_heading(source), "sae_id_suffix": None, "features": features})
            explanations.writelines(
                json.dumps(_explanation(card, source, by.get(card.feature, "")), ensure_ascii=False) + "\n" for card in batch if card.explanation
            )
            written.update(card.feature for card in batch)
        skipped = sorted(set(range(source.num_features)) - written)
        write_json(temporary / _SKIPPED_FILE, {**_heading(source), "layer": str(source.layer), "log_sparsity": 0, "skipped_indexes": skipped})
    return target


def _firing(cards: Iterable[FeatureCard], source: NeuronpediaSource) -> Iterator[FeatureCard]:
    for card in cards:
        if card.layer != source.layer:
            raise InputError(f"feature {card.feature} is of layer {card.layer}, the export of layer {source.layer}; export each layer by itself")
        if card.maximum > 0:
            yield card


def _heading(source: NeuronpediaSource) -> dict[str, Any]:
    return {"model_id": source.model_id, "layer": source.layer, "sae_set": source.sae_set}


def _feature(card: FeatureCard, source: NeuronpediaSource, token_text: Callable[[int], str]) -> dict[str, Any]:
    firing = sum(part.texts for part in card.quantiles)
    activations = [_activation(context, (_TOP[0], card.maximum, _TOP[1]), token_text) for context in card.top]
    for part in card.quantiles:
        interval = part.low, part.high, part.texts / firing
        activations += [_activation(context, interval, token_text) for context in part.contexts]
    empty = ("neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1", "correlated_neurons_indices", "correlated_neurons_l1",
             "correlated_neurons_pearson", "correlated_features_indices", "correlated_features_l1", "correlated_features_pearson",
             "logits_hist_data_bar_heights", "logits_hist_data_bar_values", "decoder_weights_dist")  # fmt: skip
    return {
        "feature_index": card.feature,
        **{name: [] for name in empty},
        "neg_str": [token_text(token) for token, _ in card.suppressed],
        "neg_values": _rounded(logit for _, logit in card.suppressed),
        "pos_str": [token_text(token) for token, _ in card.promoted],
        "pos_values": _rounded(logit for _, logit in card.promoted),
        "frac_nonzero": card.density,
        "freq_hist_data_bar_values": _rounded((low + high) / 2 for low, high, _ in card.histogram),
        "freq_hist_data_bar_heights": [texts for *_, texts in card.histogram],
        "n_prompts_total": source.texts,
        "n_tokens_in_prompt": source.context_tokens,
        "dataset": source.dataset,
        "activations": activations,
    }


def _activation(context: Context, interval: tuple[float, float, float], token_text: Callable[[int], str]) -> dict[str, Any]:
    low, high, share = interval
    return {
        "bin_min": low,
        "bin_max": high,
        "bin_contains": share,
        "qualifying_token_index": context.peak,
        "tokens": [token_text(token) for token in context.token_ids],
        "values": _rounded(context.activations),
    }


def _explanation(card: FeatureCard, source: NeuronpediaSource, explained_by: str) -> Mapping[str, Any]:
    return {
        "modelId": source.model_id,
        "layer": f"{source.layer}-{source.sae_set}",
        "index": str(card.feature),
        "description": card.explanation,
        "explanationModelName": explained_by or None,
        "scores": dict(card.scores),
    }


def _name(source: str) -> str:
    """The last part of a path or hub id, in lower case, letters, digits, dots and dashes only."""
    return re.sub(r"[^a-z0-9.]+", "-", Path(source).name.lower()).strip("-") or "unnamed"


def _rounded(values: Iterable[float]) -> list[float]:
    return [round(float(value), _DIGITS) for value in values]


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=True), encoding="utf-8")
