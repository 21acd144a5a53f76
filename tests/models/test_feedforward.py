import jax
import jax.numpy as jnp
import numpy as np

from qscope_jax.models.feedforward import GatedMLP


def test_output_is_down_of_silu_gate_times_up(tiny_config):
    mlp = GatedMLP(tiny_config(), jax.random.key(0))
    x = np.random.default_rng(0).standard_normal((2, 3, 32)).astype(np.float32)
    gate, up, down = (np.asarray(parameter[...]) for parameter in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    assert (gate.shape, up.shape, down.shape) == ((48, 32), (48, 32), (32, 48))
    gated = x @ gate.T
    expected = (gated / (1 + np.exp(-gated)) * (x @ up.T)) @ down.T
    np.testing.assert_allclose(mlp(jnp.asarray(x)), expected, rtol=1e-4, atol=1e-8)


def test_random_weights_have_the_configs_dtype_and_scale(tiny_config):
    mlp = GatedMLP(tiny_config(layers=8, dtype="bfloat16", d_ff=512), jax.random.key(0))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(mlp)} == {"bfloat16"}
    assert abs(float(jnp.std(mlp.gate_proj[...].astype(jnp.float32))) - 0.02) < 1e-3
    assert abs(float(jnp.std(mlp.down_proj[...].astype(jnp.float32))) - 0.02 / 4) < 3e-4
