import json
import shutil

import numpy as np
import pytest

from qscope_jax.errors import SourceError
from qscope_jax.features.store import feature_store
from qscope_jax.features.store.feature_store import TEXTS_FILE, holds_store, read_store, shard_name
from qscope_jax.features.store.store_writer import StoreConfig, write_store

TEXTS = ["abc", "", "d e f g", "ab", "hij", "cabe"]


@pytest.fixture(scope="module")
def folder(character_model, saes, tmp_path_factory):
    """Five texts in shards of some eight tokens each, the blank one left out."""
    path = tmp_path_factory.mktemp("store") / "store"
    rows = [{"text": text, "place": f"place {i}"} for i, text in enumerate(TEXTS)]
    write_store(character_model, saes[:2], rows, path, StoreConfig(max_length=16, batch_size=1, shard_tokens=8, dictionary=0, max_norm_multiple=0.0))
    return path


def test_opening_reads_the_manifest_alone(folder, tmp_path):
    (tmp_path / "manifest.json").write_bytes((folder / "manifest.json").read_bytes())
    store = read_store(tmp_path)
    assert store.layers == (0, 1) and store.num_features == {0: 24, 1: 24} and len(store.shard_texts) > 1 and store.num_texts == 5
    with pytest.raises(SourceError):
        store.texts  # noqa: B018


def test_texts_and_columns_keep_their_order_over_shards(folder):
    store = read_store(folder)
    kept = [i for i, text in enumerate(TEXTS) if text]
    assert store.texts == [TEXTS[i] for i in kept] and store.rows == kept and store.column("place") == [f"place {i}" for i in kept]
    assert store.lengths.tolist() == [len(TEXTS[i]) for i in kept] and store.num_tokens == store.lengths.sum()
    assert [store.token_ids(i).tolist() for i in range(5)] == [[ord(c) - 30 for c in TEXTS[row]] for row in kept]


def test_codes_by_text_and_by_shard_are_the_same_and_give_the_tables(folder):
    store, text = read_store(folder), 0
    tables = store.text_features(1)
    for first, offsets, code in store.code_shards(1):
        assert first == text
        for begin, end in zip(offsets[:-1], offsets[1:], strict=True):
            alone = store.code(1, text)
            for name in ("values", "indices", "counted"):
                np.testing.assert_array_equal(getattr(alone, name), getattr(code, name)[begin:end])
            dense = np.zeros(24, np.float32)
            np.maximum.at(dense, alone.indices[alone.counted].ravel(), alone.values[alone.counted].ravel())
            # Codes are kept in bfloat16.
            np.testing.assert_allclose(tables.maxima[[text]].toarray()[0], dense, rtol=1e-2)
            text += 1
    assert text == store.num_texts


def test_few_files_stay_mapped_however_many_are_read(folder, monkeypatch):
    monkeypatch.setattr(feature_store, "_MAPPED", 2)
    store = read_store(folder)
    for text in (0, 4, 1, 3, 2):
        found = store.code(0, text), store.code(1, text), store.token_ids(text)
        assert len(found[0].values) == len(found[1].values) == len(found[2])
        assert len(store._maps) <= 2


def test_a_store_is_known_by_its_manifest(folder, tmp_path):
    assert holds_store(folder) and not holds_store(tmp_path) and not holds_store(tmp_path / "nothing")
    (tmp_path / "manifest.json").write_text(json.dumps({"format": "something else"}))
    assert not holds_store(tmp_path)
    with pytest.raises(SourceError, match="holds something else version unknown, expected qscope_jax features version 1"):
        read_store(tmp_path)


def test_texts_that_are_damaged_are_said_to_be(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / shard_name(1) / TEXTS_FILE).write_bytes(b"PAR1 nothing")
    with pytest.raises(SourceError, match=r"texts\.parquet: cannot be read .*; write the store again"):
        read_store(tmp_path / "copy").texts  # noqa: B018
