"""Reads any number of texts into their tables with few shapes, so that checking text after text compiles little."""

from collections.abc import Callable, Mapping, Sequence

from qscope_jax.features.readout import BATCH_TEXTS, read_features
from qscope_jax.features.text_features import TextFeatures, join_texts, text_features
from qscope_jax.models.language_model import LanguageModel
from qscope_jax.sae.filtering import MAX_NORM_MULTIPLE
from qscope_jax.sae.layer_sae import LayerSAE

# Batches whose tokens' codes are in memory together, before the texts' tables are made of them.
_BATCHES = 8

FeatureReader = Callable[[Sequence[str]], Mapping[int, TextFeatures]]
"""Reads texts into their tables, by layer."""


def feature_reader(
    model: LanguageModel, saes: Sequence[LayerSAE], *, drop_first: bool = True, max_norm_multiple: float = MAX_NORM_MULTIPLE
) -> FeatureReader:
    """A reader by a model and SAEs of distinct layers; the arguments are those of `read_features`.

    Memory holds the tables of all texts, but the codes of some hundred texts' tokens only.
    """

    def read(texts: Sequence[str]) -> dict[int, TextFeatures]:
        # Texts of like length lie together; the last batch is filled up to a power of two by repeats, whose tables are dropped.
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        left = len(order) % BATCH_TEXTS
        room = (1 << (left - 1).bit_length()) - left if left else 0
        filled = [texts[index] for index in [*order[:1] * room, *order]] if order else []
        places = sorted(range(len(order)), key=lambda place: order[place])
        parts: dict[int, list[TextFeatures]] = {sae.layer: [] for sae in saes}
        for start in range(0, max(len(filled), 1), _BATCHES * BATCH_TEXTS):
            block = filled[start : start + _BATCHES * BATCH_TEXTS]
            for layer, readout in read_features(model, saes, block, drop_first=drop_first, max_norm_multiple=max_norm_multiple).items():
                parts[layer].append(text_features(readout))
        return {layer: join_texts(tables).select([room + place for place in places]) for layer, tables in parts.items()}

    return read
