import html
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from qscope_jax.errors import InputError, SourceError
from qscope_jax.report.figures import bars
from qscope_jax.report.page import Page

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\" onclick='x'"


class Reader(HTMLParser):
    """Elements with their attributes, and the text outside scripts and styles."""

    def __init__(self, document: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(document)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.elements and self.elements[-1][0] not in ("script", "style"):
            self.text += data

    def named(self, tag, **wanted):
        return [attrs for name, attrs in self.elements if name == tag and all(attrs.get(key.strip("_")) == value for key, value in wanted.items())]


def full_page(text: str) -> Page:
    page = Page(text, text).heading(text).heading(text, 3).text(text).table([text], [[text]], caption=text)
    page.tokens([text, "b"], [1.0, -1.0], label=text).completions([(text, text, text)]).verdict(text, text, text, True)
    figure = bars([text], [1.0], title=text, y=text)
    figure.update_layout(title_text=text)
    return page.figure(figure, caption=text)


def test_no_text_is_read_as_markup():
    plain, hostile = Reader(full_page(re.sub(r"\S", "x", HOSTILE)).html()), Reader(full_page(HOSTILE).html())
    assert [(tag, sorted(attrs)) for tag, attrs in plain.elements] == [(tag, sorted(attrs)) for tag, attrs in hostile.elements]
    assert hostile.text.count(HOSTILE) == 20


def test_nothing_is_fetched_and_only_the_pages_own_scripts_may_run():
    page = Reader(full_page("x").html())
    for tag, attrs in page.elements:
        assert "src" not in attrs and not (tag == "link" and attrs["href"] != "data:,")
        assert tag != "a" or attrs["href"].startswith("#")
    (policy,) = [attrs["content"] for attrs in page.named("meta") if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and policy.count("sha256-") == 2 and "unsafe-eval" not in policy
    document = full_page("x").html()
    style = document[document.index("<style>") : document.index("</style>")]
    assert "url(" not in style and "@import" not in style


def test_plotly_is_inlined_once_and_only_for_figures():
    figure = bars(["a"], [1.0], title="t", y="y")
    one, two, none = Page("t").figure(figure), Page("t").figure(figure).figure(figure), Page("t")
    assert len(none.html()) < 20_000 and "<script" not in none.html() and "script-src 'none'" in none.html()
    assert len(one.html()) > 1_000_000 and len(two.html()) - len(one.html()) < 20_000
    assert [attrs["data-figure"] for attrs in Reader(two.html()).named("div") if "data-figure" in attrs] == ["figure-1", "figure-2"]


def test_only_transparent_figures_take_the_pages_ink():
    import plotly.graph_objects as go

    page = Reader(Page("t").figure(bars(["a"], [1.0], title="t", y="y")).figure(go.Figure()).html())
    assert [attrs.get("class") for attrs in page.named("div") if "data-figure" in attrs] == ["neutral", None]


def test_token_backgrounds_follow_the_values():
    page = Reader(Page("t").tokens(["a", " b", "c", "d"], np.asarray([2, 1, -1, 0], np.float32)).html())
    spans = [attrs for attrs in page.named("span") if attrs["class"] in ("t", "t n")]
    assert [(span["class"], span.get("style")) for span in spans] == [("t", "--v:1.000"), ("t", "--v:0.500"), ("t n", "--v:0.500"), ("t", None)]
    assert [span["title"] for span in spans] == ['"a"  2', '" b"  1', '"c"  -1', '"d"  0']


def test_copied_tokens_are_the_text_and_invisible_parts_are_marked():
    document = Page("t").tokens(["Hi", " there\n", "\t", "\ufffd", "<0xE4>", "\x07"], [1, 0, 0, 0, 0, 0]).html()
    inside = re.search(r'<div class="tokens" dir="auto">(.*?)</div>', document, re.S)
    assert inside is not None
    assert html.unescape(re.sub("<[^>]*>", "", inside[1])) == "Hi there\n\t□□U+0007"
    for name, count in (("sp", 1), ("nl", 1), ("tab", 1), ("part", 2), ("code", 1)):
        assert inside[1].count(f'<i class="{name}">') == count


def test_no_token_breaks_the_direction_or_shaping_of_its_line():
    document = Page("t").tokens(["الص", "باح"], [1, 0]).html()
    assert "<span" in document and not [attrs for attrs in Reader(document).named("span") if "dir" in attrs]
    assert re.search(r"\.tokens \{[^}]*unicode-bidi: plaintext", document) and not re.search(r"\.t \{[^}]*(margin|padding:|padding-inline)", document)


def test_tables_align_numbers_and_set_off_rows_and_cells():
    rows = [["a", 1234, 0.5], ["b", None, 0.25]]
    page = Reader(Page("t").table(["name", "count", "share"], rows, highlight={1, (0, 2)}).html())
    assert [attrs.get("class") for attrs in page.named("td")] == [None, "right", "right marked", None, "right", "right"]
    assert [attrs.get("class") for attrs in page.named("tr")] == [None, None, "marked"]
    assert "1,234" in page.text and "0.50" in page.text and "–" in page.text
    centred = Reader(Page("t").table(["a", "b"], [[1, 2]], align=["center", "left"]).html())
    assert [attrs.get("class") for attrs in centred.named("td")] == ["center", None]


def test_verdicts_that_follow_each_other_share_a_table():
    page = Page("t").verdict("FVU", 0.1, "at most 0.2", True).verdict("success", 0.5, 0.9, np.bool_(False)).text("x").verdict("other", 1, 1, True)
    reader = Reader(page.html())
    assert len(reader.named("table", class_="verdicts")) == 2
    assert "1 of 2 targets met" in reader.text and "✓ pass" in reader.text and "✗ short" in reader.text
    assert len(reader.named("td", class_="pass")) == 2 and len(reader.named("td", class_="short")) == 1


def test_the_table_of_contents_links_to_every_section():
    page = Reader(Page("t").heading("one").heading("part", 3).heading("small", 4).heading("two").html())
    assert [attrs["href"] for attrs in page.named("a")] == ["#section-1", "#section-2", "#section-4"]
    assert {attrs["id"] for tag, attrs in page.elements if tag in ("h2", "h3", "h4")} == {f"section-{i}" for i in range(1, 5)}
    assert not Reader(Page("t").heading("one").html()).named("nav")


def test_empty_lines_part_paragraphs():
    assert len(Reader(Page("t").text("one\ntwo\n\nthree").html()).named("p")) == 2


def test_a_page_is_written_whole_even_with_broken_text(tmp_path):
    path = Page("t\ud800").text("中文 العربية").write(tmp_path / "folder" / "page.html")
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>") and text.endswith("</html>\n") and "中文 العربية" in text and "t\ufffd" in text
    assert [file.name for file in path.parent.iterdir()] == ["page.html"]
    (tmp_path / "file").write_text("")
    with pytest.raises(SourceError):
        Page("t").write(tmp_path / "file" / "page.html")


@pytest.mark.parametrize(
    ("add", "message"),
    [
        (lambda page: page.heading("x", 1), "level 1"),
        (lambda page: page.table(["a"], [[1, 2]]), "row 0.*2 cells"),
        (lambda page: page.table(["a"], [[1]], align=["left", "left"]), "2 alignments"),
        (lambda page: page.tokens(["a"], [1.0, 2.0]), "1 tokens came with 2 values"),
        (lambda page: page.tokens(["a"], [1.0], color="mauve"), "mauve"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(add, message):
    with pytest.raises(InputError, match=message):
        add(Page("t"))


def test_no_figure_can_end_the_script_that_holds_it(monkeypatch):
    figure = bars(["a"], [1.0], title="t", y="y")
    monkeypatch.setattr(type(figure), "to_json", lambda self: '{"data": [], "layout": {"title": "</script><b>"}}')
    assert '"title": "\\u003c/script>\\u003cb>"' in Page("t").figure(figure).html()
