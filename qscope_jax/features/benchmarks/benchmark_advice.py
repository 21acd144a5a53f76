"""Which benchmarks to keep, merge or drop, and why: what each adds to the footprint of those kept before it.

The Qwen-Scope report (arXiv 2605.11887, section 4) suggests to drop benchmarks of high overlap and to add those of low overlap. The order, the
thresholds and the check against scores are ours.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float

from qscope_jax.errors import ConfigError, InputError
from qscope_jax.features.benchmarks.benchmark_footprint import Footprint, equal_overlap_min_matrix, overlap_matrix, overlap_min_matrix
from qscope_jax.features.benchmarks.benchmark_performance import Similarity


@dataclass(frozen=True)
class AdviceConfig:
    """Thresholds, all of them shares between 0 and 1."""

    drop_covered: float = 0.9
    """Drop a benchmark of whose features at least this share is in those kept or merged before it."""
    merge_overlap: float = 0.6
    """Merge a benchmark into one kept before it if their overlap_min is at least this."""
    similar: float = 0.8
    """Drop or merge only where scores on both correlate at least this much, if there are scores."""
    enough: float = 0.9
    """Share of a footprint that counts as most of it, to say how few samples would do."""

    def __post_init__(self):
        """Check ranges."""
        for item in fields(self):
            if not 0 < getattr(self, item.name) <= 1:
                raise ConfigError(f"{item.name} is {getattr(self, item.name)}, expected a number above 0 and at most 1")


@dataclass(frozen=True)
class Advice:
    """What to do with one benchmark.

    Attributes:
        benchmark: Its name.
        action: What to do.
        partner: The benchmark that covers it (drop), takes it in (merge), or is nearest among those kept before it (keep; None for the first).
        adds: Features that those kept or merged before it lack.
        covered: Share of its features that those have.
        overlap_min: With the partner.
        similarity: Correlation of scores with the partner's; None where there are no scores.
        samples_enough: Samples that cover most of its footprint, in the mean over subsets.
        reasons: Why, in words and numbers.
    """

    benchmark: str
    action: Literal["keep", "merge", "drop"]
    partner: str | None
    adds: int
    covered: float
    overlap_min: float | None
    similarity: float | None
    samples_enough: int
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Suite:
    """What to do with all benchmarks.

    Attributes:
        advice: In the order of the decisions, what adds most first.
        features: Features that all benchmarks light up together.
        kept_share: Share of them that the benchmarks to keep cover.
        merged_share: Share that those to keep or merge cover.
        samples: Samples of all benchmarks.
        kept_samples: Samples of those to keep.
    """

    advice: tuple[Advice, ...]
    features: int
    kept_share: float
    merged_share: float
    samples: int
    kept_samples: int

    def names(self, action: Literal["keep", "merge", "drop"]) -> list[str]:
        """The benchmarks of one kind of advice."""
        return [one.benchmark for one in self.advice if one.action == action]


def advise(footprints: Sequence[Footprint], similarity: Similarity | None = None, config: AdviceConfig | None = None) -> Suite:
    """Go through benchmarks greedily, the one that adds most features to those kept or merged so far first.

    Args:
        footprints: Footprints of the benchmarks.
        similarity: How alike models score on the same benchmarks, in the same order.
        config: Thresholds.

    Raises:
        InputError: fewer than two benchmarks, or similarity of other ones.
    """
    names = [one.name for one in footprints]
    if len(names) < 2:
        raise InputError(f"{len(names)} benchmark given; advice compares 2 or more")
    if similarity is not None and list(similarity.benchmarks) != names:
        raise InputError(f"similarity is of {', '.join(similarity.benchmarks)}; expected the benchmarks compared, {', '.join(names)}")
    judge = _Judge(footprints, similarity, config or AdviceConfig())
    rest, advice = list(range(len(names))), []
    while rest:
        chosen = max(rest, key=lambda i: (judge.gain(i), -i))
        rest.remove(chosen)
        advice.append(judge.decide(chosen))
    return judge.suite(advice)


class _Judge:
    """What was kept so far, and the matrices that decisions look up."""

    def __init__(self, footprints: Sequence[Footprint], similarity: Similarity | None, config: AdviceConfig):
        self.footprints, self.similarity, self.config = footprints, similarity, config
        self.overlap, self.overlap_min = overlap_matrix(footprints), overlap_min_matrix(footprints)
        self.equal = min(one.samples for one in footprints)
        self.equal_overlap: Float[np.ndarray, "N N"] = equal_overlap_min_matrix(footprints, self.equal)
        self.kept: list[int] = []
        self.covered: Bool[np.ndarray, " F"] = np.zeros(len(footprints[0].counts), bool)

    def gain(self, i: int) -> int:
        """Features that benchmark i adds."""
        return int(np.count_nonzero(self.footprints[i].features & ~self.covered))

    def decide(self, i: int) -> Advice:
        """Keep, merge or drop the next benchmark."""
        adds = self.gain(i)
        covered = 1 - adds / self.footprints[i].size
        if not self.kept:
            return self._keep(i, None, adds, covered, [self._first(i)])
        # Whole footprints decide what is dropped, pairs what is merged.
        dropped = covered >= self.config.drop_covered
        matrix = self.overlap if dropped else self.overlap_min
        partner = max(self.kept, key=lambda j: matrix[i, j])
        facts = self._covered(i, partner, covered) if dropped else self._adds(i, partner, adds, covered)
        if not dropped and matrix[i, partner] < self.config.merge_overlap:
            return self._keep(i, partner, adds, covered, [facts])
        alike, reason = self._alike(i, partner)
        if not alike:
            return self._keep(i, partner, adds, covered, [facts, reason])
        if not dropped:
            self.covered = self.covered | self.footprints[i].features
        return self._advice(i, "drop" if dropped else "merge", partner, adds, covered, [facts, reason])

    def suite(self, advice: Sequence[Advice]) -> Suite:
        union = np.any([one.features for one in self.footprints], axis=0)
        kept = np.any([self.footprints[i].features for i in self.kept], axis=0)
        total = int(union.sum())
        samples, kept_samples = sum(one.samples for one in self.footprints), sum(self.footprints[i].samples for i in self.kept)
        return Suite(tuple(advice), total, float(kept.sum() / total), float(self.covered.sum() / total), samples, kept_samples)

    def _name(self, i: int) -> str:
        return self.footprints[i].name

    def _first(self, i: int) -> str:
        size, union = self.footprints[i].size, np.any([one.features for one in self.footprints], axis=0).sum()
        return f"has the largest footprint, {size:,} features, {size / union:.0%} of what all benchmarks light up"

    def _covered(self, i: int, j: int, covered: float) -> str:
        size, alone = self.footprints[i].size, self.overlap[i, j]
        return f"{covered:.0%} of its {size:,} features are in benchmarks kept or merged before it, {alone:.0%} in {self._name(j)} alone"

    def _adds(self, i: int, j: int, adds: int, covered: float) -> str:
        equal = f"{self.equal_overlap[i, j]:.2f} for {self.equal:,} samples of each"
        overlap = f"overlap_min with {self._name(j)} is {self.overlap_min[i, j]:.2f} ({equal})"
        return f"adds {adds:,} features to those kept or merged before it, {1 - covered:.0%} of its own; {overlap}"

    def _alike(self, i: int, j: int) -> tuple[bool, str]:
        """Whether scores allow two benchmarks to stand for each other, and the sentence that says so."""
        if self.similarity is None:
            return True, "no scores were given to check that models rank alike on both"
        value, models = float(self.similarity.values[i, j]), int(self.similarity.models[i, j])
        if not math.isfinite(value):
            return True, f"scores of {models} models on {self._name(i)} and {self._name(j)} do not vary, so that they say nothing"
        if value >= self.config.similar:
            return True, f"scores of {models} models on both correlate at {value:.2f}"
        return False, f"scores of {models} models on both differ, they correlate at {value:.2f}, below {self.config.similar:g}"

    def _keep(self, i: int, partner: int | None, adds: int, covered: float, reasons: list[str]) -> Advice:
        advice = self._advice(i, "keep", partner, adds, covered, reasons)
        self.kept.append(i)
        self.covered = self.covered | self.footprints[i].features
        return advice

    def _advice(self, i: int, action: Literal["keep", "merge", "drop"], j: int | None, adds: int, covered: float, reasons: list[str]) -> Advice:
        one = self.footprints[i]
        few = one.samples_for(self.config.enough)
        reasons = [*reasons, f"{few:,} of its {one.samples:,} samples cover {self.config.enough:.0%} of its footprint in the mean"]
        overlap = None if j is None else float(self.overlap_min[i, j])
        similarity = None if j is None or self.similarity is None else float(self.similarity.values[i, j])
        return Advice(one.name, action, None if j is None else self._name(j), adds, covered, overlap, similarity, few, tuple(reasons))
