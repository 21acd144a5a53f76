"""Features that a data set should light up: from explanations a judge finds useful, from a list, or from what fires at all."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qscope_jax.data.files import atomic_path
from qscope_jax.data.tables import load_table, read_index
from qscope_jax.errors import InputError
from qscope_jax.features.text_features import TextFeatures

TAU = 0.5
"""Score from which on an explanation makes its feature a target; the paper does not state its own."""


@dataclass(frozen=True, order=True)
class Target:
    """A feature that should be covered.

    Attributes:
        layer: 0-based layer.
        feature: Feature of that layer's SAE.
        explanation: What it responds to, if that is known.
        score: Usefulness that a judge gave, in [0, 1], if one was asked.
        harmful: Whether texts that fire it ask for harm, which a response should refuse; None where that is not known.
        threshold: A text fires it where its activation exceeds this; 0 is the paper's own rule.
    """

    layer: int
    feature: int
    explanation: str = ""
    score: float | None = None
    harmful: bool | None = None
    threshold: float = 0.0

    @property
    def key(self) -> str:
        """`layer/feature`."""
        return f"{self.layer}/{self.feature}"


def load_targets(source: str | Path, *, tau: float = TAU, layers: Sequence[int] | None = None, unjudged: bool = False) -> list[Target]:
    """Read the target inventory, T = {(l, f): s >= tau} (Qwen-Scope report, Eq. 19), in order of layer and feature.

    Args:
        source: A table (see `load_table`) with columns `layer` and `feature`, and, where known, `explanation`, `score`, `harmful` and
            `threshold`. Rows without a score are kept, so that a plain list of features is an inventory too; rows whose score is null are
            left out, since their judge failed. Where `scores` stand beside it, as in a file of explanations, the score says how well the
            explanation holds and not how useful the feature is: such a row counts as one without a score.
        tau: Least score.
        layers: Keep targets of these layers only.
        unjudged: Keep rows whose score is null too, to have them judged.

    Raises:
        SourceError: there is no such table.
        InputError: a row that is no target, a feature listed twice, a score outside [0, 1], or nothing left.
    """
    if not 0 <= tau <= 1:
        raise InputError(f"tau is {tau}, expected 0 to 1")
    table = load_table(source)
    found: dict[str, Target] = {}
    seen: set[str] = set()
    for row, place in zip(table.rows, table.places, strict=True):
        target = _target(row, f"{table.name} {place}")
        if target.key in seen:
            raise InputError(f"{table.name} {place}: lists feature {target.feature} of layer {target.layer} again; keep one row for each")
        seen.add(target.key)
        if _counts(target, row, tau, unjudged) and (layers is None or target.layer in layers):
            found[target.key] = target
    if not found:
        raise InputError(f"{source}: none of its {len(table)} features is a target with a score of {tau} or more; lower tau, or check the layers")
    return sorted(found.values(), key=lambda target: (target.layer, target.feature))


def alive_targets(features: Mapping[int, TextFeatures], *, least: int = 1, highest_rate: float = 1.0, strength: float = 0.0) -> list[Target]:
    """Targets where nothing is explained: features that at least `least` texts fire, and at most a share `highest_rate` of them.

    Args:
        features: Tables of the texts, by layer.
        least: Texts that must fire a feature, so that it is known to be reachable.
        highest_rate: Leave out features that a larger share of texts fires: they are covered by anything.
        strength: Each target's threshold, as a share of its largest activation in the texts. In a small dictionary, of which every text
            fires a large part, a faint activation says little.

    Raises:
        InputError: `least` is below 1, the rate not in (0, 1], the strength not in [0, 1), or no feature is left.
    """
    if least < 1 or not 0 < highest_rate <= 1 or not 0 <= strength < 1:
        raise InputError(
            f"least is {least}, highest_rate {highest_rate} and strength {strength}; expected 1 or more texts, a rate above 0 and at most 1, and a "
            "strength from 0 to below 1"
        )
    found = []
    for layer, table in sorted(features.items()):
        strongest_F = np.zeros(table.num_features, np.float32)
        np.maximum.at(strongest_F, table.maxima.indices, table.maxima.data)
        thresholds_F = strength * strongest_F
        above = table.maxima.data > thresholds_F[table.maxima.indices]
        texts_F = np.bincount(table.maxima.indices[above], minlength=table.num_features)
        chosen = np.flatnonzero((texts_F >= least) & (texts_F <= highest_rate * len(table)))
        found += [Target(layer, int(feature), threshold=float(thresholds_F[feature])) for feature in chosen]
    if not found:
        raise InputError(f"no feature fires on at least {least} texts and at most {highest_rate:.0%} of them; give more texts or widen the range")
    return found


def save_targets(path: str | Path, targets: Sequence[Target], *, failed: Collection[str] = ()) -> None:
    """Write targets as JSON lines that `load_targets` reads.

    Args:
        path: The file.
        targets: The targets.
        failed: Keys of those whose judge failed; their score is written as null, so that they are not taken for a plain list's.

    Raises:
        SourceError: the file cannot be written.
    """
    # What is as it is by default goes without saying.
    lines = [
        {name: value for name, value in vars(target).items() if value != getattr(Target, name, None)}
        | ({"score": None} if target.key in failed else {})
        for target in targets
    ]
    with atomic_path(path) as temporary:
        temporary.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def check_targets(targets: Sequence[Target], num_features: Mapping[int, int]) -> None:
    """Check that SAEs (or tables) have every target: {layer: F}.

    Raises:
        InputError: no target, or one of a layer or feature that is not there.
    """
    if not targets:
        raise InputError("no targets given; expected at least one layer and feature")
    for target in targets:
        if target.layer not in num_features:
            raise InputError(f"target {target.key}: there is no layer {target.layer} here; there are {', '.join(map(str, sorted(num_features)))}")
        if target.feature >= num_features[target.layer]:
            raise InputError(f"target {target.key}: layer {target.layer} has features 0 to {num_features[target.layer] - 1}")


def _counts(target: Target, row: Mapping[str, Any], tau: float, unjudged: bool) -> bool:
    if target.score is None:
        return unjudged or "score" not in row or bool(row.get("scores"))
    return target.score >= tau


def _target(row: Mapping[str, Any], where: str) -> Target:
    layer, feature = (read_index(row.get(name), where, name) for name in ("layer", "feature"))
    explanation, score, harmful, threshold = (_stated(row.get(name)) for name in ("explanation", "score", "harmful", "threshold"))
    if explanation is not None and not isinstance(explanation, str):
        raise InputError(f"{where}: explanation holds {type(explanation).__name__}, expected text")
    if row.get("scores"):
        score = None
    least = 0.0 if threshold is None else _number(threshold, where, "threshold", float("inf"))
    return Target(layer, feature, explanation or "", None if score is None else _number(score, where, "score", 1.0), _flag(harmful, where), least)


def _stated(value: Any) -> Any:
    """The value; nothing where a cell is empty, as cells of CSV are."""
    return None if isinstance(value, str) and not value.strip() else value


def _number(value: Any, where: str, name: str, most: float) -> float:
    try:
        number = -1.0 if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = -1.0
    if not 0 <= number <= most or number == float("inf"):
        raise InputError(f"{where}: {name} holds {value!r}, expected a number from 0" + (f" to {most:g}" if most < float("inf") else ""))
    return number


def _flag(value: Any, where: str) -> bool | None:
    spoken = {"true": True, "false": False}.get(value.strip().lower()) if isinstance(value, str) else value
    if value is not None and not isinstance(spoken, bool):
        raise InputError(f"{where}: harmful holds {value!r}, expected true or false")
    return spoken
