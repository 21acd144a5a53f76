"""DAPO on the embedded model, with and without rollouts that are steered into repetition.

    python -m benchmarks.steered_negatives --out runs/steered_negatives [--arms vanilla,steered,random] [--seeds 3]

Every seed has a cold start of its own (demo/repetition.py): sums of which a third are shown wrong, and open questions after which some answers go
round in circles, rarely after ordinary ones and mostly after those that end in a phrase over and over. Every arm then learns from the same sums
and ordinary open questions with the same draws, and is asked held-out sums, open questions, and questions of the prone kind, none of which is
learnt from, without any edit. `steered` samples one of eight answers to a prompt along features of repetition, `random` along random directions of
the same norm. Layers, number of features, strength, rate and the shortest answer were chosen on cold starts of seeds 100, which is not in the
table, and 0, which is. Finished runs are kept in the folder and not made again.

Target: `vanilla` raises accuracy on sums clearly; `steered` halves its share of endless repetition without losing accuracy; at most eight minutes a
run on two CPU cores.
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
from qscope_jax.demo.dapo_study import ARMS, COUNT, KINDS, LAYERS, Study, ask, cold_start, edits_of, repetition_features, run_arm
from qscope_jax.demo.embedded import tiny_model, tiny_saes
from qscope_jax.demo.repetition import open_questions
from qscope_jax.features.proportions import pooled_difference, pooled_share
from qscope_jax.features.repetition.repetition_features import COLUMNS, RepetitionFeatures
from qscope_jax.models.language_model import LanguageModel
from qscope_jax.report.figures import curves
from qscope_jax.report.page import Page
from qscope_jax.sae.layer_sae import LayerSAE, SAECollection

STUDY = Study()
STEP_METRICS = ("entropy", "length", "truncated", "repeating", "steered/repeating", "steered/reward_gap", "steered/abs_adv_token_share")
TITLES = {"sums": "sums", "open": "ordinary open questions", "prone": "questions that end in a phrase over and over"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/steered_negatives"))
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    arguments = parser.parse_args()
    header("steered_negatives")
    arguments.out.mkdir(parents=True, exist_ok=True)
    log = RecordLog(arguments.out / "runs.jsonl", "run", "run of this benchmark")
    seeds, arms = range(arguments.first_seed, arguments.first_seed + arguments.seeds), arguments.arms.split(",")
    runs = {arm: [] for arm in arms}
    for seed in seeds:
        for arm in arms:
            runs[arm].append(one_run(arm, seed, log))
    rows = table(runs)
    show(rows)
    write_json(arguments.out / "table.json", rows)
    write_page(arguments.out / "page.html", runs, rows)


def one_run(arm: str, seed: int, log: RecordLog) -> Mapping[str, Any]:
    """Train and measure; the record of it, made once."""
    key = f"{arm} {seed}"
    if (found := log.get(key)) is not None:
        return found
    model, saes, features = start(seed)
    begun = time.monotonic()
    edits = edits_of(arm, model, saes, features, STUDY, seed)
    probe = ask(model, open_questions(STUDY.probes), STUDY, seed, samples=1, edits=edits) if edits else None
    result = run_arm(model, STUDY, edits, seed)
    record = {
        "arm": arm, "seed": seed, "steps": result.steps, "samples": STUDY.samples, "right": result.right, "repeating": result.repeating,
        "probe_repeating": sum(probe.repeating()) / STUDY.probes if probe else None,
        "features": [list(row) for row in features.rows()],
        "metrics": {name: [float(step.get(name, np.nan)) for step in result.metrics] for name in STEP_METRICS},
        "seconds": time.monotonic() - begun, "examples": {kind: list(result.answers[kind].texts[:4]) for kind in KINDS},
    }  # fmt: skip
    log.add(key, record)
    before, after = (sum(right) / trials(record).sum() for right in (result.right[0], result.right[-1]))
    ends = ", ".join(f"{kind} {sum(counts[-1]) / trials(record).sum():.1%}" for kind, counts in result.repeating.items())
    print(f"  {arm} seed {seed}: right {before:.1%} to {after:.1%}; repeating at the end: {ends}; {record['seconds']:.0f} s", flush=True)
    return record


@cache
def start(seed: int) -> tuple[LanguageModel, list[LayerSAE], RepetitionFeatures]:
    """The cold start of a seed, the SAEs, and its features of repetition."""
    begun = time.monotonic()
    model, collection = cold_start(tiny_model(), STUDY, seed), SAECollection(tiny_saes())
    saes = [collection[layer] for layer in LAYERS]
    features = repetition_features(model, saes, STUDY, COUNT, seed)
    print(f"  cold start of seed {seed}: {time.monotonic() - begun:.0f} s; features {features.features_MS.tolist()} of layers {LAYERS}", flush=True)
    return model, saes, features


def table(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """The start and each arm at its end, all seeds together, with intervals over prompts; and against the first arm."""
    base = next(iter(runs.values()))
    rows = [_row("start", base, 0)]
    for arm, found in runs.items():
        row = _row(arm, found, -1)
        for name in ("right", *KINDS):
            change = pooled_difference(_pooled(base, name, -1), _pooled(found, name, -1))
            row[f"{name}_difference"] = [change.value, change.low, change.high]
        rows.append(row)
    return rows


def _row(arm: str, found: Sequence[Mapping[str, Any]], place: int) -> dict[str, Any]:
    row: dict[str, Any] = {"arm": arm}
    for name in ("right", *KINDS):
        row[name] = list(pooled_share(*_pooled(found, name, place)))
        row[f"{name}_seeds"] = [sum(_counts(one, name)[place]) / trials(one).sum() for one in found]
    row["seconds"] = [one["seconds"] for one in found]
    row["probe_repeating"] = [one["probe_repeating"] for one in found] if place else []
    return row


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the table."""
    for row in rows:
        print(f"{row['arm']}")
        for name, title in (("right", "right sums"), *((kind, f"repeating, {TITLES[kind]}") for kind in KINDS)):
            share, low, high = row[name]
            against = ""
            if row["arm"] != "start" and (change := row[f"{name}_difference"])[0]:
                against = f"  against the first arm {change[0]:+.1%} ({change[1]:+.1%} to {change[2]:+.1%})"
            print(f"  {title}: {share:.1%} ({low:.1%} to {high:.1%}; seeds {', '.join(f'{one:.1%}' for one in row[f'{name}_seeds'])}){against}")
        if row["arm"] != "start":
            print(f"  seconds: {', '.join(f'{one:.0f}' for one in row['seconds'])}")


def write_page(path: Path, runs: Mapping[str, Sequence[Mapping[str, Any]]], rows: Sequence[Mapping[str, Any]]) -> None:
    """The table, and curves of the arms."""
    page = Page(
        "Rare negatives by steering", "The embedded model learns sums by DAPO; in one arm, one answer of each group is steered into repetition."
    )
    columns = ("arm", "right sums", "from", "to", *(f"repeating: {kind}" for kind in KINDS[1:]), "repeating: prone, from", "to")
    cells = [(row["arm"], *row["right"], *(row[kind][0] for kind in KINDS[1:]), *row["prone"][1:]) for row in rows]
    page.table(columns, cells, caption=f"Held-out prompts, {len(rows[0]['right_seeds'])} seeds together; 95 % intervals over prompts")
    steps = next(iter(runs.values()))[0]["steps"]
    for name, title in (("right", "Right answers to held-out sums"), *((kind, f"Endless repetition: {TITLES[kind]}") for kind in KINDS)):
        shares = {arm: [pooled_share(*_pooled(found, name, place)) for place in range(len(steps))] for arm, found in runs.items()}
        lines = {arm: [share.value for share in of_arm] for arm, of_arm in shares.items()}
        bands = {arm: ([share.low for share in of_arm], [share.high for share in of_arm]) for arm, of_arm in shares.items()}
        page.figure(curves(steps, lines, bands=bands, title=title, x_title="step", y_title="share of answers"))
    for name in STEP_METRICS:
        # What a file has null for is not a number.
        values = {arm: np.array([one["metrics"][name] for one in found], float) for arm, found in runs.items()}
        lines = {arm: np.nanmean(of_seeds, axis=0) for arm, of_seeds in values.items() if not np.isnan(of_seeds).all(axis=0).any()}
        page.figure(curves(range(1, steps[-1] + 1), lines, title=f"Training: {name}", x_title="step", y_title=name))
    first = next(iter(runs.values()))[0]
    page.table(COLUMNS, first["features"], caption="Features of repetition, first seed")
    for arm, found in runs.items():
        page.table((f"{arm}: answers to questions of the prone kind",), [(text,) for text in found[0]["examples"]["prone"]], align=["left"])
    page.write(path)


def trials(record: Mapping[str, Any]) -> np.ndarray:
    """Answers to each prompt."""
    return np.full(len(record["right"][0]), record["samples"])


def _counts(record: Mapping[str, Any], name: str) -> Sequence[Sequence[int]]:
    return record["right"] if name == "right" else record["repeating"][name]


def _pooled(found: Sequence[Mapping[str, Any]], name: str, place: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each prompt, answers counted under `name` and all answers, over seeds."""
    return np.sum([_counts(one, name)[place] for one in found], axis=0), np.sum([trials(one) for one in found], axis=0)


if __name__ == "__main__":
    main()
