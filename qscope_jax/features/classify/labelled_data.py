"""Texts of two classes, perhaps of several languages, in halves to choose on and to score."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Int

from qscope_jax.data.text_splits import TextSplit, split_as_given, split_at_random
from qscope_jax.errors import InputError


@dataclass(frozen=True, eq=False)
class LabelledHalves:
    """Which texts to choose on and which to score, and their class. Indices into tables of the same texts.

    Attributes:
        positive_B: Whether each text is of the class.
        discovery: Texts to choose on.
        evaluation: Texts to score.
    """

    positive_B: Bool[np.ndarray, " B"]
    discovery: Int[np.ndarray, " _"]
    evaluation: Int[np.ndarray, " _"]

    def of(self, chosen_B: Bool[np.ndarray, " B"]) -> "LabelledHalves":
        """The halves without the texts that are not chosen, such as those of other languages."""
        return LabelledHalves(self.positive_B, *(half[chosen_B[half]] for half in (self.discovery, self.evaluation)))


@dataclass(frozen=True, eq=False)
class LabelledData:
    """B texts without repeats, first those of discovery, then those of evaluation. Made by `label_data`.

    Attributes:
        texts: The texts.
        rows: Where each stood among the texts given.
        positive_B: Whether it is of the class looked for.
        positive: Name of that class.
        negative: Name of the other.
        languages: Its language, where that is known.
        split: How they were split, in places among the texts given.
    """

    texts: tuple[str, ...]
    rows: Int[np.ndarray, " B"]
    positive_B: Bool[np.ndarray, " B"]
    positive: str
    negative: str
    languages: tuple[str, ...] | None
    split: TextSplit

    @property
    def halves(self) -> LabelledHalves:
        """All texts."""
        border = len(self.split.discovery)
        return LabelledHalves(self.positive_B, np.arange(border), np.arange(border, len(self.rows)))

    @property
    def by_language(self) -> dict[str, LabelledHalves]:
        """The halves of each language, by name; `all` where languages are not known."""
        if self.languages is None:
            return {"all": self.halves}
        names = np.asarray(self.languages, object)
        return {name: self.halves.of(names == name) for name in sorted(set(self.languages))}

    def only(self, languages: Sequence[str]) -> "LabelledData":
        """The texts of some languages.

        Raises:
            InputError: the texts have no languages, or not these.
        """
        known = sorted(set(self.languages or ()))
        if missing := [name for name in languages if name not in known]:
            raise InputError(f"no text is of language {missing[0]!r}; texts are of {', '.join(map(repr, known)) or 'languages not named'}")
        assert self.languages is not None
        kept_B = np.isin(np.asarray(self.languages, object), list(languages))
        border, chosen = len(self.split.discovery), np.flatnonzero(kept_B)
        split = replace(self.split, discovery=self.split.discovery[kept_B[:border]], evaluation=self.split.evaluation[kept_B[border:]])
        texts, names = (tuple(values[i] for i in chosen) for values in (self.texts, self.languages))
        return replace(self, texts=texts, rows=self.rows[kept_B], positive_B=self.positive_B[kept_B], languages=names, split=split)


def label_data(
    texts: Sequence[str],
    labels: Sequence[str],
    *,
    positive: str | None = None,
    languages: Sequence[str] | None = None,
    halves: Sequence[str] | None = None,
    share: float = 0.2,
    seed: int = 0,
) -> LabelledData:
    """Name the classes and split the texts; repeats and contradictions are left out.

    Args:
        texts: Texts.
        labels: The class of each.
        positive: The class to look for. By default the second of two by name; more than two need it, and are then one against the rest.
        languages: The language of each text; every language gets its share of each half.
        halves: To which half each text belongs, see `split_as_given`; by default texts are drawn.
        share: Share of each class and language drawn for evaluation.
        seed: Of the draw.

    Raises:
        InputError: one class only, more than two without `positive`, no text of it, or what the split demands.
    """
    classes = sorted(set(labels))
    if positive is None:
        if len(classes) != 2:
            found = ", ".join(map(repr, classes[:6])) + (" ..." if len(classes) > 6 else "")
            raise InputError(f"{len(labels)} texts have {len(classes)} classes ({found}); give two, or name the positive one of more")
        positive = classes[1]
    if positive not in classes or len(classes) < 2:
        raise InputError(f"positive class {positive!r}: texts are of {', '.join(map(repr, classes[:6])) or 'none'}; expected it and another")
    negative = next(name for name in classes if name != positive) if len(classes) == 2 else f"not {positive}"
    names = [positive if label == positive else negative for label in labels]
    split = split_at_random(texts, names, languages, share=share, seed=seed) if halves is None else split_as_given(texts, names, halves, languages)
    rows = np.concatenate([split.discovery, split.evaluation])
    used: list[int] = rows.tolist()
    return LabelledData(
        tuple(texts[row] for row in used),
        rows,
        np.array([names[row] == positive for row in used]),
        positive,
        negative,
        None if languages is None else tuple(languages[row] for row in used),
        split,
    )
