"""Rollouts of the embedded model: the sampler beside plain generation in batches, and with one of eight members steered beside none.

    python -m benchmarks.rollouts [--rounds 7] [--prompts 64] [--rows 64] [--new 128]

Groups of eight continue sentences cut off at mixed lengths, temperature 1, stop tokens on. Plain generation takes the same prompts in batches of as
many rows, each of which ends with its longest row. Rates are tokens kept a second, everything on the host included.

Targets: no slower than plain generation; with one member of each group steered at least 80 % of the rate without.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import header, paired
from qscope_jax.data.batches import pad_batch
from qscope_jax.data.buckets import bucket_length
from qscope_jax.demo.corpus import LANGUAGES, sentences
from qscope_jax.demo.embedded import tiny_model
from qscope_jax.features.steering import add_directions
from qscope_jax.models.generation import decode, prefill
from qscope_jax.models.rollouts import RolloutSampler
from qscope_jax.models.sampling import Sampler, SamplingConfig

GROUP, ROOM = 8, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--new", type=int, default=128)
    arguments = parser.parse_args()
    header("rollouts")
    model = tiny_model()
    prompts = mixed_prompts(model, arguments.prompts)
    sampling = SamplingConfig(max_new_tokens=arguments.new, temperature=1.0)
    stops = model.config.eos_token_ids
    sampler = RolloutSampler(
        model.config, model.mesh, rows=arguments.rows, prompt_length=ROOM, max_new_tokens=arguments.new, sampling=sampling, stop_ids=stops
    )
    direction = np.random.default_rng(0).standard_normal((1, model.config.d_model)).astype(np.float32)
    edit = add_directions(4, direction / np.linalg.norm(direction), 30.0)
    counts: dict[str, int] = {}

    def plain() -> None:
        rows, counts["plain generation"] = [prompt for prompt in prompts for _ in range(GROUP)], 0
        for start in range(0, len(rows), arguments.rows):
            part = rows[start : start + arguments.rows]
            batch = pad_batch(part, length=bucket_length(ROOM), side="left")
            settings = Sampler.make(sampling, stops, len(part), range(start, start + len(part)))
            with jax.set_mesh(model.mesh):
                state = prefill(model.decoder, batch.tokens_BT, batch.segment_ids_BT, settings, (), new_tokens=bucket_length(arguments.new))
                state = decode(model.decoder, state, settings, (), jnp.int32(arguments.new))
            kept = [row[:count].tolist() for row, count in zip(np.asarray(state.tokens_BT), np.asarray(state.counts_B), strict=True)]
            counts["plain generation"] += sum(map(len, kept))

    def rollouts(name: str, **steering) -> None:
        counts[name] = sum(len(one.token_ids) for one in sampler(model.decoder, prompts, GROUP, seeds=range(len(prompts)), **steering))

    sides = {
        "plain generation": plain,
        "sampler": lambda: rollouts("sampler"),
        "sampler, 1 of 8 steered": lambda: rollouts("sampler, 1 of 8 steered", edits=(edit,), steered=(GROUP - 1,)),
    }
    times = paired(sides, rounds=arguments.rounds, warmup=1)
    print(f"{len(prompts)} prompts of {min(map(len, prompts))} to {max(map(len, prompts))} tokens, groups of {GROUP}, {arguments.rows} rows, "
          f"at most {arguments.new} new tokens")  # fmt: skip
    rates = {name: counts[name] / values for name, values in times.items()}
    for name, values in rates.items():
        p10, median, p90 = np.percentile(values, [10, 50, 90])
        print(f"  {name:<26} {counts[name]:8,} tokens  median {median:10,.0f} tok/s   p10 {p10:10,.0f}   p90 {p90:10,.0f}")
    for over, under, target in (("sampler", "plain generation", "at least 1"), ("sampler, 1 of 8 steered", "sampler", "at least 0.8")):
        ratios = rates[over] / rates[under]
        print(f"  {over} / {under}: median {np.median(ratios):.2f} (p10 {np.percentile(ratios, 10):.2f}, p90 {np.percentile(ratios, 90):.2f}); "
              f"target {target}")  # fmt: skip


def mixed_prompts(model, count: int) -> list[list[int]]:
    """Beginnings of held-out sentences in all languages, of 2 tokens to as many as there is room for."""
    rng = np.random.default_rng(0)
    texts = [text for code in LANGUAGES for text in sentences(code, held_out=True)]
    chosen = [model.tokenize([texts[index]])[0] for index in rng.choice(len(texts), count)]
    return [ids[: int(rng.integers(2, max(min(len(ids), ROOM), 2) + 1))] for ids in chosen]


if __name__ == "__main__":
    main()
