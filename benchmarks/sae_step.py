"""An SAE training step beside other libraries': resident float32 activations, the same sizes, tokens and threads, no dead features.

    pip install -e '.[peers]'
    python -m benchmarks.sae_step [--rounds 9] [--shapes 2] [--peers sparsify dictionary_learning SAELens] [--their-optimizer own|adam|sign_sgd]

Steps are whole: forward, backward, decoder constraint, clipping where it is done, optimiser (each library's own default: Adam, but sparsify's
trainer takes sign-SGD inside a schedule-free average; `--their-optimizer adam` gives it Adam as well, `sign_sgd` leaves the average out, which its
trainer never does). The bound is the encoder product alone, timed in the same
rounds: no exact top-k SAE can be trained without it. Target: at least 2.5 times sparsify's rate, and at most 1.6 times the product's time.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.sae_peers import PEERS
from benchmarks.timing import header, paired, report
from qscope_jax.models.linear import linear
from qscope_jax.sae.autoencoder import SparseAutoencoder
from qscope_jax.training.sae_config import SAEConfig
from qscope_jax.training.sae_step import SAEStep

SHAPES = ((1024, 16384, 50, 1024), (2048, 32768, 50, 512))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--shapes", type=int, default=1, help="how many of the two shapes to run")
    parser.add_argument("--peers", nargs="*", default=["sparsify"], choices=list(PEERS), help="libraries to run beside; none: our step alone")
    parser.add_argument("--their-optimizer", choices=("own", "adam", "sign_sgd"), default="own")
    parser.add_argument("--layers", type=int, default=1, help="SAEs of our side that are trained at once, each on as many tokens")
    arguments = parser.parse_args()
    header("sae_step")
    for width, features, k, tokens in SHAPES[: arguments.shapes]:
        x = np.random.default_rng(0).standard_normal((tokens, width)).astype(np.float32)
        sides = {name: _theirs(name, x, features, k, arguments.their_optimizer) for name in arguments.peers}
        sides |= {"qscope_jax": _ours(x, features, k, arguments.layers), "encoder product alone": _product(x, features)}
        times = paired(sides, rounds=arguments.rounds, warmup=2)
        times["qscope_jax"] = times["qscope_jax"] / arguments.layers
        title = f"D={width} F={features} K={k} N={tokens}"
        for name in arguments.peers:
            report(title, {side: times[side] for side in (name, "qscope_jax")}, ours="qscope_jax", target="at least 2.5 of sparsify", units=tokens)
        bound = np.median(times["qscope_jax"] / times["encoder product alone"])
        print(f"  {title}: step {np.median(times['qscope_jax']) * 1e3:.0f} ms, "
              f"encoder product alone {np.median(times['encoder product alone']) * 1e3:.0f} ms, "
              f"step / product {bound:.2f}; target at most 1.6")  # fmt: skip


def _ours(x: np.ndarray, features: int, k: int, layers: int) -> Any:
    width = x.shape[1]
    step = SAEStep(SAEConfig(num_features=features, k=k, steps=100_000), width // 2)
    rows = jax.random.normal(jax.random.key(0), (features, width))
    rows /= jnp.linalg.norm(rows, axis=1, keepdims=True)
    sae = SparseAutoencoder(rows, jnp.array(rows), jnp.zeros(features), jnp.zeros(width), k=k)
    held = {"state": step.build(lambda _, sae, scale: step.new_state(sae, scale), layers, (sae, jnp.float32(np.sqrt(width))))}
    batch = jnp.repeat(jnp.asarray(x)[None], layers, axis=0)

    def run() -> None:
        held["state"], metrics = step(held["state"], batch)
        jax.block_until_ready((held["state"], metrics))

    return run


def _product(x: np.ndarray, features: int) -> Any:
    W = jax.random.normal(jax.random.key(0), (features, x.shape[1]))
    product, batch = jax.jit(linear), jnp.asarray(x)
    return lambda: product(batch, W).block_until_ready()


def _theirs(name: str, x: np.ndarray, features: int, k: int, optimizer: str) -> Any:
    import torch

    torch.set_num_threads(2)
    torch.manual_seed(0)
    if name != "sparsify":
        optimizer = "adam"
    side, batch = PEERS[name](x.shape[1], features, k, 1e-4, "signum" if optimizer == "own" else optimizer), torch.tensor(x)
    return lambda: side.step(batch)


if __name__ == "__main__":
    main()
