import json
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save_file

from qscope_jax.errors import ArchitectureError, InputError, ShapeError, SourceError, UnsafeFileError
from qscope_jax.sae.formats.registry import list_sae_layers, read_sae_arrays

F, D = 96, 32


@pytest.fixture
def params(tiny, threshold):
    return {
        "w_enc": np.ascontiguousarray(tiny["W_enc"].T),
        "w_dec": tiny["W_dec"],
        "b_enc": tiny["b_enc"],
        "b_dec": tiny["b_dec"],
        "threshold": threshold,
    }


@pytest.fixture
def published(tmp_path, params):
    def write(folder="layer_5/width_16k/average_l0_71", compress=False, **changes):
        path = tmp_path / "res" / folder
        path.mkdir(parents=True, exist_ok=True)
        content = {name: array for name, array in {**params, **changes}.items() if array is not None}
        (np.savez_compressed if compress else np.savez)(path / "params.npz", **content)
        return path

    return write


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("upper", [False, True])
def test_gemma_scope_files_give_the_same_codes(compress, upper, published, params, tiny, threshold, x, assert_agree):
    renamed = {"w_enc": None, "w_dec": None, "W_enc": params["w_enc"], "W_dec": params["w_dec"]} if upper else {}
    path = published(compress=compress, **renamed)
    wide = {name: array.astype(np.float64) for name, array in tiny.items()}
    z = x @ wide["W_enc"].T + wide["b_enc"]
    codes = np.where(z > threshold, z, 0)
    for source in (path, path / "params.npz"):
        sae = read_sae_arrays(source, None)
        assert_agree(sae, x, codes, codes @ wide["W_dec"] + wide["b_dec"])
        assert (sae.metadata["layer"], sae.metadata["mean_l0"], sae.metadata["format"]) == (5, 71, "gemma_scope")


def test_a_repository_is_a_collection_and_several_widths_are_told_apart_by_folder(published, tmp_path):
    published()
    published("layer_12/width_16k/average_l0_82")
    assert list_sae_layers(tmp_path / "res") == [5, 12]
    assert read_sae_arrays(tmp_path / "res", 12).metadata["mean_l0"] == 82
    published("layer_12/width_65k/average_l0_72")
    with pytest.raises(InputError, match="2 SAEs of layer 12; give the folder of one: layer_12/width_16k/average_l0_82/, layer_12/width_65k"):
        read_sae_arrays(tmp_path / "res", 12)
    assert read_sae_arrays(tmp_path / "res" / "layer_12" / "width_65k", None).metadata["layer"] == 12


def test_python_objects_and_damaged_archives_are_refused(published, tmp_path):
    with pytest.raises(UnsafeFileError, match="never unpickled"):
        read_sae_arrays(published(b_dec=np.array([{}], object)), None)
    path = published() / "params.npz"
    data = path.read_bytes()
    for length in (0, 10, len(data) // 2, len(data) - 5):
        path.write_bytes(data[:length])
        with pytest.raises(SourceError, match=r"params\.npz: [^\n]*$"):
            read_sae_arrays(path, None)
    np.save(tmp_path / "x.npy", np.ones(3))
    (tmp_path / "x.npy").rename(tmp_path / "x.npz")
    with pytest.raises(SourceError, match="not a valid npz file"):
        read_sae_arrays(tmp_path / "x.npz", 0)
    with zipfile.ZipFile(tmp_path / "many.npz", "w") as archive:
        for i in range(101):
            archive.writestr(f"{i}.npy", b"")
    with pytest.raises(UnsafeFileError, match="101 arrays"):
        read_sae_arrays(tmp_path / "many.npz", 0)


@pytest.mark.parametrize(
    "changes, error, found",
    [
        ({"threshold": None}, SourceError, "lacks threshold"),
        ({"w_enc": np.ones((F, D), np.float32)}, ShapeError, r"w_enc \[D, F\]"),
        ({"threshold": np.full(F, np.nan, np.float32)}, SourceError, "tensor threshold holds NaN"),
        ({"affine_skip_connection": np.ones((D, D), np.float32)}, ArchitectureError, "transcoder"),
        ({"w_dec": np.ones((F, 2, D), np.float32)}, ArchitectureError, "several layers"),
        ({"folder": "embedding/width_4k/average_l0_6"}, ArchitectureError, "embeddings"),
    ],
)
def test_what_is_not_supported_or_damaged_is_refused_by_name(changes, error, found, published):
    with pytest.raises(error, match=found):
        read_sae_arrays(published(**changes), None)


@pytest.fixture
def second(tmp_path, params):
    """Gemma Scope 2: the same tensors as safetensors, with or without a config."""

    def write(config=None, **changes):
        path = tmp_path / "resid_post" / "layer_9_width_16k_l0_medium"
        path.mkdir(parents=True, exist_ok=True)
        save_file({**params, **changes}, path / "params.safetensors")
        if config is not None:
            (path / "config.json").write_text(json.dumps(config))
        return path

    return write


@pytest.mark.parametrize("config", [None, {"architecture": "jump_relu", "hf_hook_point_in": "model.layers.9.output", "model_name": "gemma-v3"}])
def test_gemma_scope_2_files_give_the_same_codes(config, second, tiny, threshold, x, assert_agree):
    sae = read_sae_arrays(second(config), None)
    wide = {name: array.astype(np.float64) for name, array in tiny.items()}
    z = x @ wide["W_enc"].T + wide["b_enc"]
    codes = np.where(z > threshold, z, 0)
    assert_agree(sae, x, codes, codes @ wide["W_dec"] + wide["b_dec"])
    assert (sae.metadata["layer"], sae.metadata["format"]) == (9, "gemma_scope_2")
    assert isinstance(sae.W_dec.base, np.memmap)


@pytest.mark.parametrize(
    "config, changes, found",
    [
        ({"architecture": "topk"}, {}, "architecture 'topk' of Gemma Scope 2"),
        ({"architecture": "jump_relu", "hf_hook_point_in": "a", "hf_hook_point_out": "b"}, {}, "transcoder from a to b"),
        (None, {"affine_skip_connection": np.ones((D, D), np.float32)}, "affine_skip_connection"),
    ],
)
def test_other_kinds_of_gemma_scope_2_are_refused_by_name(config, changes, found, second):
    with pytest.raises(ArchitectureError, match=found):
        read_sae_arrays(second(config, **changes), None)
