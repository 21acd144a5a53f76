"""Results in a terminal: tables, key-value lists and coloured tokens that also read well in a log file and at 80 columns."""

import io
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import IO, Any, SupportsFloat, TextIO, cast

from rich import box
from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text

from qscope_jax.errors import InputError
from qscope_jax.report import palette, token_heat
from qscope_jax.report.number_format import format_column, format_number, is_numeric

TextStream = TextIO | io.TextIOBase

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_NEUTRAL = (118, 118, 118)  # as far from a white terminal as from a black one
_FAINT = 0.04  # share of the maximum below which a token stays uncoloured
_TEXT_WIDTH = 12  # columns that a column of text needs at least
_MARKS = {"newline": "↵\n", "tab": "⇥\t", "partial": "□"}


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, title: str = "", file: TextStream | None = None) -> None:
    """Print a table: numbers formatted and right-aligned, long text wrapped, one record below the other where the columns do not fit.

    Args:
        columns: Column names.
        rows: Cells, row by row; None is a dash. Give what is a name rather than an amount, such as a feature's index, as text.
            Nothing is read as markup or as a terminal's control sequence.
        title: A line above the table.
        file: Where to print; by default standard output.

    Raises:
        InputError: a row has another length than `columns`.
    """
    rows = [list(row) for row in rows]
    for i, row in enumerate(rows):
        if len(row) != len(columns):
            raise InputError(f"row {i} of the table has {len(row)} cells, its columns are {len(columns)}; give one cell for each column")
    by_column = [[row[j] for row in rows] for j in range(len(columns))]
    numeric = [is_numeric(cells) for cells in by_column]
    texts = [[_clean(text) for text in format_column(cells)] for cells in by_column]
    names = [_clean(name) for name in columns]
    console = _console(file)
    needed = sum(_needed(name, cells, number) + 2 for name, cells, number in zip(names, texts, numeric, strict=True))
    if title:
        _print(console, Text(_clean(title), style="bold"))
    if needed > console.width:
        for i in range(len(rows)):
            _print(console, _pairs(names, [cells[i] for cells in texts]))
        return
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    for name, cells, number in zip(names, texts, numeric, strict=True):
        table.add_column(Text(name), justify="right" if number else "left", min_width=_needed(name, cells, number), overflow="fold")
    for cells in zip(*texts, strict=True):
        table.add_row(*map(Text, cells))
    _print(console, table)


def print_kv(mapping: Mapping[str, Any], *, title: str = "", file: TextStream | None = None) -> None:
    """Print names and their values, one pair a line.

    Args:
        mapping: Names and values; numbers are formatted.
        title: A line above.
        file: Where to print; by default standard output.
    """
    console = _console(file)
    if title:
        _print(console, Text(_clean(title), style="bold"))
    _print(console, _pairs([_clean(str(name)) for name in mapping], [_clean(format_number(value)) for value in mapping.values()]))


def tokens_text(tokens: Sequence[str], values: Iterable[SupportsFloat], *, color: str = "blue", maximum: float | None = None) -> Text:
    """Running text whose tokens have a background as strong as their values, for `rich.print`.

    Args:
        tokens: The text of each token; what is only part of a character gets a placeholder, newlines and tabs a mark.
        values: A number for each token; negative ones get the opposite colour.
        color: A name from `qscope_jax.report.palette.COLORS`.
        maximum: The value of the strongest background; by default the largest absolute value.

    Raises:
        InputError: tokens and values differ in number, an unknown colour, or a maximum that is not positive.
    """
    _, shares, _ = token_heat.levels(tokens, values, maximum)
    heat, cold = palette.color(color), palette.opposite(color)
    line = Text()
    for token, share in zip(tokens, shares, strict=True):
        style = _style(heat if share > 0 else cold, abs(share))
        for kind, text in token_heat.pieces(token):
            line.append(_MARKS.get(kind, f"[{text}]" if kind == "code" else text), style)
    return line


def _console(file: TextStream | None) -> Console:
    return Console(file=sys.stdout if file is None else cast(IO[str], file), highlight=False, markup=False, emoji=False)


def _print(console: Console, content: RenderableType) -> None:
    """Print; a character that the file's encoding lacks becomes a question mark instead of an error."""
    with console.capture() as capture:
        console.print(content)
    encoding = getattr(console.file, "encoding", None) or "utf-8"
    # Padding up to the width of a terminal is of no use in a log.
    lines = [line if console.is_terminal else line.rstrip() for line in capture.get().split("\n")]
    console.file.write("\n".join(lines).encode(encoding, "replace").decode(encoding))
    console.file.flush()


def _pairs(names: list[str], texts: list[str]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", overflow="fold")
    table.add_column(overflow="fold")
    for name, text in zip(names, texts, strict=True):
        table.add_row(Text(name), Text(text))
    return table


def _needed(name: str, cells: list[str], numeric: bool) -> int:
    """Columns of the screen below which this column cannot be read."""
    widest = max(map(cell_len, [*cells, *(name.split() or [""])]))
    return widest if numeric else min(widest, _TEXT_WIDTH)


def _style(rgb: palette.Rgb, share: float) -> Style:
    if share < _FAINT:
        return Style()
    red, green, blue = (round(grey + (full - grey) * share) for grey, full in zip(_NEUTRAL, rgb, strict=True))
    light = 0.299 * red + 0.587 * green + 0.114 * blue > 125
    return Style(color="#000000" if light else "#ffffff", bgcolor=f"#{red:02x}{green:02x}{blue:02x}")


def _clean(text: str) -> str:
    """The text with control characters shown by their pictures, so that no text can steer the terminal."""
    return _CONTROLS.sub(lambda match: chr(0x2400 + ord(match.group())) if ord(match.group()) < 0x20 else "\ufffd", str(text))
