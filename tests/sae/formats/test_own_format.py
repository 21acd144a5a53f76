import json
import os
import struct
import weakref
from collections.abc import Mapping

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qscope_jax.data.hub import open_source
from qscope_jax.errors import ArchitectureError, InputError, QscopeError, ShapeError, SourceError
from qscope_jax.sae.arrays import SAEArrays
from qscope_jax.sae.formats.own_format import list_layers, read_layer, write_folder

F, D = 6, 4


def sae(seed=0, dtype=np.float32, **settings) -> SAEArrays:
    generator = np.random.default_rng(seed)
    shapes = {"W_enc": (F, D), "W_dec": (F, D), "b_enc": (F,), "b_dec": (D,)}
    tensors = {name: generator.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    return SAEArrays(**{**tensors, "k": 2, "metadata": {"layer": seed, "folds": ["scale"]}, **settings})


def threshold(dtype=np.float32):
    return np.linspace(0, 1, F).astype(dtype)


def assert_same(one: SAEArrays, other: SAEArrays):
    assert list(one.tensors()) == list(other.tensors())
    for name, array in one.tensors().items():
        np.testing.assert_array_equal(array, other.tensors()[name], strict=True)
    for key in ("k", "activation", "apply_b_dec_to_input", "metadata"):
        assert getattr(one, key) == getattr(other, key)


@pytest.mark.parametrize("dtype", ["f8", "f4", "f2", ml_dtypes.bfloat16])
@pytest.mark.parametrize("settings", [{}, {"activation": "jumprelu", "k": 0, "threshold": threshold()}, {"apply_b_dec_to_input": True}])
def test_layers_are_read_back_to_the_bit(dtype, settings, tmp_path):
    layers = {layer: sae(layer, dtype, **settings) for layer in (7, 0)}
    write_folder(tmp_path / "sae", layers)
    source = open_source(tmp_path / "sae")
    assert list_layers(source) == [0, 7]
    for layer, arrays in layers.items():
        assert_same(arrays, read_layer(source, layer))


def test_strided_arrays_are_written_in_order(tmp_path):
    arrays = sae()
    arrays = SAEArrays(np.asfortranarray(arrays.W_enc), arrays.W_dec[::-1], arrays.b_enc, arrays.b_dec, k=2)
    write_folder(tmp_path / "sae", {0: arrays})
    assert_same(arrays, read_layer(open_source(tmp_path / "sae"), 0))


def test_the_safetensors_library_reads_the_same_file(tmp_path):
    write_folder(tmp_path / "sae", {0: sae()})
    loaded = load_file(tmp_path / "sae" / "layer0.safetensors")
    assert set(loaded) == {"W_enc", "W_dec", "b_enc", "b_dec"}
    np.testing.assert_array_equal(loaded["W_dec"], sae().W_dec)


def test_tensors_are_mapped_not_copied(tmp_path):
    write_folder(tmp_path / "sae", {0: sae()})
    array = read_layer(open_source(tmp_path / "sae"), 0).W_enc
    assert isinstance(array.base, np.memmap) and not array.flags.writeable


def test_layers_of_a_lazy_mapping_are_held_one_at_a_time(tmp_path):
    alive: list[weakref.ref[SAEArrays]] = []

    class Lazy(Mapping):
        def __iter__(self):
            return iter((0, 1, 2))

        def __len__(self):
            return 3

        def __getitem__(self, layer):
            assert not any(arrays() for arrays in alive)
            made = sae(layer)
            alive.append(weakref.ref(made))
            return made

    write_folder(tmp_path / "sae", Lazy())
    assert list_layers(open_source(tmp_path / "sae")) == [0, 1, 2] and len(alive) >= 3


def test_writing_replaces_a_folder_only_when_it_is_complete(tmp_path):
    write_folder(tmp_path / "sae", {0: sae(), 1: sae(1)})
    with pytest.raises(SourceError, match="layer 2: tensor b_dec holds NaN"):
        write_folder(tmp_path / "sae", {0: sae(5), 2: sae(2, b_dec=np.full(D, np.nan, np.float32))})
    assert_same(sae(), read_layer(open_source(tmp_path / "sae"), 0))
    write_folder(tmp_path / "sae", {3: sae(3)})
    assert sorted(os.listdir(tmp_path / "sae")) == ["layer3.safetensors", "sae.json"] and os.listdir(tmp_path) == ["sae"]


def test_layers_that_differ_in_what_they_share_are_refused(tmp_path):
    for changes in ({"k": 3}, {"apply_b_dec_to_input": True}, {"activation": "jumprelu", "threshold": threshold()}):
        with pytest.raises(InputError, match="layer 1 has"):
            write_folder(tmp_path / "sae", {0: sae(), 1: sae(**changes)})
    for layers in ({}, {-1: sae()}):
        with pytest.raises(InputError, match="at least one and none below 0"):
            write_folder(tmp_path / "sae", layers)
    assert os.listdir(tmp_path) == []


@pytest.fixture
def folder(tmp_path):
    write_folder(tmp_path / "sae", {0: sae()})
    return tmp_path / "sae"


def test_a_layer_that_is_not_listed_is_refused(folder):
    with pytest.raises(InputError, match="no layer 4; it holds 0"):
        read_layer(open_source(folder), 4)


def test_every_truncation_is_one_clear_error(folder):
    path = folder / "layer0.safetensors"
    data = path.read_bytes()
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        with pytest.raises(SourceError, match=r"layer0\.safetensors: [^\n]*$"):
            read_layer(open_source(folder), 0)


@pytest.mark.parametrize("length", [1 << 62, (1 << 64) - 1, 100_000_001, 5000])
def test_a_header_longer_than_the_file_is_refused_before_it_is_read(length, folder):
    path = folder / "layer0.safetensors"
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    with pytest.raises(SourceError, match=f"header claims {length} bytes"):
        read_layer(open_source(folder), 0)


def test_flipped_bytes_of_the_header_are_refused_or_change_only_values(folder):
    path = folder / "layer0.safetensors"
    data = path.read_bytes()
    refused = 0
    for position in range(8 + struct.unpack_from("<Q", data)[0]):
        path.write_bytes(data[:position] + bytes([data[position] ^ 3]) + data[position + 1 :])
        try:
            arrays = read_layer(open_source(folder), 0)
            assert arrays.W_enc.shape == (F, D)
        except QscopeError:
            refused += 1
    assert refused > 200


def rewrite(folder, **changes):
    path = folder / "layer0.safetensors"
    tensors = {**load_file(path), **changes}
    save_file({name: array for name, array in tensors.items() if array is not None}, path)


@pytest.mark.parametrize(
    "changes, error, found",
    [
        ({"W_dec": np.ones((D, F), np.float32)}, ShapeError, r"W_dec has shape \(4, 6\), expected \(6, 4\)"),
        ({"b_enc": np.array([np.nan] * F, np.float32)}, SourceError, "b_enc holds NaN"),
        ({"b_enc": np.ones(F, np.int32)}, SourceError, "b_enc is I32"),
        ({"b_enc": None}, SourceError, "expected W_dec, W_enc, b_dec, b_enc"),
        ({"extra": np.ones(1, np.float32)}, SourceError, "holds the tensors .*extra"),
        (
            {"W_enc": np.ones((8, D), np.float32), "W_dec": np.ones((8, D), np.float32), "b_enc": np.ones(8, np.float32)},
            ShapeError,
            r"F=8, D=4\], sae\.json says F=6",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(changes, error, found, folder):
    rewrite(folder, **changes)
    with pytest.raises(error, match=found):
        read_layer(open_source(folder), 0)


@pytest.mark.parametrize(
    "changes, error, found",
    [
        ({"format": "other"}, SourceError, "format is 'other'"),
        ({"version": 2}, ArchitectureError, "version is 2"),
        ({"k": "50"}, SourceError, "k is '50', expected int"),
        ({"k": True}, SourceError, "k is True"),
        ({"k": 99}, InputError, "k is 99"),
        ({"activation": "softmax"}, ArchitectureError, "softmax"),
        ({"activation": "jumprelu"}, ShapeError, "needs a threshold"),
        ({"apply_b_dec_to_input": 0}, SourceError, "apply_b_dec_to_input is 0"),
        ({"layers": [0, 0]}, SourceError, "distinct"),
        ({"layers": ["../0"]}, SourceError, "distinct whole numbers"),
        ({"layers": 0}, SourceError, "layers is 0"),
        ({"metadata": {"0": 1}}, SourceError, "metadata"),
    ],
)
def test_a_config_that_does_not_make_sense_is_refused(changes, error, found, folder):
    config = json.loads((folder / "sae.json").read_text())
    (folder / "sae.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(error, match=found):
        read_layer(open_source(folder), 0)


def test_a_listed_layer_whose_file_is_missing_is_one_clear_error(folder):
    (folder / "layer0.safetensors").unlink()
    with pytest.raises(SourceError, match=r"no file layer0\.safetensors"):
        read_layer(open_source(folder), 0)
