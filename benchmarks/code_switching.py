"""SASFT on the embedded model: how often answers switch to an unwanted language, beside plain fine-tuning, a penalty and a control.

    python -m benchmarks.code_switching --out runs/code_switching [--targets zh,ru,ko] [--seeds 3] [--arms sft,sasft,penalty,random]

Every arm fine-tunes on the same made conversations, of which a few per cent of the answers switch (demo/switching.py), with the same seeds and
steps, and answers the same held-out questions in the other five languages, eight times each (temperature 1, top_p 0.8, one character of the script
is a switch). `random` is SASFT's loss on as many random features that belong to no language. Finished runs are kept in the folder and not made
again; the table and the page tell ratios with intervals over questions, and the loss on clean held-out conversations.

Target: SASFT's ratio at least 50 % below plain fine-tuning's for each language, its loss on clean text at most 2 % higher.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.timing import header
from qscope_jax.data.chat_data import Message
from qscope_jax.data.chat_templates import ChatFormat
from qscope_jax.data.chat_tokens import ChatRows, chat_rows, prompt_text
from qscope_jax.data.record_log import RecordLog
from qscope_jax.demo.corpus import LANGUAGES, sentences
from qscope_jax.demo.embedded import tiny_model, tiny_saes
from qscope_jax.demo.switching import TARGETS, clean_conversations, questions, switching_conversations
from qscope_jax.features.proportions import pooled_difference, pooled_share
from qscope_jax.features.switching.code_switching import Response, is_switched, sample_responses, script_tokens, target_script
from qscope_jax.features.switching.find_language_features import find_language_features
from qscope_jax.features.switching.language_features import LanguageFeatures
from qscope_jax.features.switching.switch_prompts import SwitchPrompt
from qscope_jax.models.language_model import LanguageModel
from qscope_jax.models.sampling import SamplingConfig
from qscope_jax.sae.layer_sae import SAECollection
from qscope_jax.training.auxiliary import Auxiliary
from qscope_jax.training.sasft import SASFTConfig, feature_ceiling, script_penalty
from qscope_jax.training.sft import SFT, SFTConfig

ARMS = ("sft", "sasft", "penalty", "random")
FORMAT = ChatFormat(template="plain")
SETTINGS = SFTConfig(steps=120, batch_size=16, length=128, learning_rate=1e-3, warmup_steps=10, remat=False)
SAMPLING = SamplingConfig(max_new_tokens=64, temperature=1.0, top_p=0.8)
LAYERS = (4, 5)  # the last two
WEIGHTS = {"sft": 0.0, "sasft": 0.3, "random": 0.3, "penalty": 1.0}
CONVERSATIONS, QUESTIONS = 3000, 60


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/code_switching"))
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--weight", type=float, help="lambda of all arms, to look for one")
    arguments = parser.parse_args()
    header("code_switching")
    model = tiny_model()
    arguments.out.mkdir(parents=True, exist_ok=True)
    log = RecordLog(arguments.out / "runs.jsonl", "run", "run of this benchmark")
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    targets, arms = arguments.targets.split(","), arguments.arms.split(",")
    for target in targets:
        runs = {arm: [one_run(model, target, arm, seed, log, arguments.weight) for seed in seeds] for arm in arms}
        show(target, runs)


def one_run(model: LanguageModel, target: str, arm: str, seed: int, log: RecordLog, weight: float | None = None) -> Mapping[str, Any]:
    """Fine-tune, answer and count; the record of it, made once."""
    weight = WEIGHTS[arm] if weight is None or arm == "sft" else weight
    key = f"{target} {arm} {seed} {weight} {SETTINGS.steps}"
    if (found := log.get(key)) is not None:
        return found
    start = time.monotonic()
    rows = chat_rows(switching_conversations(CONVERSATIONS, target, seed=seed), model.tokenizer, FORMAT, length=SETTINGS.length)
    held_out = chat_rows(clean_conversations(240), model.tokenizer, FORMAT, length=SETTINGS.length)
    tuned, loss = tune(model, rows, held_out, replace(SETTINGS, seed=seed), auxiliary_of(model, target, arm, seed, weight))
    trained = time.monotonic() - start
    prompts = [SwitchPrompt((("user", text),), language) for text, language in questions(target, QUESTIONS)]

    def render(prompt: SwitchPrompt) -> str:
        return prompt_text([Message(*turn) for turn in prompt.messages], model.tokenizer, FORMAT)

    answers = sample_responses(tuned, prompts, replace(SAMPLING, seed=seed), render=render, batch_size=128)
    switched = counts(answers, target_script(target))
    record = {
        "target": target, "arm": arm, "seed": seed, "weight": weight, "switched": switched, "answers": len(answers) // len(prompts),
        "loss": loss, "train_seconds": trained, "seconds": time.monotonic() - start,
        "examples": [one.text for one in answers if is_switched(one.text, target_script(target))][:5],
    }  # fmt: skip
    log.add(key, record)
    ratio = sum(switched) / len(answers)
    print(f"  {target} {arm} seed {seed} lambda {weight:g}: {ratio:.2%} switched, clean loss {loss:.4f}, {record['seconds']:.0f} s", flush=True)
    return record


def tune(model: LanguageModel, rows: ChatRows, held_out: ChatRows, config: SFTConfig, auxiliary: Auxiliary | None) -> tuple[LanguageModel, float]:
    """The fine-tuned model and its loss on the held-out conversations, which no answer of switches."""
    recipe = SFT(model, rows, config, auxiliary=auxiliary, languages=tuple(LANGUAGES), held_out=held_out)
    state, stream = recipe.init(), recipe.stream()
    for _ in range(config.steps):
        state, _ = recipe.step(state, next(stream))
    return LanguageModel(recipe.export(state), model.source, model.mesh), float(recipe.evaluate(state)["loss"])


def auxiliary_of(model: LanguageModel, target: str, arm: str, seed: int, weight: float) -> Auxiliary | None:
    """The loss that an arm adds; the random features are drawn anew for each seed."""
    if arm == "penalty":
        unwanted = script_tokens(model.tokenizer, model.config.vocab_size, target_script(target))
        return script_penalty(unwanted, tuple(LANGUAGES), target, weight)
    return None if arm == "sft" else feature_ceiling(features_of(model, target, seed if arm == "random" else None), SASFTConfig(weight=weight))


@cache
def features_of(model: LanguageModel, target: str, random_seed: int | None) -> LanguageFeatures:
    """The two features of highest monolinguality of the last two layers, or as many that belong to no language, with their levels."""
    saes = SAECollection(tiny_saes())
    texts = {language: sentences(language) for language in LANGUAGES}
    return find_language_features(model, [saes[layer] for layer in LAYERS], texts, target, random_seed=random_seed)


def counts(answers: Sequence[Response], script: str) -> list[int]:
    """Switched answers to each question."""
    found = [0] * (max(one.prompt for one in answers) + 1)
    for one in answers:
        found[one.prompt] += is_switched(one.text, script)
    return found


def show(target: str, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Print and return the table of one target: all seeds together, intervals over questions, which all arms and seeds share."""
    rows = []
    base = runs.get("sft")
    for arm, found in runs.items():
        switched_P, answers_P = pooled(found)
        share = pooled_share(switched_P, answers_P)
        row = {"target": target, "arm": arm, "weight": found[0]["weight"], "ratio": share.value, "low": share.low, "high": share.high,
               "seeds": seeds_of(found),
               "loss": float(np.mean([one["loss"] for one in found]))}  # fmt: skip
        if base:
            before = pooled(base)
            row["relative"] = share.value / (before[0].sum() / before[1].sum()) - 1
            row["relative_seeds"] = [own / was - 1 for own, was in zip(row["seeds"], seeds_of(base), strict=True)]
            row["loss_change"] = row["loss"] / float(np.mean([one["loss"] for one in base])) - 1
            change = pooled_difference(before, (switched_P, answers_P))
            row["difference"] = [change.low, change.high]
        rows.append(row)
    print(f"\n{target}: {len(next(iter(runs.values())))} seeds, {sum(pooled(next(iter(runs.values())))[1])} answers an arm")
    for row in rows:
        seeds = " ".join(f"{share:.2%}" for share in row["seeds"])
        against = f"  {row['relative']:+.0%} (by seed {' '.join(f'{one:+.0%}' for one in row['relative_seeds'])})" if base else ""
        loss = f"{row['loss']:.4f}" + (f" ({row['loss_change']:+.2%})" if base else "")
        print(f"  {row['arm']:<8} lambda {row['weight']:<5g} switched {row['ratio']:7.2%} ({row['low']:.2%} to {row['high']:.2%}; {seeds}){against}"
              f"  loss on clean text {loss}")  # fmt: skip
    return rows


def pooled(runs: Sequence[Mapping[str, Any]]) -> tuple[Any, Any]:
    """Switched answers and all answers of each question, over seeds."""
    switched_P = np.sum([one["switched"] for one in runs], axis=0)
    return switched_P, np.full(len(switched_P), sum(one["answers"] for one in runs))


def seeds_of(runs: Sequence[Mapping[str, Any]]) -> list[float]:
    """Ratio of each seed."""
    return [sum(one["switched"]) / (one["answers"] * len(one["switched"])) for one in runs]


if __name__ == "__main__":
    main()
