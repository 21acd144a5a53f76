"""One self-contained HTML page: headings, tables, token heat maps, completions, figures; no request leaves the reader's machine."""

import base64
import hashlib
import html
import importlib.resources
import json
import os
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, SupportsFloat

import numpy as np

from qscope_jax.data.files import atomic_path
from qscope_jax.errors import InputError
from qscope_jax.report import palette, token_heat
from qscope_jax.report.number_format import format_column, format_number, is_numeric

if TYPE_CHECKING:
    import plotly.graph_objects

Align = Literal["left", "right", "center"]

_SURROGATES = re.compile("[\ud800-\udfff]")
_SHOW_FIGURES = """
for (const holder of document.querySelectorAll("[data-figure]")) {
  const figure = JSON.parse(document.getElementById(holder.dataset.figure).textContent);
  Plotly.newPlot(holder, figure.data, figure.layout, {responsive: true, displaylogo: false, modeBarButtons: [["toImage", "resetScale2d"]]});
}
matchMedia("print").addEventListener("change", () => document.querySelectorAll("[data-figure]").forEach((holder) => Plotly.Plots.resize(holder)));
"""


class Page:
    """A page that grows block by block and is written once; every method but `html` and `write` returns the page itself.

    All text is shown as it stands: nothing in it is read as markup. Each block finds its own writing direction.
    """

    def __init__(self, title: str, subtitle: str = "") -> None:
        """Start a page with its title and, below it, a line in smaller type."""
        self.title = title
        self.subtitle = subtitle
        self._blocks: list[str | _Verdicts] = []
        self._headings: list[tuple[int, str, str]] = []
        self._figures: list[str] = []

    def heading(self, text: str, level: int = 2) -> "Page":
        """Start a section (`level` 2) or a part of one (3, 4); the table of contents lists levels 2 and 3.

        Raises:
            InputError: `level` is not 2, 3 or 4.
        """
        if level not in (2, 3, 4):
            raise InputError(f"heading {text!r} has level {level}; give 2, 3 or 4 (the title is level 1)")
        anchor = f"section-{len(self._headings) + 1}"
        self._headings.append((level, anchor, text))
        return self._add(f'<h{level} id="{anchor}" dir="auto">{_escape(text)}</h{level}>')

    def text(self, text: str) -> "Page":
        """Add running text; an empty line starts a new paragraph."""
        return self._add("\n".join(f'<p dir="auto">{_escape(part.strip())}</p>' for part in re.split(r"\n\s*\n", text) if part.strip()))

    def table(
        self,
        columns: Sequence[str],
        rows: Iterable[Sequence[Any]],
        caption: str = "",
        align: Sequence[Align] | None = None,
        highlight: Collection[int | tuple[int, int]] | None = None,
    ) -> "Page":
        """Add a table.

        Args:
            columns: Column names.
            rows: Cells, row by row; numbers are formatted, None is a dash. Give what is a name rather than an amount, such as a feature's
                index, as text.
            caption: A line above the table.
            align: How each column is aligned; by default columns of numbers to the right, others to where their text starts.
            highlight: Row numbers, or (row, column) pairs, from 0, to set off.

        Raises:
            InputError: a row or `align` has another length than `columns`.
        """
        rows = [list(row) for row in rows]
        for i, row in enumerate(rows):
            if len(row) != len(columns):
                raise InputError(f"row {i} of the table has {len(row)} cells, its columns are {len(columns)}; give one cell for each column")
        if align is not None and len(align) != len(columns):
            raise InputError(f"the table has {len(columns)} columns and {len(align)} alignments; give one for each column")
        by_column = [[row[j] for row in rows] for j in range(len(columns))]
        sides = list(align) if align is not None else ["right" if is_numeric(cells) else "left" for cells in by_column]
        texts = zip(*map(format_column, by_column), strict=True)
        marked = highlight or ()
        head = "".join(_cell("th", name, side) for name, side in zip(columns, sides, strict=True))
        body = "".join(
            _row([_cell("td", text, sides[j], (i, j) in marked) for j, text in enumerate(cells)], i in marked) for i, cells in enumerate(texts)
        )
        return self._add(_table(f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>", caption))

    def tokens(
        self, tokens: Sequence[str], values: Iterable[SupportsFloat], *, label: str = "", color: str = "blue", maximum: float | None = None
    ) -> "Page":
        """Add a token heat map: running text, each token on a background as strong as its value; pointing at one shows both.

        Args:
            tokens: The text of each token, as decoded alone. What is only part of a character (U+FFFD, or `<0xE4>`) gets a placeholder.
            values: A number for each token; negative ones get the opposite colour, those that are not finite none.
            label: What is shown, above the text.
            color: A name from `qscope_jax.report.palette.COLORS`.
            maximum: The value of the strongest background; by default the largest absolute value. Give one to make maps comparable.

        Raises:
            InputError: tokens and values differ in number, an unknown colour, or a maximum that is not positive.
        """
        numbers, shares, top = token_heat.levels(tokens, values, maximum)
        heat, cold = (" ".join(map(str, rgb)) for rgb in (palette.color(color), palette.opposite(color)))
        spans = "".join(map(_token, tokens, numbers, shares))
        scale = f'<span class="scale">0 <i></i> {format_number(top)}</span>'
        return self._add(
            f'<div class="heat" style="--heat:{heat};--cold:{cold}"><div class="label"><bdi>{_escape(label)}</bdi>{scale}</div>'
            f'<div class="tokens" dir="auto">{spans}</div></div>'
        )

    def figure(self, figure: "plotly.graph_objects.Figure", caption: str = "") -> "Page":
        """Add a plotly figure. A transparent one takes the page's text colour, light or dark."""
        name = f"figure-{len(self._figures) + 1}"
        # "<" occurs in strings only; escaped, no text in the figure can end the script element.
        data = _whole(str(figure.to_json())).replace("<", "\\u003c")
        self._figures.append(f'<script type="application/json" id="{name}">{data}</script>')
        layout: Any = figure.layout
        background = layout.paper_bgcolor or layout.template.layout.paper_bgcolor
        neutral = ' class="neutral"' if background == "rgba(0,0,0,0)" else ""
        below = f'<figcaption dir="auto">{_escape(caption)}</figcaption>' if caption else ""
        return self._add(f'<figure><div data-figure="{name}"{neutral}></div>{below}</figure>')

    def completions(self, rows: Iterable[tuple[str, str, str]]) -> "Page":
        """Add completions, a (label, prompt, continuation) each: the prompt in grey, what the model wrote in bold."""
        body = "".join(
            f'<tr><th dir="auto">{_escape(label)}</th>'
            f'<td dir="auto"><span class="prompt">{_escape(prompt)}</span><b>{_escape(continuation)}</b></td></tr>'
            for label, prompt, continuation in rows
        )
        return self._add(f'<table class="completions"><tbody>{body}</tbody></table>')

    def verdict(self, name: str, value: Any, target: Any, ok: bool | np.bool_) -> "Page":
        """Add a row to a table of results: what was measured, what was aimed at, and whether it is met (pass) or not (short).

        Rows that follow each other share a table. Give `target` as text where it is a bound, such as `at least 0.9`.
        """
        if not (self._blocks and isinstance(self._blocks[-1], _Verdicts)):
            self._blocks.append(_Verdicts())
        block = self._blocks[-1]
        assert isinstance(block, _Verdicts)
        block.rows.append((name, format_number(value), format_number(target), bool(ok)))
        return self

    def html(self) -> str:
        """The page as one HTML document."""
        body = "\n".join(block.html() if isinstance(block, _Verdicts) else block for block in self._blocks)
        subtitle = f'<p class="subtitle" dir="auto">{_escape(self.subtitle)}</p>' if self.subtitle else ""
        scripts = [_plotly_script(), _SHOW_FIGURES] if self._figures else []
        style = importlib.resources.files("qscope_jax.report").joinpath("style.css").read_text(encoding="utf-8")
        tail = "\n".join(self._figures + [f"<script>{script}</script>" for script in scripts])
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{_policy(scripts)}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
            f"<title>{_escape(self.title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
            f'<header><h1 dir="auto">{_escape(self.title)}</h1>{subtitle}</header>\n{self._contents()}'
            f"<main>\n{body}\n</main>\n{tail}\n</body>\n</html>\n"
        )

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the page to `path`, whole or not at all, and return the path.

        Raises:
            SourceError: the folder cannot be written to.
        """
        document = self.html()
        with atomic_path(path) as temporary:
            temporary.write_text(document, encoding="utf-8")
        return Path(path)

    def _add(self, block: str) -> "Page":
        self._blocks.append(block)
        return self

    def _contents(self) -> str:
        listed = [(level, anchor, text) for level, anchor, text in self._headings if level < 4]
        if len(listed) < 2:
            return ""
        items = "".join(f'<li class="level-{level}" dir="auto"><a href="#{anchor}">{_escape(text)}</a></li>' for level, anchor, text in listed)
        return f'<nav aria-label="Contents"><ol>{items}</ol></nav>\n'


class _Verdicts:
    """Rows of `Page.verdict` that follow each other."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, str, bool]] = []

    def html(self) -> str:
        head = "".join(_cell("th", name, side) for name, side in (("Result", "left"), ("Measured", "right"), ("Target", "right"), ("", "left")))
        body = "".join(
            _row([_cell("td", name, "left"), _cell("td", value, "right"), _cell("td", target, "right"), _mark(ok)])
            for name, value, target, ok in self.rows
        )
        met = sum(ok for *_, ok in self.rows)
        return _table(f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>", f"{met} of {len(self.rows)} targets met", "verdicts")


def _table(inside: str, caption: str, style: str = "") -> str:
    above = f'<caption dir="auto">{_escape(caption)}</caption>' if caption else ""
    return f'<div class="wide"><table class="{style or "data"}">{above}{inside}</table></div>'


def _row(cells: list[str], marked: bool = False) -> str:
    style = ' class="marked"' if marked else ""
    return f"<tr{style}>{''.join(cells)}</tr>"


def _cell(tag: str, text: str, side: str, marked: bool = False) -> str:
    # "left" is where the text starts, so that a column of Arabic is ragged on the left.
    names = [name for name, on in ((side, side != "left"), ("marked", marked)) if on]
    style = f' class="{" ".join(names)}"' if names else ""
    return f"<{tag}{style}><bdi>{_escape(text)}</bdi></{tag}>"


def _mark(ok: bool) -> str:
    return '<td class="pass">✓ pass</td>' if ok else '<td class="short">✗ short</td>'


def _token(token: str, number: float, share: float) -> str:
    inside = "".join(_piece(kind, text) for kind, text in token_heat.pieces(token))
    title = _escape(f"{json.dumps(token, ensure_ascii=False)}  {format_number(number)}")
    # The browser's shaping joins Arabic letters across plain inline elements, so tokens carry no padding, margin or direction of their own.
    strength = f' style="--v:{abs(share):.3f}"' if abs(share) >= 0.0005 else ""
    return f'<span class="{"t n" if share < 0 else "t"}"{strength} title="{title}">{inside}</span>'


def _piece(kind: token_heat.Kind, text: str) -> str:
    match kind:
        case "space":
            # The space itself stays, so that lines break and copied text is the text; the style sheet draws a dot on it.
            return "".join(f'<i class="sp">{character}</i>' for character in text)
        case "newline":
            return '<i class="nl"></i>\n'
        case "tab":
            return '<i class="tab">\t</i>'
        case "partial":
            return '<i class="part">□</i>'
        case "code":
            return f'<i class="code">{_escape(text)}</i>'
        case _:
            return _escape(text)


def _plotly_script() -> str:
    from plotly.offline import get_plotlyjs

    # A browser reads every line ending as "\n", also when it checks a script's hash.
    return get_plotlyjs().replace("\r\n", "\n").replace("\r", "\n")


def _policy(scripts: list[str]) -> str:
    """A content security policy that lets these scripts run, nothing else, and nothing be fetched."""
    hashes = [f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" for script in scripts]
    allowed = " ".join(hashes) or "'none'"
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"


def _escape(text: str) -> str:
    return html.escape(_whole(str(text)))


def _whole(text: str) -> str:
    """The text without halves of surrogate pairs, which UTF-8 cannot hold."""
    return _SURROGATES.sub("\ufffd", text)
