"""A feature store written file by file from readouts, for tests that need neither a model nor the writer."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import pyarrow
import pyarrow.parquet

from qscope_jax.features.readout import Readout
from qscope_jax.features.store.feature_store import (
    FORMAT,
    TEXTS_FILE,
    TOKENS_FILE,
    VERSION,
    VOCABULARY_FILE,
    FeatureStore,
    layer_file,
    read_store,
    shard_name,
)
from qscope_jax.features.text_features import text_features
from qscope_jax.sae.formats.mapped_tensors import write_safetensors


def make_store(
    folder: Path,
    readout: Readout,
    *,
    columns: Mapping[str, Sequence] | None = None,
    vocabulary: Sequence[str] | None = None,
    shard_texts: int = 3,
    codes: bool = True,
    dictionary: Mapping[str, np.ndarray] | None = None,
) -> FeatureStore:
    """Write the texts of a readout, so many a shard, and open them."""
    columns = dict(columns or {})
    size = max(max(ids) for ids in readout.token_ids) + 1
    folder.mkdir(parents=True)
    (folder / VOCABULARY_FILE).write_text(json.dumps({"tokens": list(vocabulary or [f" t{i}" for i in range(size)])}))
    shards = [list(range(first, min(first + shard_texts, len(readout)))) for first in range(0, len(readout), shard_texts)]
    for index, texts in enumerate(shards):
        _write_shard(folder / shard_name(index), readout, texts, {name: [values[i] for i in texts] for name, values in columns.items()}, codes)
    if dictionary is not None:
        (folder / "dictionary").mkdir()
        write_safetensors(folder / "dictionary" / layer_file(readout.layer), dict(dictionary))
    files = {}
    for path in sorted(folder.rglob("*.*")):
        data = path.read_bytes()
        files[str(path.relative_to(folder))] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    facts = {
        "format": FORMAT, "format_version": VERSION, "model": "made", "sae": "made SAEs", "layers": [readout.layer],
        "num_features": {readout.layer: readout.num_features}, "k": {readout.layer: readout.values[0].shape[1]}, "d_model": 4,
        "shard_texts": [len(texts) for texts in shards], "shard_tokens": [sum(len(readout.token_ids[i]) for i in texts) for texts in shards],
        "columns": list(columns), "codes": codes, "streams": False, "files": files,
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(facts))
    return read_store(folder)


def _write_shard(folder: Path, readout: Readout, texts: list[int], columns: Mapping[str, Sequence], codes: bool) -> None:
    folder.mkdir()
    table = {"row": texts, "text": [readout.texts[i] for i in texts], "tokens": [len(readout.token_ids[i]) for i in texts], **columns}
    pyarrow.parquet.write_table(pyarrow.table(table), folder / TEXTS_FILE)
    write_safetensors(folder / TOKENS_FILE, {"token_ids": np.concatenate([readout.token_ids[i] for i in texts]).astype(np.int32)})
    found = text_features(readout).select(texts)
    maxima = found.maxima
    last = [(readout.values[i][-1], readout.indices[i][-1]) for i in texts]
    tensors = {
        "indptr": maxima.indptr.astype(np.int64), "features": maxima.indices.astype(np.int32), "maxima": maxima.data,
        "counts": found.firing_counts.data.astype(np.int32), "counted_tokens": found.counted_tokens.astype(np.int64),
        "last_values": np.stack([v for v, _ in last]).astype(ml_dtypes.bfloat16), "last_indices": np.stack([i for _, i in last]).astype(np.int32),
    }  # fmt: skip
    if codes:
        tensors["values"] = np.concatenate([readout.values[i] for i in texts]).astype(ml_dtypes.bfloat16)
        tensors["indices"] = np.concatenate([readout.indices[i] for i in texts]).astype(np.int32)
        tensors["counted"] = np.concatenate([readout.counted[i] for i in texts])
    write_safetensors(folder / layer_file(readout.layer), tensors)
