import math

import pytest

from qscope_jax.models.catalogue import model_size
from qscope_jax.models.config import ModelConfig
from qscope_jax.models.published import PUBLISHED
from tpu_scripts.flops import model_flops, sae_flops


def test_a_dense_layer_counts_its_matrices_and_the_keys_that_queries_see(tiny_config):
    config = tiny_config(layers=3)  # D 32, 4 heads and 2 key/value heads 12 wide, hidden 48
    matrices = 32 * 48 + 2 * 32 * 24 + 48 * 32 + 3 * 32 * 48
    attention = 2 * 4 * 12 * (1 + 2 + 3 + 4) / 4  # two products with 2.5 keys on average, over rows of 4 tokens
    assert model_flops(config, 4, 2) == 2 * 2 * (matrices + attention)


def test_a_window_bounds_the_keys(tiny_config):
    config = tiny_config(layers=1, mixers=("sliding_attention",), sliding_window=2)
    whole = model_flops(tiny_config(layers=1), 4, 1)
    assert whole - model_flops(config, 4, 1) == 4 * 4 * 12 * (2.5 - (1 + 2 + 2 + 2) / 4)


def test_only_the_experts_of_a_token_count():
    config = ModelConfig.from_hf(PUBLISHED["Qwen3-30B-A3B"])
    # 3.3 billion parameters are active (model card), those of embedding and head among them.
    tables = 2 * config.vocab_size * config.d_model
    assert model_flops(config, 1, config.num_layers) == pytest.approx(2 * (3.3e9 - tables), rel=0.03)


@pytest.mark.parametrize("name", ["Qwen3-1.7B", "Qwen3-8B", "Qwen3.5-2B", "Qwen3.5-9B", "Qwen3.5-27B"])
def test_a_dense_model_computes_twice_its_layers_parameters_and_little_more(name):
    config = ModelConfig.from_hf(PUBLISHED[name])
    tables = config.vocab_size * config.d_model * (1 if config.tie_embeddings else 2)
    parameters = model_size(name, config).parameters - tables
    assert 0.999 < model_flops(config, 1, config.num_layers) / (2 * parameters) < 1.1


def test_layers_above_the_highest_tapped_one_do_not_count():
    config = ModelConfig.from_hf(PUBLISHED["Qwen3.5-2B"])
    half, whole = (model_flops(config, 512, layers) for layers in (12, 24))
    assert math.isclose(2 * half, whole)


def test_an_sae_step_is_five_products():
    assert sae_flops(1024, 64, 8, dense=True) == 5 * 2 * 1024 * 64
    assert sae_flops(1024, 64, 8, dense=False) == 2 * 64 * (1024 + 4 * 8)
