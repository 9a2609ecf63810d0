"""Charts of the report: lines with gaps, limits, thinning that keeps spikes."""

from __future__ import annotations

import html
import json
import math
import re

import pytest

from pithwood.report.charts import Line, line_chart, thinned

pytestmark = pytest.mark.quick


def test_a_value_that_is_not_finite_leaves_a_gap():
    chart = line_chart("loss", [Line("a", [1, 2, 3, 4], [1.0, math.nan, 2.0, 3.0], 0)])
    (path,) = re.findall(r'<path class="line s0" d="([^"]+)"', chart)
    assert [letter for letter in path if letter.isalpha()] == ["M", "M", "L"]


def test_values_of_the_pointer_are_json_without_nan():
    chart = line_chart("loss", [Line('a "name"', [1, 2], [1.0, math.inf], 0)])
    data = json.loads(html.unescape(re.search(r'data-lines="([^"]+)"', chart)[1]))
    assert data["lines"] == [{"name": 'a "name"', "x": [1], "y": [1.0]}]


def test_no_finite_value_is_said_in_words():
    assert "no finite value was logged" in line_chart("loss", [Line("a", [1, 2], [math.nan, math.nan], 0)])


@pytest.mark.parametrize("values", [[3.0], [0.0, 0.0], [1e-9, 2e-9], [-4.0, -1.0], [5e12, 6e12]])
def test_any_range_of_values_can_be_drawn(values):
    chart = line_chart("x", [Line("a", list(range(1, len(values) + 1)), values, 0)])
    numbers = [float(word) for word in re.findall(r' (?:y|y1|cy)="?(-?[\d.]+)', chart)]
    assert numbers
    assert all(0 <= value <= 200 for value in numbers)
    assert re.findall(r"<text class=y [^>]+>[^<]+</text>", chart)


def test_thinning_keeps_the_spike_and_the_order():
    y = [1.0] * 5000
    y[1234] = 50.0
    x, kept = thinned(range(5000), y, 100)
    assert len(x) <= 100
    assert x == sorted(x)
    assert kept[x.index(1234)] == 50.0
