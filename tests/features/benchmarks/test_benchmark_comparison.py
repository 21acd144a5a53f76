import json
import math

import numpy as np
import pytest
from scipy import stats
from scipy.sparse import csr_array

from qscope_jax.data.benchmark_scores import ScoreTable
from qscope_jax.data.files import plain
from qscope_jax.errors import ConfigError, InputError
from qscope_jax.features.benchmarks.benchmark_comparison import ComparisonConfig, compare_benchmarks

NAMES = ("sums", "products", "rhymes", "songs", "odd")
QUICK = ComparisonConfig(resamples=100, orders=20, subsets=20)


@pytest.fixture(scope="module")
def codes() -> dict[str, csr_array]:
    """Two families of two benchmarks that share features, and one by itself; the later ones fire more features, each rarely."""
    rng = np.random.default_rng(0)
    spans = {"sums": (0, 12), "products": (4, 18), "rhymes": (30, 60), "songs": (30, 70), "odd": (80, 120)}
    found = {}
    for index, (name, (first, last)) in enumerate(spans.items()):
        dense = np.zeros((30 + 5 * index, 128), np.float32)
        dense[:, first:last] = rng.random((len(dense), last - first)) < 4 / (last - first)
        found[name] = csr_array(dense)
    return found


@pytest.fixture(scope="module")
def scores() -> ScoreTable:
    """Ten models with a general ability and one for each family; the last column is the control."""
    rng = np.random.default_rng(1)
    general, numbers, words = rng.standard_normal((3, 10))
    columns = [general + numbers, general + numbers, general + words, general + words, general, general]
    return ScoreTable("scores", tuple(f"m{i}" for i in range(10)), (*NAMES, "mmlu"), np.stack(columns, 1) + 0.1 * rng.standard_normal((10, 6)))


@pytest.fixture(scope="module")
def correct(codes) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(2)
    return {name: rng.random((6, last.shape[0])) < np.linspace(0.2, 0.8, 6)[:, None] for name, last in codes.items()}


@pytest.fixture(scope="module")
def comparison(codes, scores, correct):
    return compare_benchmarks(codes, 3, scores=scores, correct=correct, control="mmlu", config=QUICK)


def test_families_overlap_stand_together_and_score_alike(comparison):
    i, j = (comparison.names.index(name) for name in ("rhymes", "songs"))
    assert comparison.overlap_min[i, j] > 0.9 and comparison.overlap_min[i, 0] == 0
    assert sorted(map(sorted, comparison.clustering.groups(0.9))) == [[0, 1], [2, 3], [4]]
    assert comparison.partial.values[i, j] > 0.9 > 0.5 > abs(comparison.partial.values[i, 0])
    assert comparison.correlations["overlap_min and partial similarity"]["spearman"].value > 0.5


def test_redundancy_is_set_against_that_of_performance(comparison):
    measured = [comparison.performance[name].value for name in NAMES]
    by_features = [one.redundancy for one in comparison.footprints]
    found = comparison.correlations["R-hat and R"]["spearman"]
    assert found.value == pytest.approx(stats.spearmanr(by_features, measured).statistic) and found.points == 5
    assert found.low <= found.value <= found.high
    for one, (mean, error) in zip(comparison.footprints, comparison.sampled, strict=True):
        assert abs(mean - one.redundancy) < 6 * error


def test_sizes_are_equal_where_they_must_be(comparison, codes):
    assert comparison.equal_samples == 30
    found = compare_benchmarks(codes, 3, config=ComparisonConfig(equal_samples=12, orders=2))
    assert found.equal_samples == 12 and found.similarity is None and not found.correlations
    with pytest.raises(InputError, match="benchmark sums has 30 samples, fewer than the 31 of equal_samples"):
        compare_benchmarks(codes, 3, config=ComparisonConfig(equal_samples=31))


def test_the_summary_is_plain_and_whole(comparison):
    found = json.loads(json.dumps(plain(comparison.summary())))
    assert found["names"] == list(NAMES) and found["layer"] == 3 and found["partial_similarity"]["control"] == "mmlu"
    sums = found["benchmarks"]["sums"]
    assert sums["samples"] == 30 and sums["coverage"]["samples"][-1] == 30 and sums["coverage"]["share"][-1] == pytest.approx(1)
    assert sums["performance_redundancy"]["models"] == 6 and len(found["overlap"]) == 5
    assert [one["action"] for one in found["advice"]["advice"]].count("keep") >= 3


def test_a_control_among_the_benchmarks_is_left_out_of_partial_pairs(codes, scores):
    found = compare_benchmarks(codes, 0, scores=scores, control="odd", config=QUICK)
    assert found.correlations["overlap_min and partial similarity"]["pearson"].points == 6
    assert found.correlations["overlap_min and similarity"]["pearson"].points == 10
    assert math.isnan(found.partial.values[4, 0])


def test_too_little_is_refused_with_the_least_and_why(codes, scores):
    with pytest.raises(InputError, match=r"1 benchmark given \(sums\); a comparison needs 2 or more"):
        compare_benchmarks({"sums": codes["sums"]}, 0)
    with pytest.raises(InputError, match="benchmark few has 9 samples, expected 10 or more: redundancy is a mean over subsets of all sizes"):
        compare_benchmarks({"few": codes["sums"][:9], "odd": codes["odd"]}, 0)
    with pytest.raises(InputError, match="benchmark quiet: none of the last tokens of its 20 samples fires a feature"):
        compare_benchmarks({"quiet": csr_array((20, 128), dtype=np.float32), "odd": codes["odd"]}, 0)
    with pytest.raises(InputError, match="control mmlu was given without scores"):
        compare_benchmarks(codes, 0, control="mmlu")
    with pytest.raises(InputError, match="has no scores of benchmark 'more'"):
        compare_benchmarks(codes | {"more": codes["odd"]}, 0, scores=scores)
    with pytest.raises(ConfigError, match="least_models is 3, expected 4 or more"):
        ComparisonConfig(least_models=3)
    with pytest.raises(ConfigError, match="confidence is 1.0, expected a number between 0 and 1"):
        ComparisonConfig(confidence=1.0)
