"""Pictures as inline SVG: line charts, block maps, expert loads. Colours come from the page's style sheet."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from pithwood.observe.console import format_count

POINTS = 400
"""Points of a line; a wider stretch is drawn by its lowest and highest point."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 8, 8, 24


@dataclass(frozen=True)
class Line:
    """One line of a chart; points that are not finite leave a gap."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int
    """Number of a series colour of the style sheet."""
    look: str = "line"
    """line, faint (unlabelled, behind the others), dashed, or points."""


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    limits: tuple[float, float] | None = None,
    marks: Sequence[float] = (),
    wide: bool = False,
) -> str:
    """A figure with axis labels, a legend if there are several named lines, and values at the pointer.

    limits  of the vertical axis; default: the values' own, with some air
    marks   positions of vertical lines: spikes
    """
    width, height = (720, 300) if wide else (360, 200)
    known = [
        (x, y) for line in lines for x, y in zip(line.x, line.y, strict=True) if math.isfinite(x) and math.isfinite(y)
    ]
    head = f"<figcaption>{html.escape(title)}</figcaption>"
    if not known:
        return f"<figure>{head}<p class=none>no finite value was logged</p></figure>"
    right = max(max(x for x, _ in known), 1.0)
    low, high = limits or _limits([y for _, y in known])
    ticks_y, ticks_x = _ticks(low, high), _ticks(0.0, right)

    def place(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + (width - _LEFT - _RIGHT) * x / right
        down = _TOP + (height - _TOP - _BOTTOM) * (high - y) / (high - low)
        return round(across, 1), round(down, 1)

    out = []
    for y in ticks_y:
        _, at = place(0, y)
        out.append(f"<line class=grid x1={_LEFT} x2={width - _RIGHT} y1={at} y2={at} />")
        out.append(f"<text class=y x={_LEFT - 5} y={at + 4}>{_tick_text(y, ticks_y)}</text>")
    for x in ticks_x:
        at, _ = place(x, low)
        out.append(f"<text class=x x={at} y={height - 6}>{_short(x)}</text>")
    for x in marks:
        at, _ = place(x, low)
        out.append(f"<line class=mark x1={at} x2={at} y1={_TOP} y2={height - _BOTTOM} />")
    # an svg of its own cuts off what lies outside of the limits
    out.append(f'<svg x=0 y=0 width={width} height={height - _BOTTOM} viewBox="0 0 {width} {height - _BOTTOM}">')
    out += [_drawn(line, place) for line in sorted(lines, key=lambda line: line.look != "faint")]
    out.append("</svg>")
    out.append(f"<line class=cursor x1=0 x2=0 y1={_TOP} y2={height - _BOTTOM} visibility=hidden />")
    named = [line for line in lines if line.look != "faint"]
    data = {
        "left": _LEFT, "right": width - _RIGHT, "most": right,
        "lines": [{"name": line.name, **_rounded(line)} for line in named],
    }  # fmt: skip
    legend = "".join(f'<span class="key s{line.colour} {line.look}">{html.escape(line.name)}</span>' for line in named)
    text = html.escape(json.dumps(data, allow_nan=False), quote=True)
    return (
        f'<figure class="{"wide" if wide else "small"}">{head}<svg viewBox="0 0 {width} {height}" role=img '
        f'aria-label="{html.escape(title, quote=True)}" data-lines="{text}">{"".join(out)}</svg>'
        f"<div class=legend>{legend if len(named) > 1 else ''}<output></output></div></figure>"
    )


def block_map(layer: str, shares: Sequence[Sequence[float]], caption: str) -> str:
    """A figure of which key blocks (across) the queries of each block (down) chose; darker is more often."""
    count, cell = len(shares), 240 / max(len(shares), 1)
    out = [f'<polygon class=past points="0,0 0,{count} {count},{count}" />']
    for row, values in enumerate(shares):
        for column, share in enumerate(values):
            if share > 0:
                # the square root keeps single choices of past blocks visible beside the diagonal
                title = f"<title>query block {row}, key block {column}: {share:.0%}</title>" if count <= 32 else ""
                out.append(f"<rect x={column} y={row} width=1 height=1 opacity={math.sqrt(share):.2f}>{title}</rect>")
    return (
        f"<figure class=map><figcaption>{html.escape(layer)}</figcaption>"
        f'<svg viewBox="0 0 {count} {count}" width={round(count * cell)} role=img shape-rendering=crispEdges '
        f'aria-label="{html.escape(layer, quote=True)}: chosen blocks">{"".join(out)}</svg>'
        f"<p>{html.escape(caption)}</p></figure>"
    )


def load_map(rows: Sequence[Mapping[str, Any]]) -> str:
    """A figure with a row per MoE layer and a cell per expert: its tokens over the mean, full colour at twice that."""
    experts = max(len(row["counts"]) for row in rows)
    width, height, left = 360, 18 * len(rows), 54
    size = (width - left) / experts
    out = []
    for number, row in enumerate(rows):
        mean = max(sum(row["counts"]) / len(row["counts"]), 1e-9)
        out.append(f"<text class=y x={left - 6} y={18 * number + 13}>layer {row['layer']}</text>")
        for expert, tokens in enumerate(row["counts"]):
            load = tokens / mean
            out.append(
                f"<rect class={'load' if tokens else 'dead'} x={left + size * expert:.1f} y={18 * number + 1} "
                f"width={max(size - 1, size * 0.8):.1f} height=16 opacity={min(load / 2, 1) if tokens else 1:.2f}>"
                f"<title>layer {row['layer']}, expert {expert}: {load:.2f} x the mean</title></rect>"
            )
    return (
        f'<figure class=loads><svg viewBox="0 0 {width} {height}" role=img aria-label="expert load">'
        f"{''.join(out)}</svg></figure>"
    )


def thinned(x: Sequence[float], y: Sequence[float], points: int = POINTS) -> tuple[list[float], list[float]]:
    """At most `points` points of a line, by the lowest and highest of each stretch, so that no spike gets lost."""
    if len(x) <= points:
        return list(x), list(y)
    edges = np.linspace(0, len(x), points // 2 + 1).astype(int)
    values = np.asarray(y, dtype=np.float64)
    kept: set[int] = set()
    for start, stop in pairwise(edges):
        part = values[start:stop]
        if np.isfinite(part).any():
            kept |= {int(start + np.nanargmin(part)), int(start + np.nanargmax(part))}
    order = sorted(kept)
    return [x[i] for i in order], [y[i] for i in order]


def _drawn(line: Line, place: Any) -> str:
    x, y = thinned(line.x, line.y)
    if line.look == "points" or len(x) == 1:
        dots = "".join(
            "<circle cx={} cy={} r=3 />".format(*place(a, b)) for a, b in zip(x, y, strict=True) if math.isfinite(b)
        )
        return f'<g class="dots s{line.colour}">{dots}</g>{_path(line, x, y, place)}'
    return _path(line, x, y, place)


def _path(line: Line, x: Sequence[float], y: Sequence[float], place: Any) -> str:
    steps, pen = [], "M"
    for a, b in zip(x, y, strict=True):
        if not (math.isfinite(a) and math.isfinite(b)):
            pen = "M"
            continue
        across, down = place(a, b)
        steps.append(f"{pen}{across} {down}")
        pen = "L"
    return f'<path class="{line.look} s{line.colour}" d="{"".join(steps)}" />'


def _rounded(line: Line) -> dict[str, list[float]]:
    x, y = thinned(line.x, line.y)
    pairs = [(a, float(f"{b:.4g}")) for a, b in zip(x, y, strict=True) if math.isfinite(a) and math.isfinite(b)]
    return {"x": [a for a, _ in pairs], "y": [b for _, b in pairs]}


def _limits(values: Sequence[float]) -> tuple[float, float]:
    # the first steps of a run and single spikes would flatten all the rest
    low, high = (float(np.percentile(values, share)) for share in (0.5, 99.0))
    low, high = min(low, values[-1]), max(high, values[-1])
    if high - low < 1e-9 * max(abs(high), 1.0):
        air = max(abs(high) * 0.1, 1e-9)
        return low - air, high + air
    air = 0.06 * (high - low)
    return max(low - air, 0.0) if low >= 0 else low - air, high + air


def _ticks(low: float, high: float) -> list[float]:
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step for step in (power, 2 * power, 2.5 * power, 5 * power, 10 * power) if step >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _tick_text(value: float, ticks: Sequence[float]) -> str:
    gap = abs(ticks[1] - ticks[0]) if len(ticks) > 1 else abs(value) or 1.0
    if max(map(abs, ticks)) >= 10_000:
        return _short(value)
    if gap < 1e-3:
        return f"{value:.1e}".replace("e-0", "e-")
    return f"{value:.{max(0, -math.floor(math.log10(gap) + 1e-9))}f}" if gap < 1 else f"{value:g}"


def _short(value: float) -> str:
    return format_count(value).replace(".0", "").replace(".00", "")
