"""`pithwood report`: one page that needs nothing else, and refusals before any work."""

from __future__ import annotations

import json
import re

import pytest

from pithwood.cli import main
from tests.browser import look_at


@pytest.fixture(autouse=True)
def _one_line_errors(monkeypatch):
    monkeypatch.delenv("PITHWOOD_TRACEBACK", raising=False)


def report(trained, *words: str) -> int:
    return main(["report", *words, "--samples", "2", "--device", "cpu", "--runs-dir", str(trained.runs_dir)])


def test_json_says_where_the_page_lies(copied, capsys):
    assert report(copied, "small", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    page = copied.moba / "report.html"
    assert result == {
        "page": str(page),
        "bytes": page.stat().st_size,
        "runs": [copied.moba.name],
        "spikes": {copied.moba.name: 0},
    }


def test_the_page_refers_to_nothing_outside(copied, capsys):
    assert report(copied, "small", "dense") == 0
    text = (copied.moba / "report.html").read_text(encoding="utf-8")
    assert not re.findall(r"https?://|<link[^>]+stylesheet|<script[^>]+src|@import|url\(", text)


def test_what_a_run_says_is_text_and_never_markup(copied, capsys):
    (copied.moba / "sample.txt").write_text("</pre><script>alert(1)</script>", encoding="utf-8")
    assert report(copied, "small") == 0
    text = (copied.moba / "report.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(1)" in text
    assert "<script>alert" not in text


def test_a_run_without_samples_says_how_to_get_some(copied, capsys):
    (copied.moba / "sample.txt").unlink()
    assert report(copied, "small") == 0
    assert f"pithwood generate {copied.moba.name}" in (copied.moba / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["small", "--samples", "0"], "--samples=0 must be at least 1"),
        (["small", "small"], "is named twice"),
        (["small"] * 7, "7 runs are too many for one page; give at most 6"),
        (["small", "--out", "no/such/folder/page.html"], "there is no folder no/such/folder"),
        (["nothing"], "no run 'nothing'"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(trained, capsys, words, message):
    assert main(["report", *words, "--runs-dir", str(trained.runs_dir)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.browser
@pytest.mark.parametrize(("width", "dark"), [(1200, False), (1200, True), (390, False), (390, True)])
def test_a_browser_shows_all_of_it_and_asks_for_nothing(copied, tmp_path, capsys, width, dark):
    page = copied.moba / "report.html"
    assert report(copied, "small", "dense") == 0
    seen = look_at(page, tmp_path / "page.png", width=width, dark=dark)
    assert seen["requests"] == [page.resolve().as_uri()]
    assert seen["complaints"] == []
    assert seen["viewport"] == width
    assert seen["width"] <= width
    assert seen["dark"] == dark
    assert (seen["ground"] == "rgb(255, 255, 255)") != dark
    assert contrast(seen["ground"], seen["ink"]) > 7
    assert seen["charts"] >= 8
    assert seen["curves"] >= 2 * seen["charts"] - 4
    assert seen["maps"] == 2
    assert seen["cells"] > 8
    assert seen["tables"] >= 8
    assert seen["smallest"] >= 10
    assert "validation" in seen["pointed"]
    assert "--- prompt:" in seen["samples"]
    assert (tmp_path / "page.png").stat().st_size > 20_000


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two CSS colours rgb(r, g, b), WCAG 2.2: 1 to 21."""

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dim, bright = sorted((luminance(one), luminance(other)))
    return (bright + 0.05) / (dim + 0.05)
