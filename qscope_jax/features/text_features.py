"""What texts did at a layer, feature by feature: the sparse table that classifying, comparing and covering work on."""

import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Integer
from scipy.sparse import csr_array, vstack

from qscope_jax.errors import ShapeError
from qscope_jax.features.readout import Readout

# Texts whose table is made densely at a time: [texts, F] stays in a cache for small dictionaries and within 16 MB for 131,072 features.
_DENSE = 2**22


@dataclass(frozen=True, eq=False)
class TextFeatures:
    """Sparse tables of B texts by F features at one layer; what is not stored is 0, what is stored is positive.

    Attributes:
        layer: 0-based layer.
        maxima: float32 [B, F], largest activation over each text's counted tokens.
        firing_counts: int32 [B, F], counted tokens at which a feature fires; stored at the same places as `maxima`.
        last: float32 [B, F], the code of each text's last token, whether it counts or not.
        counted_tokens: Tokens of each text that count.
    """

    layer: int
    maxima: csr_array
    firing_counts: csr_array
    last: csr_array
    counted_tokens: Int[np.ndarray, " B"]

    def __post_init__(self):
        """Check that the tables are of the same texts and features."""
        shapes = [table.shape for table in (self.maxima, self.firing_counts, self.last)]
        if len(set(shapes)) > 1 or len(self) != len(self.counted_tokens):
            raise ShapeError(
                f"tables of layer {self.layer} have shapes {shapes}, and {len(self.counted_tokens)} texts; expected [texts, features] for all"
            )

    def __len__(self) -> int:
        """B."""
        return typing.cast(tuple[int, int], self.maxima.shape)[0]

    @property
    def num_features(self) -> int:
        """F."""
        return typing.cast(tuple[int, int], self.maxima.shape)[1]

    def select(self, texts: Sequence[int] | Int[np.ndarray, " C"]) -> "TextFeatures":
        """The tables of some texts, in the order given."""
        rows = np.asarray(texts, np.int64)
        return TextFeatures(self.layer, self.maxima[rows], self.firing_counts[rows], self.last[rows], self.counted_tokens[rows])


class TextTable(NamedTuple):
    """The stored entries of `maxima` and `firing_counts`, row by row, features ascending within a row."""

    indptr: Int[np.ndarray, " B1"]
    features: Int[np.ndarray, " E"]
    maxima: Float[np.ndarray, " E"]
    counts: Int[np.ndarray, " E"]


def text_table(
    values_NK: Float[np.ndarray, "N K"],
    indices_NK: Integer[np.ndarray, "N K"],
    counted_N: Bool[np.ndarray, " N"],
    offsets: Int[np.ndarray, " B1"],
    num_features: int,
) -> TextTable:
    """Largest activation and number of firing tokens of every text and feature.

    Args:
        values_NK: Activations, text after text; 0 is an empty slot.
        indices_NK: The features they belong to.
        counted_N: Tokens that count.
        offsets: Where each text begins, and where the last one ends.
        num_features: F.
    """
    texts = len(offsets) - 1
    at_once = max(_DENSE // num_features, 1)
    lengths, features, maxima, counts = [np.zeros(0, np.int64)], [], [], []
    for first in range(0, texts, at_once):
        last = min(first + at_once, texts)
        begin, end = offsets[first], offsets[last]
        rows_N = np.repeat(np.arange(last - first), np.diff(offsets[first : last + 1]))[counted_N[begin:end]]
        values = values_NK[begin:end][counted_N[begin:end]].astype(np.float32, copy=False)
        keys = (rows_N[:, None] * num_features + indices_NK[begin:end][counted_N[begin:end]]).reshape(-1)
        values = values.reshape(-1)
        keys, values = (keys, values) if (active := values > 0).all() else (keys[active], values[active])
        found = np.bincount(keys, minlength=(last - first) * num_features)
        largest = np.zeros(len(found), np.float32)
        np.maximum.at(largest, keys, values)
        places = np.flatnonzero(found)
        lengths.append(np.bincount(places // num_features, minlength=last - first))
        features.append((places % num_features).astype(np.int32))
        maxima.append(largest[places])
        counts.append(found[places].astype(np.int32))
    indptr = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
    return TextTable(indptr, *(np.concatenate([np.zeros(0, kind), *parts]) for kind, parts in
                               ((np.int32, features), (np.float32, maxima), (np.int32, counts))))  # fmt: skip


def join_texts(parts: Sequence[TextFeatures]) -> TextFeatures:
    """The tables of texts one part after the other, of one layer; at least one part.

    Raises:
        ShapeError: the parts have different numbers of features.
    """
    if len({part.num_features for part in parts}) != 1:
        raise ShapeError(f"tables of {[part.num_features for part in parts]} features cannot be joined; expected one number and at least one table")
    maxima, counts, last = (csr_array(vstack([getattr(part, name) for part in parts], format="csr")) for name in ("maxima", "firing_counts", "last"))
    return TextFeatures(parts[0].layer, maxima, counts, last, np.concatenate([part.counted_tokens for part in parts]))


def last_codes(values_BK: Float[np.ndarray, "B K"], indices_BK: Integer[np.ndarray, "B K"], num_features: int) -> csr_array:
    """Codes as a sparse table [B, F]; empty slots are left out."""
    active = values_BK > 0
    indptr = np.concatenate([[0], np.cumsum(active.sum(axis=1))])
    table = csr_array((values_BK[active].astype(np.float32), indices_BK[active].astype(np.int32), indptr), shape=(len(values_BK), num_features))
    table.sort_indices()
    return table


def text_features(readout: Readout) -> TextFeatures:
    """The tables of texts that were just read, without a store."""
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in readout.values])])
    joined = [np.concatenate(column) for column in (readout.values, readout.indices, readout.counted)]
    table = text_table(joined[0], joined[1], joined[2], offsets, readout.num_features)
    shape = (len(readout), readout.num_features)
    last = last_codes(np.stack([row[-1] for row in readout.values]), np.stack([row[-1] for row in readout.indices]), readout.num_features)
    return TextFeatures(
        readout.layer,
        csr_array((table.maxima, table.features, table.indptr), shape=shape),
        csr_array((table.counts, table.features, table.indptr), shape=shape),
        last,
        np.array([int(row.sum()) for row in readout.counted]),
    )
