import json

import pytest


@pytest.fixture(scope="module")
def pair(model, saes) -> list[str]:
    return ["--model", model, "--sae", saes]


def test_a_file_and_a_text_are_compared(qscope, pair, tmp_path):
    (tmp_path / "a.txt").write_text("My grandmother made tea.\n\nIn the garden.\n")
    arguments = ["--by", "rate", "--top", 4, "--layers", "1-2", "--out", tmp_path / "o.json"]
    answer = qscope("compare", tmp_path / "a.txt", "奶奶在花园里泡茶。", *pair, *arguments)
    assert answer.status == 0 and not answer.err and "Largest differences by rate" in answer.out
    saved = json.loads((tmp_path / "o.json").read_text())
    assert saved["texts"] == [2, 1] and list(saved["layers"]) == ["1", "2"]
    for layer in saved["layers"].values():
        gaps = [abs(one["rate_a"] - one["rate_b"]) for one in layer["features"]]
        assert len(gaps) == 4 and gaps == sorted(gaps, reverse=True) and min(layer["counted_tokens"]) > 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tea in"], "B is missing"),
        (["", "tea in"], "a text is empty"),
        (["none.txt", "tea in"], "none.txt: no such file"),
        (["tea in", "the garden", "--layers", "9"], "layer 9 is out of range"),
        (["tea in", "the garden", "--by", "max"], "--by is 'max', expected mean or rate"),
        (["tea in", "the garden", "--out", "."], "is a folder"),
    ],
)
def test_bad_requests_are_refused(refused, pair, arguments, said):
    assert said in refused("compare", *arguments, *pair)
