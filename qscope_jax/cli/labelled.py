"""Labelled texts for `qscope classify`, and what they do at each layer: read by the model, or known from a feature store."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qscope_jax.cli.options import Integers, Texts, check_at_least, positional
from qscope_jax.cli.sources import TINY, SAEOptions, cut_texts, open_model, open_saes, sae_groups
from qscope_jax.errors import ConfigError, InputError

if TYPE_CHECKING:
    import numpy as np

    from qscope_jax.features.classify.labelled_data import LabelledData
    from qscope_jax.features.classify.text_reading import ReadingConfig
    from qscope_jax.features.store.feature_store import FeatureStore
    from qscope_jax.features.text_features import TextFeatures
    from qscope_jax.models.language_model import LanguageModel
    from qscope_jax.sae.layer_sae import LayerSAE


@dataclass(frozen=True, kw_only=True)
class LabelledOptions(SAEOptions):
    """Labelled texts, and how they are read."""

    data: str = positional("")
    """Labelled texts: a .jsonl, .parquet or .csv file, a hub dataset, or `tiny` for the embedded corpus's rude and polite sentences."""
    store: str = ""
    """Feature store that holds the texts, with their classes among its columns; no model is then needed, and --layers are the store's."""
    column: str = "text"
    """Column of the texts."""
    label_column: str = "label"
    """Column of their classes."""
    positive: str = ""
    """The class to look for, by default the second of two by name; one of more is told from all others."""
    language_column: str = ""
    """Column of their languages, each of which is split and reported by itself."""
    split_column: str = ""
    """Column that says discovery (or train) and evaluation (or test); by default texts are drawn."""
    splits: Texts = ("train",)
    """Splits of a hub dataset; of several, each names the language of its texts."""
    per_class: int | None = None
    """Use at most so many texts of each class and language, drawn at random."""
    share: float = 0.2
    """Share of each class and language held out for evaluation."""
    seed: int = 0
    """Seed of all draws."""
    layers: Integers | None = None
    """Layers to choose from: all, 3 or 2,4-5; by default all that have an SAE."""
    keep_first: bool = False
    """Count the first token of a text too."""
    max_norm_multiple: float = 10.0
    """Leave tokens out whose residual norm exceeds this multiple of their text's median; 0 counts all."""
    max_tokens: int = 512
    """Read at most so many tokens of a text."""
    batch_size: int = 16
    """Texts in a forward pass."""


@dataclass(frozen=True, eq=False)
class Activations:
    """What the texts did.

    Attributes:
        tables: The table of each layer.
        streams: Mean residual streams of each layer; empty where they are not known.
        reading: How texts were read.
        model_name: With what.
        sae_name: And with which SAEs.
        model: The model, where it was opened.
        sae_of: Opens the SAE of a layer.
    """

    tables: "dict[int, TextFeatures]"
    streams: "dict[int, np.ndarray]"
    reading: "ReadingConfig"
    model_name: str
    sae_name: str
    model: "LanguageModel | None"
    sae_of: "Callable[[int], LayerSAE]"


def check_labelled(config: LabelledOptions) -> None:
    """Check what can be checked before anything is opened.

    Raises:
        ConfigError: an option is out of range, or there is neither data nor store, or both.
    """
    if bool(config.data) == bool(config.store):
        raise ConfigError("give either DATA, a file of labelled texts, or --store, and not both")
    check_at_least(config, 1, "per_class", "max_tokens", "batch_size")
    if not 0 < config.share < 1:
        raise ConfigError(f"share is {config.share}, expected a number between 0 and 1")
    if not config.splits:
        raise ConfigError("splits is empty, expected the name of one or more")


def read_labelled(config: LabelledOptions) -> "tuple[LabelledData, FeatureStore | None]":
    """The labelled texts, split, and the store if they are from one.

    Raises:
        QscopeError: what is wrong with the source or its columns.
    """
    from qscope_jax.features.classify.labelled_data import label_data
    from qscope_jax.features.store.feature_store import read_store

    store = read_store(config.store) if config.store else None
    columns = _store_columns(store, config) if store is not None else _tiny_columns() if config.data == TINY else _table_columns(config)
    kept = _drawn(columns, config)
    columns = {name: None if values is None else [values[row] for row in kept] for name, values in columns.items()}
    texts, labels = columns["texts"] or [], columns["labels"] or []
    data = label_data(
        texts,
        labels,
        positive=config.positive or None,
        languages=columns["languages"],
        halves=columns["halves"],
        share=config.share,
        seed=config.seed,
    )
    if store is not None:
        from dataclasses import replace

        import numpy as np

        data = replace(data, rows=np.asarray(kept)[data.rows])
    return data, store


def read_activations(config: LabelledOptions, data: "LabelledData", store: "FeatureStore | None") -> Activations:
    """Read the texts by the model, or take from the store what they did.

    Raises:
        QscopeError: what is wrong with model, SAEs, store or layers.
    """
    from qscope_jax.features.classify.text_reading import ReadingConfig, read_texts

    if store is not None:
        return _stored(config, data, store)
    reading = ReadingConfig(not config.keep_first, config.max_norm_multiple, config.max_tokens, config.batch_size)
    model = open_model(config.model, config.dtype, config.mesh)
    saes = open_saes(config.sae, model)
    found: dict[int, Any] = {}
    for group in sae_groups(saes, config.layers, model):
        found |= read_texts(model, group, data.texts, reading)
    tables, streams = ({layer: getattr(one, name) for layer, one in found.items()} for name in ("features", "mean_streams"))
    return Activations(tables, streams, reading, config.model, config.sae, model, saes.__getitem__)


def mark_tokens(
    found: Activations, data: "LabelledData", store: "FeatureStore | None", wanted: Sequence[tuple[int, int, int]]
) -> "list[tuple[list[str], np.ndarray]]":
    """The tokens of texts of `data`, and a feature's activation at each, 0 at those that do not count; asked for by (text, layer, feature).

    Of a store that keeps no codes, a text is one piece.
    """
    import numpy as np

    if store is not None:
        if not store.has_codes:
            return [([data.texts[row]], np.zeros(1)) for row, _, _ in wanted]
        places = ((int(data.rows[row]), layer, feature) for row, layer, feature in wanted)
        return [
            ([store.vocabulary[token] for token in store.token_ids(text)], np.where(code.counted, code.activation(feature), 0))
            for text, feature, code in ((text, feature, store.code(layer, text)) for text, layer, feature in places)
        ]
    from qscope_jax.features.readout import read_features, token_texts

    assert found.model is not None
    marked: dict[tuple[int, int, int], Any] = {}
    for layer in sorted({layer for _, layer, _ in wanted}):
        own = [one for one in wanted if one[1] == layer]
        texts = cut_texts(found.model, [data.texts[row] for row, _, _ in own], found.reading.max_tokens)
        kept = {"drop_first": found.reading.drop_first, "max_norm_multiple": found.reading.max_norm_multiple}
        readout = read_features(found.model, [found.sae_of(layer)], texts, **kept)[layer]
        for place, one in enumerate(own):
            activation = np.where(readout.counted[place], readout.activation(place, one[2]), 0)
            marked[one] = token_texts(found.model, readout.token_ids[place]), activation
    return [marked[one] for one in wanted]


def _stored(config: LabelledOptions, data: "LabelledData", store: "FeatureStore") -> Activations:
    from qscope_jax.features.classify.text_reading import ReadingConfig

    layers = store.layers if config.layers is None else config.layers
    tables = {layer: store.text_features(store.check_layer(layer)).select(data.rows) for layer in layers}
    streams = {layer: store.streams(layer, "mean")[data.rows] for layer in layers} if store.has_streams else {}
    kept = store.facts.get("filter", {})
    reading = ReadingConfig(
        kept.get("drop_first", True), kept.get("max_norm_multiple", 10.0), kept.get("max_length", config.max_tokens), config.batch_size
    )

    source = store.sae if config.sae == TINY else config.sae

    def sae_of(layer: int) -> "LayerSAE":
        from qscope_jax.sae.layer_sae import load_sae

        sae = load_sae(source, layer)
        if (sae.num_features, sae.d_model) != (store.num_features[layer], store.d_model):
            found, expected = f"{sae.num_features} features and width {sae.d_model}", f"{store.num_features[layer]} and {store.d_model}"
            raise InputError(f"{source}: has {found} at layer {layer}; {store.folder} was read with {expected}, from {store.sae}")
        return sae

    return Activations(tables, streams, reading, store.model, source, None, sae_of)


def _table_columns(config: LabelledOptions) -> "dict[str, list[str] | None]":
    """Texts, classes, languages and halves of a table; rows whose text is blank are left out."""
    from qscope_jax.data.tables import load_table

    found: dict[str, list[str]] = {"texts": [], "labels": [], "languages": [], "halves": []}
    for split in config.splits:
        table = load_table(config.data, split=split)
        table = table.select([row for row, text in enumerate(table.texts(config.column)) if text.strip()])
        found["texts"] += table.texts(config.column)
        found["labels"] += table.classes(config.label_column)
        found["languages"] += table.classes(config.language_column) if config.language_column else [split] * len(table)
        found["halves"] += table.classes(config.split_column) if config.split_column else []
    named = config.language_column or len(config.splits) > 1
    return {**found, "languages": found["languages"] if named else None, "halves": found["halves"] if config.split_column else None}


def _store_columns(store: "FeatureStore", config: LabelledOptions) -> "dict[str, list[str] | None]":
    def classes(name: str) -> list[str] | None:
        return [_class(value, store, name) for value in store.column(name)] if name else None

    return {
        "texts": store.texts, "labels": classes(config.label_column), "languages": classes(config.language_column),
        "halves": classes(config.split_column),
    }  # fmt: skip


def _class(value: Any, store: "FeatureStore", name: str) -> str:
    if value is None or not str(value).strip():
        raise InputError(f"{store.folder}: column {name} has a text without a value; write the store again without such rows")
    return str(value)


def _tiny_columns() -> "dict[str, list[str] | None]":
    from qscope_jax.demo.corpus import LANGUAGES
    from qscope_jax.demo.tone import tone_sentences

    found = tone_sentences(list(LANGUAGES))
    return {
        "texts": [one.text for one in found], "labels": [one.tone for one in found], "languages": [one.language for one in found],
        "halves": [one.split for one in found],
    }  # fmt: skip


def _drawn(columns: "Mapping[str, list[str] | None]", config: LabelledOptions) -> list[int]:
    """Rows to use: all, or so many of each class and language (and half, where halves are given), in their order."""
    texts, labels = columns["texts"] or [], columns["labels"] or []
    if config.per_class is None:
        return list(range(len(texts)))
    import numpy as np

    strata: dict[tuple[str, ...], list[int]] = {}
    others = [columns[name] or [""] * len(texts) for name in ("languages", "halves")]
    for row, stratum in enumerate(zip(labels, *others, strict=True)):
        strata.setdefault(stratum, []).append(row)
    rng = np.random.default_rng(config.seed)
    return sorted(row for rows in strata.values() for row in rng.permutation(rows)[: config.per_class].tolist())
