import base64
import hashlib
import json
import re
from pathlib import Path

import pytest

from qscope_jax.errors import InputError, SourceError
from qscope_jax.features.explain.feature_card import Context
from qscope_jax.report.feature_site import BLOCK_FEATURES, holds_site, write_site
from tests.report.test_site_data import HOSTILE, card, handed_over


def read(folder: Path, name: str):
    found, value = handed_over((folder / "data" / f"{name}.js").read_text(encoding="utf-8"))
    assert found == name
    return value


def write(folder: Path, cards, **options) -> Path:
    return write_site(folder, cards, **{"title": "t", "token_text": lambda token: f" w{token}", **options})


def test_every_feature_is_in_the_index_and_in_the_block_of_its_place(tmp_path):
    features = list(range(3 * BLOCK_FEATURES + 5))[::-1]
    folder = write(tmp_path / "site", map(card, features))
    assert read(folder, "index0")["features"] == features
    assert [one["feature"] for number in range(4) for one in read(folder, f"block{number}")["cards"]] == features
    assert [len(read(folder, f"block{number}")["cards"]) for number in range(4)] == [BLOCK_FEATURES] * 3 + [5]


def test_the_index_has_what_the_list_shows(tmp_path):
    contexts = tuple(Context(0, 0, 0, (token,), (1.0,)) for token in (7, 8, 7, 9, 10, 11, 12))
    folder = write(tmp_path / "site", [card(4, top=contexts, density=0.0123456)])
    assert read(folder, "index0") == {
        "features": [4], "densities": [0.01235], "maxima": [2.5], "explanations": ["said"], "tokens": [["w7", "w8", "w9", "w10", "w11"]],
        "promoted": [["w11"]],
    }  # fmt: skip


def test_a_block_holds_all_of_a_card_and_each_token_once(tmp_path):
    block = read(write(tmp_path / "site", [card(4), card(5)]), "block0")
    assert block["tokens"] == [" w10", " w11", " w12"]
    context = {"text": 5, "start": 2, "peak": 1, "tokens": [0, 1, 2], "activations": [0, 2500, 123], "about": [["language", "en"]]}
    assert block["cards"][1] == {
        "feature": 5, "textRate": 0.5, "meanMaximum": 1.25, "histogram": [[0, 2.5, 7]], "groups": [["language", [["en", 9, 0.5, 0.01, 1]]]],
        "unit": 0.001, "top": [context], "quantiles": [[1, 2, 3, [context]]], "promoted": [[1, 0.5]], "suppressed": [[2, -0.5]],
        "neighbours": [[1, 0.9]], "cofiring": [[2, 0.1]], "scores": [["detection", 0.75]],
    }  # fmt: skip


def test_no_text_is_read_as_markup(tmp_path):
    documents = [
        (write(tmp_path / name, [card(0)], title=text, subtitle=text, about={text: text}) / "index.html").read_text(encoding="utf-8")
        for name, text in (("plain", "x"), ("hostile", HOSTILE))
    ]
    plain, hostile = (re.findall(r"<[a-z/!]", document) for document in documents)
    assert plain == hostile
    found = re.search(r'<script type="application/json" id="site">(.*?)</script>', documents[1], re.S)
    assert found is not None and json.loads(found[1])["about"] == [[HOSTILE.replace("\ud83d", "\ufffd")] * 2]


def test_only_its_own_program_and_style_may_act_and_nothing_else_be_fetched(tmp_path):
    document = (write(tmp_path / "site", [card(0)]) / "index.html").read_text(encoding="utf-8")
    style, script = (re.search(rf"<{tag}>(.*?)</{tag}>", document, re.S) for tag in ("style", "script"))
    assert style is not None and script is not None
    for text in (style[1], script[1]):
        assert f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" in document
        assert not re.search(
            r"innerHTML|insertAdjacent|document\.write|eval\(|fetch\(|XMLHttp|https?://(?!www\.w3\.org/2000/svg)|url\(|@import", text
        )
    assert "default-src 'none'; script-src 'sha256-" in document and "unsafe" not in document.split("<style>")[0]
    assert not re.search(r"\s(src|style|on\w+)=", re.sub(r"<(style|script)[ >].*?</\1>", "", document, flags=re.S))


def test_cards_are_taken_one_by_one_and_written_block_by_block(tmp_path):
    written = []

    def cards():
        for feature in range(2 * BLOCK_FEATURES + 1):
            written.append(len(list(tmp_path.glob(".site.*/data/block*.js"))))
            yield card(feature)

    write(tmp_path / "site", cards())
    assert written == [0] * BLOCK_FEATURES + [1] * BLOCK_FEATURES + [2]


def test_the_same_cards_make_the_same_bytes_and_others_another_version(tmp_path):
    first, again, other = (
        {path.name: path.read_bytes() for path in write(tmp_path / name, [card(feature)]).rglob("*.*")}
        for name, feature in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first == again
    assert json.loads(first["site.json"])["version"] != json.loads(other["site.json"])["version"]


def test_an_older_site_is_replaced_as_a_whole(tmp_path):
    write(tmp_path / "site", map(card, range(BLOCK_FEATURES + 1)))
    folder = write(tmp_path / "site", [card(9)])
    assert holds_site(folder) and sorted(path.name for path in (folder / "data").iterdir()) == ["block0.js", "index0.js"]
    assert [path.name for path in tmp_path.iterdir()] == ["site"]


def test_anything_else_in_the_way_is_refused_before_a_card_is_taken(tmp_path):
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("x")
    taken = iter([card(0)])
    for name, message in (("papers", "holds something else than a site"), ("file", "is a file")):
        with pytest.raises(SourceError, match=message):
            write(tmp_path / name, taken)
    assert list(taken) == [card(0)] and (tmp_path / "papers" / "thesis.tex").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    assert holds_site(write(tmp_path / "empty", [card(0)]))


def test_a_failure_leaves_the_older_site_and_nothing_else(tmp_path):
    folder = write(tmp_path / "site", [card(1)])
    before = (folder / "index.html").read_bytes()

    def failing():
        yield card(2)
        raise RuntimeError("the store is gone")

    with pytest.raises(RuntimeError, match="the store is gone"):
        write(folder, failing())
    assert (folder / "index.html").read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["site"]


@pytest.mark.parametrize(
    ("cards", "message"),
    [([], "at least one feature"), ([card(1), card(1)], "feature 1 of layer 3 came twice"), ([card(1), card(2, layer=4)], "layers 3 and 4")],
)
def test_cards_that_make_no_site_are_refused(tmp_path, cards, message):
    with pytest.raises(InputError, match=message):
        write(tmp_path / "site", cards)
    assert not list(tmp_path.iterdir())
