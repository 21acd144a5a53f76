import numpy as np
import pytest
from scipy.sparse import csr_array

from qscope_jax.errors import ConfigError, InputError
from qscope_jax.features.benchmarks.benchmark_advice import AdviceConfig, advise
from qscope_jax.features.benchmarks.benchmark_footprint import footprint
from qscope_jax.features.benchmarks.benchmark_performance import Similarity


def planted(name: str, features, samples: int = 4):
    """A benchmark whose every sample fires all these features."""
    dense = np.zeros((samples, 64), np.float32)
    dense[:, list(features)] = 1
    return footprint(name, csr_array(dense))


LARGE, INSIDE, BESIDE, OTHER = (
    planted("large", range(40), 8),
    planted("inside", range(10, 20)),
    planted("beside", range(20, 48)),
    planted("other", [60]),
)
ALL = [INSIDE, OTHER, LARGE, BESIDE]


def similarity(**pairs: float) -> Similarity:
    names = [one.name for one in ALL]
    values = np.full((4, 4), 0.95)
    for pair, value in pairs.items():
        i, j = (names.index(name) for name in pair.split("_"))
        values[i, j] = values[j, i] = value
    return Similarity(tuple(names), values, np.full((4, 4), 7))


def actions(suite) -> dict[str, tuple[str, str | None]]:
    return {one.benchmark: (one.action, one.partner) for one in suite.advice}


def test_what_is_covered_is_dropped_what_overlaps_is_merged_and_the_rest_is_kept():
    suite = advise(ALL)
    assert actions(suite) == {"large": ("keep", None), "beside": ("merge", "large"), "other": ("keep", "large"), "inside": ("drop", "large")}
    assert [one.benchmark for one in suite.advice] == ["large", "beside", "other", "inside"]
    assert [one.adds for one in suite.advice] == [40, 8, 1, 0]
    assert suite.names("keep") == ["large", "other"] and suite.features == 49
    assert suite.kept_share == pytest.approx(41 / 49) and suite.merged_share == 1 and (suite.samples, suite.kept_samples) == (20, 12)


def test_reasons_give_the_numbers():
    reasons = {one.benchmark: "; ".join(one.reasons) for one in advise(ALL, similarity()).advice}
    assert "has the largest footprint, 40 features, 82% of what all benchmarks light up" in reasons["large"]
    assert "100% of its 10 features are in benchmarks kept or merged before it, 100% in large alone" in reasons["inside"]
    assert (
        "adds 8 features to those kept or merged before it, 29% of its own; overlap_min with large is 0.71 (0.71 for 4 samples of each)"
        in reasons["beside"]
    )
    assert (
        "scores of 7 models on both correlate at 0.95" in reasons["beside"] and "1 of its 4 samples cover 90% of its footprint" in reasons["beside"]
    )
    assert "no scores were given" in "; ".join(advise(ALL).advice[1].reasons)


def test_benchmarks_on_which_models_score_differently_are_kept():
    suite = advise(ALL, similarity(inside_large=0.3, large_beside=0.5))
    assert suite.names("keep") == ["large", "beside", "other", "inside"]
    reasons = {one.benchmark: "; ".join(one.reasons) for one in suite.advice}
    assert "scores of 7 models on both differ, they correlate at 0.30, below 0.8" in reasons["inside"]


def test_thresholds_decide():
    assert advise(ALL, config=AdviceConfig(merge_overlap=0.8)).names("merge") == []
    assert advise(ALL, config=AdviceConfig(drop_covered=0.7)).names("drop") == ["beside", "inside"]
    assert advise(ALL, similarity(large_beside=0.5), AdviceConfig(similar=0.4)).names("merge") == ["beside"]


def test_of_two_copies_one_is_dropped():
    suite = advise([planted("a", range(9)), planted("b", range(9))])
    assert actions(suite) == {"a": ("keep", None), "b": ("drop", "a")}


def test_bad_requests_are_refused():
    with pytest.raises(InputError, match="1 benchmark given; advice compares 2 or more"):
        advise([LARGE])
    with pytest.raises(InputError, match="similarity is of inside, other, large, beside; expected the benchmarks compared, large, beside"):
        advise([LARGE, BESIDE], similarity())
    with pytest.raises(ConfigError, match="similar is 1.5, expected a number above 0 and at most 1"):
        AdviceConfig(similar=1.5)
