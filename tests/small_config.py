"""The config that most tests of models begin with, also for programs that tests start."""

from typing import Any

from qscope_jax.models.config import ModelConfig


def small_config(layers: int = 3, **changes) -> ModelConfig:
    """A Qwen3 config; keywords replace fields."""
    fields: dict[str, Any] = dict(
        family="qwen3", vocab_size=97, d_model=32, d_ff=48, num_heads=4, num_kv_heads=2, head_dim=12, rope_theta=1e4, norm_eps=1e-6,
        mixers=("full_attention",) * layers, feed_forwards=("dense",) * layers, max_positions=1024, dtype="float32",
    )  # fmt: skip
    return ModelConfig(**(fields | changes))
