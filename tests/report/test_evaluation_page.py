# pyright: reportAttributeAccessIssue=false
import json
import math
import re

import numpy as np
import pytest

from qscope_jax.report.evaluation_page import MOST_LINES, layer_figure, write_evaluation_page
from qscope_jax.sae.probing import Probe, ProbingResult


def metrics(layer: int, *, splice=True, densities=True, geometry=True) -> dict:
    """What an evaluation says of a layer, in numbers that tell it from others."""
    found = {"tokens": 1000.0, "tokens_all": 1100.0, "first_tokens": 90, "outlier_tokens": 10, "damaged_tokens": 3, "fvu": 0.1 + layer / 1000,
             "fvu_all": 0.6 + layer / 1000, "l0": 50.0, "cossim": 0.9, "dead_fraction": 0.02, "dense_fraction": 0.01,
             "dense_fraction_1_percent": 0.03, "explained_variance": 0.9, "explained_variance_legacy": math.nan}  # fmt: skip
    if splice:
        found |= {"ce_loss_score": 0.95, "ce_loss_score_mean_ablation": 0.9, "kl_div_score": 0.85, "ce_clean": 2.0, "ce_sae": 2.1}
    if densities:
        found["density_histogram"] = {"edges": np.arange(-7, 0.5, 0.5), "counts": np.array([0] * 6 + [10, 60, 20] + [0] * 5), "silent": 10}
    return found | ({"decoder_max_cosine": 0.31, "decoder_norm_max": 1.5} if geometry else {})


def figures(document: str) -> dict[str, dict]:
    """{title: figure} of the page."""
    found = [json.loads(text) for text in re.findall(r'<script type="application/json" id="figure-\d+">(.*?)</script>', document, re.S)]
    return {figure["layout"]["title"]["text"]: figure for figure in found}


def result(layer: int) -> ProbingResult:
    kinds = [("sae", 1, (7,)), ("sae", 2, (7, 4)), ("residual", 1, (3,)), ("dense", 32, ())]
    probes = tuple(Probe(label, source, k, 0.5 + k / 100, 0.4, columns, source != "dense") for label in ("<a>", "b") for source, k, columns in kinds)
    return ProbingResult(layer, probes, {"<a>": 0.75, "b": 0.75}, 80, 20, 4, 2, 0)


@pytest.fixture
def written(tmp_path):
    def write(layers, **more) -> str:
        return write_evaluation_page(tmp_path / "page.html", layers, **more).read_text(encoding="utf-8")

    return write


def test_fvu_is_drawn_with_and_without_outliers_and_beside_it_what_the_model_loses(written):
    drawn = figures(written({3: metrics(3), 5: metrics(5)}))
    fvu = {trace["name"]: trace["y"] for trace in drawn["FVU by layer"]["data"]}
    assert fvu == {"ordinary tokens": pytest.approx([0.103, 0.105]), "all tokens": pytest.approx([0.603, 0.605])}
    assert {trace["name"]: trace["y"][0] for trace in drawn["Scores by layer"]["data"]} == {"CE score": 0.95, "CE score, mean": 0.9, "KL score": 0.85}
    assert drawn["FVU by layer"]["layout"]["xaxis"]["ticktext"] == ["3", "5"]


def test_tables_state_how_many_tokens_count(written):
    document = written({3: metrics(3)}, subtitle="a model, some texts")
    assert "a model, some texts" in document and "1,100" in document and ">90<" in document and "not finite, left out" in document
    assert "Directions" in document and ">1.5<" in document


def test_what_was_not_measured_has_no_section(written):
    document = written({3: metrics(3, splice=False, densities=False, geometry=False)})
    assert list(figures(document)) == ["FVU by layer"]
    assert not [name for name in ("Directions", "Sparse probing", "Feature density", "what the SAE rebuilt") if name in document]


def test_metrics_read_back_from_a_file_make_the_same_page(written):
    from qscope_jax.data.files import plain

    layers = {3: metrics(3), 5: metrics(5)}
    assert written(json.loads(json.dumps(plain(layers)))) == written(layers)


def test_densities_are_shares_of_all_features_over_the_bins_in_use(written):
    (trace,) = figures(written({3: metrics(3)}))["Features by firing rate"]["data"]
    assert trace["x"] == [-4.25, -3.75, -3.25, -2.75, -2.25] and trace["y"] == [0, 0.1, 0.6, 0.2, 0]
    nothing = metrics(3) | {"density_histogram": {"edges": np.arange(-7, 0.5, 0.5), "counts": np.zeros(14, int), "silent": 100}}
    assert set(figures(written({3: nothing}))["Features by firing rate"]["data"][0]["y"]) == {0}


def test_probes_are_drawn_by_source_and_listed_by_class(written):
    document = written({3: metrics(3)}, probing={3: result(3), 4: result(4)})
    accuracy = {trace["name"]: trace["y"] for trace in figures(document)["Accuracy, mean over classes"]["data"]}
    assert list(accuracy) == ["SAE 1", "SAE 2", "residual 1", "dense"]
    assert [values[1] for values in accuracy.values()] == pytest.approx([0.51, 0.52, 0.51, 0.82])
    assert "F1, mean over classes" in figures(document)
    assert "20 texts held out of 100; 4 repeated texts and 2 with several classes" in document and "4 fits did not end" in document
    assert document.count("&lt;a&gt;") == 2 and document.count(">7, 4<") == 4


def test_few_layers_are_curves_and_many_a_heat_map():
    few = layer_figure(range(MOST_LINES), [1, 2], [[i, i + 1] for i in range(MOST_LINES)], title="t", x_title="x", value="v")
    many = layer_figure(range(MOST_LINES + 1), [1, 2], [[i, 10**i] for i in range(MOST_LINES + 1)], title="t", x_title="x", value="v", log=True)
    assert [trace.type for trace in few.data] == ["scatter"] * MOST_LINES and few.data[1].name == "layer 1"
    assert [trace.type for trace in many.data] == ["heatmap"]
    assert math.isnan(many.data[0].z[0][0]) and many.data[0].z[3][1] == 3 and many.data[0].colorbar.title.text == "log10 v"
