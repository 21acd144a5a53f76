"""Write a feature store: one pass of the model over a corpus, shard by shard, in memory that does not grow with it."""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qscope_jax.data.buckets import bucket_length
from qscope_jax.data.files import plain, read_json
from qscope_jax.data.packing import PackedBatch, pack_texts
from qscope_jax.data.resumable import ResumableFolder, source_fingerprint
from qscope_jax.errors import ConfigError, InputError
from qscope_jax.features.readout import read_codes
from qscope_jax.features.store.dictionary_facts import dictionary_facts
from qscope_jax.features.store.feature_store import (
    FORMAT,
    TEXTS_FILE,
    TOKENS_FILE,
    VERSION,
    VOCABULARY_FILE,
    Dictionary,
    FeatureStore,
    dictionary_file,
    holds_store,
    layer_file,
    read_store,
    shard_name,
)
from qscope_jax.features.text_features import text_table
from qscope_jax.models.language_model import LanguageModel, forward
from qscope_jax.sae.filtering import MAX_NORM_MULTIPLE
from qscope_jax.sae.formats.mapped_tensors import write_safetensors
from qscope_jax.sae.layer_sae import LayerSAE

SHARD_FILE = "shard.json"
_RESERVED = ("text", "tokens", "row")
_TOKENIZED_AT_ONCE = 512


@dataclass(frozen=True)
class StoreConfig:
    """What is read, and what is kept of it."""

    max_length: int = 256
    """Tokens of a text that are read; longer texts are cut. Also the length of the model's rows, which texts share."""
    batch_size: int = 16
    """Rows of the model's batch."""
    shard_tokens: int = 65_536
    """Tokens of a shard, a little more or less; an interruption loses at most two."""
    codes: bool = True
    """Keep the code of every token: 4 k bytes a token and layer (6 k where there are more than 65,536 features). Contexts need it."""
    streams: bool = False
    """Keep the mean and the last residual stream of every text: 8 D bytes a text and layer. Baselines on streams need it."""
    dictionary: int = 10
    """Tokens promoted and suppressed, and nearest directions, found for every feature; 0 finds none."""
    drop_first: bool = True
    """Do not count the first token of a text."""
    max_norm_multiple: float = MAX_NORM_MULTIPLE
    """Do not count tokens whose residual norm exceeds this multiple of the batch's median; 0 counts all."""

    def __post_init__(self):
        """Check ranges."""
        for name, least in (("max_length", 1), ("batch_size", 1), ("shard_tokens", 1), ("dictionary", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected {least} or more")


def write_store(
    model: LanguageModel,
    saes: Sequence[LayerSAE],
    texts: Iterable[str | Mapping[str, Any]],
    out: str | Path,
    config: StoreConfig | None = None,
    *,
    columns: Sequence[str] | None = None,
    sae_name: str = "in memory",
    data: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    report: Callable[[int, int], None] | None = None,
) -> FeatureStore:
    """Read a corpus once and keep its features on disk. The same call resumes what was interrupted; blank texts are left out and counted.

    Args:
        model: The model.
        saes: SAEs of distinct layers.
        texts: Texts, or rows with `text` and further columns; read in order, once.
        out: Folder of the store; appears when it is complete.
        config: What is read and kept.
        columns: Columns kept besides the text, as text; by default those of the first row whose values there are text, numbers or booleans.
        sae_name: Where the SAEs are from, for the record.
        data: What the corpus is, in JSON's terms, for telling whether an unfinished store is of the same.
        overwrite: Replace a store that is in the folder.
        report: Called with the texts and tokens done so far.

    Raises:
        ConfigError: the mesh does not divide the batch's rows.
        ShapeError: an SAE does not fit the model.
        InputError: no text, a layer out of range or given twice, or a row without a column.
        SourceError: the folder cannot be written, or holds something else.
    """
    config = config or StoreConfig()
    saes = sorted(saes, key=lambda sae: sae.layer)
    _check(model, saes, config)
    rows = iter(texts)
    first = next(rows, None)
    if first is None:
        raise InputError("there is no text to read; give at least one")
    kept = _columns(first, columns)
    plan = _plan(model, saes, config, kept, sae_name, data) | {"first_text": _digest(first)}
    with ResumableFolder(Path(out), plan, overwrite=overwrite, replaceable=holds_store) as folder:
        facts = _resumed(folder)
        done = sum(shard["rows"] for shard in facts)
        rows = itertools.islice(itertools.chain([first], rows), done, None)
        with ThreadPoolExecutor(1, thread_name_prefix="store") as pool:
            writing: Future[dict[str, Any]] | None = None
            for number, shard in enumerate(_shards(model, rows, kept, config, done), len(facts)):
                layers = _read_shard(model, saes, shard, config)
                if writing is not None:
                    facts.append(writing.result())
                writing = pool.submit(_write_shard, folder, shard_name(number), shard, layers, saes, kept, config)
                if report is not None:
                    report(sum(fact["texts"] for fact in facts) + len(shard.texts), sum(fact["tokens"] for fact in facts) + shard.tokens)
            if writing is not None:
                facts.append(writing.result())
        if not facts:
            raise InputError("all texts are blank; give texts with at least one token")
        _write_dictionaries(folder, model, saes, config)
        folder.finish(**_facts(model, saes, config, kept, sae_name, facts))
    return read_store(out)


@dataclass(eq=False)
class _Shard:
    """Consecutive texts: where each stood in the corpus, its tokens as far as they are read, and its columns; blank rows between them, counted."""

    rows: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    token_ids: list[list[int]] = field(default_factory=list)
    about: list[dict[str, str | None]] = field(default_factory=list)
    tokens: int = 0
    seen: int = 0
    cut: int = 0

    @property
    def offsets(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum([len(ids) for ids in self.token_ids])])


@dataclass(frozen=True, eq=False)
class _LayerArrays:
    """What a shard's tokens and texts did at a layer, tokens in the order of their texts."""

    values_NK: np.ndarray
    indices_NK: np.ndarray
    counted_N: np.ndarray
    mean_BD: np.ndarray | None
    last_BD: np.ndarray | None


def _shards(model: LanguageModel, rows: Iterator[Any], columns: tuple[str, ...], config: StoreConfig, done: int) -> Iterator[_Shard]:
    """The rest of the corpus, tokenised and cut into shards, each with a text at least."""
    shard, number = _Shard(), done
    while chunk := list(itertools.islice(rows, _TOKENIZED_AT_ONCE)):
        read = [_row(row, columns, number + index) for index, row in enumerate(chunk)]
        all_ids = model.tokenizer([text for text, _ in read], add_special_tokens=True, verbose=False)["input_ids"]
        for (text, about), ids in zip(read, all_ids, strict=True):
            blank = not ids or not text.strip()
            if shard.tokens >= config.shard_tokens and not blank:
                yield shard
                shard = _Shard()
            if not blank:
                shard.rows.append(number)
                shard.texts.append(text)
                shard.token_ids.append(ids[: config.max_length])
                shard.about.append(about)
                shard.tokens += len(shard.token_ids[-1])
                shard.cut += len(ids) > config.max_length
            shard.seen += 1
            number += 1
    if shard.texts:
        yield shard


def _row(row: str | Mapping[str, Any], columns: tuple[str, ...], number: int) -> tuple[str, dict[str, str | None]]:
    if isinstance(row, str):
        return row, {}
    if missing := [name for name in ("text", *columns) if name not in row]:
        raise InputError(f"row {number} of the corpus has no column {missing[0]!r}; the columns there are {', '.join(map(repr, row))}")
    text = "" if row["text"] is None else row["text"]
    if not isinstance(text, str):
        raise InputError(f"row {number} of the corpus: text is of type {type(text).__name__}, expected text")
    return text, {name: None if row[name] is None else str(row[name]) for name in columns}


def _columns(first: str | Mapping[str, Any], wanted: Sequence[str] | None) -> tuple[str, ...]:
    there = [] if isinstance(first, str) else [name for name, value in first.items() if name not in _RESERVED]
    if wanted is None:
        return tuple(name for name in there if isinstance(first, Mapping) and isinstance(first[name], str | int | float))
    if missing := [name for name in wanted if name not in there]:
        raise InputError(f"the corpus has no column {missing[0]!r} to keep; it has {', '.join(map(repr, there)) or 'none'}")
    return tuple(wanted)


def _read_shard(model: LanguageModel, saes: Sequence[LayerSAE], shard: _Shard, config: StoreConfig) -> list[_LayerArrays]:
    """Run the model over a shard; the device is given the next batch before the host waits for the last one."""
    batches = pack_texts(shard.token_ids, batch_size=config.batch_size, length=config.max_length)
    arrays = [_empty(sae, len(shard.texts), shard.tokens, model.config.d_model, config) for sae in saes]
    computing: tuple[PackedBatch, list[Any]] | None = None
    for batch in (*batches, None):
        following = None if batch is None else (batch, _start(model, saes, batch, config))
        if computing is not None:
            _collect(*computing, arrays)
        computing = following
    return arrays


def _empty(sae: LayerSAE, texts: int, tokens: int, width: int, config: StoreConfig) -> _LayerArrays:
    indices = np.uint16 if sae.num_features <= 2**16 else np.int32
    streams = [np.zeros((texts, width), np.float32) if config.streams else None for _ in range(2)]
    return _LayerArrays(np.zeros((tokens, sae.k), np.float32), np.zeros((tokens, sae.k), indices), np.zeros(tokens, bool), *streams)


def _start(model: LanguageModel, saes: Sequence[LayerSAE], batch: PackedBatch, config: StoreConfig) -> list[Any]:
    """What the device is to compute for a batch, layer by layer, not waited for."""
    taps = jnp.asarray([sae.layer for sae in saes], jnp.int32)
    segment_ids = jnp.asarray(batch.batch.segment_ids_BT)
    with jax.set_mesh(model.mesh):
        out = forward(model.decoder, batch.batch.tokens_BT, segment_ids, (), taps, stop_after=saes[-1].layer)
        assert out.residuals is not None
        found = []
        for sae, x_BTD in zip(saes, out.residuals, strict=True):
            code, _, counted_BT = read_codes(sae.autoencoder, x_BTD, segment_ids, config.max_norm_multiple, config.drop_first)
            streams = _text_streams(x_BTD, counted_BT, *_texts_of(batch)) if config.streams else None
            found.append((code.values, code.indices, counted_BT, streams))
    return found


def _texts_of(batch: PackedBatch) -> tuple[np.ndarray, np.ndarray]:
    """The batch's texts by their place among those it holds, -1 at padding, and where each ends; as many as a bucket has room for."""
    texts, places_BT = np.unique(batch.texts_BT, return_inverse=True)
    places_BT = places_BT.reshape(batch.texts_BT.shape) - int(texts[0] < 0)
    ends = np.zeros(bucket_length(int(places_BT.max()) + 1), np.int32)
    flat = places_BT.reshape(-1)
    ends[flat[flat >= 0]] = np.flatnonzero(flat >= 0)  # the last token written stays
    return places_BT.astype(np.int32), ends


@jax.jit
def _text_streams(
    x_BTD: Float[Array, "B T D"], counted_BT: Bool[Array, "B T"], places_BT: Int[Array, "B T"], ends_C: Int[Array, " C"]
) -> tuple[Float[Array, "C D"], Float[Array, "C D"]]:
    """Mean over counted tokens, and last stream, of every text of a batch."""
    x_ND, places_N = x_BTD.reshape(-1, x_BTD.shape[-1]).astype(jnp.float32), places_BT.reshape(-1)
    weights_N = (counted_BT.reshape(-1) & (places_N >= 0)).astype(jnp.float32)
    # Damaged tokens do not count, and 0 times what is not a number is not 0.
    x_counted_ND = jnp.where(weights_N[:, None] > 0, x_ND, jnp.float32(0))
    sums = jax.ops.segment_sum(x_counted_ND, places_N, ends_C.shape[0])
    counts = jax.ops.segment_sum(weights_N, places_N, ends_C.shape[0])
    return sums / jnp.maximum(counts, 1)[:, None], x_ND[ends_C]


def _collect(batch: PackedBatch, found: list[Any], arrays: list[_LayerArrays]) -> None:
    """Put a batch's results where its texts' tokens belong."""
    inside = batch.places_BT.reshape(-1) >= 0
    places = batch.places_BT.reshape(-1)[inside]
    texts = np.unique(batch.texts_BT[batch.texts_BT >= 0])
    for (values_NK, indices_NK, counted_BT, streams), layer in zip(jax.device_get(found), arrays, strict=True):
        layer.values_NK[places] = values_NK[inside]
        layer.indices_NK[places] = indices_NK[inside]
        layer.counted_N[places] = counted_BT.reshape(-1)[inside]
        if layer.mean_BD is not None and layer.last_BD is not None:
            layer.mean_BD[texts], layer.last_BD[texts] = (part[: len(texts)] for part in streams)


def _write_shard(
    folder: ResumableFolder,
    name: str,
    shard: _Shard,
    layers: list[_LayerArrays],
    saes: Sequence[LayerSAE],
    columns: tuple[str, ...],
    config: StoreConfig,
) -> dict[str, Any]:
    facts: dict[str, Any] = {"rows": shard.seen, "texts": len(shard.texts), "tokens": shard.tokens, "cut": shard.cut}
    with folder.unit(name) as path:
        path.mkdir()
        _write_texts(path / TEXTS_FILE, shard, columns)
        ids = np.concatenate([np.zeros(0, np.int32), *(np.asarray(ids, np.int32) for ids in shard.token_ids)])
        write_safetensors(path / TOKENS_FILE, {"token_ids": ids})
        offsets = shard.offsets
        counted = {}
        for sae, arrays in zip(saes, layers, strict=True):
            write_safetensors(path / layer_file(sae.layer), _layer_columns(sae, arrays, offsets, config))
            counted[str(sae.layer)] = int(arrays.counted_N.sum())
        facts["counted"] = counted
        (path / SHARD_FILE).write_text(json.dumps(plain(facts)) + "\n", encoding="utf-8")
    return facts


def _layer_columns(sae: LayerSAE, arrays: _LayerArrays, offsets: np.ndarray, config: StoreConfig) -> dict[str, np.ndarray]:
    table = text_table(arrays.values_NK, arrays.indices_NK, arrays.counted_N, offsets, sae.num_features)
    ends = offsets[1:] - 1
    counted_B = np.add.reduceat(arrays.counted_N.astype(np.int32), offsets[:-1])
    found = {**table._asdict(), "counted_tokens": counted_B, "last_values": arrays.values_NK[ends], "last_indices": arrays.indices_NK[ends]}
    if config.codes:
        # bfloat16 has float32's range, so that what fires stays above 0.
        found |= {"values": arrays.values_NK.astype(ml_dtypes.bfloat16), "indices": arrays.indices_NK, "counted": arrays.counted_N}
    if arrays.mean_BD is not None and arrays.last_BD is not None:
        found |= {"mean_streams": arrays.mean_BD, "last_streams": arrays.last_BD}
    return found


def _write_texts(path: Path, shard: _Shard, columns: tuple[str, ...]) -> None:
    import pyarrow
    import pyarrow.parquet

    lengths = [len(ids) for ids in shard.token_ids]
    own = {name: pyarrow.array([about.get(name) for about in shard.about], pyarrow.string()) for name in columns}
    table = {"row": pyarrow.array(shard.rows, pyarrow.int64()), "text": pyarrow.array(shard.texts, pyarrow.string())}
    pyarrow.parquet.write_table(pyarrow.table(table | {"tokens": pyarrow.array(lengths, pyarrow.int32())} | own), path)


def _write_dictionaries(folder: ResumableFolder, model: LanguageModel, saes: Sequence[LayerSAE], config: StoreConfig) -> None:
    if not folder.done(VOCABULARY_FILE):
        tokens = model.tokenizer.batch_decode([[token] for token in range(model.config.vocab_size)], skip_special_tokens=False)
        with folder.unit(VOCABULARY_FILE) as path:
            path.write_text(json.dumps({"tokens": tokens}, ensure_ascii=False) + "\n", encoding="utf-8")
    for sae in saes:
        if config.dictionary and not folder.done(dictionary_file(sae.layer)):
            found = dictionary_facts(model, sae, entries=config.dictionary)
            with folder.unit(dictionary_file(sae.layer)) as path:
                write_safetensors(path, {item.name: getattr(found, item.name) for item in fields(Dictionary)})


def _check(model: LanguageModel, saes: Sequence[LayerSAE], config: StoreConfig) -> None:
    if (processes := jax.process_count()) > 1:
        raise ConfigError(f"a store is written by one process, this one is of {processes}; run one process for each part of the corpus")
    if not saes:
        raise InputError("no SAE given to read features with")
    if len({sae.layer for sae in saes}) != len(saes):
        raise InputError(f"SAEs of layers {[sae.layer for sae in saes]}: give of each layer one")
    for sae in saes:
        sae.check_width(model.config.d_model, model.name)
        model.check_layer(sae.layer)
    if config.max_length > model.config.max_positions:
        raise ConfigError(f"max_length is {config.max_length}; {model.name} has {model.config.max_positions} positions")
    axes = model.mesh.shape
    if config.batch_size % (axes["data"] * axes["fsdp"]):
        raise ConfigError(f"batch_size is {config.batch_size}, expected a multiple of data={axes['data']} times fsdp={axes['fsdp']}")


def _plan(
    model: LanguageModel, saes: Sequence[LayerSAE], config: StoreConfig, columns: tuple[str, ...], sae_name: str, data: Mapping[str, Any] | None
) -> dict[str, Any]:
    folder = model.source.folder if model.source else None
    sae_folder = Path(sae_name).expanduser()
    return {
        "model_source": str(folder.resolve()) if folder else model.name,
        "model_files": source_fingerprint(folder) if folder else {},
        "sae_source": sae_name,
        "sae_files": source_fingerprint(sae_folder) if sae_folder.exists() else {},
        "model_dtype": model.config.dtype,
        "sizes": [[sae.layer, sae.num_features, sae.k] for sae in saes],
        "data": dict(data or {}),
        "kept_columns": list(columns),
        **asdict(config),
    }


def _digest(row: str | Mapping[str, Any]) -> str:
    """Tells corpora apart of which nothing else is said."""
    text = row if isinstance(row, str) else row.get("text")
    return hashlib.sha256(str(text).encode("utf-8", "surrogatepass")).hexdigest()


def _resumed(folder: ResumableFolder) -> list[dict[str, Any]]:
    """What the whole shards of an earlier run hold; what follows a gap is made again."""
    facts: list[dict[str, Any]] = []
    while folder.done(shard_name(len(facts))):
        facts.append(read_json(folder.path / shard_name(len(facts)) / SHARD_FILE))
    return facts


def _facts(
    model: LanguageModel, saes: Sequence[LayerSAE], config: StoreConfig, columns: tuple[str, ...], sae_name: str, shards: list[dict[str, Any]]
) -> dict[str, Any]:
    """What the manifest says besides plan and files."""
    total = {name: sum(shard[name] for shard in shards) for name in ("rows", "texts", "tokens", "cut")}
    return {
        "format": FORMAT,
        "format_version": VERSION,
        "model": model.name,
        "sae": sae_name,
        "layers": [sae.layer for sae in saes],
        "num_features": {sae.layer: sae.num_features for sae in saes},
        "k": {sae.layer: sae.k for sae in saes},
        "d_model": model.config.d_model,
        "shard_texts": [shard["texts"] for shard in shards],
        "shard_tokens": [shard["tokens"] for shard in shards],
        "columns": list(columns),
        "codes": config.codes,
        "streams": config.streams,
        "filter": {"drop_first": config.drop_first, "max_norm_multiple": config.max_norm_multiple, "max_length": config.max_length},
        "total": {**total, "blank": total["rows"] - total["texts"]},
        "counted_tokens": {sae.layer: sum(shard["counted"][str(sae.layer)] for shard in shards) for sae in saes},
    }
