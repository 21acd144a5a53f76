import pytest

from qscope_jax.models.catalogue import model_size
from qscope_jax.models.config import ModelConfig
from qscope_jax.models.published import PUBLISHED
from qscope_jax.sae.formats.qwen_scope import RELEASES

# Parameters as the model cards give them, in billions.
CARDS = {"Qwen3-1.7B": 1.7, "Qwen3-8B": 8.2, "Qwen3-30B-A3B": 30.5, "Llama-3.1-8B": 8.0, "Gemma-2-2B": 2.6, "Gemma-2-9B": 9.2}


def test_parameters_are_those_of_the_model_cards():
    sizes = {name: model_size(name, ModelConfig.from_hf(PUBLISHED[name])).parameters for name in CARDS}
    assert {name: round(size / 1e9, 1) for name, size in sizes.items()} == CARDS
    assert sizes["Qwen3-1.7B"] == 1_720_574_976 and sizes["Llama-3.1-8B"] == 8_030_261_248


@pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.repository)
def test_every_release_has_its_backbone_of_that_width_and_depth(release):
    config = ModelConfig.from_hf(PUBLISHED[release.backbone.removesuffix("-Base")])
    assert config.num_layers == release.num_layers and release.num_features % config.d_model == 0


def test_configs_that_are_read_are_read_whole():
    config = ModelConfig.from_hf(PUBLISHED["Llama-3.1-8B"])
    assert config.rope_scaling is not None and config.rope_scaling.factor == 8.0 and not config.tie_embeddings
    assert ModelConfig.from_hf(PUBLISHED["Gemma-2-2B"]).tie_embeddings
