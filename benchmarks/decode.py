"""Cached greedy decoding beside transformers' `generate`: float32, the same weights, prompts and threads.

    python -m benchmarks.decode [--models tiny,0.6b] [--rounds 7]

Targets: at least twice as fast on the embedded model, no slower on a Qwen3-0.6B shape. Prefill is included on both sides.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks.shapes import both_sides
from benchmarks.timing import header, paired, report
from qscope_jax.models.generation import decode, prefill
from qscope_jax.models.sampling import Sampler, SamplingConfig

SHAPES = {"tiny": ((1, 16, 64), (8, 32, 64)), "0.6b": ((1, 32, 16), (4, 32, 16))}
TARGETS = {"tiny": "at least 2", "0.6b": "at least 1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default="tiny,0.6b")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    header("decode")
    for name in arguments.models.split(","):
        ours, theirs = both_sides(name)
        for batch, length, new in SHAPES[name]:
            tokens = np.random.default_rng(0).integers(1, ours.config.vocab_size, (batch, length)).astype(np.int32)
            prompt = torch.tensor(tokens.astype(np.int64))
            sampler = Sampler.make(SamplingConfig(max_new_tokens=new, stop_token_ids=()), (), batch)
            theirs.generation_config.eos_token_id = None

            def run_theirs(prompt=prompt, new=new, theirs=theirs) -> np.ndarray:
                with torch.inference_mode():
                    mask = torch.ones_like(prompt)
                    return theirs.generate(prompt, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0).numpy()

            def run_ours(tokens=tokens, new=new, ours=ours, sampler=sampler) -> np.ndarray:
                state = prefill(ours.decoder, tokens, np.ones_like(tokens), sampler, (), new_tokens=new)
                return np.asarray(jax.block_until_ready(decode(ours.decoder, state, sampler, (), jnp.int32(new))).tokens_BT)

            same = np.array_equal(run_theirs()[:, length:], run_ours())
            times = paired({"transformers": run_theirs, "qscope_jax": run_ours}, rounds=arguments.rounds if name == "tiny" else 3, warmup=1)
            title = f"{name}, {batch} rows, {length} prompt + {new} new tokens, {'identical tokens' if same else 'TOKENS DIFFER'}"
            report(title, times, ours="qscope_jax", target=TARGETS[name], units=batch * new)


if __name__ == "__main__":
    main()
