import pytest

from qscope_jax.errors import ArchitectureError, ConfigError


def test_layer_kinds_are_checked(tiny_config):
    with pytest.raises(ArchitectureError, match="layer kinds .'mamba'. are not implemented"):
        tiny_config(mixers=("full_attention", "mamba", "full_attention"))
    with pytest.raises(ConfigError, match="got 2 and 3"):
        tiny_config(mixers=("full_attention",) * 2)
    with pytest.raises(ConfigError, match="attention is 'flash', expected one of auto, reference, cudnn"):
        tiny_config(attention="flash")


@pytest.mark.parametrize("period", [2, -1])
def test_a_period_must_divide_the_layers(tiny_config, period):
    with pytest.raises(ConfigError, match=f"a period of {period} layers does not divide 3"):
        tiny_config(period=period)
