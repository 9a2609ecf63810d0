"""Pictures of measured runs: they show what was measured, and survive thin or broken input."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from pithwood.observe.inspect_plots import plot_comparison, plot_curves, plot_positions, plot_routing
from tests.observe.test_plots import has_colour, picture

pytestmark = pytest.mark.quick

BLUE, RED, GREY = "#2f6db3", "#d1495b", "#6b7280"


def curve(values: list[float]) -> dict[str, list[float]]:
    steps = [float(step) for step in range(1, len(values) + 1)]
    return {"steps": steps, "tokens": [1000 * step for step in steps], "values": values}


def falling(count: int = 100) -> dict[str, list[float]]:
    return curve([2 + 6 * math.exp(-step / 15) for step in range(count)])


def layer_of_blocks(layer: int) -> dict:
    distances = [
        {"from": 0, "to": 0, "share": 0.4, "uniform": 0.4},
        {"from": 1, "to": 1, "share": 0.3, "uniform": 0.2},
        {"from": 2, "to": 2, "share": 0.2, "uniform": 0.2},
        {"from": 3, "to": 4, "share": 0.1, "uniform": 0.2},
    ]
    return {"layer": layer, "distances": distances}


def test_every_curve_that_is_there_gets_a_panel(tmp_path: Path):
    all_of_them = dict.fromkeys(("loss", "lr", "grad_norm", "tokens_per_s"), falling())
    plot_curves({**all_of_them, "validation/loss": falling(5)}, tmp_path / "many.png", "demo")
    many = picture(tmp_path / "many.png")
    assert has_colour(many, BLUE)
    assert has_colour(many, RED)
    plot_curves({"loss": falling()}, tmp_path / "one.png", "demo")
    one = picture(tmp_path / "one.png")
    assert not has_colour(one, RED)
    assert one.size < many.size


@pytest.mark.parametrize("values", [[1.0], [math.nan], [math.nan, math.inf, 3.0], [0.0, 0.0], [-1.0, 2.0] * 30])
def test_short_and_broken_curves_are_drawn(tmp_path: Path, values: list[float]):
    plot_curves({"loss": curve(values), "grad_norm": curve(values)}, tmp_path / "curves.png", "demo")
    picture(tmp_path / "curves.png")


def test_no_curves_and_no_routing_give_a_note(tmp_path: Path):
    plot_curves({}, tmp_path / "curves.png", "demo")
    plot_routing({"experts": [], "blocks": []}, tmp_path / "routing.png", "demo")
    assert has_colour(picture(tmp_path / "curves.png"), GREY)
    assert has_colour(picture(tmp_path / "routing.png"), GREY)


def test_busy_experts_are_red_and_idle_ones_blue(tmp_path: Path):
    even = {"experts": [{"layer": 0, "counts": [50, 50, 50, 50]}], "blocks": []}
    uneven = {"experts": [{"layer": 0, "counts": [200, 0, 0, 0]}], "blocks": []}
    plot_routing(even, tmp_path / "even.png", "demo")
    plot_routing(uneven, tmp_path / "uneven.png", "demo")

    def redness(name: str) -> float:
        pixels = picture(tmp_path / name)
        # the left quarter holds the busiest expert's cell, clear of the colour bar
        cell = pixels[pixels.shape[0] // 3 : pixels.shape[0] // 2, pixels.shape[1] // 5 : pixels.shape[1] // 4]
        return float((cell[..., 0] - cell[..., 2]).mean())

    assert abs(redness("even.png")) < 0.05
    assert redness("uneven.png") > 0.25


@pytest.mark.parametrize("layers", [1, 8, 40])
def test_distances_are_drawn_for_few_and_many_layers(tmp_path: Path, layers: int):
    blocks = [layer_of_blocks(layer) for layer in range(layers)]
    plot_routing({"experts": [], "blocks": blocks}, tmp_path / "routing.png", "demo")
    assert has_colour(picture(tmp_path / "routing.png"), BLUE)


def test_positions_get_a_line_per_result(tmp_path: Path):
    def buckets(loss: float) -> list[dict]:
        edges = [(0, 0), (1, 1), (2, 3), (4, 7)]
        return [{"from": a, "to": b, "loss": loss - a / 10, "standard_error": math.nan if a else 0.1} for a, b in edges]

    plot_positions({"as trained": buckets(3.0)}, tmp_path / "one.png", "demo")
    plot_positions({"as trained": buckets(3.0), "full": buckets(2.5)}, tmp_path / "two.png", "demo")
    assert not has_colour(picture(tmp_path / "one.png"), RED)
    assert has_colour(picture(tmp_path / "two.png"), RED)


def test_a_comparison_takes_bits_if_all_have_them_and_nats_if_not(tmp_path: Path):
    both = {"loss": falling(), "bits_per_byte": falling(), "validation/bits_per_byte": falling(4)}
    plot_comparison({"a": both, "b": both}, tmp_path / "bits.png")
    plot_comparison({"a": both, "b": {"loss": falling()}}, tmp_path / "nats.png")
    assert has_colour(picture(tmp_path / "bits.png"), RED)
    assert has_colour(picture(tmp_path / "nats.png"), RED)
