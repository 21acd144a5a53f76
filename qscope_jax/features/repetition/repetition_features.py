"""The features that rise as a model begins to go round in circles (Qwen-Scope report, section 8)."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from qscope_jax.errors import InputError, ShapeError
from qscope_jax.features.readout import BATCH_TEXTS, Readout, read_token_features
from qscope_jax.features.repetition.endless_repetition import endless_repetition, repetition_start
from qscope_jax.models.language_model import LanguageModel
from qscope_jax.sae.layer_sae import LayerSAE

LAYERS_AT_ONCE = 4
"""SAEs in memory at a time."""

COLUMNS = ("layer", "rank", "feature", "increase", "first", "last", "normal", "normal rate")
"""Of `RepetitionFeatures.rows`."""


class RepeatedTokens(NamedTuple):
    """Places of the tokens of a circle, one for each place in it: in its first round, and in the last one that was reached."""

    first_J: Int[np.ndarray, " J"]
    last_J: Int[np.ndarray, " J"]


def repeated_tokens(token_ids: Sequence[int]) -> RepeatedTokens | None:
    """First and last occurrence of each token of the circle that a sample ends in; None where it ends in none.

    A token that stands twice in the circle is two: each is compared with itself, after the same tokens.
    """
    period = endless_repetition(token_ids, stopped=False)
    if period is None:
        return None
    first_J = repetition_start(token_ids, period) + np.arange(period)
    return RepeatedTokens(first_J, first_J + (len(token_ids) - 1 - first_J) // period * period)


@dataclass(eq=False)
class RepetitionSums:
    """What a layer's features do in repetition and in normal text, added up readout by readout.

    Attributes:
        layer: 0-based layer.
        num_features: F.
        first_F: Over samples, the sum of the mean activation at first occurrences.
        last_F: The same at last ones.
        samples: Samples added.
        skipped: Samples left out: they end in no circle, or no token of it counts both times.
        normal_F: Summed activation over counted tokens of normal text.
        normal_fires_F: Such tokens at which a feature fires.
        normal_tokens: Such tokens.
    """

    layer: int
    num_features: int
    first_F: Float[np.ndarray, " F"] = field(init=False)
    last_F: Float[np.ndarray, " F"] = field(init=False)
    samples: int = 0
    skipped: int = 0
    normal_F: Float[np.ndarray, " F"] = field(init=False)
    normal_fires_F: Int[np.ndarray, " F"] = field(init=False)
    normal_tokens: int = 0

    def __post_init__(self):
        """Begin at 0."""
        self.first_F, self.last_F, self.normal_F = (np.zeros(self.num_features) for _ in range(3))
        self.normal_fires_F = np.zeros(self.num_features, np.int64)

    def add_repetitive(self, readout: Readout) -> None:
        """Add samples that end in a circle; each counts once, however long its circle is.

        Raises:
            ShapeError: a readout of another layer or SAE.
        """
        self._check(readout)
        for text, token_ids in enumerate(readout.token_ids):
            places, counted = repeated_tokens(token_ids), readout.counted[text]
            both = np.zeros(0, bool) if places is None else counted[places.first_J] & counted[places.last_J]
            if places is None or not both.any():
                self.skipped += 1
                continue
            self.first_F += self._sum(readout, text, places.first_J[both]) / both.sum()
            self.last_F += self._sum(readout, text, places.last_J[both]) / both.sum()
            self.samples += 1

    def add_normal(self, readout: Readout) -> None:
        """Add normal text.

        Raises:
            ShapeError: a readout of another layer or SAE.
        """
        self._check(readout)
        for text, counted in enumerate(readout.counted):
            places = np.flatnonzero(counted)
            values, indices = readout.values[text][places], readout.indices[text][places]
            self.normal_F += self._sum(readout, text, places)
            self.normal_fires_F += np.bincount(indices[values > 0], minlength=self.num_features)
            self.normal_tokens += len(places)

    def increase(self) -> Float[np.ndarray, " F"]:
        """Mean over samples of the mean over repeated tokens of last minus first activation."""
        return (self.last_F - self.first_F) / max(self.samples, 1)

    def _sum(self, readout: Readout, text: int, places: Int[np.ndarray, " J"]) -> Float[np.ndarray, " F"]:
        values, indices = readout.values[text][places], readout.indices[text][places]
        active = values > 0
        return np.bincount(indices[active], weights=values[active], minlength=self.num_features).astype(np.float64)  # counts where none is active

    def _check(self, readout: Readout) -> None:
        if (readout.layer, readout.num_features) != (self.layer, self.num_features):
            found = f"layer {readout.layer} with {readout.num_features} features"
            raise ShapeError(f"a readout of {found} is added to sums of layer {self.layer} with {self.num_features}; keep layers apart")


@dataclass(frozen=True, eq=False)
class RepetitionFeatures:
    """S features of each of M layers, largest increase first, and what they do.

    Attributes:
        layers: 0-based layers.
        features_MS: The features.
        scores_MS: Increase of activation from the first to the last occurrence of repeated tokens, mean over tokens, then over samples.
        first_MS: Mean activation at first occurrences.
        last_MS: At last ones.
        normal_MS: Over the tokens of normal text; near 0 in a feature of repetition alone.
        normal_rates_MS: Share of those tokens at which it fires.
        samples: Samples behind the means.
        skipped: Samples left out; see `RepetitionSums`.
        normal_tokens: Tokens of normal text.
    """

    layers: tuple[int, ...]
    features_MS: Int[np.ndarray, "M S"]
    scores_MS: Float[np.ndarray, "M S"]
    first_MS: Float[np.ndarray, "M S"]
    last_MS: Float[np.ndarray, "M S"]
    normal_MS: Float[np.ndarray, "M S"]
    normal_rates_MS: Float[np.ndarray, "M S"]
    samples: int
    skipped: int
    normal_tokens: int

    def rows(self) -> list[tuple[int | float, ...]]:
        """The report: a row for each feature, in the order of `COLUMNS`."""
        measured = (self.scores_MS, self.first_MS, self.last_MS, self.normal_MS, self.normal_rates_MS)
        return [
            (layer, rank + 1, int(feature), *(float(table[place, rank]) for table in measured))
            for place, layer in enumerate(self.layers)
            for rank, feature in enumerate(self.features_MS[place])
        ]


def rank_repetition_features(sums: Sequence[RepetitionSums], count: int = 1) -> RepetitionFeatures:
    """The features that rise most, of each layer.

    Args:
        sums: Of distinct layers, added up over the same samples.
        count: Features of each layer.

    Raises:
        InputError: no sample, no normal text, no layer or one twice, or fewer rising features than asked for.
    """
    layers = tuple(one.layer for one in sums)
    if not layers or len(set(layers)) != len(layers):
        raise InputError(f"repetition was measured at layers {list(layers)}; expected one or more, none of them twice")
    if not all(one.samples for one in sums):
        raise InputError(f"none of {sums[0].skipped} samples ends in endless repetition; sample longer completions, or more of them")
    if not all(one.normal_tokens for one in sums):
        raise InputError("there is no normal text to compare repetition with; give some of more than one token")
    chosen = [_ranked(one, count) for one in sums]

    def table(of_layer: Sequence[np.ndarray]) -> np.ndarray:
        return np.stack([values_F[features] for values_F, features in zip(of_layer, chosen, strict=True)])

    return RepetitionFeatures(
        layers=layers,
        features_MS=np.stack(chosen),
        scores_MS=table([one.increase() for one in sums]),
        first_MS=table([one.first_F / one.samples for one in sums]),
        last_MS=table([one.last_F / one.samples for one in sums]),
        normal_MS=table([one.normal_F / one.normal_tokens for one in sums]),
        normal_rates_MS=table([one.normal_fires_F / one.normal_tokens for one in sums]),
        samples=min(one.samples for one in sums),
        skipped=max(one.skipped for one in sums),
        normal_tokens=min(one.normal_tokens for one in sums),
    )


def find_repetition_features(
    model: LanguageModel,
    saes: Iterable[LayerSAE],
    samples: Sequence[Sequence[int]],
    normal: Sequence[Sequence[int]],
    *,
    count: int = 1,
    batch_texts: int = BATCH_TEXTS,
) -> RepetitionFeatures:
    """Read samples of endless repetition and normal ones, and rank features by how much they rise inside the circle.

    The same token is compared with itself, last occurrence minus first, so that what a feature says of the token drops out. Few batches of
    codes are in memory at a time.

    Args:
        model: The model.
        saes: SAEs of distinct layers; they may be loaded as they are asked for, a few at a time.
        samples: Tokens of each sample, prompt and completion; those that end in no circle are left out and counted.
        normal: Tokens of normal samples.
        count: Features of each layer.
        batch_texts: Samples that are read at a time.

    Raises:
        ShapeError: an SAE does not fit the model.
        InputError: no SAE, two of a layer or one out of range; no sample with repetition, no normal text, or fewer rising features than asked for.
    """
    if count < 1 or batch_texts < 1:
        raise InputError(f"{count} features of each layer from {batch_texts} samples at a time are asked for; ask for 1 or more")
    repetitive = [ids for ids in samples if repeated_tokens(ids) is not None]
    if not repetitive or not normal:
        given = f"{len(repetitive)} of {len(samples)} samples end in endless repetition, and {len(normal)} are normal"
        raise InputError(f"{given}; give some of each, of at least 64 repeated tokens")
    found: list[RepetitionSums] = []
    source = iter(saes)
    while group := list(itertools.islice(source, LAYERS_AT_ONCE)):
        sums = {sae.layer: RepetitionSums(sae.layer, sae.num_features, skipped=len(samples) - len(repetitive)) for sae in group}
        for add, token_lists in ((RepetitionSums.add_repetitive, repetitive), (RepetitionSums.add_normal, normal)):
            for start in range(0, len(token_lists), batch_texts):
                for layer, readout in read_token_features(model, group, token_lists[start : start + batch_texts], batch_texts=batch_texts).items():
                    add(sums[layer], readout)
        found += sums.values()
    return rank_repetition_features(found, count)


def _ranked(sums: RepetitionSums, count: int) -> Int[np.ndarray, " S"]:
    increase_F = sums.increase()
    rising = int((increase_F > 0).sum())
    if not 1 <= count <= rising:
        raise InputError(f"{count} repetition features of layer {sums.layer}: {rising} rise in repetition; ask for 1 to those, or read another layer")
    return np.argsort(-increase_F, kind="stable")[:count]
