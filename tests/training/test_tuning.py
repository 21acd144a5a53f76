import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.errors import ConfigError
from qscope_jax.parallel.mesh import make_mesh
from qscope_jax.training.tuning import TuningConfig, accumulate, check_rows


def test_the_rate_rises_to_its_peak_and_falls_to_zero():
    for schedule, halfway in (("cosine", 0.5), ("linear", 0.5), ("constant", 1.0)):
        config = TuningConfig(steps=110, warmup_steps=10, learning_rate=1.0, schedule=schedule, weight_decay=0.0, clip=1e9)
        rate = config.rate()
        assert 0 < float(rate(0)) < 0.2 and float(rate(10)) == pytest.approx(1.0) and float(rate(60)) == pytest.approx(halfway, abs=1e-6)
        assert float(rate(110)) == pytest.approx(1.0 if schedule == "constant" else 0.0, abs=1e-6)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_parts_of_a_batch_add_up_to_its_sums_and_gradient(parts):
    rows, scale = jnp.arange(12.0).reshape(4, 3), jnp.arange(1.0, 5.0)

    def loss(w, arrays):
        values = (arrays[0] @ w) * arrays[1]
        return jnp.sum(jnp.square(values)), (jnp.sum(values), jnp.max(arrays[1]) * 0 + 1)

    (total, count), gradient = jax.jit(accumulate, static_argnums=(0, 3))(loss, jnp.ones(3), [rows, scale], parts)
    x = np.asarray(rows, np.float64) * np.arange(1.0, 5.0)[:, None]
    assert float(total) == x.sum() and float(count) == parts
    np.testing.assert_allclose(gradient, 2 * x.T @ x.sum(axis=1), rtol=1e-6)


def test_rows_must_lie_evenly_over_parts_and_shards():
    check_rows(8, 2, make_mesh("data=2,fsdp=2"), "batch_size")
    with pytest.raises(ConfigError, match="batch_size 8 cannot be split into 3 micro_batches"):
        check_rows(8, 3, make_mesh(""), "batch_size")
    with pytest.raises(ConfigError, match="2 rows does not lie over data and fsdp, 4 shards"):
        check_rows(8, 4, make_mesh("data=4"), "batch_size")
