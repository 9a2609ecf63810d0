"""The picture of one step on the GPUs of a mesh: computing and exchanging as lanes, what is hidden and what is not.

A moment of an exchange is hidden while another kernel of the same GPU runs. Kernels of NCCL also wait, for partners
that are slower and for data that is not there yet, so a long exchange need not be a long transfer.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING

from pithwood.errors import naming
from pithwood.observe.step_parts import EXCHANGE, PARTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Span = tuple[str, float, float]
"""(part of the step, start, end) in ms since the step began."""
Interval = tuple[float, float]

_COLOURS = {
    "attention": "#2f6db3",
    "experts": "#3d9970",
    "router and dispatch": "#93c9ae",
    "dense": "#8fb4dd",
    "head and loss": "#e3a63b",
    "optimizer": "#8a6bb1",
    "other": "#9ca3af",
}
_HIDDEN, _EXPOSED, _INK = "#c3c8d0", "#d1495b", "#1f2937"
ZOOM = 1 / 20
"""Share of the step that the lower panel shows, from the first exchange after its middle on."""
TITLE_WIDTH = 150
"""Characters of a line of the title."""
FINEST = 4000
"""A gap between kernels of one part under this part of the step is not told apart."""


@dataclass(frozen=True)
class Timeline:
    """One step of one process: ms since it began. Small enough to be sent to another process."""

    length_ms: float
    computing: dict[str, list[Interval]]
    """By part, when kernels of it ran."""
    hidden: list[Interval]
    """When kernels of NCCL ran and others beside them."""
    exposed: list[Interval]
    """When kernels of NCCL ran alone."""

    @staticmethod
    def of(spans: Iterable[Span], length_ms: float) -> Timeline:
        """From every kernel of a step."""
        by_part: dict[str, list[Interval]] = {}
        for part, start, end in spans:
            by_part.setdefault(part, []).append((start, end))
        exchanges = merged(by_part.pop(EXCHANGE, []))
        busy = merged(interval for intervals in by_part.values() for interval in intervals)
        exposed = outside(exchanges, busy)
        gap = length_ms / FINEST
        computing = {part: merged(by_part[part], gap) for part in PARTS if part in by_part}
        return Timeline(length_ms, computing, merged(outside(exchanges, exposed), gap), exposed)


def merged(intervals: Iterable[Interval], gap: float = 0.0) -> list[Interval]:
    """Disjoint intervals in order that cover the same moments, and gaps up to `gap`."""
    found: list[Interval] = []
    for start, end in sorted(intervals):
        if found and start <= found[-1][1] + gap:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((start, end))
    return found


def outside(intervals: Sequence[Interval], others: Sequence[Interval]) -> list[Interval]:
    """What of `intervals` no other one covers; both disjoint and in order."""
    found: list[Interval] = []
    first = 0
    for start, end in intervals:
        while first < len(others) and others[first][1] <= start:
            first += 1
        at = first
        while at < len(others) and others[at][0] < end:
            if others[at][0] > start:
                found.append((start, others[at][0]))
            start = max(start, others[at][1])
            at += 1
        if start < end:
            found.append((start, end))
    return found


def plot_timelines(timelines: Sequence[Timeline], path: Path, title: str) -> None:
    """Draw a step of every process, in the order of their ranks, and below a part of it larger.

    path   PNG file, replaced atomically
    title  what was trained

    Each process's time counts from the moment when it began the step, which all do within a millisecond or so.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    lane = 0.42 * 2 * len(timelines)
    fig = Figure(figsize=(13.0, 2 * lane + 2.9), layout="constrained", dpi=130)
    whole, part = fig.subplots(2, 1)
    length = max(timeline.length_ms for timeline in timelines)
    begin, end = _window(timelines, length)
    fig.suptitle(fill(title, TITLE_WIDTH), x=0.01, ha="left", fontsize=10, color=_INK, fontweight="bold")
    for ax, limits in ((whole, (0.0, length)), (part, (begin, end))):
        _draw_lanes(ax, timelines)
        ax.set_xlim(*limits)
    whole.set_title(f"one step: {length:,.0f} ms (profiled)", loc="left", fontsize=9.5)
    shown = f"{end - begin:,.0f} ms of it, from the first exchange after its middle on"
    part.set_title(shown, loc="left", fontsize=9.5)
    part.set_xlabel("ms since the step began")
    whole.axvspan(begin, end, color="#111827", alpha=0.08, linewidth=0)
    there = [name for name in PARTS if any(timeline.computing.get(name) for timeline in timelines)]
    handles = [Patch(color=_COLOURS[name], label=name) for name in there]
    handles += [
        Patch(color=_HIDDEN, label="exchange, hidden under computing"),
        Patch(color=_EXPOSED, label="exchange alone"),
    ]
    fig.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=8.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with naming(path):
        fig.savefig(temporary, format="png")
        os.replace(temporary, path)


def _window(timelines: Sequence[Timeline], length: float) -> Interval:
    """What the lower panel shows: computing alone, as a long head is, would say nothing of exchanges."""
    starts = [start for timeline in timelines for start, _ in timeline.hidden + timeline.exposed if start >= length / 2]
    begin = min(starts, default=length / 2)
    begin = max(0.0, min(begin, length * (1 - ZOOM)))
    return begin, begin + length * ZOOM


def _draw_lanes(ax: Axes, timelines: Sequence[Timeline]) -> None:
    """Two lanes for each process, the first on top."""
    places, names = [], []
    for rank, timeline in enumerate(timelines):
        computing, exchanging = -2.3 * rank, -2.3 * rank - 1
        for part, intervals in timeline.computing.items():
            _bars(ax, intervals, computing, _COLOURS[part])
        _bars(ax, timeline.hidden, exchanging, _HIDDEN)
        _bars(ax, timeline.exposed, exchanging, _EXPOSED)
        hidden, alone = (sum(end - start for start, end in each) for each in (timeline.hidden, timeline.exposed))
        share = f"\n{hidden / (hidden + alone):.0%} hidden" if hidden + alone else ""
        places += [computing, exchanging]
        names += [f"rank {rank} computing", f"exchanging{share}"]
    ax.set_yticks(places, names, fontsize=8.5)
    ax.set_ylim(min(places) - 0.6, 0.6)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x", color="#e5e7eb", linewidth=0.7)
    ax.set_axisbelow(True)
    ax.spines[["top", "right", "left"]].set_visible(False)


def _bars(ax: Axes, intervals: Sequence[Interval], place: float, colour: str) -> None:
    ax.broken_barh([(start, end - start) for start, end in intervals], (place - 0.42, 0.84), color=colour, linewidth=0)
