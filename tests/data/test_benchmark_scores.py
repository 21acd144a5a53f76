import json
import math

import numpy as np
import pytest

from qscope_jax.data.benchmark_files import Benchmark
from qscope_jax.data.benchmark_scores import Correctness, accuracy_table, answers_of, load_correctness, load_scores
from qscope_jax.errors import InputError, SourceError


def lines(path, *rows) -> str:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


def test_a_csv_and_json_lines_give_the_same_scores(tmp_path):
    (tmp_path / "s.csv").write_text("model,gsm8k,math\nsmall,0.25,\nlarge,0.5,0.125\n")
    rows = [{"model": "small", "gsm8k": 0.25}, {"model": "large", "gsm8k": 0.5, "math": 0.125}]
    for path in (tmp_path / "s.csv", lines(tmp_path / "s.jsonl", *rows)):
        found = load_scores(path)
        assert found.models == ("small", "large") and found.benchmarks == ("gsm8k", "math")
        np.testing.assert_array_equal(found.values, [[0.25, math.nan], [0.5, 0.125]])
    np.testing.assert_array_equal(found.columns(["math"]), [[math.nan], [0.125]])
    with pytest.raises(InputError, match="has no scores of benchmark 'mbpp'; it has 'gsm8k', 'math'"):
        found.columns(["math", "mbpp"])


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (["model,a", "x,good"], "row 0: column a holds 'good', expected a score; leave a missing one empty"),
        (["model,a", "x,1", "x,2"], "has two rows of model 'x'"),
        (["name,a", "x,1"], "has no column 'model'; the columns there are 'name', 'a'"),
        (["model", "x"], "has no column but 'model'"),
    ],
)
def test_bad_scores_are_refused(tmp_path, rows, said):
    (tmp_path / "s.csv").write_text("\n".join(rows))
    with pytest.raises(InputError, match=said):
        load_scores(tmp_path / "s.csv")


def test_correctness_comes_from_rows_or_arrays_and_gives_accuracies(tmp_path):
    rows = [{"benchmark": b, "model": m, "correct": c} for b, m, c in (("a", "x", [1, 0]), ("b", "y", [1, 1, 0]), ("a", "y", [True, True]))]
    found = load_correctness(lines(tmp_path / "c.jsonl", *rows))
    assert found["a"].models == ("x", "y") and found["a"].correct.tolist() == [[True, False], [True, True]]
    scores = accuracy_table(found)
    assert scores.models == ("x", "y") and scores.benchmarks == ("a", "b")
    np.testing.assert_allclose(scores.values, [[0.5, math.nan], [1, 2 / 3]])
    np.savez(tmp_path / "c.npz", a=found["a"].correct, models=np.array(["x", "y"]))
    arrays = load_correctness(tmp_path / "c.npz")
    assert arrays["a"].models == ("x", "y") and np.array_equal(arrays["a"].correct, found["a"].correct)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"benchmark": "a", "model": "x", "correct": [1, 2]}], "column correct holds something else than a list of 0 and 1"),
        ([{"benchmark": "a", "model": "x", "correct": "10"}], "column correct holds something else"),
        ([{"benchmark": "a", "model": "x"}], "has no column 'correct'"),
        ([{"benchmark": "a", "model": m, "correct": c} for m, c in (("x", [1]), ("y", [1, 0]))], "'x' answered 1 samples and 'y' 2"),
        ([{"benchmark": "a", "model": "x", "correct": [1]}] * 2, "has model 'x' on benchmark 'a' a second time"),
    ],
)
def test_bad_correctness_is_refused(tmp_path, rows, said):
    with pytest.raises(InputError, match=said):
        load_correctness(lines(tmp_path / "c.jsonl", *rows))


def test_bad_arrays_are_refused(tmp_path):
    (tmp_path / "no.npz").write_bytes(b"PK")
    with pytest.raises(SourceError, match="is not a .npz file of plain arrays"):
        load_correctness(tmp_path / "no.npz")
    np.savez(tmp_path / "flat.npz", a=np.ones(3))
    with pytest.raises(InputError, match=r"array 'a' of shape \[3\] is not one of models by samples"):
        load_correctness(tmp_path / "flat.npz")
    np.savez(tmp_path / "names.npz", a=np.ones((2, 3)), models=np.array(["x"]))
    with pytest.raises(InputError, match="has 2 rows and `models` 1 names"):
        load_correctness(tmp_path / "names.npz")


def test_answers_are_those_to_the_prompts_that_were_read():
    drawn = Benchmark("b", ("x", "y"), (1, 3), 4)
    whole = Correctness(("m",), np.array([[False, True, False, False]]))
    assert answers_of(drawn, whole).tolist() == [[True, False]]
    assert answers_of(drawn, Correctness(("m",), np.array([[False, True]]))).tolist() == [[False, True]]
    with pytest.raises(InputError, match="models answered 3 samples of benchmark b; expected its 4 rows or the 2 that were read"):
        answers_of(drawn, Correctness(("m",), np.ones((1, 3), bool)))
