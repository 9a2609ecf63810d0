"""Pictures: they exist, have content where content is due, and survive thin or broken runs."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch

from pithwood.observe.plots import block_shares, common_sigma, in_points, loss_limits, plot_blocks, plot_loss, smooth
from tests.observe.test_metrics import Packing, random_ids


def run_events(steps: int, *, validate_every: int = 20) -> list[dict]:
    events: list[dict] = [{"kind": "run", "step": 0, "time": 0.0, "recipe": "demo"}]
    for step in range(1, steps + 1):
        bits = 1.8 + 6 * math.exp(-step / 15)
        event = {"step": step, "tokens": step * 1000, "bits_per_byte": bits, "loss": bits}
        events.append({"kind": "train", **event})
        if step % validate_every == 0:
            events.append({"kind": "validation", **event})
    return events


def picture(path: Path) -> np.ndarray:
    """RGB pixels 0..1; asserts a PNG of plausible size that is not blank."""
    assert 2_000 < path.stat().st_size < 2_000_000
    pixels = matplotlib.image.imread(path)[..., :3]
    assert min(pixels.shape[:2]) > 200
    assert pixels.std() > 0.01
    return pixels


def has_colour(pixels: np.ndarray, colour: str) -> bool:
    rgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return bool((np.abs(pixels - rgb).max(-1) < 0.02).sum() > 30)


TRAIN, VALIDATION, GZIP = "#2f6db3", "#d1495b", "#6b7280"


def test_loss_curve_shows_train_validation_and_gzip(tmp_path: Path):
    plot_loss(run_events(200), 2.1, tmp_path / "loss.png")
    pixels = picture(tmp_path / "loss.png")
    assert [has_colour(pixels, colour) for colour in (TRAIN, VALIDATION, GZIP)] == [True, True, True]
    plot_loss([e for e in run_events(200) if e["kind"] != "validation"], None, tmp_path / "loss.png", title="x")
    pixels = picture(tmp_path / "loss.png")
    assert [has_colour(pixels, colour) for colour in (TRAIN, VALIDATION)] == [True, False]
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]


def broken_events() -> list[dict]:
    events = run_events(50)
    events[3]["bits_per_byte"] = math.nan
    events[10]["bits_per_byte"] = math.inf
    del events[12]["bits_per_byte"]
    return events


@pytest.mark.parametrize(
    "events",
    [
        [],
        run_events(0),
        run_events(1),
        run_events(2, validate_every=1),
        broken_events(),
        [{**event, "bits_per_byte": math.nan} for event in run_events(5)],
        [event for event in run_events(40) if event["kind"] == "validation"],
    ],
    ids=["empty", "no-steps", "one", "two", "gaps", "all-nan", "validation-only"],
)
@pytest.mark.parametrize("gzip_bits", [None, 2.1, math.nan])
def test_loss_curve_of_thin_runs(tmp_path: Path, events: list[dict], gzip_bits: float | None):
    plot_loss(events, gzip_bits, tmp_path / "loss.png")
    picture(tmp_path / "loss.png")


def test_first_steps_do_not_flatten_the_rest():
    y = 1.8 + 6.2 * np.exp(-np.arange(700) / 18)
    low, high = loss_limits(y, y, np.array([3.0, 1.9]), 2.1)
    assert low < 1.8
    assert 2.1 < high < 4.0
    assert loss_limits(np.array([]), np.array([]), np.array([]), None) == (0.0, 8.0)


def test_block_shares_equal_counting():
    packing, block_size = Packing.from_lengths([100]), 16
    ids = random_ids(packing, 2, 3, block_size, seed=3)
    share = block_shares(ids, block_size)
    expected = torch.zeros(7, 7, dtype=torch.float64)
    for t in range(100):
        for s in range(2):
            for b in ids[t, s].tolist():
                if b >= 0:
                    expected[t // block_size, b] += 1 / (2 * min(block_size, 100 - t // block_size * block_size))
    torch.testing.assert_close(share, expected)
    torch.testing.assert_close(share.diagonal(), torch.ones(7, dtype=torch.float64))
    with pytest.raises(ValueError, match="block id 6 in a document of 2 blocks"):
        block_shares(ids[-20:], block_size)


@pytest.mark.parametrize(("layers", "tokens"), [(1, 40), (3, 300), (7, 200), (2, 5)])
def test_block_maps(tmp_path: Path, layers: int, tokens: int):
    packing = Packing.from_lengths([tokens])
    selections = {layer: (random_ids(packing, 2, 3, 16, seed=layer), 16) for layer in range(layers)}
    plot_blocks(selections, tmp_path / "blocks.png", title="demo")
    pixels = picture(tmp_path / "blocks.png")
    assert has_colour(pixels, "#0b2545")  # own blocks
    future = np.abs(pixels - np.array([0xEC, 0xEE, 0xF1]) / 255).max(-1) < 0.002
    assert (future.sum() > 1000) == (tokens > 16)


def test_block_maps_without_sparse_layers(tmp_path: Path):
    plot_blocks({}, tmp_path / "blocks.png")
    picture(tmp_path / "blocks.png")


def test_runs_of_different_lengths_are_smoothed_over_the_same_tokens():
    def spread_of_a_spike(steps: int, tokens_per_step: int, sigma: float, x: np.ndarray) -> float:
        y = np.zeros(steps)
        y[steps // 2] = 1.0
        weight = smooth(y, in_points(sigma, x.tolist()))
        mean = (weight * x).sum() / weight.sum()
        return math.sqrt((weight * (x - mean) ** 2).sum() / weight.sum())

    sizes = ((200, 1000), (2000, 1000), (400, 4000))
    tokens = [(np.arange(steps) + 1.0) * per_step for steps, per_step in sizes]
    sigma = common_sigma([x.tolist() for x in tokens])
    spreads = [spread_of_a_spike(*size, sigma, x) for size, x in zip(sizes, tokens, strict=True)]
    assert spreads == pytest.approx([sigma] * 3, rel=0.02)


def test_the_common_window_suits_the_longest_run_and_keeps_the_shape_of_the_shortest():
    steps = {count: [1000.0 * (step + 1) for step in range(count)] for count in (1, 2, 101, 1201, 12001)}
    assert common_sigma([steps[1201], steps[1201]]) == 10_000
    assert common_sigma([steps[1201], steps[101]]) == 5_000
    assert common_sigma([steps[101], steps[101]]) == pytest.approx(100_000 / 120)
    assert common_sigma([steps[12001], steps[2]]) == 500  # half a step at least
    assert common_sigma([steps[1]]) == 0
    assert smooth(np.ones(1), in_points(0.0, steps[1])).tolist() == [1.0]
