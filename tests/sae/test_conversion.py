import dataclasses
import errno
import json
import os

import ml_dtypes
import numpy as np
import pytest

from qscope_jax.data.resumable import verify_manifest
from qscope_jax.errors import ArchitectureError, InputError, SourceError
from qscope_jax.models import safetensors_file
from qscope_jax.sae import conversion
from qscope_jax.sae.arrays import SAEArrays
from qscope_jax.sae.autoencoder import densify
from qscope_jax.sae.comparison import compare_codes, first_difference
from qscope_jax.sae.conversion import ConversionConfig, convert, fit
from qscope_jax.sae.formats.own_format import write_folder
from qscope_jax.sae.formats.registry import list_sae_layers, read_sae_arrays
from qscope_jax.sae.formats.writers import WRITERS
from qscope_jax.sae.layer_sae import load_sae

F, D, K = 1024, 12, 50
LAYERS = [0, 2, 5]
RELEASED = f"SAE-Res-Tiny-W1K-L0_{K}"


def made(layer=0, dtype=np.float32, **settings) -> SAEArrays:
    rng = np.random.default_rng(layer)
    W_enc = rng.standard_normal((F, D))
    drawn = {"W_enc": W_enc, "W_dec": W_enc * rng.uniform(0.2, 2, (F, 1)), "b_enc": rng.uniform(-2, 0, F), "b_dec": rng.standard_normal(D)}
    tensors = {name: array.astype(dtype) for name, array in drawn.items()}
    return SAEArrays(**{**tensors, "k": K, "metadata": {"layer": layer, "model_name": "tiny", "folds": []}, **settings})


def jump(layer=0, **settings) -> SAEArrays:
    threshold = np.random.default_rng(9).uniform(0, 3, F).astype(np.float32)
    return made(layer, **{"activation": "jumprelu", "threshold": threshold, **settings})


@pytest.fixture
def source(tmp_path):
    """Our own folder with three layers; the encoder sees x unless said otherwise."""

    def write(make=made, **settings):
        write_folder(tmp_path / "source", {layer: make(layer, **settings) for layer in LAYERS})
        return tmp_path / "source"

    return write


def k_of(to):
    return {"k": K} if to == "qwen_scope" else {}


@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.parametrize("to", sorted(WRITERS))
def test_every_format_takes_topk_and_load_sae_reads_it_back_with_the_same_features(to, flag, source, tmp_path):
    told = []
    assert convert(source(apply_b_dec_to_input=flag), tmp_path / "out", ConversionConfig(to), report=told.append) == LAYERS
    assert list_sae_layers(tmp_path / "out") == LAYERS and verify_manifest(tmp_path / "out") == []
    exact = WRITERS[to].apply_b_dec_to_input in (None, flag)
    x = np.random.default_rng(1).standard_normal((64, D)).astype(np.float32)
    for layer, said in zip(LAYERS, told, strict=True):
        original, found = made(layer, apply_b_dec_to_input=flag), read_sae_arrays(tmp_path / "out", layer, **k_of(to))
        assert (first_difference(original, found) is None) == exact == ("equal to the bit" in said.outcome)
        assert said.folds == (() if exact else ("b_dec_out_of_input" if flag else "b_dec_into_input",)) and compare_codes(original, found).same
        loaded, ours = load_sae(tmp_path / "out", layer, **k_of(to)), load_sae(tmp_path / "source", layer)
        np.testing.assert_allclose(densify(loaded.encode(x), F), densify(ours.encode(x), F), rtol=1e-5, atol=2e-5)
        np.testing.assert_allclose(loaded.decode(loaded.encode(x)), ours.decode(ours.encode(x)), rtol=1e-5, atol=2e-4)
        assert found.metadata["layer"] == layer


@pytest.mark.parametrize("to", ["safetensors", "orbax", "sae_lens"])
@pytest.mark.parametrize("activation", ["jumprelu", "batch_topk"])
def test_thresholds_are_carried_to_the_bit(to, activation, source, tmp_path):
    convert(source(jump, activation=activation, apply_b_dec_to_input=True), tmp_path / "out", ConversionConfig(to))
    for layer in LAYERS:
        found = read_sae_arrays(tmp_path / "out", layer)
        assert first_difference(jump(layer), found) is None
        assert (found.k, found.apply_b_dec_to_input, load_sae(tmp_path / "out", layer).k) == (K, True, K)


def test_there_and_back_through_every_format_is_the_same_to_the_bit(source, tmp_path):
    """The encoder sees x - b_dec, which all of these hold."""
    previous = source(apply_b_dec_to_input=True)
    for to in ("sae_lens", "orbax", "sparsify", "dictionary_learning", "safetensors"):
        convert(previous, tmp_path / to, ConversionConfig(to))
        previous = tmp_path / to
    for layer in LAYERS:
        assert first_difference(made(layer), read_sae_arrays(previous, layer)) is None


@pytest.mark.parametrize("to", ["qwen_scope", "sparsify", "dictionary_learning"])
def test_thresholds_are_refused_where_only_topk_fits_unless_a_loss_is_allowed(to, source, tmp_path):
    with pytest.raises(ArchitectureError, match=f"layer 0: {to} holds top-k SAEs only, this one is jumprelu .*allow --lossy"):
        convert(source(jump), tmp_path / "out", ConversionConfig(to))
    with pytest.raises(InputError, match="needs k, the mean L0 on real text"):
        convert(tmp_path / "source", tmp_path / "out", ConversionConfig(to, lossy=True))
    assert not (tmp_path / "out").exists() and os.listdir(tmp_path) == ["source"]
    told = []
    convert(tmp_path / "source", tmp_path / "out", ConversionConfig(to, lossy=True, k=30), report=told.append)
    assert "became topk with k 30" in told[0].changes[0] and "differ on" in told[0].outcome
    found = read_sae_arrays(tmp_path / "out", 0, k=30)
    assert (found.activation, found.k, found.threshold) == ("topk", 30, None)


def test_a_stated_mean_l0_becomes_k(tmp_path):
    sae = jump(metadata={"mean_l0": 71, "folds": []})
    fitted, changes = fit(sae, ConversionConfig("dictionary_learning", lossy=True), "x")
    assert fitted.k == 71 and fitted.metadata["folds"] == ["threshold_to_topk", "b_dec_into_input"] and len(changes) == 1
    assert fit(jump(activation="batch_topk"), ConversionConfig("sparsify", lossy=True), "x")[0].k == K


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_narrower_type_needs_permission_and_says_what_it_rounds(dtype, source, tmp_path):
    with pytest.raises(InputError, match=rf"layer 0: {dtype} cannot hold the values of W_enc, W_dec, b_enc, b_dec exactly.*allow --lossy"):
        convert(source(), tmp_path / "out", ConversionConfig("sae_lens", dtype=dtype))
    told = []
    convert(tmp_path / "source", tmp_path / "out", ConversionConfig("sae_lens", dtype=dtype, lossy=True), report=told.append)
    assert told[0].changes == (f"W_enc, W_dec, b_enc, b_dec rounded to {dtype}",) and "of 256 random tokens" in told[0].outcome
    assert json.loads((tmp_path / "out" / "blocks.0.hook_resid_post" / "cfg.json").read_text())["dtype"] == dtype
    np.testing.assert_array_equal(read_sae_arrays(tmp_path / "out", 2).W_enc, made(2).W_enc.astype(conversion.DTYPES[dtype]), strict=True)


def test_a_fold_is_computed_before_the_type_is_narrowed(source, tmp_path):
    convert(source(), tmp_path / "out", ConversionConfig("sparsify", dtype="bfloat16", lossy=True))
    sae = made(2)
    expected = sae.b_enc.astype(np.float64) + sae.W_enc.astype(np.float64) @ sae.b_dec.astype(np.float64)
    np.testing.assert_array_equal(read_sae_arrays(tmp_path / "out", 2).b_enc, expected.astype(np.float32).astype(ml_dtypes.bfloat16))


def test_a_wider_type_loses_nothing_and_needs_no_permission(source, tmp_path):
    convert(source(dtype=ml_dtypes.bfloat16), tmp_path / "out", ConversionConfig("safetensors", dtype="float32"))
    for name, array in made(2, ml_dtypes.bfloat16).tensors().items():
        np.testing.assert_array_equal(read_sae_arrays(tmp_path / "out", 2).tensors()[name], array.astype(np.float32), strict=True)
    convert(tmp_path / "out", tmp_path / "back", ConversionConfig("safetensors", dtype="bfloat16"))  # the values fit, so nothing is lost
    assert first_difference(read_sae_arrays(tmp_path / "back", 2), made(2, ml_dtypes.bfloat16)) is None


def test_a_fold_of_a_narrow_sae_is_not_rounded_away_by_its_reader(source, tmp_path):
    convert(source(dtype=ml_dtypes.bfloat16), tmp_path / "out", ConversionConfig("sparsify"))
    found = read_sae_arrays(tmp_path / "out", 0)
    assert {array.dtype for array in found.tensors().values()} == {np.dtype(np.float32)}
    assert compare_codes(made(0, ml_dtypes.bfloat16), found).same


def test_values_too_large_for_a_type_are_refused_even_with_permission():
    with pytest.raises(InputError, match="b_dec holds values too large for float16"):
        fit(made(b_dec=np.full(D, 1e6, np.float32)), ConversionConfig("safetensors", dtype="float16", lossy=True), "x")
    with pytest.raises(InputError, match="qwen_scope files hold float32 only"):
        fit(made(), ConversionConfig("qwen_scope", dtype="bfloat16", lossy=True), "x")


class Interrupted(BaseException):
    """Stands for KeyboardInterrupt and the like."""


@pytest.mark.parametrize("to", sorted(WRITERS))
@pytest.mark.parametrize("at", [1, 2, 3])
def test_an_interrupted_conversion_resumes_after_any_layer(to, at, source, tmp_path):
    told = []

    def stop_at(said):
        told.append(said)
        if len(told) == at:
            raise Interrupted

    with pytest.raises(Interrupted):
        convert(source(), tmp_path / "out", ConversionConfig(to), report=stop_at)
    assert not (tmp_path / "out").exists()
    again = []
    assert convert(tmp_path / "source", tmp_path / "out", ConversionConfig(to), report=again.append) == LAYERS
    assert [said.resumed for said in again] == [layer in LAYERS[:at] for layer in LAYERS]
    fresh = tmp_path / "fresh"
    convert(tmp_path / "source", fresh, ConversionConfig(to))
    assert list_sae_layers(tmp_path / "out") == LAYERS and not (tmp_path / ".out.partial").exists()
    for layer in LAYERS:
        assert first_difference(*(read_sae_arrays(path, layer, **k_of(to)) for path in (tmp_path / "out", fresh))) is None


@pytest.mark.parametrize("change", ["another option", "another source"])
def test_after_a_change_of_options_or_source_a_conversion_starts_clean(change, source, tmp_path):
    def stop(said):
        raise Interrupted

    with pytest.raises(Interrupted):
        convert(source(), tmp_path / "out", ConversionConfig("sae_lens"), report=stop)
    told, config = [], ConversionConfig("sae_lens")
    if change == "another option":
        config = dataclasses.replace(config, k=K - 1)
    else:
        os.utime(tmp_path / "source" / "layer5.safetensors", ns=(1, 1))
    convert(tmp_path / "source", tmp_path / "out", config, report=told.append)
    assert not any(said.resumed for said in told)


def test_a_full_disk_keeps_what_is_finished_and_says_so_in_one_line(source, tmp_path, monkeypatch):
    path, honest, calls = source(), safetensors_file.os.fsync, []

    def full(handle):
        calls.append(handle)
        if len(calls) > 12:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        honest(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SourceError, match=r"^[^\n]*out: the disk is full; \d+ finished units stay in [^\n]*then the same command resumes$"):
        convert(path, tmp_path / "out", ConversionConfig("sae_lens"))
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    told = []
    convert(path, tmp_path / "out", ConversionConfig("sae_lens"), report=told.append)
    assert [said.resumed for said in told] == [True, False, False]


@pytest.mark.parametrize("to", sorted(WRITERS))
def test_a_write_that_does_not_read_back_equal_is_an_error_and_is_not_kept(to, source, tmp_path, monkeypatch):
    writer = WRITERS[to]

    def flipped(path, layer, arrays):
        found = writer.read_back(path, layer, arrays)
        b_dec = found.b_dec.copy()
        b_dec[0] = np.nextafter(b_dec[0], np.float32(9))
        return dataclasses.replace(found, b_dec=b_dec)

    monkeypatch.setitem(WRITERS, to, dataclasses.replace(writer, read_back=flipped))
    with pytest.raises(SourceError, match="layer 0: b_dec differs after writing"):
        convert(source(), tmp_path / "out", ConversionConfig(to))
    assert os.listdir(tmp_path) == ["source"]
    told = []
    convert(tmp_path / "source", tmp_path / "out", ConversionConfig(to, verify=False), report=told.append)
    assert told[0].outcome == "not read back"


def test_a_fold_that_is_wrong_is_noticed_by_its_codes(source, tmp_path, monkeypatch):
    def wrong(arrays):
        return dataclasses.replace(arrays, apply_b_dec_to_input=True)  # without changing b_enc

    monkeypatch.setattr(conversion, "b_dec_into_input", wrong)
    with pytest.raises(SourceError, match="active features differ from the source's on"):
        convert(source(), tmp_path / "out", ConversionConfig("sparsify"))


def test_a_damaged_layer_stops_the_conversion_and_the_rest_resumes(source, tmp_path):
    path = source()
    data = (path / "layer2.safetensors").read_bytes()
    (path / "layer2.safetensors").write_bytes(data[:-1])
    with pytest.raises(SourceError, match=r"layer2\.safetensors: .*truncated"):
        convert(path, tmp_path / "out", ConversionConfig("qwen_scope"))
    assert not (tmp_path / "out").exists()


def test_a_single_file_of_unknown_layer_is_converted_when_it_is_given_one(source, tmp_path):
    convert(source(), tmp_path / "out", ConversionConfig("qwen_scope"), [2])
    (tmp_path / "out" / "layer2.sae.pt").rename(tmp_path / "mine.pt")
    with pytest.raises(InputError, match="nothing there says which layer"):
        convert(tmp_path / "mine.pt", tmp_path / "new", ConversionConfig("sae_lens", k=K))
    assert convert(tmp_path / "mine.pt", tmp_path / "new", ConversionConfig("sae_lens", k=K), [7]) == [7]
    assert read_sae_arrays(tmp_path / "new", None).metadata["layer"] == 7


@pytest.mark.parametrize(
    "config, found", [(ConversionConfig("gguf"), "'gguf' is not written"), (ConversionConfig("orbax", dtype="int8"), "dtype is 'int8'")]
)
def test_options_that_do_not_exist_are_refused(config, found, source, tmp_path):
    with pytest.raises(InputError, match=found):
        convert(source(), tmp_path / "out", config)


def test_layers_that_our_format_cannot_hold_together_are_refused(tmp_path):
    for layer, k in ((0, K), (1, K - 1)):
        write_folder(tmp_path / f"one{layer}", {layer: made(layer, k=k)})
        convert(tmp_path / f"one{layer}", tmp_path / f"lens{layer}", ConversionConfig("sae_lens"))
        (tmp_path / f"lens{layer}" / f"blocks.{layer}.hook_resid_post").rename(tmp_path / f"blocks.{layer}.hook_resid_post")
    (tmp_path / "both").mkdir()
    for layer in (0, 1):
        (tmp_path / f"blocks.{layer}.hook_resid_post").rename(tmp_path / "both" / str(layer))
    with pytest.raises(InputError, match="layer 1 has .*'k': 49.*write them to separate folders"):
        convert(tmp_path / "both", tmp_path / "out", ConversionConfig("safetensors"))
    assert convert(tmp_path / "both", tmp_path / "lens", ConversionConfig("sae_lens")) == [0, 1]


def test_a_folder_named_like_another_release_is_refused(source, tmp_path):
    with pytest.raises(InputError, match="says 2048 features and k 50, the SAEs have 1024 and 50; rename the folder"):
        convert(source(), tmp_path / "SAE-Res-Tiny-W2K-L0_50", ConversionConfig("qwen_scope"))
    convert(tmp_path / "source", tmp_path / RELEASED, ConversionConfig("qwen_scope"))
    assert read_sae_arrays(tmp_path / RELEASED, 5).k == K
