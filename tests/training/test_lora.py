import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.errors import ConfigError, ShapeError, SourceError
from qscope_jax.models.decoder import Decoder
from qscope_jax.models.safetensors_file import read_header
from qscope_jax.training.lora import TARGETS, attach, init_adapters, load_adapters, merge, save_adapters

TOKENS = np.array([[3, 14, 15, 9, 2], [6, 5, 35, 8, 9]], np.int32)


def decoder_of(config, seed=0):
    return jax.jit(lambda key: Decoder(config, key))(jax.random.key(seed))


def trained(adapters, seed=1):
    """Adapters as training leaves them: neither half is zero."""
    leaves, tree = jax.tree.flatten(adapters)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(tree, [0.1 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)])


@pytest.fixture(scope="module", params=["unrolled", "scanned"])
def decoder(request, tiny_config):
    config = tiny_config(3)
    return decoder_of(config.unrolled() if request.param == "unrolled" else config)


@pytest.fixture(scope="module")
def adapters(decoder):
    return init_adapters(decoder, 4, TARGETS, jax.random.key(0))


def logits(decoder):
    return jax.jit(lambda decoder: decoder(jnp.asarray(TOKENS)).logits)(decoder)


def test_new_adapters_change_nothing(decoder, adapters):
    np.testing.assert_array_equal(logits(attach(decoder, adapters, 2.0)), logits(decoder))


def test_attached_and_merged_adapters_give_the_same_scores_and_leave_the_decoder_alone(decoder, adapters):
    before = logits(decoder)
    adapters = trained(adapters)
    attached, merged = logits(attach(decoder, adapters, 2.0)), logits(merge(decoder, adapters, 2.0))
    np.testing.assert_allclose(attached, merged, atol=1e-5 * float(jnp.abs(merged).max()))
    assert float(jnp.abs(attached - before).max()) > 0.01 * float(jnp.abs(before).max())
    np.testing.assert_array_equal(logits(decoder), before)


def test_a_merged_weight_is_the_weight_plus_the_scaled_product(decoder, adapters):
    adapters = trained(adapters)
    pair = adapters["0.mixer.q_proj"]
    was, now = decoder.layers[0].mixer.q_proj[...], merge(decoder, adapters, 0.5).layers[0].mixer.q_proj[...]
    expected = was + 0.5 * np.einsum("row,rwi->roi", np.asarray(pair["lora_B"], np.float64), np.asarray(pair["lora_A"], np.float64))
    np.testing.assert_allclose(now, expected, atol=1e-6)


def test_gradients_reach_the_adapters_and_no_weight(decoder, adapters):
    def loss(decoder, adapters):
        return jnp.sum(jnp.square(attach(decoder, adapters, 2.0)(jnp.asarray(TOKENS)).logits))

    to_weights, to_adapters = jax.jit(jax.grad(loss, argnums=(0, 1)))(decoder, trained(adapters))
    assert not np.any(to_weights.layers[0].mixer.q_proj[...]) and not np.any(to_weights.layers[0].feed_forward.down_proj[...])
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(to_adapters))


def test_adapters_written_for_peft_are_pairs_by_layer_and_come_back(decoder, adapters, tmp_path):
    adapters = trained(adapters)
    save_adapters(tmp_path, adapters, decoder.config, alpha=8.0, base="some/model")
    names = read_header(tmp_path / "adapter_model.safetensors")
    assert len(names) == 2 * len(TARGETS) * 3
    A = names["base_model.model.model.layers.2.self_attn.k_proj.lora_A.weight"]
    assert A.shape == (4, decoder.config.d_model)
    described = json.loads((tmp_path / "adapter_config.json").read_text())
    assert described["r"] == 4 and described["lora_alpha"] == 8.0 and set(described["target_modules"]) == set(TARGETS)
    found, scale = load_adapters(tmp_path, decoder)
    assert scale == 2.0
    jax.tree.map(np.testing.assert_array_equal, found, adapters)


def test_adapters_of_another_model_are_refused(decoder, adapters, tmp_path, tiny_config):
    save_adapters(tmp_path, adapters, decoder.config, alpha=8.0, base="some/model")
    with pytest.raises(ShapeError, match=r"layers\.2.*on one side alone"):
        load_adapters(tmp_path, decoder_of(tiny_config(2).unrolled()))
    wider = replace(tiny_config(3), d_ff=2 * decoder.config.d_ff)
    with pytest.raises(ShapeError, match="has shape"):
        load_adapters(tmp_path, decoder_of(wider))
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(SourceError, match="peft_type is IA3, expected LORA"):
        load_adapters(tmp_path, decoder)


def test_a_target_that_no_layer_has_is_refused_with_those_that_fit(decoder):
    with pytest.raises(ConfigError, match="no weight gate that an adapter fits; choose of down_proj, gate_proj"):
        init_adapters(decoder, 4, ("q_proj", "gate"), jax.random.key(0))
    with pytest.raises(ConfigError, match="rank of an adapter is 0"):
        init_adapters(decoder, 0, TARGETS, jax.random.key(0))
