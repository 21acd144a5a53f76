import json

import jax
import numpy as np
import pytest

from qscope_jax.cli.train_sae import Config
from qscope_jax.errors import ConfigError
from qscope_jax.models.decoder import Decoder
from qscope_jax.parallel.mesh import make_mesh
from qscope_jax.parallel.rules import shard_tree
from tpu_scripts.programs import backbone, batch_bytes, buffer_array, bytes_a_device, decoder_arrays, make_run

MODEL = {
    "model_type": "qwen3", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "max_position_embeddings": 64, "eos_token_id": 0, "dtype": "float32",
}  # fmt: skip


@pytest.fixture
def config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MODEL))

    def make(**changes) -> Config:
        sizes = {"num_features": 64, "k": 4, "batch_tokens": 64, "buffer_batches": 3, "lanes": 2, "sequence_length": 8, "model_batch": 4}
        return Config(**{"model": str(tmp_path), "out": "runs/x", **sizes, **changes})

    return make


def test_a_run_has_the_verbs_sizes(config):
    run = make_run(config(layers=(1, 3), num_seeds=2, compute_dtype="bfloat16", activation="batch_topk"), make_mesh())
    assert run.layers == (1, 3) and run.num_saes == 4 and run.sae.compute_dtype == "bfloat16" and run.sae.activation == "batch_topk"
    assert make_run(config(num_features=None), make_mesh()).sae.num_features == 16 * 32


def test_the_decoder_lies_as_a_loaded_one_does(config):
    mesh = make_mesh("fsdp=2,tensor=2")
    run = make_run(config(), mesh)
    shapes = jax.eval_shape(lambda: Decoder(run.model, jax.random.key(0)))
    real = shard_tree(jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes), mesh)
    described = decoder_arrays(run.model, run.mesh)
    for one, other in zip(jax.tree.leaves(described), jax.tree.leaves(real), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype) and one.sharding.is_equivalent_to(other.sharding, len(one.shape))
    shard = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(real))
    assert bytes_a_device(described) == shard


def test_the_buffer_lies_over_layers_and_lanes(config):
    run = make_run(config(dtype="bfloat16"), make_mesh("data=2,fsdp=2"))
    assert buffer_array(run).shape == (4, 2, 3 * 64 // 2 + 4 * 8 // 2, 32)
    assert bytes_a_device(buffer_array(run)) == 2 * 1 * (96 + 16) * 32 * 2
    assert batch_bytes(run) == 2 * 32 * 32 * 2


@pytest.mark.parametrize(
    ("changes", "mesh", "said"),
    [
        ({"model_batch": 6}, "data=2,fsdp=2", "model_batch is 6, expected a multiple of 4"),
        ({"lanes": 3, "batch_tokens": 63}, "", "model_batch is 4, expected a multiple of 3"),
        ({"batch_tokens": 63}, "", "batch_tokens is 63, expected a multiple of 2"),
        ({"lanes": 2, "model_batch": 8}, "data=4", "lanes is 2, expected a multiple of 4"),
        ({"layers": (0, 1, 2)}, "fsdp=2", "layers is 3, expected a multiple of 2"),
        ({"num_features": 63}, "tensor=2", "num_features is 63, expected a multiple of 2"),
        ({"layers": (4,)}, "", "layer 4 is out of range"),
        ({"activations": "cache"}, "", "activations is cache"),
    ],
)
def test_what_a_mesh_does_not_divide_is_an_error_that_names_it(config, changes, mesh, said):
    with pytest.raises(ConfigError, match=said):
        make_run(config(**changes), make_mesh(mesh))


def test_published_models_are_known_by_name_and_others_by_their_folder(tmp_path):
    assert backbone("Qwen/Qwen3-8B-Base", "bfloat16").d_model == backbone("Qwen3-8B", None).d_model == 4096
    with pytest.raises(ConfigError, match="model Qwen/Qwen9-1B: no such folder, and no config is known here"):
        backbone("Qwen/Qwen9-1B", None)
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    assert backbone(str(tmp_path), "bfloat16").dtype == "bfloat16" and backbone(str(tmp_path / "config.json"), None).dtype == "float32"
