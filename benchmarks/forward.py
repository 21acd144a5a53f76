"""Forward pass beside transformers: float32, the same weights, tokens and threads, all logits.

    python -m benchmarks.forward [--models tiny,0.6b] [--rounds 15]

Target: at least as fast as transformers.
"""

import argparse

import numpy as np
import torch

from benchmarks.shapes import both_sides
from benchmarks.timing import header, paired, report
from qscope_jax.models.language_model import forward

SHAPES = {"tiny": ((1, 64), (8, 128), (16, 256)), "0.6b": ((1, 128), (1, 512))}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default="tiny,0.6b")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    header("forward")
    for name in arguments.models.split(","):
        ours, theirs = both_sides(name)
        for batch, length in SHAPES[name]:
            tokens = np.random.default_rng(0).integers(0, ours.config.vocab_size, (batch, length)).astype(np.int32)
            segments, torch_tokens = np.ones_like(tokens), torch.tensor(tokens.astype(np.int64))

            def run_theirs(torch_tokens=torch_tokens, theirs=theirs) -> None:
                with torch.inference_mode():
                    theirs(torch_tokens, use_cache=False)

            def run_ours(tokens=tokens, segments=segments, ours=ours) -> None:
                forward(ours.decoder, tokens, segments).logits.block_until_ready()

            times = paired({"transformers": run_theirs, "qscope_jax": run_ours}, rounds=arguments.rounds if name == "tiny" else 5, warmup=2)
            report(f"{name}, {batch} x {length} tokens", times, ours="qscope_jax", target="at least 1", units=batch * length)


if __name__ == "__main__":
    main()
