import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors.numpy import save_file

from qscope_jax.errors import ArchitectureError, InputError, SourceError, UnsafeFileError
from qscope_jax.sae.arrays import SAEArrays
from qscope_jax.sae.formats.registry import list_sae_layers, read_sae_arrays
from qscope_jax.sae.formats.qwen_scope import write_layer
from qscope_jax.sae.formats.own_format import write_folder

F, D = 1024, 3


def sae(layer: int) -> SAEArrays:
    generator = np.random.default_rng(layer)
    return SAEArrays(*(generator.standard_normal(shape).astype(np.float32) for shape in ((F, D), (F, D), F, D)), k=8, metadata={"layer": layer})


@pytest.fixture
def released(tmp_path) -> Path:
    folder = tmp_path / "SAE-Res-Qwen3-8B-Base-W1K-L0_100"
    for layer in (0, 1, 2, 5):
        write_layer(folder / f"layer{layer}.sae.pt", sae(layer))
    return folder


@pytest.fixture
def ours(tmp_path) -> Path:
    write_folder(tmp_path / "mine", {layer: sae(layer) for layer in (4, 9)})
    return tmp_path / "mine"


def assert_is(arrays: SAEArrays, layer: int):
    for name, array in sae(layer).tensors().items():
        np.testing.assert_array_equal(arrays.tensors()[name], array, strict=True)
    assert arrays.metadata["layer"] == layer


def test_a_released_folder_is_listed_and_read(released):
    assert list_sae_layers(released) == [0, 1, 2, 5]
    arrays = read_sae_arrays(str(released), 5)
    assert_is(arrays, 5)
    assert arrays.k == 100


def test_our_folder_is_listed_and_read(ours):
    assert list_sae_layers(ours) == [4, 9]
    assert_is(read_sae_arrays(ours, 9), 9)
    assert (read_sae_arrays(ours, 9).k, read_sae_arrays(ours, 9, k=3).k) == (8, 3)
    with pytest.raises(InputError, match="k is 5000"):
        read_sae_arrays(ours, 9, k=5000)


def test_a_home_folder_is_expanded(released, monkeypatch):
    monkeypatch.setenv("HOME", str(released.parent))
    assert list_sae_layers(f"~/{released.name}") == [0, 1, 2, 5]
    assert_is(read_sae_arrays(f"~/{released.name}/layer1.sae.pt", None), 1)


def test_a_layer_out_of_range_is_answered_with_what_there_is(released, ours):
    with pytest.raises(InputError, match=r"no layer 3; it holds 0-2, 5"):
        read_sae_arrays(released, 3)
    with pytest.raises(InputError, match=r"no layer -1; it holds 4, 9"):
        read_sae_arrays(ours, -1)


def test_the_layer_may_be_left_out_where_there_is_one(released, ours, tmp_path):
    with pytest.raises(InputError, match=r"holds 4 layers \(0-2, 5\)"):
        read_sae_arrays(released, None)
    for layer in (0, 1, 5):
        (released / f"layer{layer}.sae.pt").unlink()
    assert_is(read_sae_arrays(released, None), 2)
    write_folder(tmp_path / "one", {6: sae(6)})
    assert_is(read_sae_arrays(tmp_path / "one", None), 6)


def test_a_single_file_in_a_released_folder_needs_nothing_more(released):
    path = released / "layer2.sae.pt"
    assert list_sae_layers(path) == [2]
    for layer in (None, 2):
        arrays = read_sae_arrays(path, layer)
        assert_is(arrays, 2)
        assert arrays.k == 100
    with pytest.raises(InputError, match="no layer 3; it holds 2"):
        read_sae_arrays(path, 3)


def test_a_single_file_elsewhere_needs_k_and_may_be_told_its_layer(released, tmp_path):
    path = tmp_path / "mine.pt"
    os.rename(released / "layer2.sae.pt", path)
    assert_is(read_sae_arrays(path, 2, k=8), 2)
    assert read_sae_arrays(path, None, k=8).metadata["layer"] is None
    with pytest.raises(InputError, match="give k"):
        read_sae_arrays(path, 2)
    with pytest.raises(InputError, match="does not say which layer"):
        list_sae_layers(path)


def test_a_single_file_of_our_folder_is_read_with_its_config(ours):
    assert list_sae_layers(ours / "layer9.safetensors") == [9]
    assert_is(read_sae_arrays(ours / "layer9.safetensors", None), 9)
    with pytest.raises(InputError, match="no layer 4; it holds 9"):
        read_sae_arrays(ours / "layer9.safetensors", 4)


@pytest.mark.parametrize(
    "expected, files",
    [
        ("SAELens", ["cfg.json", "sae_weights.safetensors"]),
        ("sparsify", ["layers.3/cfg.json", "layers.3/sae.safetensors"]),
        ("dictionary_learning", ["trainer_0/ae.pt"]),
        ("Gemma Scope", ["layer_3/width_16k/average_l0_50/params.npz"]),
        ("Llama Scope", ["hyperparams.json", "checkpoints/final.safetensors"]),
    ],
)
def test_folders_of_other_formats_are_refused_by_name(expected, files, tmp_path):
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("{}")
    for read in (list_sae_layers, lambda name: read_sae_arrays(name, 0)):
        with pytest.raises(ArchitectureError, match=f"in the format of {expected}, .*Qwen-Scope"):
            read(tmp_path)


def test_files_of_other_formats_are_refused_by_name(tmp_path):
    weights = {"encoder.weight": torch.ones(4, 2), "encoder.bias": torch.ones(4), "decoder.weight": torch.ones(2, 4), "b_dec": torch.ones(2)}
    torch.save({**weights, "k": torch.tensor(2, dtype=torch.int32)}, tmp_path / "ae.pt")
    torch.save({"step": 3, "ae": weights, "optimizer": {"state": {0: {"step": 1.0}}}, "config": {}}, tmp_path / "checkpoint.pt")
    save_file(
        {"encoder.weight": np.ones((4, 2)), "encoder.bias": np.ones(4), "W_dec": np.ones((4, 2)), "b_dec": np.ones(2)}, tmp_path / "sae.safetensors"
    )
    (tmp_path / "params.npz").write_bytes(b"PK")
    for file, expected in (
        ("ae.pt", r"dictionary_learning \(TopK or BatchTopK\)"),
        ("checkpoint.pt", "dictionary_learning, as an interrupted run"),
        ("sae.safetensors", "sparsify"),
        ("params.npz", "Gemma Scope"),
    ):
        with pytest.raises(ArchitectureError, match=f"{file}: is in the format of {expected}"):
            read_sae_arrays(tmp_path / file, 0, k=2)


def test_what_is_no_sae_is_refused_with_what_was_expected(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    with pytest.raises(SourceError, match="not recognised as an SAE.*expected Qwen-Scope"):
        read_sae_arrays(tmp_path, 0)
    torch.save({"weight": torch.ones(2)}, tmp_path / "x.pt")
    save_file({"weight": np.ones(2)}, tmp_path / "x.safetensors")
    for file in ("x.pt", "x.safetensors"):
        with pytest.raises(SourceError, match="it holds weight; expected"):
            read_sae_arrays(tmp_path / file, 0)
    for name in (tmp_path / "nowhere", "", "nowhere"):
        with pytest.raises(SourceError):
            list_sae_layers(name)


def test_hostile_and_truncated_files_stay_refused(released, tmp_path):
    path = released / "layer0.sae.pt"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(SourceError, match="truncated"):
        read_sae_arrays(path, 0)
    path.write_bytes(data.replace(b"FloatStorage", b"FloatMalware"))
    with pytest.raises(UnsafeFileError, match=r"torch\.FloatMalware"):
        read_sae_arrays(released, 0)
    (tmp_path / "x.safetensors").write_bytes(bytes(20))
    with pytest.raises(SourceError, match="not a valid safetensors file"):
        read_sae_arrays(tmp_path / "x.safetensors", 0)


@pytest.fixture
def offline(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def cached(hub: Path, repository: str) -> Path:
    revision = "0123456789abcdef0123456789abcdef01234567"
    folder = hub / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(revision)
    return folder / "snapshots" / revision


def test_a_cached_layer_of_a_release_is_read_offline(offline):
    repository = "Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_50"
    wide = SAEArrays(np.ones((65536, 2), np.float32), np.ones((65536, 2), np.float32), np.ones(65536, np.float32), np.ones(2, np.float32), k=50)
    write_layer(cached(offline, repository) / "layer35.sae.pt", wide)
    assert list_sae_layers(repository) == list(range(36))
    assert read_sae_arrays(repository, 35).k == 50
    with pytest.raises(InputError, match="no layer 36; it holds 0-35"):
        read_sae_arrays(repository, 36)
    with pytest.raises(SourceError, match="cache"):
        read_sae_arrays(repository, 0)


def test_our_format_is_read_from_the_hub_cache_offline(offline, ours):
    snapshot = cached(offline, "someone/my-saes")
    snapshot.parent.mkdir(parents=True)
    ours.rename(snapshot)
    assert list_sae_layers("someone/my-saes") == [4, 9]
    assert_is(read_sae_arrays("someone/my-saes", 9), 9)


def test_an_unknown_repository_offline_is_one_clear_error(offline):
    with pytest.raises(SourceError, match=r"^someone/other: its files cannot be listed"):
        list_sae_layers("someone/other")
