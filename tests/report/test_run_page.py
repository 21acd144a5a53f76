import json
import math
import re

import numpy as np
import pytest

from qscope_jax.errors import SourceError
from qscope_jax.report.run_page import read_run, write_run_page


def write_run(folder, lines, config="layers: [2, 5]\nmodel: some/model\nk: 4\nnote: <b>\n"):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    if config is not None:
        (folder / "config.yaml").write_text(config)
    return folder


def training(step, *fvu):
    return {"step": step, "loss": float(np.mean(fvu)), "fvu": list(fvu), "dead": [0.0] * len(fvu), "tag": "x"}


def figures(document: str) -> list[dict]:
    return [json.loads(text) for text in re.findall(r'<script type="application/json" id="figure-\d+">(.*?)</script>', document, re.S)]


@pytest.fixture
def folder(tmp_path):
    held_out = {"step": 40, "held_out": True, "fvu": [0.25, 0.35], "cossim": [0.9, None]}
    return write_run(tmp_path / "run", [training(20, 0.5, 0.7), training(40, 0.3, 0.4), held_out])


def test_a_run_is_read_by_metric_and_layer(folder):
    run = read_run(folder)
    assert run.layers == (2, 5) and run.config["k"] == 4
    assert run.training["fvu"].steps.tolist() == [20, 40] and run.training["fvu"].values.tolist() == [[0.5, 0.7], [0.3, 0.4]]
    assert not run.training["loss"].by_layer and "tag" not in run.training
    assert run.held_out["fvu"].values.tolist() == [[0.25, 0.35]] and math.isnan(run.held_out["cossim"].values[0, 1])


def test_a_page_draws_held_out_and_training_curves_of_every_layer(folder):
    path = write_run_page(folder)
    document = path.read_text(encoding="utf-8")
    assert path == folder / "page.html" and document.startswith("<!doctype html>") and "Training run run" in document
    drawn = figures(document)
    assert [figure["layout"]["title"]["text"] for figure in drawn] == ["FVU", "Cosine", "Loss", "FVU"]
    assert [(trace["name"], trace["y"]) for trace in drawn[3]["data"]] == [("layer 2", [0.5, 0.3]), ("layer 5", [0.7, 0.4])]
    assert drawn[0]["data"][0]["y"] == [0.25] and drawn[2]["data"][0]["x"] == [20, 40]
    assert "The same throughout: Dead features 0." in document and "40 steps, 2 layers, model some/model" in document
    assert "&lt;b&gt;" in document and "<b>" not in document


@pytest.mark.parametrize("layers", ["[2, 5]", "null"])
def test_saes_of_several_seeds_are_told_apart(tmp_path, layers):
    lines = [training(step, *(step + place for place in range(6))) for step in (1, 2)]
    held_out = {"step": 2, "held_out": True, "fvu": [0.25, 0.35]}
    folder = write_run(tmp_path / "run", [*lines, held_out], f"layers: {layers}\nnum_seeds: 3\nseed: 4\n")
    run = read_run(folder)
    first, second = run.layers
    assert (run.layers, run.seeds) == ((2, 5) if layers != "null" else (0, 1), (4, 5, 6))
    assert run.names(6) == [f"{layer}, seed {seed}" for layer in (first, second) for seed in (4, 5, 6)] and run.names(4) == ["0", "1", "2", "3"]
    drawn = figures(write_run_page(folder).read_text(encoding="utf-8"))
    assert [trace["name"] for trace in drawn[0]["data"]] == [f"layer {first}", f"layer {second}"]
    assert drawn[-1]["data"][4]["name"] == f"layer {second}, seed 5"


def test_an_evaluation_joins_the_curves_at_the_path_asked_for(folder, tmp_path):
    evaluation = {2: {"tokens": 10.0, "fvu": 0.2, "fvu_all": 0.3}, 5: {"tokens": 10.0, "fvu": 0.4, "fvu_all": 0.5}}
    path = write_run_page(folder, evaluation, path=tmp_path / "other.html")
    titles = [figure["layout"]["title"]["text"] for figure in figures(path.read_text(encoding="utf-8"))]
    assert path == tmp_path / "other.html" and titles[-1] == "FVU by layer" and not (folder / "page.html").exists()


def test_many_layers_are_a_heat_map_and_long_runs_are_thinned_to_means(tmp_path):
    lines = [training(step, *(step / (layer + 1) for layer in range(9))) for step in range(1, 1002)]
    drawn = figures(write_run_page(write_run(tmp_path / "run", lines, "layers: null\n")).read_text(encoding="utf-8"))
    loss, fvu = (next(figure for figure in drawn if figure["layout"]["title"]["text"] == title)["data"] for title in ("Loss", "FVU"))
    assert len(fvu) == 1 and fvu[0]["type"] == "heatmap" and len(fvu[0]["z"]) == 9 and len(fvu[0]["z"][0]) == 100
    # 1,001 steps in 100 groups: the first has eleven, of which the mean is 6, and the last ends at the last step.
    assert fvu[0]["z"][0][0] == pytest.approx(math.log10(6)) and fvu[0]["customdata"][8][-1] == "8, 1001"
    assert len(loss[0]["x"]) == 400 and loss[0]["x"][-1] == 1001


def test_what_spans_decades_is_drawn_on_a_logarithmic_axis(tmp_path):
    axes = []
    for first in (1.0, 10.0, -10.0):
        folder = write_run(tmp_path / "run", [{"step": 1, "loss": first}, {"step": 2, "loss": 0.9}])
        axes.append(figures(write_run_page(folder).read_text(encoding="utf-8"))[0]["layout"]["yaxis"]["type"])
    assert axes == ["linear", "log", "linear"]


def test_a_gap_is_where_a_metric_was_not_finite(tmp_path):
    lines = [{"step": step, "loss": None if step % 2 else 1.0 + step} for step in range(1, 5)]
    drawn = figures(write_run_page(write_run(tmp_path / "run", lines, None)).read_text(encoding="utf-8"))
    assert drawn[0]["data"][0]["y"] == [None, 3.0, None, 5.0]


def test_a_run_without_options_numbers_its_layers_and_its_last_line_may_be_unfinished(tmp_path):
    folder = write_run(tmp_path / "run", [training(20, 0.5, 0.7), training(40, 0.3, 0.4)], None)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 60, "lo')
    run = read_run(folder)
    assert run.layers == (0, 1) and run.config == {} and run.training["loss"].steps.tolist() == [20, 40]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no metrics yet"),
        ('{"ste\n{"step": 1}\n', "line 1: is not a line of metrics"),
        ('{"loss": 1}\n', "line 1: is not a line of metrics"),
        ("[1]\n", "line 1: is not a line of metrics"),
        ("\udcff", "not UTF-8"),
    ],
)
def test_damaged_metrics_are_refused(tmp_path, text, said):
    (tmp_path / "metrics.jsonl").write_text(text, errors="surrogateescape")
    with pytest.raises(SourceError, match=said):
        write_run_page(tmp_path)


def test_what_is_no_run_or_has_broken_options_is_refused(tmp_path, folder):
    with pytest.raises(SourceError, match="give the folder of a training run"):
        write_run_page(tmp_path)
    (folder / "config.yaml").write_text("a: [")
    with pytest.raises(SourceError, match="is not readable YAML"):
        write_run_page(folder)
