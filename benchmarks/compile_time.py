"""Compile time of forward pass and training step with 8 and with 64 layers, scanned: the period is compiled once, whatever the depth.

    python -m benchmarks.compile_time [--rounds 3]

Target: about the same, at most 1.5 times. (Layers that are not scanned, the CPU's default, take as much longer as they are more.)
"""

import argparse
import time
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import header
from qscope_jax.models.config import ModelConfig
from qscope_jax.models.language_model import forward
from qscope_jax.training.causal_lm import CausalLM, CausalLMConfig

_SHARED: dict[str, Any] = dict(
    vocab_size=1024, d_model=256, d_ff=512, num_heads=4, num_kv_heads=2, head_dim=64, dtype="float32", max_positions=2048
)  # fmt: skip
_MIXERS = {"qwen3": ("full_attention",), "qwen3_5_text": (*("gated_delta",) * 3, "full_attention")}
_DELTA: dict[str, Any] = dict(
    delta_key_heads=4, delta_value_heads=8, delta_key_dim=32, delta_value_dim=32, attention_gate=True, unit_offset_norms=True, rotary_dim=16
)
TOKENS = np.ones((4, 128), np.int32)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    header("compile_time")
    for family, period in _MIXERS.items():
        for name, compile_once in (("forward", _forward), ("training step", _step)):
            seconds: dict[int, list[float]] = {8: [], 64: []}
            for _ in range(arguments.rounds):
                for layers, taken in seconds.items():
                    config = ModelConfig(
                        family=family, mixers=period * (layers // len(period)), feed_forwards=("dense",) * layers, **_SHARED,
                        **(_DELTA if len(period) > 1 else {}),
                    )  # fmt: skip
                    jax.clear_caches()
                    taken.append(compile_once(config))
            eight, many = (float(np.median(taken)) for taken in seconds.values())
            print(f"{family}, {name}: 8 layers {eight:.2f} s, 64 layers {many:.2f} s, ratio {many / eight:.2f}; target at most 1.5")


def _forward(config: ModelConfig) -> float:
    from qscope_jax.models.decoder import Decoder

    abstract = jax.eval_shape(lambda: Decoder(config, jax.random.key(0)))
    return _seconds(forward.lower, abstract, TOKENS, TOKENS)


def _step(config: ModelConfig) -> float:
    recipe = CausalLM(replace(config, remat=True), CausalLMConfig(steps=10, batch_size=4, length=128), ["text"], lambda text: [1])
    state = jax.eval_shape(recipe.init)
    return _seconds(recipe._step.lower, state, jnp.asarray(TOKENS), jnp.asarray(TOKENS))


def _seconds(lower: Any, *arguments: Any) -> float:
    """Time of tracing, lowering and compiling."""
    start = time.perf_counter()
    lower(*arguments).compile()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
