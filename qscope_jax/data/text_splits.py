"""Texts to learn from and texts to be scored on: repeats left out, every class and group in proportion, no text in both halves."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from jaxtyping import Int

from qscope_jax.errors import InputError

Indices: TypeAlias = Int[np.ndarray, " _"]

DISCOVERY_NAMES = ("discovery", "train", "training")
EVALUATION_NAMES = ("evaluation", "eval", "test", "held_out", "heldout")
"""What the halves are called in a column that says to which one a text belongs."""

FEWEST_TEXTS = 5
"""Texts that a class of a group needs to be split."""


@dataclass(frozen=True)
class DistinctTexts:
    """Texts of one class each, once.

    Attributes:
        kept: Where each occurs first, ascending.
        repeated: Texts left out as they occur before, with the same class.
        contradictory: Texts left out as they occur with several classes.
    """

    kept: Indices
    repeated: int
    contradictory: int


@dataclass(frozen=True)
class TextSplit:
    """Two halves without a text in common; indices into the texts given.

    Attributes:
        discovery: Texts to choose and fit on.
        evaluation: Texts to be scored on.
        repeated: Texts left out as they occur before, in the same half and with the same class.
        contradictory: Texts left out as they occur with several classes.
        crossing: Texts left out of discovery as they occur in evaluation too.
        unused: Texts of neither half.
    """

    discovery: Indices
    evaluation: Indices
    repeated: int
    contradictory: int
    crossing: int = 0
    unused: int = 0

    def removed(self) -> str:
        """What was left out, in words; empty where nothing was."""
        found = {
            "repeated": self.repeated,
            "with several classes": self.contradictory,
            "of discovery that evaluation has too": self.crossing,
            "of neither half": self.unused,
        }
        return ", ".join(f"{count:,} {what}" for what, count in found.items() if count)


def distinct_texts(texts: Sequence[str], labels: Sequence[Hashable]) -> DistinctTexts:
    """Find repeats, which differ at most in blanks around them, and contradictions, of which no occurrence is kept.

    Raises:
        InputError: texts and labels differ in number.
    """
    _check_lengths(texts, labels)
    rows_of: dict[str, list[int]] = {}
    for index, text in enumerate(texts):
        rows_of.setdefault(text.strip(), []).append(index)
    groups = list(rows_of.values())
    kept = [rows[0] for rows in groups if len({labels[row] for row in rows}) == 1]
    contradictory = sum(len(rows) for rows in groups if len({labels[row] for row in rows}) > 1)
    return DistinctTexts(np.array(kept, np.int64), len(texts) - contradictory - len(kept), contradictory)


def hold_out(indices: Indices, strata: Sequence[Hashable], share: float, seed: int) -> tuple[Indices, Indices]:
    """Hold out a share of every stratum, at least one and never all.

    Args:
        indices: What to split.
        strata: The stratum of each of them; strata must be sortable.
        share: Share held out.
        seed: Of the draw.

    Returns:
        Those kept and those held out.
    """
    members: dict[Hashable, list[int]] = {}
    for index, stratum in zip(indices.tolist(), strata, strict=True):
        members.setdefault(stratum, []).append(index)
    rng = np.random.default_rng(seed)
    kept, held = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for stratum in sorted(members):  # pyright: ignore[reportArgumentType]
        order = rng.permutation(members[stratum])
        count = min(max(round(share * len(order)), 1), len(order) - 1)
        held.append(order[:count])
        kept.append(order[count:])
    return np.concatenate(kept), np.concatenate(held)


def split_at_random(
    texts: Sequence[str], labels: Sequence[str], groups: Sequence[str] | None = None, *, share: float = 0.2, seed: int = 0
) -> TextSplit:
    """Hold out a share of every class in every group, such as a language.

    Raises:
        InputError: texts, labels and groups differ in number, the share is not between 0 and 1, there is one class only, or a class of a group
            has fewer than `FEWEST_TEXTS` texts or none at all.
    """
    if not 0 < share < 1:
        raise InputError(f"the share held out is {share}, expected one between 0 and 1")
    distinct = distinct_texts(texts, labels)
    names = _groups(texts, groups)
    removed = f"{distinct.repeated} repeated and {distinct.contradictory} contradictory ones removed"
    kept: list[int] = distinct.kept.tolist()
    _check_classes([labels[i] for i in kept], [names[i] for i in kept], FEWEST_TEXTS, removed, "texts")
    halves = hold_out(distinct.kept, [(names[i], labels[i]) for i in kept], share, seed)
    return TextSplit(*halves, distinct.repeated, distinct.contradictory)


def split_as_given(texts: Sequence[str], labels: Sequence[str], halves: Sequence[str], groups: Sequence[str] | None = None) -> TextSplit:
    """Take the halves as a column says, and leave out what would be in both.

    Args:
        texts: Texts.
        labels: The class of each.
        halves: Of each one of `DISCOVERY_NAMES` or `EVALUATION_NAMES`, in any case; texts of other names are not used.
        groups: The group of each, such as its language.

    Raises:
        InputError: texts, labels, halves and groups differ in number, a half has no text, there is one class only, or a class of a group has
            no text in a half.
    """
    _check_lengths(texts, labels)
    if len(halves) != len(texts):
        raise InputError(f"{len(texts)} texts came with {len(halves)} names of halves; give one for each text")
    names = _groups(texts, groups)
    half = ["discovery" if name.lower() in DISCOVERY_NAMES else "evaluation" if name.lower() in EVALUATION_NAMES else "" for name in halves]
    for wanted, known in (("discovery", DISCOVERY_NAMES), ("evaluation", EVALUATION_NAMES)):
        if wanted not in half:
            found = ", ".join(map(repr, sorted(set(halves))[:6]))
            raise InputError(f"the column of halves names {found}; expected some texts of {wanted}, which is called {' or '.join(known)}")
    used = [i for i, name in enumerate(half) if name]
    uncontradicted = {texts[i].strip() for i in _once(texts, labels, used)}
    contradictory = sum(texts[i].strip() not in uncontradicted for i in used)
    once = {
        wanted: _once(texts, labels, [i for i in used if half[i] == wanted and texts[i].strip() in uncontradicted])
        for wanted in ("discovery", "evaluation")
    }
    scored = {texts[i].strip() for i in once["evaluation"]}
    parts = {"discovery": [i for i in once["discovery"] if texts[i].strip() not in scored], "evaluation": once["evaluation"]}
    crossing = len(once["discovery"]) - len(parts["discovery"])
    repeated = len(used) - contradictory - crossing - sum(map(len, parts.values()))
    discovery, evaluation = (np.array(part, np.int64) for part in parts.values())
    split = TextSplit(discovery, evaluation, repeated, contradictory, crossing, len(texts) - len(used))
    for name, part in parts.items():
        _check_classes([labels[i] for i in part], [names[i] for i in part], 1, split.removed() or "none removed", f"texts for {name}")
    return split


def _check_lengths(texts: Sequence[str], labels: Sequence[Hashable]) -> None:
    if len(texts) != len(labels):
        raise InputError(f"{len(texts)} texts came with {len(labels)} labels; give one label for each text")


def _once(texts: Sequence[str], labels: Sequence[str], rows: Sequence[int]) -> list[int]:
    """Those of the rows that `distinct_texts` keeps."""
    kept = distinct_texts([texts[i] for i in rows], [labels[i] for i in rows]).kept
    return [rows[place] for place in kept.tolist()]


def _groups(texts: Sequence[str], groups: Sequence[str] | None) -> Sequence[str]:
    if groups is not None and len(groups) != len(texts):
        raise InputError(f"{len(texts)} texts came with {len(groups)} groups; give one group for each text")
    return [""] * len(texts) if groups is None else groups


def _check_classes(labels: Sequence[str], groups: Sequence[str], fewest: int, removed: str, what: str) -> None:
    """Check that every group has enough texts of every class, of which there are two or more."""
    counts: dict[tuple[str, str], int] = {}
    for group, label in zip(groups, labels, strict=True):
        counts[group, label] = counts.get((group, label), 0) + 1
    classes = sorted(set(labels))
    if len(classes) < 2:
        found = f"class {classes[0]!r} only" if classes else "no class"
        raise InputError(f"{len(labels)} {what} ({removed}) have {found}; two classes are needed to tell them apart")
    for group in sorted(set(groups)):
        for label in classes:
            if (count := counts.get((group, label), 0)) < fewest:
                where = f" of {group!r}" if group else ""
                raise InputError(f"class {label!r}{where} has {count} {what} ({removed}), expected {fewest} or more; add texts or leave it out")
