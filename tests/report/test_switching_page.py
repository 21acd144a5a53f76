import json
import math
import re

import numpy as np
import pytest

from qscope_jax.features.choices import ChoiceAccuracy
from qscope_jax.features.classify.classification_scores import Interval
from qscope_jax.features.switching.code_switching import RatioChange, Response, SwitchRatio
from qscope_jax.features.switching.switch_ablation import DoseCurves
from qscope_jax.features.switching.switch_traces import Curve, Trace
from qscope_jax.report.switching_page import SwitchExample, write_choices_page, write_doses_page, write_ratios_page, write_traces_page

ROWS = [SwitchRatio("all", "", 10, 80, 4, 0.05, 0.01, 0.12), SwitchRatio("language", "th", 5, 40, 4, 0.1, 0.02, 0.2),
        SwitchRatio("language", "ar", 5, 40, 0, 0.0, 0.0, 0.43), SwitchRatio("task", "<MGSM>", 10, 80, 4, 0.05, 0.01, 0.12)]  # fmt: skip


@pytest.fixture
def figures(tmp_path):
    """The text of a page, and the figures in it."""

    def read(path) -> tuple[str, list[dict]]:
        html = path.read_text(encoding="utf-8")
        found = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', html)
        return html.split("<main>")[1].split("</main>")[0], [json.loads(one) for one in found]

    return read


def test_ratios_have_bars_with_intervals_by_language_and_task(tmp_path, figures):
    text, found = figures(write_ratios_page(tmp_path / "p.html", {"before": ROWS, "after": ROWS}, script="Han"))
    assert [one["layout"]["title"]["text"] for one in found] == ["All answers", "By language of the prompt", "By task"]
    bars = found[1]["data"]
    assert [one["name"] for one in bars] == ["before", "after"] and bars[0]["y"] == [10, 0]
    np.testing.assert_allclose(bars[0]["error_y"]["array"], [10, 43])
    np.testing.assert_allclose(bars[0]["error_y"]["arrayminus"], [8, 0])
    assert "&lt;MGSM&gt;" in text and "(2.00 to 20.00)" in text


def test_changes_are_said_with_what_is_not_known(tmp_path, figures):
    changes = {
        "after": [RatioChange("all", "", 0.05, 0.02, -0.03, -0.06, -0.01, -0.6), RatioChange("language", "ar", 0.0, 0.0, 0.0, *[math.nan] * 3)]
    }
    text, _ = figures(write_ratios_page(tmp_path / "p.html", {"before": ROWS, "after": ROWS}, script="Han", changes=changes))
    assert "after beside before" in text and "-3.00" in text and "-6.00 to -1.00" in text and "-60 %" in text and "nan" not in text


def test_switched_characters_are_marked_and_shown_with_what_is_around_them(tmp_path, figures):
    response = Response(0, 2, "a" * 500 + " 你好 <b> " + "b" * 500, "th", "MGSM")
    text, _ = figures(
        write_ratios_page(tmp_path / "p.html", {"m": ROWS}, script="Han", examples={"m": [SwitchExample(response, "why?\n" + "x" * 200)]})
    )
    assert re.search(r'style="--v:1.000" title="[^"]*">你好</span>', text) and "&lt;b&gt;" in text and "a" * 300 not in text and "b" * 300 not in text
    assert "th, MGSM, answer 3 to: …" in text and text.count("--v:") == 1


def test_a_trace_is_drawn_where_answers_reach_with_bands(tmp_path, figures):
    mean, error = np.array([[np.nan], [1.0], [3.0]]), np.array([[np.nan], [np.nan], [0.5]])
    switched = Curve(mean, error, np.array([0, 1, 4]))
    baseline = Curve(mean - 1, error, np.array([0, 4, 4]))
    text, found = figures(write_traces_page(tmp_path / "p.html", {5: Trace(5, np.array([-1, 0, 1]), switched, baseline)}, {5: ["feature 7"]}))
    (figure,) = found
    by_name = {one["name"]: one for one in figure["data"] if "name" in one}
    assert by_name["switched"]["x"] == [0, 1] and by_name["switched"]["y"] == [1, 3] and by_name["not switched"]["y"] == [0, 2]
    low, high = (one["y"] for one in figure["data"][:2])
    np.testing.assert_allclose([low, high], [[1, 3 - 0.98], [1, 3 + 0.98]])
    assert "Layer 5, feature 7" in figure["layout"]["title"]["text"] and "+1" in text


def test_dose_curves_are_drawn_for_each_measure(tmp_path, figures):
    values = {"probability": {"own": np.array([[0.4, 0.6], [0.1, 0.1]]), "control": np.array([[0.4, 0.6], [0.4, 0.6]])}}
    curves = DoseCurves(27, (0.0, 2.0), 12.5, np.array([0, 1]), values)
    text, found = figures(write_doses_page(tmp_path / "p.html", curves, script="Han", unit="residual"))
    by_name = {one["name"]: one["y"] for one in found[0]["data"] if "name" in one}
    assert by_name == {"own": [0.5, 0.1], "control": [0.5, 0.5]} and "median norms" in found[0]["layout"]["xaxis"]["title"]["text"]
    assert "after layer 27" in text and "in 2 answers" in text and "12.5" in text


def test_accuracies_of_several_models_stand_side_by_side(tmp_path, figures):
    rows = [ChoiceAccuracy("", 10, 0.25, Interval(0.5, 0.2, 0.8), Interval(0.6, 0.3, 0.9))]
    text, found = figures(write_choices_page(tmp_path / "p.html", {"a": rows, "b": rows}))
    assert len(found) == 2 and [one["name"] for one in found[0]["data"]] == ["a", "b"] and found[1]["data"][0]["y"] == [0.6]
    assert "0.500 (0.200-0.800)" in text
