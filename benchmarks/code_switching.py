"""SASFT on the embedded model: how often answers switch to an unwanted language, beside plain fine-tuning, a penalty and a control.

    python -m benchmarks.code_switching --out runs/code_switching [--targets zh,ru,ko] [--seeds 3] [--arms sft,sasft,sasft2,penalty,random]

Every arm fine-tunes on the same made conversations, of which a few per cent of the answers switch (demo/switching.py), with the same seeds and
steps, and answers the same held-out questions in the other five languages, eight times each (temperature 1, top_p 0.8, one character of the
script is a switch). `sasft` holds sixteen features of each of the last two layers down, `sasft2` two as in the papers, and `random` sixteen that
belong to no language. Their lambda, and the penalty's, were chosen on a seed that is not in the table (Chinese, seed 100). Finished runs are kept
in the folder and not made again; table and page tell ratios with intervals over questions, and the loss on clean held-out conversations.

Target: SASFT's ratio at least 50 % below plain fine-tuning's for each language, its loss on clean text at most 2 % higher.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.timing import header
from qscope_jax.data.files import write_json
from qscope_jax.data.record_log import RecordLog
from qscope_jax.demo.corpus import LANGUAGES
from qscope_jax.demo.embedded import tiny_model, tiny_saes
from qscope_jax.demo.switching import TARGETS
from qscope_jax.demo.switching_study import ARMS, FEATURES, Study, auxiliary_of, run_arm, target_features
from qscope_jax.features.proportions import pooled_difference, pooled_share
from qscope_jax.features.switching.code_switching import is_switched, target_script
from qscope_jax.features.switching.language_features import LanguageFeatures
from qscope_jax.models.language_model import LanguageModel
from qscope_jax.report.figures import bars
from qscope_jax.report.page import Page
from qscope_jax.sae.layer_sae import SAECollection

STUDY = Study()
LAYERS = (4, 5)  # the last two
WEIGHTS = {"sft": 0.0, "sasft": 1.0, "sasft2": 1.0, "random": 1.0, "penalty": 10.0}
COUNTS = {"sasft2": 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/code_switching"))
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--arms", default=",".join((*ARMS, *COUNTS)))
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
    tables = {}
    for target in targets:
        runs = {arm: [one_run(model, target, arm, seed, log, arguments.weight) for seed in seeds] for arm in arms}
        tables[target] = show(target, runs)
    write_json(arguments.out / "table.json", tables)
    write_page(arguments.out / "page.html", tables)


def one_run(model: LanguageModel, target: str, arm: str, seed: int, log: RecordLog, weight: float | None = None) -> Mapping[str, Any]:
    """Fine-tune, answer and count; the record of it, made once."""
    weight = WEIGHTS[arm] if weight is None or arm == "sft" else weight
    key = f"{target} {arm} {seed} {weight:g}"
    if (found := log.get(key)) is not None:
        return found
    start = time.monotonic()
    features = None
    if arm in ("sasft", "sasft2", "random"):
        features = features_of(model, target, seed if arm == "random" else None, COUNTS.get(arm, FEATURES))
    result = run_arm(model, target, auxiliary_of(arm.rstrip("2"), model, target, weight, features), STUDY, seed)
    switched, script = result.switched(target), target_script(target)
    record = {
        "target": target, "arm": arm, "seed": seed, "weight": weight, "switched": switched, "answers": STUDY.samples, "loss": result.loss,
        "seconds": time.monotonic() - start, "examples": [one.text for one in result.answers if is_switched(one.text, script)][:5],
    }  # fmt: skip
    log.add(key, record)
    ratio = sum(switched) / len(result.answers)
    print(
        f"  {target} {arm} seed {seed} lambda {weight:g}: {ratio:.2%} switched, clean loss {result.loss:.4f}, {record['seconds']:.0f} s", flush=True
    )
    return record


@cache
def features_of(model: LanguageModel, target: str, random_seed: int | None, count: int) -> LanguageFeatures:
    """What SASFT holds down, or as many features that belong to no language."""
    saes = SAECollection(tiny_saes())
    return target_features(model, [saes[layer] for layer in LAYERS], target, random_seed, count)


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


def write_page(path: Path, tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """The tables as a page, with a bar for each arm."""
    page = Page(
        "Answers that stay in their language", "The embedded model, fine-tuned on conversations of which a few per cent of the answers switch."
    )
    columns = ("arm", "lambda", "switched", "from", "to", "against plain", "loss on clean text", "against plain")
    for target, rows in tables.items():
        page.heading(f"Switches to {LANGUAGES[target]}")
        cells = [
            (row["arm"], row["weight"], row["ratio"], row["low"], row["high"], row.get("relative"), row["loss"], row.get("loss_change"))
            for row in rows
        ]
        page.table(columns, cells, caption=f"{len(rows[0]['seeds'])} seeds together; 95 % intervals over questions")
        arms, ratios, low, high = ([row[name] for row in rows] for name in ("arm", "ratio", "low", "high"))
        page.figure(bars(arms, ratios, bounds=(low, high), title=f"Answers with a {LANGUAGES[target]} character", y="share of answers"))
    page.write(path)


def pooled(runs: Sequence[Mapping[str, Any]]) -> tuple[Any, Any]:
    """Switched answers and all answers of each question, over seeds."""
    switched_P = np.sum([one["switched"] for one in runs], axis=0)
    return switched_P, np.full(len(switched_P), sum(one["answers"] for one in runs))


def seeds_of(runs: Sequence[Mapping[str, Any]]) -> list[float]:
    """Ratio of each seed."""
    return [sum(one["switched"]) / (one["answers"] * len(one["switched"])) for one in runs]


if __name__ == "__main__":
    main()
