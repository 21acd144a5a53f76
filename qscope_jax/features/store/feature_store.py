"""A feature store: what an SAE's features did over a corpus, on disk, for analyses that never need the model again.

    manifest.json                     model, SAEs, layers, sizes, counts, filter, and every file's size and SHA-256
    vocabulary.json                   what each token reads as by itself
    shard000000/texts.parquet         `row` in the corpus, `text`, `tokens` (their number) and the corpus' own columns
    shard000000/tokens.safetensors    `token_ids` [N], text after text
    shard000000/layer12.safetensors   of each text, its table: `indptr`, `features`, `maxima`, `counts`; its last token's code: `last_values`,
                                      `last_indices` [B, K]; `counted_tokens` [B]. Of each token, where kept: `values` (bfloat16), `indices`
                                      [N, K], `counted` [N]. Where kept, `mean_streams` and `last_streams` [B, D]
    dictionary/layer12.safetensors    of each feature, where made: tokens promoted and suppressed, features of the nearest directions

Shards hold consecutive texts. Files are read when they are asked for, and mapped.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_array

from qscope_jax.data.files import read_json
from qscope_jax.data.resumable import MANIFEST_FILE, verify_manifest
from qscope_jax.errors import InputError, SourceError
from qscope_jax.features.text_features import TextFeatures, join_texts, last_codes
from qscope_jax.sae.formats.mapped_tensors import map_safetensors

FORMAT = "qscope_jax features"
VERSION = 1
TEXTS_FILE = "texts.parquet"
TOKENS_FILE = "tokens.safetensors"
VOCABULARY_FILE = "vocabulary.json"

# Files that stay mapped, so that reading text by text does not parse a header for each.
_MAPPED = 64


def shard_name(index: int) -> str:
    """Folder of a shard, 0-based."""
    return f"shard{index:06d}"


def layer_file(layer: int) -> str:
    """File of a layer inside a shard, or of its dictionary."""
    return f"layer{layer}.safetensors"


def dictionary_file(layer: int) -> str:
    """File of what a layer's dictionary says of its features."""
    return f"dictionary/{layer_file(layer)}"


class TextCode(NamedTuple):
    """The codes of one text's T tokens, and which of them count."""

    values: Float[np.ndarray, "T K"]
    indices: Int[np.ndarray, "T K"]
    counted: Bool[np.ndarray, " T"]

    def activation(self, feature: int) -> Float[np.ndarray, " T"]:
        """Activation of a feature at every token."""
        return np.where(self.indices == feature, self.values, 0).sum(axis=1)


@dataclass(frozen=True)
class Dictionary:
    """What a layer's dictionary says of its F features, W entries each, strongest first.

    Attributes:
        promoted: Token ids whose logits the feature's direction raises most, through the final norm's gain and the head.
        promoted_logits: By how much, for a direction of its own length and a stream of unit root mean square.
        suppressed: Those that it lowers most.
        suppressed_logits: By how much, negative.
        neighbours: Features whose directions are nearest.
        cosines: Their cosines.
    """

    promoted: Int[np.ndarray, "F W"]
    promoted_logits: Float[np.ndarray, "F W"]
    suppressed: Int[np.ndarray, "F W"]
    suppressed_logits: Float[np.ndarray, "F W"]
    neighbours: Int[np.ndarray, "F V"]
    cosines: Float[np.ndarray, "F V"]


@dataclass(frozen=True)
class FeatureStore:
    """A finished store. Made by `write_store`, opened by `read_store`.

    Attributes:
        folder: Where it lies.
        model: What was read with.
        sae: Where its SAEs are from.
        layers: Layers, ascending.
        num_features: F of each layer.
        k: Slots of a code at each layer.
        d_model: Width of the residual stream.
        shard_texts: Texts of each shard.
        shard_tokens: Tokens of each shard.
        columns: Names of the corpus' own columns.
        has_codes: Whether every token's code was kept.
        has_streams: Whether each text's mean and last residual stream were kept.
        facts: The whole manifest.
    """

    folder: Path
    model: str
    sae: str
    layers: tuple[int, ...]
    num_features: Mapping[int, int]
    k: Mapping[int, int]
    d_model: int
    shard_texts: tuple[int, ...]
    shard_tokens: tuple[int, ...]
    columns: tuple[str, ...]
    has_codes: bool
    has_streams: bool
    facts: Mapping[str, Any]
    _maps: dict[str, dict[str, np.ndarray]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def num_texts(self) -> int:
        """B."""
        return sum(self.shard_texts)

    @property
    def num_tokens(self) -> int:
        """N."""
        return sum(self.shard_tokens)

    def check_layer(self, layer: int) -> int:
        """The layer, if the store has it.

        Raises:
            InputError: it has not.
        """
        if layer not in self.layers:
            raise InputError(f"{self.folder}: has no layer {layer}; it has layers {', '.join(map(str, self.layers))}")
        return layer

    @cached_property
    def texts(self) -> list[str]:
        """The texts as they were given, longer ones not cut."""
        return [text for shard in range(len(self.shard_texts)) for text in self._column(shard, "text")]

    def column(self, name: str) -> list[Any]:
        """One of the corpus' own columns, a value for each text.

        Raises:
            InputError: the store has no such column; those that it has are named.
        """
        if name not in self.columns:
            raise InputError(f"{self.folder}: has no column {name!r}; it has {', '.join(map(repr, self.columns)) or 'none'}")
        return [value for shard in range(len(self.shard_texts)) for value in self._column(shard, name)]

    @cached_property
    def rows(self) -> list[int]:
        """Where each text stood in the corpus, blank rows counted."""
        return [row for shard in range(len(self.shard_texts)) for row in self._column(shard, "row")]

    @cached_property
    def lengths(self) -> Int[np.ndarray, " B"]:
        """Tokens of each text, as far as it was read."""
        return np.concatenate([np.asarray(self._column(shard, "tokens"), np.int64) for shard in range(len(self.shard_texts))])

    @cached_property
    def vocabulary(self) -> list[str]:
        """What each token reads as by itself; part of a character is the replacement sign."""
        return list(read_json(self.folder / VOCABULARY_FILE)["tokens"])

    def token_ids(self, text: int) -> Int[np.ndarray, " T"]:
        """The tokens of a text."""
        shard, begin, end = self._span(text)
        return self._mapped(shard, TOKENS_FILE)["token_ids"][begin:end]

    def text_features(self, layer: int) -> TextFeatures:
        """The tables of all texts at a layer, in memory.

        Raises:
            InputError: the store has no such layer.
        """
        return join_texts([self.shard_features(layer, shard) for shard in range(len(self.shard_texts))])

    def shard_features(self, layer: int, shard: int) -> TextFeatures:
        """The tables of one shard's texts at a layer, whose number does not grow with the corpus.

        Raises:
            InputError: the store has no such layer.
        """
        arrays = self._layer(layer, shard)
        shape = (self.shard_texts[shard], self.num_features[layer])
        maxima, counts = (csr_array((arrays[name], arrays["features"], arrays["indptr"]), shape=shape) for name in ("maxima", "counts"))
        last = last_codes(arrays["last_values"].astype(np.float32), arrays["last_indices"].astype(np.int32), shape[1])
        return TextFeatures(layer, maxima, counts, last, np.asarray(arrays["counted_tokens"]))

    def code(self, layer: int, text: int) -> TextCode:
        """The codes of one text's tokens.

        Raises:
            InputError: the store has no such layer, or keeps no codes.
        """
        self.check_codes()
        shard, begin, end = self._span(text)
        arrays = self._layer(layer, shard)
        return _text_code(arrays, slice(begin, end))

    def code_shards(self, layer: int) -> Iterator[tuple[int, Int[np.ndarray, " B1"], TextCode]]:
        """Shard by shard the number of its first text, where each of its texts begins (and the last ends), and its tokens' codes.

        Raises:
            InputError: the store has no such layer, or keeps no codes.
        """
        self.check_codes()
        first = 0
        for shard, texts in enumerate(self.shard_texts):
            yield first, self._offsets(shard), _text_code(self._layer(layer, shard), slice(None))
            first += texts

    def streams(self, layer: int, which: Literal["mean", "last"]) -> Float[np.ndarray, "B D"]:
        """Each text's residual stream: its mean over counted tokens (0 where none counts), or the last token's.

        Raises:
            InputError: the store has no such layer, or keeps no streams.
        """
        if not self.has_streams:
            raise InputError(f"{self.folder}: keeps no residual streams; write it again with streams")
        return np.concatenate([self._layer(layer, shard)[f"{which}_streams"] for shard in range(len(self.shard_texts))])

    def dictionary(self, layer: int) -> Dictionary | None:
        """What the layer's dictionary says of its features; None where the store was written without.

        Raises:
            InputError: the store has no such layer.
        """
        path = self.folder / dictionary_file(self.check_layer(layer))
        return Dictionary(**map_safetensors(path)) if path.is_file() else None

    def verify(self) -> None:
        """Compare every file with its checksum.

        Raises:
            SourceError: one differs or is missing.
        """
        if differing := verify_manifest(self.folder):
            raise SourceError(f"{self.folder}: {differing[0]} is damaged or missing ({len(differing)} files); write the store again")

    def check_codes(self) -> None:
        """Check that every token's code was kept.

        Raises:
            InputError: it was not.
        """
        if not self.has_codes:
            raise InputError(f"{self.folder}: keeps no token's code; write it again with codes")

    def _span(self, text: int) -> tuple[int, int, int]:
        if not 0 <= text < self.num_texts:
            raise InputError(f"text {text} is out of range; {self.folder} has texts 0 to {self.num_texts - 1}")
        shard = int(np.searchsorted(np.cumsum(self.shard_texts), text, side="right"))
        row = text - sum(self.shard_texts[:shard])
        offsets = self._offsets(shard)
        return shard, int(offsets[row]), int(offsets[row + 1])

    def _offsets(self, shard: int) -> Int[np.ndarray, " B1"]:
        first = sum(self.shard_texts[:shard])
        return np.concatenate([[0], np.cumsum(self.lengths[first : first + self.shard_texts[shard]])])

    def _layer(self, layer: int, shard: int) -> dict[str, np.ndarray]:
        return self._mapped(shard, layer_file(self.check_layer(layer)))

    def _mapped(self, shard: int, file: str) -> dict[str, np.ndarray]:
        name = f"{shard_name(shard)}/{file}"
        if name not in self._maps:
            if len(self._maps) >= _MAPPED:
                self._maps.clear()
            self._maps[name] = map_safetensors(self.folder / name)
        return self._maps[name]

    def _column(self, shard: int, name: str) -> list[Any]:
        import pyarrow
        import pyarrow.parquet

        path = self.folder / shard_name(shard) / TEXTS_FILE
        try:
            return pyarrow.parquet.read_table(path, columns=[name])[name].to_pylist()
        except (OSError, pyarrow.ArrowException) as error:
            raise SourceError(f"{path}: cannot be read ({type(error).__name__}); write the store again") from error


def read_store(folder: str | Path) -> FeatureStore:
    """Open a finished store; only its manifest is read.

    Raises:
        SourceError: there is none, it is unfinished or damaged, or of a newer version.
    """
    path = Path(folder).expanduser()
    if not (path / MANIFEST_FILE).is_file():
        raise SourceError(f"{folder}: holds no feature store; write one with qscope store")
    facts = read_json(path / MANIFEST_FILE)
    if facts.get("format") != FORMAT or facts.get("format_version") != VERSION:
        found = f"{facts.get('format', 'something else')} version {facts.get('format_version', 'unknown')}"
        raise SourceError(f"{folder}: holds {found}, expected {FORMAT} version {VERSION}")
    try:
        by_layer = {name: {int(layer): int(value) for layer, value in facts[name].items()} for name in ("num_features", "k")}
        return FeatureStore(
            path, facts["model"], facts["sae"], tuple(facts["layers"]), by_layer["num_features"], by_layer["k"], facts["d_model"],
            tuple(facts["shard_texts"]), tuple(facts["shard_tokens"]), tuple(facts["columns"]), facts["codes"], facts["streams"], facts,
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SourceError(f"{path / MANIFEST_FILE}: is damaged ({type(error).__name__}: {error}); write the store again") from error


def holds_store(folder: Path) -> bool:
    """Whether a folder is a finished store."""
    try:
        return read_json(folder / MANIFEST_FILE).get("format") == FORMAT
    except SourceError:
        return False


def _text_code(arrays: Mapping[str, np.ndarray], rows: slice) -> TextCode:
    return TextCode(arrays["values"][rows].astype(np.float32), arrays["indices"][rows].astype(np.int32), arrays["counted"][rows].astype(bool))
