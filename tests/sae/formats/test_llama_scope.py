import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from qscope_jax.errors import ArchitectureError, InputError, SourceError
from qscope_jax.sae.formats.registry import list_sae_layers, read_sae_arrays

F, D, K = 96, 32, 8
PARAMETERS = {
    "d_model": D,
    "d_sae": F,
    "hook_point_in": "blocks.7.hook_resid_post",
    "jump_relu_threshold": 0.9,
    "dataset_average_activation_norm": {"in": 8.0, "out": 5.0},
}
SCOPIUM = {
    "sae_type": "sae",
    "act_fn": "jumprelu",
    "norm_activation": "dataset-wise",
    "sparsity_include_decoder_norm": True,
    "top_k": K,
    "expansion_factor": 3.0,
    "use_decoder_bias": True,
    "use_glu_encoder": False,
    "hook_point_in": "blocks.7.hook_resid_post",
    "hook_point_out": "blocks.7.hook_resid_post",
}
LOG = "activation_function.log_jumprelu_threshold"


def linear(tiny, **more):
    turned = np.ascontiguousarray(tiny["W_dec"].T)
    return {"encoder.weight": tiny["W_enc"], "encoder.bias": tiny["b_enc"], "decoder.weight": turned, "decoder.bias": tiny["b_dec"], **more}


@pytest.fixture
def wide(tiny):
    return {name: array.astype(np.float64) for name, array in tiny.items()}


@pytest.fixture
def llama(tmp_path, tiny):
    def write(folder="Llama3_1-8B-Base-L7R-8x", tensors=None, **parameters):
        path = tmp_path / "LXR" / folder
        (path / "checkpoints").mkdir(parents=True, exist_ok=True)
        save_file(linear(tiny) if tensors is None else tensors, path / "checkpoints" / "final.safetensors")
        (path / "hyperparams.json").write_text(json.dumps({**PARAMETERS, **parameters}))
        return path

    return write


def test_llama_scope_files_give_the_same_codes_with_both_norms_folded(llama, wide, x, assert_agree):
    path = llama()
    s_in, s_out = np.sqrt(D) / 8, np.sqrt(D) / 5
    z = (s_in * x) @ wide["W_enc"].T + wide["b_enc"]
    codes = np.where(z > np.float32(s_in * 0.9), z, 0)
    for source in (path, path / "checkpoints" / "final.safetensors"):
        sae = read_sae_arrays(source, None)
        assert_agree(sae, x, codes, (codes @ wide["W_dec"] + wide["b_dec"]) / s_out)
        assert (sae.metadata["layer"], sae.metadata["folds"]) == (7, ["input_scale"])


def test_a_group_of_llama_scope_is_a_collection(llama, tmp_path):
    llama()
    llama("Llama3_1-8B-Base-L15R-8x", hook_point_in="blocks.15.hook_resid_post")
    assert list_sae_layers(tmp_path / "LXR") == [7, 15]
    assert read_sae_arrays(tmp_path / "LXR", 15).metadata["layer"] == 15


@pytest.mark.parametrize(
    "changes, error, found",
    [
        ({"dataset_average_activation_norm": {"in": 8.0}}, InputError, "norm.out is None, expected a positive number"),
        ({"dataset_average_activation_norm": None}, InputError, "norm.in is None"),
        ({"jump_relu_threshold": "high"}, SourceError, "jump_relu_threshold in hyperparams.json is 'high'"),
    ],
)
def test_parameters_that_do_not_make_sense_are_refused(changes, error, found, llama):
    with pytest.raises(error, match=found):
        read_sae_arrays(llama(**changes), None)


def test_missing_tensors_are_named(llama, tiny):
    with pytest.raises(SourceError, match=r"lacks decoder\.bias; a Llama Scope file"):
        read_sae_arrays(llama(tensors={name: array for name, array in linear(tiny).items() if name != "decoder.bias"}), None)


def test_llama_scope_r1_needs_the_norm_that_its_files_lack(tmp_path, tiny, wide, threshold, x, assert_agree):
    path = tmp_path / "L7R"
    path.mkdir()
    save_file(linear(tiny, log_jumprelu_threshold=np.log(threshold + 0.01)), path / "sae_weights.safetensors")
    (path / "config.json").write_text(json.dumps({"d_model": D, "expansion_factor": 3, "hook_point_in": "blocks.7.hook_resid_post"}))
    with pytest.raises(InputError, match="give input_norm"):
        read_sae_arrays(path, None)
    for norm in (0.0, -2.0, float("nan")):
        with pytest.raises(InputError, match="input_norm is .*, expected a positive number"):
            read_sae_arrays(path, None, input_norm=norm)
    s = np.sqrt(D) / 8
    z = (s * x) @ wide["W_enc"].T + wide["b_enc"]
    codes = np.where(z > threshold + np.float32(0.01), z, 0)
    sae = read_sae_arrays(path, None, input_norm=8.0)
    assert_agree(sae, x, codes, (codes @ wide["W_dec"] + wide["b_dec"]) / s)
    assert (sae.metadata["format"], sae.metadata["layer"]) == ("llama_scope_r1", 7)


@pytest.fixture
def scopium(tmp_path, tiny, threshold):
    def write(norms=8.0, bias=True, log=True, **config):
        path = tmp_path / "scopium"
        path.mkdir(exist_ok=True)
        content = {"W_E": np.ascontiguousarray(tiny["W_enc"].T), "W_D": tiny["W_dec"], "b_E": tiny["b_enc"]}
        content |= {"b_D": tiny["b_dec"]} if bias else {}
        content |= {LOG: np.log(threshold + np.float32(0.01))} if log else {}
        content |= {"dataset_average_activation_norm.blocks.7.hook_resid_post": np.array(norms, np.float32)}
        save_file(content, path / "sae_weights.safetensors")
        (path / "config.json").write_text(json.dumps({**SCOPIUM, **config}))
        return path

    return write


@pytest.mark.parametrize("by_norm", [True, False])
@pytest.mark.parametrize("norm_activation", ["dataset-wise", "inference"])
def test_llamascopium_jumprelu_files_give_the_same_codes(by_norm, norm_activation, scopium, wide, threshold, x, assert_agree):
    garbage = {"norms": float("nan")} if norm_activation == "inference" else {}  # then the library never set the norms
    sae = read_sae_arrays(scopium(**garbage, norm_activation=norm_activation, sparsity_include_decoder_norm=by_norm), None)
    s = np.sqrt(D) / 8 if norm_activation == "dataset-wise" else 1
    norms = np.linalg.norm(wide["W_dec"], axis=1) if by_norm else np.ones(F)
    z = ((s * x) @ wide["W_enc"].T + wide["b_enc"]) * norms
    codes = np.where(z > threshold + np.float32(0.01), z, 0)
    assert_agree(sae, x, codes, ((codes / norms) @ wide["W_dec"] + wide["b_dec"]) / s)


def test_llamascopium_topk_and_relu_files_give_the_same_codes(scopium, wide, x, keep, assert_agree):
    norms = np.linalg.norm(wide["W_dec"], axis=1)
    z = x @ wide["W_enc"].T + wide["b_enc"]
    for act, select in (("topk", keep), ("relu", lambda z: np.maximum(z, 0))):
        sae = read_sae_arrays(scopium(log=False, act_fn=act, norm_activation="inference"), None)
        assert_agree(sae, x, select(z * norms), (select(z * norms) / norms) @ wide["W_dec"] + wide["b_dec"])
    bare = read_sae_arrays(scopium(log=False, bias=False, act_fn="topk", norm_activation="inference"), None)
    assert_agree(bare, x, keep(z * norms), (keep(z * norms) / norms) @ wide["W_dec"])


@pytest.mark.parametrize(
    "config, found",
    [
        ({"sae_type": "clt"}, "of type 'clt'"),
        ({"use_glu_encoder": True}, "gated"),
        ({"act_fn": "batchtopk"}, "'batchtopk'"),
        ({"norm_activation": "token-wise"}, "token-wise"),
        ({"norm_activation": "batch-wise"}, "batch-wise"),
        ({"hook_point_out": "blocks.7.hook_mlp_out"}, "transcoder"),
    ],
)
def test_other_kinds_of_llamascopium_are_refused_by_name(config, found, scopium):
    with pytest.raises(ArchitectureError, match=found):
        read_sae_arrays(scopium(**config), None)


def test_a_dataset_wise_norm_that_is_not_there_is_refused(scopium):
    with pytest.raises(InputError, match="norm.blocks.8.hook_resid_post is None"):
        read_sae_arrays(scopium(hook_point_in="blocks.8.hook_resid_post", hook_point_out="blocks.8.hook_resid_post"), None)
