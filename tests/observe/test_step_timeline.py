"""The picture of a step on a mesh: what is hidden, and that it is drawn."""

from __future__ import annotations

import matplotlib.image
import pytest

from pithwood.observe.step_parts import EXCHANGE
from pithwood.observe.step_timeline import ZOOM, Timeline, _window, merged, outside, plot_timelines

pytestmark = pytest.mark.quick


def a_step(layers: int, hidden: float) -> Timeline:
    """Layers of attention, exchange and experts, `hidden` of each exchange under the experts."""
    spans, at = [], 1.0
    for _ in range(layers):
        spans.append(("attention", at, at + 3.0))
        spans.append((EXCHANGE, at + 3.0, at + 5.0))
        at += 5.0 - 2 * hidden
        spans += [("experts", at + index * 0.1, at + index * 0.1 + 0.1) for index in range(60)]
        at += 6.5
    spans += [("head and loss", at, at + 20.0), ("optimizer", at + 22.0, at + 40.0), (EXCHANGE, at + 40.0, at + 46.0)]
    return Timeline.of(spans, at + 48.0)


def length(intervals) -> float:
    return sum(end - start for start, end in intervals)


def test_what_lies_under_other_kernels_is_hidden():
    timeline = a_step(10, hidden=0.75)
    assert length(timeline.hidden) == pytest.approx(10 * 1.5)
    assert length(timeline.exposed) == pytest.approx(10 * 0.5 + 6.0)
    assert list(timeline.computing) == ["attention", "experts", "head and loss", "optimizer"]


def test_kernels_that_follow_each_other_are_one_interval():
    assert len(a_step(10, hidden=0.0).computing["experts"]) == 10


def test_intervals_that_touch_are_merged_and_what_others_cover_is_cut_out():
    assert merged([(5, 6), (0, 1), (1, 2), (0.5, 1.5)]) == [(0, 2), (5, 6)]
    assert merged([(0, 1), (1.2, 2)], gap=0.3) == [(0, 2)]
    assert outside([(0, 10), (12, 14)], [(1, 2), (3, 4), (9, 13)]) == [(0, 1), (2, 3), (4, 9), (13, 14)]
    assert outside([(0, 1)], []) == [(0, 1)]
    assert outside([(2, 3)], [(0, 5)]) == []


def test_every_process_is_drawn(tmp_path):
    pictures = []
    for count in (1, 2):
        path = tmp_path / f"{count}.png"
        plot_timelines(
            [a_step(24, hidden=0.75), a_step(24, hidden=0.2)][:count], path, "qwen3_30b_8l on dp_shard 2, ep 2"
        )
        pictures.append(matplotlib.image.imread(path))
        assert pictures[-1].std() > 0.05
    assert pictures[1].shape[0] > pictures[0].shape[0]
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("exchanges", "begin"),
    [([(10.0, 12.0), (60.0, 61.0), (80.0, 90.0)], 60.0), ([(10.0, 12.0)], 50.0), ([], 50.0), ([(99.0, 99.5)], 95.0)],
    ids=["the first after the middle", "none there", "none", "at the very end"],
)
def test_the_lower_panel_begins_with_an_exchange_and_ends_within_the_step(exchanges, begin):
    timelines = [Timeline(100.0, {}, [], []), Timeline(100.0, {}, exchanges[:1], exchanges[1:])]
    assert _window(timelines, 100.0) == pytest.approx((begin, begin + 100 * ZOOM))
