"""What a tap or an edit costs: a forward pass, and cached decoding, with and without one.

    python -m benchmarks.tap_edit [--models tiny,0.6b] [--rounds 25]

Target: one tap or one edit costs under 3 %. The ratio printed is time with / time without, minus 1.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.shapes import both_sides
from benchmarks.timing import header, paired
from qscope_jax.features.steering import add_directions
from qscope_jax.models.generation import decode, prefill
from qscope_jax.models.language_model import forward
from qscope_jax.models.sampling import Sampler, SamplingConfig

SHAPES = {"tiny": (8, 128, 64), "0.6b": (1, 128, 16)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default="tiny,0.6b")
    parser.add_argument("--rounds", type=int, default=25)
    arguments = parser.parse_args()
    header("tap_edit")
    for name in arguments.models.split(","):
        ours, _ = both_sides(name)
        batch, length, new = SHAPES[name]
        config = ours.config
        tokens = np.random.default_rng(0).integers(1, config.vocab_size, (batch, length)).astype(np.int32)
        segments = np.ones_like(tokens)
        layer = config.num_layers // 2
        edit = add_directions(layer, np.random.default_rng(1).normal(size=(1, config.d_model)), 0.01)
        taps = jnp.asarray([layer], jnp.int32)
        sampler = Sampler.make(SamplingConfig(max_new_tokens=new, stop_token_ids=()), (), batch)

        def pass_with(edits: Any = (), taps: Any = None, ours: Any = ours, tokens: Any = tokens, segments: Any = segments) -> None:
            jax.block_until_ready(forward(ours.decoder, tokens, segments, edits, taps))

        def decode_with(edits: Any = (), ours: Any = ours, sampler: Any = sampler, tokens: Any = tokens[:, :16], new: int = new) -> None:
            state = prefill(ours.decoder, tokens, np.ones_like(tokens), sampler, edits, new_tokens=new)
            jax.block_until_ready(decode(ours.decoder, state, sampler, edits, jnp.int32(new)))

        rounds = arguments.rounds if name == "tiny" else 7
        forward_times = paired(
            {"plain": pass_with, "one tap": lambda p=pass_with, t=taps: p((), t), "one edit": lambda p=pass_with, e=edit: p((e,))}, rounds=rounds
        )
        decode_times = paired({"plain": decode_with, "one edit": lambda d=decode_with, e=edit: d((e,))}, rounds=rounds)
        for what, times in ((f"forward {batch} x {length}", forward_times), (f"decoding {batch} rows, {new} tokens", decode_times)):
            for side, values in times.items():
                if side != "plain":
                    ratios = values / times["plain"]
                    print(f"{name}, {what}: {side} costs {np.median(ratios) - 1:+.2%} (p10 {np.percentile(ratios, 10) - 1:+.2%}, "
                          f"p90 {np.percentile(ratios, 90) - 1:+.2%}; plain {np.median(times['plain']) * 1e3:.1f} ms); target under 3 %")  # fmt: skip


if __name__ == "__main__":
    main()
