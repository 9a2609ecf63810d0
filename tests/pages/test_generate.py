"""Generated parts of the documents: they are current, and made from results files and from the code."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from pithwood.cli import COMMANDS, main
from pithwood.pages.configuration import reachable
from pithwood.pages.generate import ROOT, filled, outdated
from pithwood.pages.listings import commands_table, list_commands, mixers_table, ops_table
from pithwood.run import Run

pytestmark = pytest.mark.quick

FILE = "bench/results/cpu/train.json"
ROWS = [
    {"recipe": "a", "seed": 0, "loss": 1.23456, "attention": {"op": "moba"}},
    {"recipe": "b", "seed": 0, "loss": 2.0},
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder like a checkout with one results file."""
    path = tmp_path / "bench" / "results" / "cpu" / "train.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"device": "cpu", "rows": ROWS}))
    (tmp_path / "README.md").write_text("Nothing generated.\n")
    return tmp_path


def test_the_pages_of_the_repository_are_up_to_date():
    assert not list(outdated(ROOT)), "run `pithwood docs tables` and commit what it writes"


def test_a_table_takes_the_rows_that_fit_and_formats_their_fields(root):
    columns = "where attention.op = moba\nrecipe: recipe\nloss: loss .2f\non: file.device\n"
    text = f"<!-- table bench/results/*/train.json\n{columns}-->old<!-- end table -->"
    table = filled(text, root, "page.md").partition("-->")[2].removesuffix("<!-- end table -->")
    assert table == "\n| recipe | loss | on |\n| --- | ---: | --- |\n| a | 1.23 | cpu |\n"


def test_a_value_is_one_field_of_the_one_row_that_fits(root):
    text = f"loss <!-- value {FILE} recipe=b,seed=0 loss .1f --><!-- end value -->!"
    assert filled(text, root, "page.md").endswith("-->2.0<!-- end value -->!")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- table bench/results/gpu/x.json\na: a\n--><!-- end table -->", "page.md: .*no results file"),
        (f"<!-- table {FILE}\na: none\n--><!-- end table -->", "no row has the field 'none'"),
        (f"<!-- table {FILE}\nwhere recipe = c\na: loss\n--><!-- end table -->", "no row of"),
        (f"<!-- value {FILE} seed=0 loss --><!-- end value -->", "2 rows fit seed=0"),
        ("<!-- recipes -->", "a marker has no end"),
    ],
)
def test_a_marker_that_cannot_be_filled_is_named(root, text, message):
    with pytest.raises(ValueError, match=message):
        filled(text, root, "page.md")


def test_an_outdated_page_is_reported_and_written(root, monkeypatch, capsys):
    monkeypatch.setattr("pithwood.pages.generate.ROOT", root)
    page = root / "README.md"
    page.write_text("<!-- recipes -->\n<!-- end recipes -->\n")
    assert main(["docs", "tables", "--check"]) == 1
    assert capsys.readouterr().out == "outdated: README.md\n"
    assert page.read_text() == "<!-- recipes -->\n<!-- end recipes -->\n"
    assert main(["docs", "tables"]) == 0
    assert "| `debug` | " in page.read_text()
    capsys.readouterr()
    assert main(["docs", "tables", "--check"]) == 0


def test_every_setting_of_a_run_is_on_the_page():
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    for cls in reachable(Run):
        section = text.partition(f"\n### {cls.__name__}\n")[2].partition("\n### ")[0]
        assert section, cls
        for field in dataclasses.fields(cls):
            if field.init:
                assert f"| `{field.name}` |" in section, (cls, field.name)


def test_the_listings_are_complete():
    assert [name for name, _ in list_commands()] == list(COMMANDS)
    assert "| `pithwood train` | train a recipe" in commands_table()
    assert (
        "| `dense_attention/` | `dense_attention` | `ref`, `torch`, `varlen`, `cudnn`, `fa4` | Softmax attention"
        in ops_table()
    )
    assert "`MoBAConfig` | `attention/moba.py` | Mixture of block attention" in mixers_table()
