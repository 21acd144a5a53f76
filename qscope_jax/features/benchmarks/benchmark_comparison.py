"""All that is known of benchmarks at one layer: footprints, overlaps, redundancy, scores, how the two agree, and what to do."""

import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float
from scipy.sparse import csr_array

from qscope_jax.data.benchmark_scores import ScoreTable
from qscope_jax.errors import ConfigError, InputError
from qscope_jax.features.benchmarks.benchmark_advice import AdviceConfig, Suite, advise
from qscope_jax.features.benchmarks.benchmark_clustering import Clustering, cluster
from qscope_jax.features.benchmarks.benchmark_footprint import (
    Footprint,
    equal_overlap_min_matrix,
    footprint,
    overlap_matrix,
    overlap_min_matrix,
    sampled_redundancy,
)
from qscope_jax.features.benchmarks.benchmark_performance import (
    FEWEST_MODELS,
    PerformanceRedundancy,
    Similarity,
    performance_redundancy,
    score_similarity,
)
from qscope_jax.features.benchmarks.correlation import FEWEST_POINTS, Correlation, Kind, correlate, correlate_pairs

CURVE_POINTS = 60
"""Points of a coverage curve that are written and drawn."""


@dataclass(frozen=True)
class ComparisonConfig:
    """How benchmarks are compared."""

    least_samples: int = 10
    """Samples that a benchmark needs: redundancy is a mean over subsets of all sizes, and over a handful of samples it says little."""
    equal_samples: int | None = None
    """Samples that benchmarks are cut down to where sizes must be equal; by default those of the smallest."""
    orders: int = 200
    """Random orders that check R-hat by sampling."""
    subsets: int = 200
    """Random subsets of each size that R is measured on."""
    least_models: int = FEWEST_MODELS
    """Models that a comparison of scores needs."""
    resample: Literal["benchmarks", "pairs"] = "benchmarks"
    """What intervals of correlations over pairs of benchmarks resample. Pairs that share a benchmark depend on each other."""
    resamples: int = 2000
    """Bootstrap resamples."""
    confidence: float = 0.95
    """Of the intervals."""
    seed: int = 0
    """Of all draws."""
    advice: AdviceConfig = field(default_factory=AdviceConfig)
    """Thresholds of the advice."""

    def __post_init__(self):
        """Check ranges."""
        leasts = {"least_samples": 2, "orders": 2, "subsets": 2, "least_models": 4, "resamples": 20}
        for name, least in leasts.items():
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected {least} or more")
        if self.equal_samples is not None and self.equal_samples < 2:
            raise ConfigError(f"equal_samples is {self.equal_samples}, expected 2 or more")
        if not 0 < self.confidence < 1:
            raise ConfigError(f"confidence is {self.confidence}, expected a number between 0 and 1")


@dataclass(frozen=True, eq=False)
class BenchmarkComparison:
    """B benchmarks at one layer; matrices are in the order of `footprints`.

    Attributes:
        layer: 0-based layer.
        footprints: A footprint for each benchmark.
        sampled: R-hat by sampling and its standard error, for each.
        equal_samples: Samples that benchmarks are cut down to where sizes must be equal.
        overlap: overlap(i, j), the share of i that j covers.
        overlap_min: Shared features over the smaller footprint.
        equal_overlap_min: The same for equal sizes.
        clustering: A tree over benchmarks.
        performance: R of those benchmarks of which per-sample answers were given.
        similarity: How alike models score; None without scores.
        partial: The same without the control's share; None without a control.
        correlations: How footprints agree with scores: what is correlated -> kind -> coefficient with interval.
        suite: What to do.
    """

    layer: int
    footprints: tuple[Footprint, ...]
    sampled: tuple[tuple[float, float], ...]
    equal_samples: int
    overlap: Float[np.ndarray, "B B"]
    overlap_min: Float[np.ndarray, "B B"]
    equal_overlap_min: Float[np.ndarray, "B B"]
    clustering: Clustering
    performance: Mapping[str, PerformanceRedundancy]
    similarity: Similarity | None
    partial: Similarity | None
    correlations: Mapping[str, Mapping[Kind, Correlation]]
    suite: Suite

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the benchmarks."""
        return tuple(one.name for one in self.footprints)

    def summary(self) -> dict[str, Any]:
        """All of it as plain values; coverage curves are thinned out."""
        found: dict[str, Any] = {
            "layer": self.layer,
            "benchmarks": {one.name: self._benchmark(i) for i, one in enumerate(self.footprints)},
            "equal_samples": self.equal_samples,
            "names": self.names,
            "overlap": self.overlap,
            "overlap_min": self.overlap_min,
            "equal_overlap_min": self.equal_overlap_min,
            "clustering": {"joins": self.clustering.joins, "order": [self.names[i] for i in self.clustering.order]},
        }
        for name, similarity in (("similarity", self.similarity), ("partial_similarity", self.partial)):
            if similarity is not None:
                found[name] = {"values": similarity.values, "models": similarity.models, "control": similarity.control}
        correlations = {name: {kind: asdict(one) for kind, one in kinds.items()} for name, kinds in self.correlations.items()}
        return found | {"correlations": correlations, "advice": asdict(self.suite)}

    def _benchmark(self, i: int) -> dict[str, Any]:
        one, sizes = self.footprints[i], curve_sizes(self.footprints[i].samples)
        found = {
            "samples": one.samples,
            "silent_samples": one.silent,
            "features": one.size,
            "coverage": {"samples": sizes, "share": one.coverage[sizes - 1]},
            "coverage_area": one.area,
            "redundancy": one.redundancy,
            "redundancy_sampled": {"mean": self.sampled[i][0], "error": self.sampled[i][1]},
            "redundancy_equal": one.redundancy_at(self.equal_samples),
        }
        if one.name in self.performance:
            measured = self.performance[one.name]
            found["performance_redundancy"] = {
                "value": measured.value, "error": measured.error, "models": measured.models, "exact": measured.exact,
                "samples": measured.sizes, "tau": measured.taus,
            }  # fmt: skip
        return found


def compare_benchmarks(
    codes: Mapping[str, csr_array],
    layer: int,
    *,
    scores: ScoreTable | None = None,
    correct: Mapping[str, Bool[np.ndarray, "_ _"]] | None = None,
    control: str | None = None,
    config: ComparisonConfig | None = None,
) -> BenchmarkComparison:
    """Compare benchmarks.

    Args:
        codes: For each benchmark the codes of its samples' last tokens [N, F], as `TextFeatures.last`.
        layer: The layer they are of.
        scores: What models scored on the benchmarks.
        correct: For some benchmarks which samples each model got right [M, N].
        control: Benchmark in `scores`, not necessarily one of those compared, whose scores are taken out of the others.
        config: How.

    Raises:
        InputError: fewer than two benchmarks, one of too few samples or without a feature, scores that are missing or of too few models.
    """
    config = config or ComparisonConfig()
    check_comparison({name: typing.cast(tuple[int, int], last.shape)[0] for name, last in codes.items()}, config, scores, correct or {}, control)
    footprints = tuple(footprint(name, last) for name, last in codes.items())
    equal = config.equal_samples or min(one.samples for one in footprints)
    performance = {
        name: performance_redundancy(answers, subsets=config.subsets, least_models=config.least_models, seed=config.seed)
        for name, answers in (correct or {}).items()
        if name in codes
    }
    similarity = score_similarity(scores, list(codes), least_models=config.least_models) if scores else None
    partial = score_similarity(scores, list(codes), control=control, least_models=config.least_models) if scores and control else None
    overlap_min, equal_overlap_min = overlap_min_matrix(footprints), equal_overlap_min_matrix(footprints, equal)
    return BenchmarkComparison(
        layer,
        footprints,
        tuple(sampled_redundancy(last, orders=config.orders, seed=config.seed) for last in codes.values()),
        equal,
        overlap_matrix(footprints),
        overlap_min,
        equal_overlap_min,
        cluster(overlap_min),
        performance,
        similarity,
        partial,
        _redundancy_correlations(footprints, equal, performance, config)
        | _overlap_correlations({"overlap_min": overlap_min, "overlap_min at equal sizes": equal_overlap_min}, similarity, partial, config),
        advise(footprints, similarity, config.advice),
    )


def check_comparison(
    samples: Mapping[str, int],
    config: ComparisonConfig,
    scores: ScoreTable | None,
    correct: Mapping[str, Bool[np.ndarray, "_ _"]],
    control: str | None,
) -> None:
    """Find out before a model reads anything whether benchmarks can be compared.

    Args:
        samples: Benchmark -> number of its samples.
        config: As of `compare_benchmarks`.
        scores: Likewise.
        correct: Likewise.
        control: Likewise.

    Raises:
        InputError: they cannot; see `compare_benchmarks`.
    """
    if len(samples) < 2:
        raise InputError(f"{len(samples)} benchmark given ({', '.join(samples) or 'none'}); a comparison needs 2 or more")
    for name, count in samples.items():
        if count < config.least_samples:
            raise InputError(
                f"benchmark {name} has {count} samples, expected {config.least_samples} or more: redundancy is a mean over subsets of all sizes "
                "and says little over so few; add samples, leave it out or lower least_samples"
            )
        if config.equal_samples is not None and count < config.equal_samples:
            raise InputError(f"benchmark {name} has {count} samples, fewer than the {config.equal_samples} of equal_samples; lower it")
        if name in correct and len(correct[name]) < config.least_models:
            raise InputError(f"benchmark {name} was answered by {len(correct[name])} models; a ranking needs {config.least_models} or more")
    if scores is not None:
        score_similarity(scores, list(samples), control=control, least_models=config.least_models)
    elif control is not None:
        raise InputError(f"control {control} was given without scores; give the scores of models too")


def curve_sizes(samples: int) -> np.ndarray:
    """Numbers of samples at which a curve is written: few of the large ones, where it is flat."""
    return np.unique(np.round(np.geomspace(1, samples, CURVE_POINTS)).astype(np.int64))


def _redundancy_correlations(
    footprints: tuple[Footprint, ...], equal: int, performance: Mapping[str, PerformanceRedundancy], config: ComparisonConfig
) -> dict[str, Mapping[Kind, Correlation]]:
    there = [one for one in footprints if one.name in performance and np.isfinite(performance[one.name].value)]
    if len(there) < FEWEST_POINTS:
        return {}
    measured = np.array([performance[one.name].value for one in there])
    # Both R-hat and R grow with the number of samples, whose own correlation is the one to beat.
    by = {
        "R-hat": [one.redundancy for one in there],
        "R-hat at equal sizes": [one.redundancy_at(equal) for one in there],
        "samples": [one.samples for one in there],
    }
    return {f"{name} and R": correlate(np.array(values, np.float64), measured, **_draws(config)) for name, values in by.items()}


def _overlap_correlations(
    overlaps: Mapping[str, np.ndarray], similarity: Similarity | None, partial: Similarity | None, config: ComparisonConfig
) -> dict[str, Mapping[Kind, Correlation]]:
    found: dict[str, Mapping[Kind, Correlation]] = {}
    over = "pairs" if config.resample == "pairs" else "items"
    for name, scores in (("similarity", similarity), ("partial similarity", partial)):
        if scores is not None and np.isfinite(scores.values[np.triu_indices(len(scores.values), 1)]).sum() >= FEWEST_POINTS:
            for overlap, matrix in overlaps.items():
                found[f"{overlap} and {name}"] = correlate_pairs(matrix, scores.values, over=over, **_draws(config))
    return found


def _draws(config: ComparisonConfig) -> dict[str, Any]:
    return {"resamples": config.resamples, "confidence": config.confidence, "seed": config.seed}
