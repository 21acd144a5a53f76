import io
import subprocess
import sys

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.style import Style

from qscope_jax.errors import InputError
from qscope_jax.report.terminal import print_kv, print_table, tokens_text


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


def printed(show, *args, **kwargs) -> str:
    file = io.StringIO()
    show(*args, file=file, **kwargs)
    return file.getvalue()


def test_numbers_are_formatted_and_line_up_on_the_right():
    lines = printed(print_table, ["name", "count"], [["a", 1234], ["b", None], ["c", 5]], title="Counts").splitlines()
    assert lines[0] == "Counts" and lines[1].split() == ["name", "count"]
    assert [line.rstrip()[-1] for line in lines[3:]] == ["4", "–", "5"] and len({len(line) for line in lines[3:]}) == 1


def test_no_markup_and_no_control_sequence_reaches_the_terminal():
    text = printed(print_table, ["[bold]x"], [["[red]y[/red] :smile: \x1b[2J"]]) + printed(print_kv, {"[b]": "\x9b2J"}, title="[i]t")
    assert "[bold]x" in text and "[red]y[/red] :smile: ␛[2J" in text and "[b]" in text and "[i]t" in text
    assert "\x1b" not in text and "\x9b" not in text


def test_long_text_wraps_at_the_width_without_losing_any():
    note = "今天的阳光很好照得房间里暖暖的" * 8
    text = printed(print_table, ["n", "note"], [[123456, note]])
    assert all(cell_len(line) <= 80 for line in text.splitlines()) and "123,456" in text
    assert "".join(character for character in text if character in set(note)) == note


def test_columns_that_do_not_fit_become_records_with_every_number_whole():
    columns = [f"column {i}" for i in range(20)]
    text = printed(print_table, columns, [[1000000 + i for i in range(20)]] * 2)
    assert all(len(line) <= 80 for line in text.splitlines())
    assert all(text.count(f"{1000000 + i:,}") == 2 and text.count(f"column {i} ") == 2 for i in range(20))


def test_a_file_that_lacks_a_character_gets_a_question_mark():
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii", newline="\n")
    print_table(["语言"], [["zh 中"]], file=file)
    file.seek(0)
    assert "zh ?" in file.read()


def test_pairs_are_printed_one_a_line_to_standard_output(capsys):
    print_kv({"FVU": 0.123456, "tokens": 10000, "model": None}, title="Run")
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [["Run"], ["FVU", "0.1235"], ["tokens", "10,000"], ["model", "–"]]


def test_empty_tables_print():
    assert printed(print_table, ["a", "b"], []).split()[:2] == ["a", "b"] and printed(print_kv, {}).strip() == ""


def test_a_row_that_does_not_fit_is_refused():
    with pytest.raises(InputError, match="row 1.*1 cells"):
        print_table(["a", "b"], [[1, 2], [3]])


def test_token_backgrounds_follow_the_values():
    text = tokens_text(["a", "b", "c", "\n", "\ufffd"], [2.0, 1.0, -2.0, 0.0, 0.0])
    assert text.plain == "abc↵\n□"
    colours = [span.style.bgcolor.name for span in text.spans if isinstance(span.style, Style) and span.style.bgcolor]
    assert colours == ["#0072b2", "#3b7494", "#d55e00"]


def test_tokens_print_as_plain_text_where_there_are_no_colours():
    file = io.StringIO()
    Console(file=file).print(tokens_text(["[bold]", " x"], [1.0, 0.5]))
    assert file.getvalue() == "[bold] x\n"


def test_the_module_loads_neither_plotly_nor_jax():
    code = "import sys, qscope_jax.report.terminal, qscope_jax.report.page, qscope_jax.report.figures; print({'plotly', 'jax'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
