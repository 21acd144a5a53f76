"""Training SAEs for every layer of the embedded model from activations at rest, from a cache on disk, and made on the fly.

    python -m benchmarks.sae_end_to_end [--rounds 7]

The same SAEs, batches of the same size; a round is as many steps as a buffer holds, so that a refill on the fly, or a window of the cache, is in
every one. What is printed is the whole of each: model, filter, buffer or reading, and steps.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.timing import header, paired
from qscope_jax.data.batches import BatchConfig
from qscope_jax.demo.corpus import documents
from qscope_jax.demo.embedded import tiny_model
from qscope_jax.training.activation_cache import CacheConfig, cache_activations
from qscope_jax.training.activations import ActivationConfig, ActivationStream
from qscope_jax.training.cached_activations import CachedActivations
from qscope_jax.training.sae import SAETraining
from qscope_jax.training.sae_config import SAEConfig
from qscope_jax.training.tokens import TokenStream

FEATURES, K, BATCH, BUFFER = 2048, 32, 1024, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    header("sae_end_to_end")
    model = tiny_model()
    layers = tuple(range(model.config.num_layers))
    settings = ActivationConfig(layers, batch_tokens=BATCH, buffer_batches=BUFFER, mix=0.0)

    def tokens(**changes: Any) -> TokenStream:
        return TokenStream(documents(4000, seed=1), lambda text: model.tokenize([text])[0], BatchConfig(16, 128, **changes))

    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        cache_activations(model, tokens(epochs=1), CacheConfig(layers, max_tokens=8 * BUFFER * BATCH), cache)
        sources: dict[str, Any] = {
            "at rest": _Resting(ActivationStream(model.decoder, tokens(), settings)),
            "from the cache": CachedActivations(cache, batch_tokens=BATCH),
            "on the fly": ActivationStream(model.decoder, tokens(), settings),
        }
        times = paired({name: _steps(model, layers, source) for name, source in sources.items()}, rounds=rounds, warmup=1)
    count = BUFFER * BATCH
    print(f"{len(layers)} SAEs of D={model.config.d_model} F={FEATURES} K={K}, {BATCH} tokens a step, {BUFFER} steps a round")
    for name, seconds in times.items():
        rates = count / seconds
        print(f"  {name:<16} {np.median(rates):12,.0f} tok/s   (p10 {np.percentile(rates, 10):,.0f}, p90 {np.percentile(rates, 90):,.0f}), "
              f"time / at rest {np.median(seconds / times['at rest']):.2f}")  # fmt: skip


class _Resting:
    """The same batch again and again."""

    def __init__(self, stream: ActivationStream):
        self._batch = next(stream)

    def __next__(self) -> jax.Array:
        return self._batch

    def peek(self) -> jax.Array:
        return self._batch


def _steps(model: Any, layers: tuple[int, ...], source: Any) -> Any:
    recipe = SAETraining(model, layers, lambda: source, SAEConfig(FEATURES, K, 100_000))
    held = {"state": recipe.init()}

    def run() -> None:
        for _ in range(BUFFER):
            held["state"], metrics = recipe.step(held["state"], next(source))
        jax.block_until_ready((held["state"], metrics))

    return run


if __name__ == "__main__":
    main()
