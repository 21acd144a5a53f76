"""An SAE training step beside EleutherAI sparsify's: resident float32 activations, the same sizes, tokens and threads, AuxK off.

    pip install -e '.[peers]'
    python -m benchmarks.sae_step [--rounds 9]

Both steps are whole: forward, backward, decoder constraint, optimiser (each library's own default: Adam here, sign-SGD without a schedule
there; `--their-optimizer adam` gives sparsify Adam as well). The bound is the encoder product alone, timed in the same rounds: no exact
top-k SAE can be trained without it. Target: at least twice sparsify's rate at D=1024, F=16384, K=50, N=1024.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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
    parser.add_argument("--their-optimizer", choices=("signum", "adam"), default="signum")
    parser.add_argument("--ours-only", action="store_true", help="leave sparsify out, to look at our step alone")
    arguments = parser.parse_args()
    header("sae_step")
    for width, features, k, tokens in SHAPES[: arguments.shapes]:
        x = np.random.default_rng(0).standard_normal((tokens, width)).astype(np.float32)
        sides: dict[str, Any] = {} if arguments.ours_only else {"sparsify": _theirs(x, features, k, arguments.their_optimizer)}
        sides |= {"qscope_jax": _ours(x, features, k), "encoder product alone": _product(x, features)}
        times = paired(sides, rounds=arguments.rounds, warmup=2)
        title = f"D={width} F={features} K={k} N={tokens}"
        if not arguments.ours_only:
            report(title, {name: times[name] for name in ("sparsify", "qscope_jax")}, ours="qscope_jax", target="at least 2", units=tokens)
        bound = np.median(times["qscope_jax"] / times["encoder product alone"])
        print(f"  {title}: step {np.median(times['qscope_jax']) * 1e3:.0f} ms, "
              f"encoder product alone {np.median(times['encoder product alone']) * 1e3:.0f} ms, "
              f"step / product {bound:.2f}")  # fmt: skip


def _ours(x: np.ndarray, features: int, k: int) -> Any:
    width = x.shape[1]
    config = SAEConfig(num_features=features, k=k, steps=100_000)
    step = SAEStep(config, width // 2)
    rows = jax.random.normal(jax.random.key(0), (features, width))
    rows /= jnp.linalg.norm(rows, axis=1, keepdims=True)
    sae = SparseAutoencoder(rows, jnp.array(rows), jnp.zeros(features), jnp.zeros(width), k=k)
    held = {"state": step.stack([step.new_state(sae, jnp.float32(np.sqrt(width)))], 1)}
    batch = jnp.asarray(x)[None]

    def run() -> None:
        held["state"], metrics = step(held["state"], batch)
        jax.block_until_ready((held["state"], metrics))

    return run


def _product(x: np.ndarray, features: int) -> Any:
    W = jax.random.normal(jax.random.key(0), (features, x.shape[1]))
    product, batch = jax.jit(linear), jnp.asarray(x)
    return lambda: product(batch, W).block_until_ready()


def _theirs(x: np.ndarray, features: int, k: int, optimizer: str) -> Any:
    import torch
    from sparsify import SparseCoder, SparseCoderConfig  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(2)
    torch.manual_seed(0)
    coder = SparseCoder(x.shape[1], SparseCoderConfig(num_latents=features, k=k))
    if optimizer == "adam":
        update: Any = torch.optim.Adam(coder.parameters(), lr=1e-4)
    else:
        from sparsify.sign_sgd import SignSGD  # pyright: ignore[reportMissingImports]

        update = SignSGD(coder.parameters(), lr=1e-4)
    batch = torch.tensor(x)

    def run() -> None:
        out = coder(batch)
        out.fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        update.step()
        update.zero_grad()
        coder.set_decoder_norm_to_unit_norm()

    return run


if __name__ == "__main__":
    main()
