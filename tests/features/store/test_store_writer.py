import errno
import json
import random
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.errors import ConfigError, InputError, ShapeError, SourceError
from qscope_jax.features.readout import read_features
from qscope_jax.features.store import store_writer
from qscope_jax.features.store.feature_store import layer_file, read_store, shard_name
from qscope_jax.features.store.store_writer import StoreConfig, write_store
from qscope_jax.features.text_features import text_features
from qscope_jax.sae.autoencoder import SparseAutoencoder
from qscope_jax.sae.layer_sae import LayerSAE

LENGTH = 24


def corpus(count: int = 40) -> list[dict]:
    """Rows of 1 to 30 characters, an outlier of the norm among them, with a language each; the third is blank."""
    rng = random.Random(0)
    rows = [
        {"text": "".join(rng.choices("abcdefgh ij~", k=rng.randint(1, 30))).strip() or "a", "language": rng.choice("xy"), "n": i}
        for i in range(count)
    ]
    rows[2] = {"text": "  ", "language": None, "n": 2}
    return rows


@pytest.fixture
def config():
    return StoreConfig(max_length=LENGTH, batch_size=4, shard_tokens=150, streams=True, dictionary=3, max_norm_multiple=0.0)


@pytest.fixture(scope="module")
def store(character_model, saes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("store") / "store"
    settings = StoreConfig(max_length=LENGTH, batch_size=4, shard_tokens=150, streams=True, dictionary=3, max_norm_multiple=0.0)
    return write_store(character_model, saes[:2], corpus(), folder, settings)


@pytest.fixture(scope="module")
def alone(character_model, saes):
    """The same texts, cut, read one by one: nothing is packed."""
    texts = [row["text"][:LENGTH] for row in corpus() if row["text"].strip()]
    readouts = [read_features(character_model, saes[:2], [text], max_norm_multiple=0.0) for text in texts]
    return texts, readouts


def test_a_store_holds_what_each_text_gives_alone(store, alone):
    texts, readouts = alone
    assert len(store.shard_texts) > 2 and store.num_texts == len(texts) == 39
    for layer in store.layers:
        tables = store.text_features(layer)
        for text, readout in enumerate(readouts):
            one = text_features(readout[layer])
            for name in ("maxima", "last"):
                np.testing.assert_allclose(getattr(tables, name)[[text]].toarray(), getattr(one, name).toarray(), atol=2e-4, err_msg=name)
            np.testing.assert_array_equal(tables.firing_counts[[text]].toarray(), one.firing_counts.toarray())
            assert tables.counted_tokens[text] == one.counted_tokens[0] == len(texts[text]) - 1
            code = store.code(layer, text)
            assert store.token_ids(text).tolist() == list(readout[layer].token_ids[0])
            for feature in np.unique(code.indices)[:5]:
                np.testing.assert_allclose(code.activation(int(feature)), readout[layer].activation(0, int(feature)), rtol=2**-7, atol=1e-3)


def test_shard_by_shard_is_all_at_once(store):
    for layer in store.layers:
        firsts = [first for first, _, _ in store.code_shards(layer)]
        assert firsts == [0, *np.cumsum(store.shard_texts)[:-1]]
        for (first, offsets, code), texts in zip(store.code_shards(layer), store.shard_texts, strict=True):
            for row in range(texts):
                for whole, part in zip(code, store.code(layer, first + row), strict=True):
                    np.testing.assert_array_equal(whole[offsets[row] : offsets[row + 1]], part)


def test_columns_rows_and_tokens_belong_to_their_texts(store):
    rows = [row for row in corpus() if row["text"].strip()]
    assert store.columns == ("language", "n") and store.texts == [row["text"] for row in rows]
    assert store.column("language") == [row["language"] for row in rows] and store.column("n") == [str(row["n"]) for row in rows]
    assert store.rows == [row["n"] for row in rows]
    assert "".join(store.vocabulary[i] for i in store.token_ids(0)) == store.texts[0][:LENGTH]
    assert store.facts["total"]["blank"] == 1 and store.facts["total"]["cut"] == sum(len(row["text"]) > LENGTH for row in rows) > 0
    store.verify()


def test_streams_are_those_of_each_text(store, character_model, alone):
    texts, _ = alone
    for text in (0, 5, 38):
        streams = np.asarray(character_model.residuals([texts[text]], [1]).values)[0, 0, : len(texts[text])]
        mean = streams[1:].mean(axis=0) if len(streams) > 1 else np.zeros(32)
        np.testing.assert_allclose(store.streams(1, "mean")[text], mean, rtol=1e-3, atol=1e-3 * np.abs(streams).max())
        np.testing.assert_allclose(store.streams(1, "last")[text], streams[-1], rtol=1e-3, atol=1e-3 * np.abs(streams).max())


def test_outliers_of_the_norm_do_not_count(character_model, saes, tmp_path, config):
    found = write_store(character_model, saes[:1], ["abcab~cabcab"], tmp_path / "s", StoreConfig(max_length=LENGTH, batch_size=1, dictionary=0))
    np.testing.assert_array_equal(found.code(0, 0).counted, [c not in "~" and i > 0 for i, c in enumerate("abcab~cabcab")])
    assert found.dictionary(0) is None


def test_an_interrupted_store_is_finished_by_the_same_call_to_the_byte(character_model, saes, tmp_path, config, store, monkeypatch):
    real, left = store_writer._read_shard, [2]

    def fails(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(store_writer, "_read_shard", fails)
    with pytest.raises(OSError):
        write_store(character_model, saes[:2], corpus(), tmp_path / "s", config)
    assert not (tmp_path / "s").exists()
    monkeypatch.setattr(store_writer, "_read_shard", real)
    seen = []
    again = write_store(character_model, saes[:2], iter(corpus()), tmp_path / "s", config, report=lambda texts, tokens: seen.append(texts))
    assert seen[0] > store.shard_texts[0], "finished shards were made again"
    for path in sorted(store.folder.rglob("*")):
        if path.is_file() and path.name != "manifest.json":
            assert path.read_bytes() == (again.folder / path.relative_to(store.folder)).read_bytes(), path
    strip = ("model_files", "sae_files")
    manifests = [{k: v for k, v in json.loads((f / "manifest.json").read_text()).items() if k not in strip} for f in (store.folder, again.folder)]
    assert manifests[0] == manifests[1]


@pytest.mark.parametrize(("rows", "name"), [(corpus(8), "other"), (corpus(8)[1:], "one")])
def test_other_settings_or_texts_do_not_continue_an_unfinished_store(character_model, saes, tmp_path, config, monkeypatch, rows, name):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(store_writer, "_write_dictionaries", stop)
    with pytest.raises(KeyboardInterrupt):
        write_store(character_model, saes[:1], corpus(8), tmp_path / "s", config, sae_name="one")
    monkeypatch.undo()
    seen = []
    found = write_store(character_model, saes[:1], rows, tmp_path / "s", config, sae_name=name, report=lambda texts, tokens: seen.append(texts))
    assert seen and found.texts == [row["text"] for row in rows if row["text"].strip()]


def test_many_features_and_small_shards_give_the_same_tables(store, character_model, saes, tmp_path, monkeypatch, config):
    monkeypatch.setattr("qscope_jax.features.text_features._DENSE", 30)
    found = write_store(character_model, saes[:2], corpus(), tmp_path / "s", config)
    for layer in store.layers:
        for name in ("maxima", "firing_counts"):
            ours, theirs = getattr(found.text_features(layer), name), getattr(store.text_features(layer), name)
            np.testing.assert_array_equal(ours.toarray(), theirs.toarray())


def test_what_cannot_be_written_or_read_gets_one_line(character_model, saes, tmp_path, store):
    def write(texts, out="s", saes=saes[:1], config=None, **options):
        return write_store(character_model, saes, texts, tmp_path / out, config or StoreConfig(max_length=8, batch_size=1, dictionary=0), **options)

    with pytest.raises(InputError, match="there is no text to read"):
        write([])
    with pytest.raises(InputError, match="all texts are blank"):
        write([" ", ""])
    with pytest.raises(InputError, match="the corpus has no column 'label' to keep; it has 'language'"):
        write([{"text": "a", "language": "x"}], columns=["label"])
    with pytest.raises(InputError, match="row 1 of the corpus has no column 'language'"):
        write([{"text": "a", "language": "x"}, {"text": "b"}])
    with pytest.raises(InputError, match="row 1 of the corpus: text is of type int"):
        write([{"text": "a"}, {"text": 3}])
    with pytest.raises(InputError, match="give of each layer one"):
        write(["a"], saes=[saes[0], saes[0]])
    with pytest.raises(ConfigError, match="max_length is 999999; in memory has"):
        write(["a"], config=StoreConfig(max_length=999_999))
    with pytest.raises(ConfigError, match="shard_tokens is 0, expected 1 or more"):
        StoreConfig(shard_tokens=0)
    assert not (tmp_path / "s").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    with pytest.raises(SourceError):
        write(["a"], "other", overwrite=True)
    with pytest.raises(SourceError, match="holds no feature store"):
        read_store(tmp_path)


def test_a_store_says_what_it_does_not_hold(character_model, saes, tmp_path, store):
    bare = write_store(character_model, saes[:1], ["abc", "d"], tmp_path / "s", StoreConfig(max_length=8, batch_size=1, dictionary=0, codes=False))
    with pytest.raises(InputError, match="keeps no token's code"):
        bare.code(0, 0)
    with pytest.raises(InputError, match="keeps no residual streams"):
        bare.streams(0, "mean")
    with pytest.raises(InputError, match="has no layer 7; it has layers 0"):
        bare.text_features(7)
    with pytest.raises(InputError, match="has no column 'x'; it has none"):
        bare.column("x")
    with pytest.raises(InputError, match="text 2 is out of range"):
        bare.token_ids(2)
    assert bare.text_features(0).last.shape == (2, 24)


def test_damage_is_found(store, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(store.folder, copy)
    path = copy / shard_name(0) / layer_file(0)
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(SourceError, match="is damaged or missing"):
        read_store(copy).verify()
    manifest = copy / "manifest.json"
    facts = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**facts, "format_version": 99}))
    with pytest.raises(SourceError, match="version 99, expected qscope_jax features version 1"):
        read_store(copy)
    manifest.write_text(json.dumps({name: value for name, value in facts.items() if name != "layers"}))
    with pytest.raises(SourceError, match="is damaged"):
        read_store(copy)


def test_an_sae_of_another_width_is_refused(character_model, saes, tmp_path):
    wide = LayerSAE(SparseAutoencoder(jnp.ones((24, 16)), jnp.ones((24, 16)), jnp.zeros(24), jnp.zeros(16), k=4), 0)
    with pytest.raises(ShapeError):
        write_store(character_model, [wide], ["abc"], tmp_path / "s")
