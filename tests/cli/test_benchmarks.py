import json
import math

import numpy as np
import pytest
from safetensors.numpy import save_file

from qscope_jax.data.files import write_json

WORDS = ("tea", "garden", "grandmother", "made", "in the", "茶", "花园")


@pytest.fixture(scope="module")
def pair(model, saes) -> list[str]:
    return ["--model", model, "--sae", saes, "--batch-size", "8"]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """Three benchmarks: prompts that end in different words, the first two in the same ones."""
    folder = tmp_path_factory.mktemp("benchmarks")
    ends = {"plain": WORDS[:4], "again": WORDS[:4], "other": WORDS[4:]}
    found = {}
    for name, words in ends.items():
        # All of about the same length, so that one program reads them.
        rows = [{"text": f"{name[:2]} {i:02} {words[i % len(words)]}"} for i in range(12 + len(words))]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        found[name] = f"{name}={folder / name}.jsonl"
    return found


@pytest.fixture(scope="module")
def panel(tmp_path_factory) -> list[str]:
    """Scores and answers of seven models."""
    folder = tmp_path_factory.mktemp("panel")
    rng = np.random.default_rng(0)
    ability = np.linspace(0.2, 0.9, 7)
    rows = [
        {"benchmark": name, "model": f"m{i}", "correct": (rng.random(size) < ability[i]).astype(int).tolist()}
        for name, size in (("plain", 16), ("again", 16), ("other", 15))
        for i in range(7)
    ]
    (folder / "correct.jsonl").write_text("\n".join(map(json.dumps, rows)))
    lines = [f"m{i},{a + 0.01 * i % 3},{a},{'' if i == 3 else 1 - a},{a + 0.1 * rng.random()}" for i, a in enumerate(ability)]
    (folder / "scores.csv").write_text("\n".join(["model,plain,again,other,general", *lines]))
    return ["--scores", str(folder / "scores.csv"), "--correct", str(folder / "correct.jsonl"), "--control", "general"]


def test_benchmarks_are_compared_at_every_layer_asked_for(qscope, pair, files, panel, tmp_path):
    out, page = tmp_path / "o.json", tmp_path / "p.html"
    arguments = ["--layers", "0,2", "--out", out, "--page", page, "--subsets", 20, "--resamples", 50, *panel]
    answer = qscope("benchmarks", *files.values(), *arguments, *pair)
    assert answer.status == 0 and not answer.err and "Those to keep cover" in answer.out and "R-hat and R" in answer.out
    saved = json.loads(out.read_text())
    assert list(saved["layers"]) == ["0", "2"] and saved["config"]["least_samples"] == 10
    for layer in saved["layers"].values():
        assert layer["names"] == ["plain", "again", "other"] and layer["equal_samples"] == 15
        assert layer["similarity"]["models"] == [[7, 7, 6], [7, 7, 6], [6, 6, 6]] and layer["partial_similarity"]["control"] == "general"
        assert {one["action"] for one in layer["advice"]["advice"]} <= {"keep", "merge", "drop"}
        assert layer["benchmarks"]["plain"]["performance_redundancy"]["models"] == 7
    assert "Layer 2" in page.read_text() and "Correlation with R by layer" in page.read_text()


def test_the_middle_layer_is_read_by_default_and_limits_are_kept(qscope, pair, files, tmp_path):
    arguments = ["--out", tmp_path / "o.json", "--limit", 11, "other=10"]
    assert qscope("benchmarks", *files.values(), *pair, *arguments).status == 0
    (layer, found), *rest = json.loads((tmp_path / "o.json").read_text())["layers"].items()
    assert layer == "1" and not rest
    assert [one["samples"] for one in found["benchmarks"].values()] == [11, 11, 10]


def test_prompts_that_benchmarks_share_are_told(qscope, pair, files, tmp_path):
    plain = files["plain"]
    assert qscope("benchmarks", plain, plain.replace("plain=", "copy="), *pair, "--out", tmp_path / "o.json").status == 0
    saved = json.loads((tmp_path / "o.json").read_text())
    assert saved["shared_prompts"] == [{"benchmarks": ["plain", "copy"], "prompts": 16}] and saved["repeated_prompts"] == {"plain": 0, "copy": 0}
    assert [one["action"] for one in saved["layers"]["1"]["advice"]["advice"]] == ["keep", "drop"]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> str:
    """A feature store of one shard: 24 texts of two benchmarks, whose last tokens fire features 0 to 7 and 4 to 11."""
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path_factory.mktemp("store")
    shard = folder / "shard000000"
    shard.mkdir()
    names = ["a", "b"] * 12
    columns = {"text": [f"text {i}" for i in range(24)], "tokens": [2] * 24, "kind": names}
    pyarrow.parquet.write_table(pyarrow.table(columns), shard / "texts.parquet")
    last = np.array([[i % 8 + 4 * (name == "b")] for i, name in enumerate(names)], np.int32)
    arrays = {
        "indptr": np.arange(25), "features": last[:, 0], "maxima": np.ones(24, np.float32), "counts": np.ones(24, np.int32),
        "last_values": np.ones((24, 1), np.float32), "last_indices": last, "counted_tokens": np.full(24, 2),
    }  # fmt: skip
    save_file(arrays, str(shard / "layer3.safetensors"))
    facts = {
        "format": "qscope_jax features", "format_version": 1, "model": "m", "sae": "s", "layers": [3], "num_features": {"3": 16}, "k": {"3": 1},
        "d_model": 4, "shard_texts": [24], "shard_tokens": [48], "columns": ["kind"], "codes": False, "streams": False,
    }  # fmt: skip
    write_json(folder / "manifest.json", facts)
    return str(folder)


def test_a_store_needs_no_model(qscope, store, tmp_path):
    assert qscope("benchmarks", "--store", store, "--column", "kind", "--out", tmp_path / "o.json").status == 0
    found = json.loads((tmp_path / "o.json").read_text())["layers"]["3"]
    assert [one["features"] for one in found["benchmarks"].values()] == [4, 4]
    assert found["names"] == ["a", "b"] and found["overlap"] == [[1, 0], [0, 1]]
    limited = qscope("benchmarks", "b", "a", "--store", store, "--column", "kind", "--limit", 10, "--out", tmp_path / "l.json")
    found = json.loads((tmp_path / "l.json").read_text())["layers"]["3"]
    assert limited.status == 0 and found["names"] == ["b", "a"] and found["benchmarks"]["a"]["samples"] == 10


def test_a_store_that_cannot_tell_benchmarks_apart_is_refused(refused, store):
    assert "has no column 'benchmark'; it has 'kind'" in refused("benchmarks", "--store", store)
    assert "column kind has no benchmark 'c'; it has 'a', 'b'" in refused("benchmarks", "a", "c", "--store", store, "--column", "kind")
    assert "has no layer 4; it has layers 3" in refused("benchmarks", "--store", store, "--column", "kind", "--layers", 4)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "no benchmark given; give two or more as NAME=FILE, or --store, or tiny"),
        (["plain"], "1 benchmark given (plain); a comparison needs 2 or more"),
        (["plain", "plain"], "benchmark 'plain' is given twice"),
        (["plain", "none=none.jsonl"], "none.jsonl: no such file"),
        (["plain", "none"], "benchmark 'none' needs a source"),
        (["plain", "other", "--text-column", "prompt"], "has no column 'prompt'; the columns there are 'text'"),
        (["plain", "other", "--least-samples", 16], "benchmark other has 15 samples, expected 16 or more: redundancy is a mean over subsets"),
        (["plain", "other", "--limit", "more=3"], "limit is 'more=3', expected a number of prompts such as 500, or NAME=500 for one of plain, other"),
        (["plain", "other", "--layers", 9], "layer 9 is out of range"),
        (["plain", "other", "--control", "general"], "control general was given without scores"),
        (["plain", "other", "--similar", 2], "similar is 2.0, expected a number above 0"),
        (["plain", "other", "--out", "."], "is a folder"),
    ],
)
def test_bad_requests_are_refused(refused, pair, files, arguments, said):
    assert said in refused("benchmarks", *(files.get(argument, argument) for argument in arguments), *pair)


def test_scores_and_answers_that_do_not_fit_are_refused(refused, pair, files, tmp_path):
    (tmp_path / "s.csv").write_text("model,plain,other\n" + "\n".join(f"m{i},{i},{'' if i > 3 else i}" for i in range(7)))
    given = [files["plain"], files["other"], *pair]
    assert "4 of 7 models have a score on plain and other" in refused("benchmarks", *given, "--scores", tmp_path / "s.csv")
    assert "has no scores of benchmark 'again'" in refused("benchmarks", files["again"], *given, "--scores", tmp_path / "s.csv")
    np.savez(tmp_path / "c.npz", plain=np.ones((7, 9)))
    assert "models answered 9 samples of benchmark plain; expected its 16 rows" in refused("benchmarks", *given, "--correct", tmp_path / "c.npz")
    np.savez(tmp_path / "few.npz", plain=np.ones((4, 16)))
    assert "plain was answered by 4 models; a ranking needs 5" in refused("benchmarks", *given, "--correct", tmp_path / "few.npz")
    np.savez(tmp_path / "none.npz", nothing=np.ones((4, 16)))
    assert "answers none of the benchmarks given; it has 'nothing'" in refused("benchmarks", *given, "--correct", tmp_path / "none.npz")


def test_answers_alone_give_scores_too(qscope, pair, files, panel, tmp_path):
    assert qscope("benchmarks", *files.values(), *pair, *panel[2:4], "--subsets", 5, "--resamples", 50, "--out", tmp_path / "o.json").status == 0
    found = json.loads((tmp_path / "o.json").read_text())["layers"]["1"]
    assert np.array(found["similarity"]["models"]).min() == 7 and math.isfinite(found["similarity"]["values"][0][1])


def test_tiny_is_the_embedded_models_tasks_and_what_its_checkpoints_answered(qscope, pair, monkeypatch, tmp_path):
    tasks = pytest.importorskip("qscope_jax.demo.tasks").tasks()
    scores = pytest.importorskip("qscope_jax.demo.task_scores")
    steps = np.arange(6)
    correct = {task.name: np.random.default_rng(0).random((6, len(task.samples))) < steps[:, None] / 6 for task in tasks}
    monkeypatch.setattr(scores, "read_scores", lambda path: scores.CheckpointScores(steps, steps * 1.0, correct))
    arguments = ["--subsets", 3, "--resamples", 20, "--limit", 12, "--out", tmp_path / "o.json"]
    assert qscope("benchmarks", "tiny", *pair, *arguments).status == 0
    found = json.loads((tmp_path / "o.json").read_text())["layers"]["1"]
    assert found["names"] == [task.name for task in tasks] and found["correlations"]["R-hat and R"]["spearman"]["points"] == len(tasks)
    assert {one["samples"] for one in found["benchmarks"].values()} == {12}
