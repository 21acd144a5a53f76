import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from huggingface_hub import constants

from qscope_jax.data.hub import Source, open_source
from qscope_jax.errors import ArchitectureError, InputError, ShapeError, SourceError
from qscope_jax.sae.arrays import SAEArrays
from qscope_jax.sae.formats.qwen_scope import RELEASES, ReleaseName, file_layer, list_layers, read_file, read_layer, write_layer

F, D, K = 1024, 12, 50
NAME = f"SAE-Res-Qwen3-1.7B-Base-W1K-L0_{K}"


def released(F=F, D=D, seed=0, dtype=torch.float32) -> dict[str, torch.Tensor]:
    """A layer file's content in the released layout: W_dec is [D, F]."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (F, D), "W_dec": (D, F), "b_enc": (F,), "b_dec": (D,)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / NAME
    path.mkdir()
    for layer in (0, 2, 10):
        torch.save(released(seed=layer), path / f"layer{layer}.sae.pt")
    (path / "README.md").write_text("a model card")
    return path


def mapped(array) -> bool:
    while array is not None and not isinstance(array, np.memmap):
        array = array.base
    return array is not None


@pytest.mark.parametrize(
    "text",
    [NAME, f"Qwen/{NAME}", f"/data/{NAME}", f"../{NAME}/", Path("x") / NAME, f"hub/models--Qwen--{NAME}/snapshots/0123456789abcdef"],
)
def test_names_are_read_from_ids_paths_and_cache_folders(text):
    assert ReleaseName.parse(text) == ReleaseName("Qwen3-1.7B-Base", 1024, 50)


@pytest.mark.parametrize(
    "text", ["", ".", "/", "Qwen3-8B", f"{NAME}-v2", f"x{NAME}", NAME.replace("W1K", "W0K"), NAME.replace("_50", "_"), f"{NAME}/layer0.sae.pt"]
)
def test_other_names_are_not_guessed_at(text):
    assert ReleaseName.parse(text) is None


def test_the_table_holds_the_14_released_groups():
    assert len(RELEASES) == len({release.repository for release in RELEASES}) == 14
    assert sum(release.num_layers for release in RELEASES) == 544
    for release in RELEASES:
        assert ReleaseName.parse(release.repository) == ReleaseName(release.backbone, release.num_features, release.k)
        assert release.num_features == release.d_model * (64 if "W128K" in release.repository else 16)
    by_name = {release.repository: release for release in RELEASES}
    assert by_name["Qwen/SAE-Res-Qwen3.5-27B-W80K-L0_100"].num_features == 81920
    assert by_name["Qwen/SAE-Res-Qwen3-30B-A3B-Base-W128K-L0_100"].num_layers == 48


def test_a_folder_lists_the_layers_it_holds(folder):
    (folder / "layer01.sae.pt").write_bytes(b"")
    (folder / "layer4.sae.pt.part").write_bytes(b"")
    assert list_layers(open_source(folder)) == [0, 2, 10]


def test_a_released_repository_is_listed_without_the_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.list_repo_files", None)
    assert list_layers(Source("Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50")) == list(range(28))


def test_another_repository_is_asked_for_its_files(monkeypatch):
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda name, revision: ["layer7.sae.pt", "README.md", "layer3.sae.pt"])
    assert list_layers(Source("someone/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50")) == [3, 7]


def test_a_layer_is_read_to_the_bit_with_decoder_rows_as_directions(folder):
    arrays, expected = read_layer(open_source(folder), 2), released(seed=2)
    assert arrays.k == K and arrays.activation == "topk" and not arrays.apply_b_dec_to_input and arrays.threshold is None
    for name in ("W_enc", "b_enc", "b_dec"):
        np.testing.assert_array_equal(getattr(arrays, name), expected[name].numpy(), strict=True)
        assert mapped(getattr(arrays, name))
    np.testing.assert_array_equal(arrays.W_dec, expected["W_dec"].numpy().T, strict=True)
    assert arrays.W_dec.flags.c_contiguous


def test_what_is_known_travels_along(folder):
    assert read_layer(open_source(folder), 2).metadata == {
        "format": "qwen_scope",
        "source": str(folder),
        "model_name": "Qwen/Qwen3-1.7B-Base",
        "layer": 2,
        "hook_name": "blocks.2.hook_resid_post",
        "dtype": "float32",
        "unit_norm_decoder": False,
        "folds": [],
    }


def test_unit_decoder_rows_are_measured_on_directions_not_on_file_rows(folder):
    tensors = released()
    torch.save({**tensors, "W_dec": torch.nn.functional.normalize(tensors["W_dec"], dim=0)}, folder / "layer0.sae.pt")
    assert read_layer(open_source(folder), 0).metadata["unit_norm_decoder"] is True
    torch.save({**tensors, "W_dec": torch.nn.functional.normalize(tensors["W_dec"], dim=1)}, folder / "layer0.sae.pt")
    assert read_layer(open_source(folder), 0).metadata["unit_norm_decoder"] is False


def test_blocks_of_the_transposition_fit_together(folder, monkeypatch):
    monkeypatch.setattr("qscope_jax.sae.arrays._BLOCK_BYTES", 5 * F * 4)
    np.testing.assert_array_equal(read_layer(open_source(folder), 0).W_dec, released()["W_dec"].numpy().T)


def test_a_decoder_that_was_saved_transposed_needs_no_copy(folder):
    W_dec = released()["W_dec"].T.contiguous().T
    torch.save({**released(), "W_dec": W_dec}, folder / "layer0.sae.pt")
    arrays = read_layer(open_source(folder), 0)
    np.testing.assert_array_equal(arrays.W_dec, W_dec.numpy().T)
    assert mapped(arrays.W_dec)


def test_k_comes_from_the_argument_before_the_name_and_is_never_guessed(folder, tmp_path):
    assert read_layer(open_source(folder), 0, k=7).k == 7
    bare = tmp_path / "somewhere"
    folder.rename(bare)
    assert read_layer(open_source(bare), 0, k=7).k == 7
    with pytest.raises(InputError, match=r"layer0\.sae\.pt: k .* give k"):
        read_layer(open_source(bare), 0)
    for k in (0, -3, F + 1):
        with pytest.raises(InputError, match=f"k is {k}"):
            read_layer(open_source(bare), 0, k=k)


def test_a_folder_given_through_a_link_or_as_the_current_one_keeps_its_name(folder, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(folder)
    assert read_layer(open_source(tmp_path / "link"), 0).k == K
    monkeypatch.chdir(folder)
    assert read_layer(open_source("."), 0).k == K


def test_a_width_that_contradicts_the_name_is_refused(folder):
    torch.save(released(F=512), folder / "layer0.sae.pt")
    with pytest.raises(ShapeError, match="holds 512 features, its folder's name says 1024"):
        read_layer(open_source(folder), 0)


@pytest.mark.parametrize(
    "changes",
    [
        {"W_dec": (F, D)},
        {"W_enc": (D, F)},
        {"b_enc": (D,)},
        {"b_dec": (F,)},
        {"b_dec": ()},
        {"W_enc": (F, D, 1)},
        {"W_enc": (F,)},
        {"W_enc": (F, 0), "W_dec": (0, F), "b_dec": (0,)},
    ],
)
def test_shapes_that_disagree_are_refused(changes, folder):
    torch.save({**released(), **{name: torch.zeros(shape) for name, shape in changes.items()}}, folder / "layer0.sae.pt")
    with pytest.raises(ShapeError, match=r"layer0\.sae\.pt: .*W_dec \[D, F\]"):
        read_layer(open_source(folder), 0)


def test_extra_and_missing_tensors_are_refused(folder):
    extra = {**released(), "threshold": torch.zeros(F)}
    missing = {name: tensor for name, tensor in released().items() if name != "b_dec"}
    for tensors in (extra, missing, {}):
        torch.save(tensors, folder / "layer0.sae.pt")
        with pytest.raises(SourceError, match="exactly W_dec, W_enc, b_dec, b_enc"):
            read_layer(open_source(folder), 0)


@pytest.mark.parametrize("name", ["W_enc", "W_dec", "b_enc", "b_dec"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused_by_name(name, value, folder):
    tensors = released()
    tensors[name].view(-1)[-1] = value
    torch.save(tensors, folder / "layer0.sae.pt")
    with pytest.raises(SourceError, match=f"tensor {name} holds NaN"):
        read_layer(open_source(folder), 0)


def test_tensors_of_whole_numbers_are_refused(folder):
    torch.save({**released(), "b_enc": torch.zeros(F, dtype=torch.int64)}, folder / "layer0.sae.pt")
    with pytest.raises(SourceError, match="b_enc is int64"):
        read_layer(open_source(folder), 0)


def test_a_missing_layer_file_is_one_clear_error(folder):
    with pytest.raises(SourceError, match=r"no file layer1\.sae\.pt"):
        read_layer(open_source(folder), 1)


def test_a_layer_is_written_exactly_as_it_was_released(folder, tmp_path):
    write_layer(tmp_path / "out.sae.pt", read_layer(open_source(folder), 10))
    loaded, expected = torch.load(tmp_path / "out.sae.pt", weights_only=True), released(seed=10)
    assert set(loaded) == set(expected)
    for name, tensor in expected.items():
        assert loaded[name].dtype == torch.float32 and loaded[name].is_contiguous()
        assert torch.equal(loaded[name], tensor)


def test_write_then_read_gives_the_same_arrays(tmp_path):
    generator = np.random.default_rng(0)
    made = {
        name: generator.standard_normal(shape).astype(np.float32)
        for name, shape in {"W_enc": (6, 4), "W_dec": (6, 4), "b_enc": 6, "b_dec": 4}.items()
    }
    write_layer(tmp_path / "layer5.sae.pt", SAEArrays(**made, k=3))
    read = read_file(tmp_path / "layer5.sae.pt", layer=5, k=3)
    for name, array in made.items():
        np.testing.assert_array_equal(getattr(read, name), array, strict=True)
    assert (read.k, read.metadata["model_name"]) == (3, None)


def test_narrow_types_are_widened_on_writing_and_float64_is_refused(tmp_path):
    arrays = SAEArrays(*(np.ones(shape, ml_dtypes.bfloat16) * 3 for shape in ((6, 4), (6, 4), 6, 4)), k=2)
    write_layer(tmp_path / "a.pt", arrays)
    assert torch.load(tmp_path / "a.pt")["W_dec"].dtype == torch.float32
    with pytest.raises(InputError, match="W_enc is float64"):
        write_layer(tmp_path / "b.pt", SAEArrays(np.ones((6, 4)), arrays.W_dec, arrays.b_enc, arrays.b_dec, k=2))


@pytest.mark.parametrize(
    "settings, error",
    [
        ({"activation": "jumprelu", "threshold": np.ones(6, np.float32)}, ArchitectureError),
        ({"apply_b_dec_to_input": True}, ArchitectureError),
        ({"threshold": np.ones(6, np.float32)}, ArchitectureError),
        ({"b_dec": np.full(4, np.nan, np.float32)}, SourceError),
        ({"b_dec": np.ones(6, np.float32)}, ShapeError),
    ],
)
def test_what_the_layout_cannot_hold_is_not_written(settings, error, tmp_path):
    fields = {
        "W_enc": np.ones((6, 4), np.float32),
        "W_dec": np.ones((6, 4), np.float32),
        "b_enc": np.ones(6, np.float32),
        "b_dec": np.ones(4, np.float32),
    }
    with pytest.raises(error):
        write_layer(tmp_path / "x.pt", SAEArrays(**{**fields, "k": 2, **settings}))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "name, layer", [("layer0.sae.pt", 0), ("x/layer12.sae.pt", 12), ("layer01.sae.pt", None), ("layer1.pt", None), ("ae.pt", None)]
)
def test_the_layer_of_a_file_is_in_its_name(name, layer):
    assert file_layer(name) == layer


@pytest.fixture
def hub_cache(tmp_path, monkeypatch) -> Path:
    """A hub cache that holds layer 3 of a released group, and no network."""
    revision = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--Qwen--SAE-Res-Qwen3-1.7B-Base-W32K-L0_50"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    snapshot = repository / "snapshots" / revision
    snapshot.mkdir(parents=True)
    torch.save(released(F=32768, D=2, seed=3), snapshot / "layer3.sae.pt")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return snapshot


def test_a_cached_layer_is_read_offline_and_others_are_one_clear_error(hub_cache):
    source = open_source("Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50")
    arrays = read_layer(source, 3)
    np.testing.assert_array_equal(arrays.W_dec, released(F=32768, D=2, seed=3)["W_dec"].numpy().T)
    assert (arrays.k, arrays.metadata["source"]) == (50, "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50")
    with pytest.raises(SourceError, match="cache"):
        read_layer(source, 4)


def test_a_snapshot_folder_given_by_path_keeps_its_name(hub_cache):
    source = open_source(hub_cache)
    assert list_layers(source) == [3]
    assert read_layer(source, 3).k == 50


def test_reading_a_layer_never_imports_torch(folder):
    code = (
        "import sys\nfrom qscope_jax.data.hub import open_source\nfrom qscope_jax.sae import qwen_scope\n"
        "arrays = qwen_scope.read_layer(open_source(sys.argv[1]), 0)\nqwen_scope.write_layer(sys.argv[1] + '/layer1.sae.pt', arrays)\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, folder], check=True, timeout=60)
    assert torch.equal(torch.load(folder / "layer1.sae.pt")["W_dec"], released()["W_dec"])
