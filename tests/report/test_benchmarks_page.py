import json
import re

import numpy as np
import pytest
from scipy.sparse import csr_array

from qscope_jax.data.benchmark_scores import ScoreTable
from qscope_jax.features.benchmarks.benchmark_comparison import ComparisonConfig, compare_benchmarks
from qscope_jax.report.benchmark_figures import tree
from qscope_jax.report.benchmarks_page import correlation_rows, write_benchmarks_page

NAMES = ("a<b>", "left", "right", "far")


@pytest.fixture(scope="module")
def comparison():
    rng = np.random.default_rng(0)
    codes = {}
    for index, name in enumerate(NAMES):
        dense = np.zeros((12 + index, 64), np.float32)
        first = 40 if name == "far" else 6 * index
        dense[:, first : first + 18] = rng.random((len(dense), 18)) < 0.3
        codes[name] = csr_array(dense)
    scores = ScoreTable("scores", tuple(f"m{i}" for i in range(8)), (*NAMES, "mmlu"), rng.random((8, 5)))
    correct = {name: rng.random((6, codes[name].shape[0])) < np.linspace(0.2, 0.8, 6)[:, None] for name in NAMES}
    return compare_benchmarks(codes, 5, scores=scores, correct=correct, control="mmlu", config=ComparisonConfig(resamples=50, orders=5, subsets=5))


def figures(document: str) -> dict[str, dict]:
    """{title: figure} of the page."""
    found = [json.loads(text) for text in re.findall(r'<script type="application/json" id="figure-\d+">(.*?)</script>', document, re.S)]
    return {figure["layout"]["title"]["text"]: figure for figure in found}


def test_a_page_shows_advice_matrices_curves_and_agreement(comparison, tmp_path):
    document = write_benchmarks_page(tmp_path / "p.html", {5: comparison}, subtitle="model, SAEs", shared={("left", "right"): 3}).read_text()
    assert "model, SAEs" in document and "Prompts in common" in document and "a<b>" not in document and "has the largest footprint" in document
    drawn = figures(document)
    heat = drawn["overlap_min: shared features over the smaller footprint"]
    order = [comparison.names[i] for i in comparison.clustering.order]
    assert heat["layout"]["xaxis"]["ticktext"] == [name.replace("<", "&lt;").replace(">", "&gt;") for name in order]
    cells = comparison.overlap_min[np.ix_(comparison.clustering.order, comparison.clustering.order)]
    np.testing.assert_allclose(heat["data"][0]["z"], cells)
    curve = {trace["name"]: trace["y"] for trace in drawn["Coverage curves"]["data"]}["left"]
    assert [value for value in curve if value is not None][-1] == pytest.approx(1)
    points = drawn["Redundancy by features and by performance"]["data"][0]
    assert points["x"] == pytest.approx([one.redundancy for one in comparison.footprints]) and len(points["y"]) == 4
    assert len(drawn["Overlap and similarity of pairs"]["data"][0]["x"]) == 6
    assert {"Similarity: correlation of scores over models", "Similarity given mmlu", "Clusters by 1 - overlap_min"} <= set(drawn)


def test_several_layers_are_set_beside_each_other(comparison, tmp_path):
    document = write_benchmarks_page(tmp_path / "p.html", {5: comparison, 7: comparison}).read_text()
    assert "Correlation with R by layer" in figures(document) and "Prompts in common" not in document


def test_the_tree_names_its_leaves_in_the_order_of_the_heat_maps(comparison):
    drawn = tree(comparison.clustering.joins, comparison.names, title="t", x_title="d")
    assert list(drawn.layout.yaxis.ticktext) == [comparison.names[i].replace("<", "&lt;").replace(">", "&gt;") for i in comparison.clustering.order]
    assert len(drawn.data) == 3 and max(max(trace.x) for trace in drawn.data) == pytest.approx(comparison.clustering.joins[-1, 2])


def test_rows_of_agreement_are_complete(comparison):
    rows = correlation_rows(comparison)
    assert len(rows) == 3 * len(comparison.correlations) and len(comparison.correlations) == 7
    assert all(len(row) == 6 for row in rows)
