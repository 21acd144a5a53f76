import math

import numpy as np
import pytest
from scipy.cluster.hierarchy import linkage

from qscope_jax.errors import InputError
from qscope_jax.report.benchmark_figures import coverage_curves, named_curves, scatter, tree

LABELS = {"title": "t", "x_title": "x", "y_title": "y"}


def test_few_points_have_their_names_beside_them_and_many_when_they_are_pointed_at():
    for count, beside in ((40, True), (41, False)):
        names = [f"<{i}>" for i in range(count)]
        (points,) = scatter(names, range(count), np.arange(count)[::-1], **LABELS).to_dict()["data"]
        assert list(points["customdata"]) == [f"&lt;{i}&gt;" for i in range(count)]
        assert ("text" in points) is beside and ("text" in points["mode"]) is beside
        assert list(points["x"]) == list(range(count)) and points["y"][0] == count - 1


def test_points_and_names_that_differ_in_number_are_refused():
    with pytest.raises(InputError, match="1 names for 2 and 2 coordinates"):
        scatter(["a"], [1, 2], [3, 4], title="", x_title="", y_title="")


def test_leaves_that_join_first_stand_together_and_joins_at_their_distance():
    places = np.array([[0.0], [10.0], [0.5], [10.2]])
    drawn = tree(linkage(places, "single"), ["a", "b", "c", "d"], title="t", x_title="d").to_dict()
    ticks = list(drawn["layout"]["yaxis"]["ticktext"])
    assert {frozenset(ticks[:2]), frozenset(ticks[2:])} == {frozenset("ac"), frozenset("bd")}
    assert sorted(max(line["x"]) for line in drawn["data"]) == pytest.approx([0.2, 0.5, 9.5])


def test_a_benchmark_without_so_many_samples_has_no_point_there():
    drawn = coverage_curves({"short": ([1, 2], np.array([0.5, 1.0])), "long": ([1, 4], np.array([0.1, 0.2, 0.3, 0.4]))}).to_dict()["data"]
    curves = {line["name"]: list(line["y"]) for line in drawn}
    assert list(drawn[0]["x"]) == [1, 2, 4] and curves["long"] == [0.1, 0.2, 0.4]
    assert curves["short"][:2] == [0.5, 1.0] and math.isnan(curves["short"][2])


def test_more_curves_make_a_higher_figure():
    few, many = (named_curves([1, 2], {f"line {i}": [0.0, 1.0] for i in range(count)}, **LABELS).to_dict()["layout"] for count in (2, 30))
    assert few["height"] < many["height"]
