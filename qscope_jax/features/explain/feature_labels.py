"""Explanations of features as a file that people write and programs read: JSON lines of `layer`, `feature`, `explanation`, `score`."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qscope_jax.data.files import atomic_path, plain
from qscope_jax.data.tables import load_table, read_index
from qscope_jax.errors import InputError
from qscope_jax.features.explain.feature_card import FeatureCard


@dataclass(frozen=True)
class FeatureLabel:
    """What a feature is taken to stand for.

    Attributes:
        layer: 0-based layer.
        feature: Index in its dictionary.
        explanation: One sentence.
        score: How well it holds, from 0 to 1; None where nobody looked.
        scores: Name -> score, where there are several, such as detection and fuzzing.
        by: Who says so: the name of a model, or empty.
    """

    layer: int
    feature: int
    explanation: str
    score: float | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    by: str = ""


def read_labels(source: str | Path) -> dict[tuple[int, int], FeatureLabel]:
    """Labels by layer and feature, in the order of the file. Any table (see `load_table`) with the columns will do.

    Raises:
        SourceError: there is no such file, or it is damaged.
        InputError: a row that is no label, or a feature that comes twice.
    """
    table = load_table(source)
    labels: dict[tuple[int, int], FeatureLabel] = {}
    for row, place in zip(table.rows, table.places, strict=True):
        label = _label(row, f"{table.name} {place}")
        if labels.setdefault((label.layer, label.feature), label) is not label:
            raise InputError(f"{table.name} {place}: explains feature {label.feature} of layer {label.layer} again; keep one row for each")
    return labels


def write_labels(path: str | Path, labels: Iterable[FeatureLabel]) -> None:
    """Write labels, whole or not at all. What is not known is left out of a row.

    Raises:
        SourceError: the file cannot be written.
    """
    rows = ({name: value for name, value in vars(label).items() if value not in (None, "", {})} for label in labels)
    with atomic_path(Path(path).expanduser()) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(plain(row), ensure_ascii=False) + "\n" for row in rows)


def labelled(card: FeatureCard, labels: Mapping[tuple[int, int], FeatureLabel]) -> FeatureCard:
    """A card with its explanation and scores, where there is one."""
    label = labels.get((card.layer, card.feature))
    if label is None:
        return card
    return replace(card, explanation=label.explanation, scores=dict(label.scores or ({} if label.score is None else {"score": label.score})))


def _label(row: Mapping[str, Any], where: str) -> FeatureLabel:
    layer, feature = (read_index(row.get(name), where, name) for name in ("layer", "feature"))
    explanation, scores, by = row.get("explanation"), row.get("scores") or {}, row.get("by") or ""
    if not isinstance(explanation, str):
        raise InputError(f"{where}: explanation holds {type(explanation).__name__}, expected text")
    if not isinstance(scores, dict) or not isinstance(by, str):
        raise InputError(f"{where}: scores should be named numbers and `by` text; mend or remove the row")
    found = {str(name): _score(value, where) for name, value in scores.items()}
    return FeatureLabel(layer, feature, explanation, _score(row.get("score"), where), {n: s for n, s in found.items() if s is not None}, by)


def _score(value: Any, where: str) -> float | None:
    if value is None or value == "":
        return None
    try:
        score = float(value)
    except (TypeError, ValueError):
        score = -1.0
    if isinstance(value, bool) or not 0 <= score <= 1:
        raise InputError(f"{where}: score holds {value!r}, expected a number from 0 to 1")
    return score
