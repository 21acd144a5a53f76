import errno
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from qscope_jax.data.files import read_json
from qscope_jax.data.hub import Source
from qscope_jax.data.resumable import verify_manifest
from qscope_jax.errors import ConfigError, InputError, SourceError
from qscope_jax.models.language_model import LanguageModel, forward
from qscope_jax.parallel.mesh import make_mesh
from qscope_jax.parallel.rules import shard_tree
from qscope_jax.training import activation_cache
from qscope_jax.training.activation_cache import CacheConfig, cache_activations
from qscope_jax.training.activation_files import RowsFile, read_cache

OUTLIER = ord("~") - 30
LAYERS = (0, 1)


def config(**changes) -> CacheConfig:
    return CacheConfig(**{"layers": LAYERS, "shard_tokens": 150, **changes})


def expected(model, tokens, *, drop=True) -> tuple[np.ndarray, np.ndarray]:
    """Streams and token ids that a cache of all batches should hold, without using the code that makes one."""
    streams, ids = [], []
    while (batch := next(tokens, None)) is not None:
        out = forward(model.decoder, batch.tokens_BT, batch.segment_ids_BT, (), jnp.asarray(LAYERS, jnp.int32), stop_after=max(LAYERS))
        mask = batch.segment_ids_BT > 0
        if drop:
            mask &= (batch.positions_BT > 0) & (batch.tokens_BT != OUTLIER)
        streams.append(np.asarray(out.residuals)[:, mask])
        ids.append(batch.tokens_BT[mask])
    return np.concatenate(streams, axis=1), np.concatenate(ids)


def stored(folder, name: str, key: str = "residuals") -> np.ndarray:
    return np.concatenate([load_file(shard / f"{name}.safetensors")[key] for shard in sorted(folder.glob("shard*"))])


def contents(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def whole(model, token_stream, tmp_path_factory):
    """The cache of all documents, in shards of 150 tokens."""
    folder = tmp_path_factory.mktemp("whole") / "cache"
    return cache_activations(model, token_stream(epochs=1), config(), folder)


def test_cached_rows_are_the_model_s_cast_once(whole, model, token_stream):
    streams, ids = expected(model, token_stream(epochs=1))
    for stream, layer in zip(streams, LAYERS, strict=True):
        assert stored(whole.folder, f"layer{layer}").tobytes() == stream.astype(ml_dtypes.bfloat16).tobytes()
    np.testing.assert_array_equal(stored(whole.folder, "tokens", "token_ids"), ids)
    assert whole.tokens == len(ids) and verify_manifest(whole.folder) == []


@pytest.mark.parametrize(("dtype", "name"), [("float32", "float32"), ("model", "float32"), ("float16", "float16")])
def test_other_types_on_disk_hold_the_same_values(dtype, name, model, token_stream, tmp_path):
    found = cache_activations(model, token_stream(epochs=1), config(dtype=dtype), tmp_path / "cache")
    assert found.dtype == name
    assert stored(tmp_path / "cache", "layer1").tobytes() == expected(model, token_stream(epochs=1))[0][1].astype(name).tobytes()


def test_shards_are_of_one_size_but_the_last(whole):
    sizes = [len(load_file(shard / "layer0.safetensors")["residuals"]) for shard in sorted(whole.folder.glob("shard*"))]
    assert len(sizes) == whole.shards > 5 and set(sizes[:-1]) == {150} and 0 < sizes[-1] < 150


def test_a_layer_cached_alone_has_the_rows_it_has_among_others(whole, model, token_stream, tmp_path):
    # The same tokens are outliers in both layers here.
    cache_activations(model, token_stream(epochs=1), config(layers=(1,)), tmp_path / "cache")
    assert stored(tmp_path / "cache", "layer1").tobytes() == stored(whole.folder, "layer1").tobytes()
    assert not (tmp_path / "cache/shard000000/layer0.safetensors").exists()


def test_the_filter_can_be_off(model, token_stream, tmp_path):
    found = cache_activations(model, token_stream(epochs=1), config(drop_first=False, max_norm_multiple=0.0), tmp_path / "cache")
    _, ids = expected(model, token_stream(epochs=1), drop=False)
    np.testing.assert_array_equal(stored(tmp_path / "cache", "tokens", "token_ids"), ids)
    assert (found.tokens, found.seen, found.dropped, found.damaged) == (len(ids), len(ids), 0, 0)


def test_counts_and_statistics_are_those_of_the_rows(whole, model, token_stream):
    _, ids = expected(model, token_stream(epochs=1), drop=False)
    assert (whole.seen, whole.seen - whole.dropped, whole.damaged) == (len(ids), whole.tokens, 0)
    for layer in LAYERS:
        norms = np.linalg.norm(stored(whole.folder, f"layer{layer}").astype(np.float64), axis=1)
        assert whole.statistics[layer]["mean_squared_norm"] == pytest.approx(np.mean(norms**2), rel=1e-6)
        assert whole.statistics[layer]["median_norm"] == pytest.approx(np.median(norms), rel=0.011)
    assert (whole.model, whole.layers, whole.d_model, whole.filter) == ("in memory", LAYERS, 32, {"max_norm_multiple": 10.0, "drop_first": True})


@pytest.mark.parametrize("limit", [1, 149, 150, 400])
def test_a_limit_takes_exactly_the_first_tokens(limit, whole, model, token_stream, tmp_path):
    found = cache_activations(model, token_stream(epochs=1), config(max_tokens=limit), tmp_path / "cache")
    assert found.tokens == limit and stored(tmp_path / "cache", "layer0").tobytes() == stored(whole.folder, "layer0")[:limit].tobytes()


@pytest.mark.parametrize("max_tokens", [None, 450, 500])
@pytest.mark.parametrize("stop", [160, 310, 449, 500])
def test_an_interrupted_cache_resumes_and_equals_the_uninterrupted_one_file_by_file(stop, max_tokens, model, token_stream, tmp_path):
    reference = tmp_path / "reference"
    cache_activations(model, token_stream(epochs=1), config(max_tokens=max_tokens), reference)

    def interrupt(kept):
        if kept >= min(stop, max_tokens or stop):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache_activations(model, token_stream(epochs=1), config(max_tokens=max_tokens), tmp_path / "cache", report=interrupt)
    assert not (tmp_path / "cache").exists()
    reports = []
    cache_activations(model, token_stream(epochs=1), config(max_tokens=max_tokens), tmp_path / "cache", report=reports.append)
    assert reports == sorted(reports) and reports[0] >= 150 and reports[0] % 150 == 0
    assert contents(tmp_path / "cache") == contents(reference)


def test_a_cache_interrupted_after_its_last_shard_only_needs_its_manifest(model, token_stream, tmp_path, monkeypatch):
    cache_activations(model, token_stream(epochs=1), config(), tmp_path / "reference")
    with monkeypatch.context() as patch:
        patch.setattr(activation_cache.ResumableFolder, "finish", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            cache_activations(model, token_stream(epochs=1), config(), tmp_path / "cache")
    reports = []
    cache_activations(model, token_stream(epochs=1), config(), tmp_path / "cache", report=reports.append)
    assert reports == [read_cache(tmp_path / "cache").tokens] and contents(tmp_path / "cache") == contents(tmp_path / "reference")


def test_a_damaged_shard_of_an_interrupted_run_is_made_again_with_those_after_it(model, token_stream, tmp_path, whole):
    def interrupt(kept):
        if kept > 500:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache_activations(model, token_stream(epochs=1), config(), tmp_path / "cache", report=interrupt)
    torn = tmp_path / ".cache.partial/shard000001/layer0.safetensors"
    torn.write_bytes(torn.read_bytes()[:-10])
    reports = []
    cache_activations(model, token_stream(epochs=1), config(), tmp_path / "cache", report=reports.append)
    assert reports[0] == 150 and contents(tmp_path / "cache") == contents(whole.folder)


def test_other_settings_or_data_begin_anew(model, token_stream, tmp_path):
    def interrupt(kept):
        if kept > 300:
            raise KeyboardInterrupt

    for changes, data in (({}, {}), ({"max_norm_multiple": 9.0}, {}), ({}, {"documents": "others"})):
        with pytest.raises(KeyboardInterrupt):
            cache_activations(model, token_stream(epochs=1), config(), tmp_path / "cache", report=interrupt)
        reports = []
        with pytest.raises(KeyboardInterrupt):
            cache_activations(
                model,
                token_stream(epochs=1),
                config(**changes),
                tmp_path / "cache",
                data=data,
                report=lambda n, to=reports: (to.append(n), interrupt(n)),
            )
        assert reports[0] == (300 if not changes and not data else 0)


def test_a_full_disk_is_said_in_one_line_and_the_same_call_resumes(model, token_stream, tmp_path, monkeypatch, whole):
    append, calls = RowsFile.append, []

    def full(self, rows_ND):
        calls.append(len(rows_ND))
        if len(calls) == 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(self, rows_ND)

    monkeypatch.setattr(RowsFile, "append", full)
    with pytest.raises(SourceError, match="the disk is full; [1-9] finished units stay"):
        cache_activations(model, token_stream(epochs=1), config(), tmp_path / "cache")
    cache_activations(model, token_stream(epochs=1), config(), tmp_path / "cache")
    assert contents(tmp_path / "cache") == contents(whole.folder)


def test_a_disk_that_cannot_hold_the_cache_is_refused_before_the_first_token(model, token_stream, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 100_000))
    assert config().token_bytes(model) == 2 * 32 * 2 + 16
    with pytest.raises(SourceError, match="0.1 GB more are needed and 0.0 GB are free"):
        cache_activations(model, token_stream(epochs=1), config(max_tokens=1_000_000), tmp_path / "cache")
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_replaced_only_on_request_and_only_if_it_is_a_cache(model, token_stream, tmp_path):
    small = config(max_tokens=20)
    cache_activations(model, token_stream(), small, tmp_path / "cache")
    with pytest.raises(SourceError, match="exists; pass --overwrite"):
        cache_activations(model, token_stream(), config(max_tokens=30), tmp_path / "cache")
    assert cache_activations(model, token_stream(), config(max_tokens=30), tmp_path / "cache", overwrite=True).tokens == 30
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").touch()
    with pytest.raises(SourceError, match="does not hold what would be written"):
        cache_activations(model, token_stream(), small, tmp_path / "other", overwrite=True)


def test_damaged_tokens_are_left_out_and_counted(model, token_stream, tmp_path):
    def spoil(path, leaf):
        return leaf.at[ord("Q") - 30].set(jnp.nan) if "embedding" in jax.tree_util.keystr(path) else leaf

    spoiled = LanguageModel(jax.tree_util.tree_map_with_path(spoil, model.decoder), tokenizer=model.tokenizer)
    found = cache_activations(spoiled, token_stream(epochs=1), config(), tmp_path / "cache")
    assert 200 * 10 / 93 < found.damaged <= found.dropped < found.seen / 2
    assert np.isfinite(stored(tmp_path / "cache", "layer1").astype(np.float32)).all()


def test_a_model_whose_every_token_is_damaged_is_refused(model, token_stream, tmp_path):
    broken = LanguageModel(jax.tree.map(lambda w: w * jnp.float32(jnp.nan), model.decoder), tokenizer=model.tokenizer)
    with pytest.raises(SourceError, match="NaN or infinite"):
        cache_activations(broken, token_stream(epochs=1), config(), tmp_path / "cache")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("axes", ["fsdp=2", "data=2,tensor=2"])
def test_a_mesh_changes_nothing_but_rounding(axes, model, token_stream, tmp_path):
    mesh = make_mesh(axes)
    spread = LanguageModel(shard_tree(model.decoder, mesh), tokenizer=model.tokenizer, mesh=mesh)
    cache_activations(spread, token_stream(epochs=1), config(dtype="float32"), tmp_path / "cache")
    streams, ids = expected(model, token_stream(epochs=1))
    np.testing.assert_array_equal(stored(tmp_path / "cache", "tokens", "token_ids"), ids)
    np.testing.assert_allclose(stored(tmp_path / "cache", "layer1"), streams[1], rtol=1e-4, atol=1e-4)


def test_a_model_from_the_hub_is_named_with_its_commit(model, token_stream, tmp_path, monkeypatch):
    snapshot = tmp_path / "models--owner--name/snapshots/0123abcd"
    monkeypatch.setattr(Source, "path", lambda self, file: snapshot / file)
    published = LanguageModel(model.decoder, Source("owner/name", "main"), tokenizer=model.tokenizer)
    found = cache_activations(published, token_stream(), config(max_tokens=20), tmp_path / "cache")
    assert (found.model, found.revision) == ("owner/name", "0123abcd")


@pytest.mark.parametrize("changes", [{"layers": ()}, {"layers": (1, 1)}, {"max_tokens": 0}, {"shard_tokens": 0}, {"dtype": "int8"}])
def test_impossible_settings_are_refused(changes):
    with pytest.raises(ConfigError):
        config(**changes)


def test_layers_processes_and_rows_that_do_not_suit_are_refused_before_anything_is_written(model, token_stream, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="layer 2 is out of range"):
        cache_activations(model, token_stream(epochs=1), config(layers=(2,)), tmp_path / "cache")
    spread = LanguageModel(model.decoder, tokenizer=model.tokenizer, mesh=make_mesh("data=3"))
    with pytest.raises(ConfigError, match="4 rows, expected a multiple of data=3"):
        cache_activations(spread, token_stream(epochs=1), config(), tmp_path / "cache")
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ConfigError, match="cached by one process, this one is of 2"):
        cache_activations(model, token_stream(epochs=1), config(), tmp_path / "cache")
    assert not list(tmp_path.iterdir())


def test_the_manifest_says_how_its_statistics_were_made(whole):
    found = read_json(whole.folder / "manifest.json")
    assert "histogram" in found["statistics_note"] and found["plan"]["stream"]["places"]["0"]["stream"]["documents"] == 200
