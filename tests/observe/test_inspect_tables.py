"""Tables: aligned on a terminal and within its width, plain and uncut elsewhere."""

from __future__ import annotations

import math
import re

import pytest

from pithwood.observe.inspect_tables import Table, count, number, percent, render

pytestmark = pytest.mark.quick

TABLE = Table("things", ("name", "size"), [["a" * 50, "1"], ["b", "22,000"]])


def test_a_pipe_gets_plain_columns_without_cuts():
    lines = render(["before", TABLE, "after"], terminal=False).splitlines()
    assert lines == [
        "before",
        "",
        "things",
        "name" + " " * 46 + "    size",
        "a" * 50 + "       1",
        "b" + " " * 49 + "  22,000",
        "after",
    ]


@pytest.mark.parametrize("width", [40, 80])
def test_a_terminal_gets_no_line_beyond_its_width(width):
    text = re.sub(r"\x1b\[[0-9;]*m", "", render(["x" * 100, TABLE], terminal=True, width=width))
    assert max(map(len, text.splitlines())) <= width
    assert "22,000" in text
    assert text.replace("\n", "").count("a") >= 50  # folded, not cut


def test_names_stay_legible_where_the_terminal_is_too_narrow():
    table = Table("runs", ("run", "state", "tokens"), [["demo-1a2b3c4d", "finished" * 4, "1" * 30]])
    text = re.sub(r"\x1b\[[0-9;]*m", "", render([table], terminal=True, width=50))
    assert "demo-1a2b3c4d" in text
    assert max(map(len, text.splitlines())) <= 50


@pytest.mark.parametrize("terminal", [False, True])
def test_a_table_without_rows_shows_its_header(terminal):
    assert "name" in render([Table("t", ("name", "size"), [])], terminal=terminal, width=40)


def test_markup_in_names_is_shown_as_it_stands():
    assert "[red]x[/red]" in render([Table("t", ("a",), [["[red]x[/red]"]])], terminal=False)


def test_numbers_that_are_none_or_undefined_are_dashes():
    assert [number(None), number(math.nan), percent(None), percent(math.nan), count(None)] == ["-"] * 5
    assert [number(1.23456), number(math.inf), percent(0.256), count(12_345)] == ["1.235", "inf", "26%", "12.3k"]
