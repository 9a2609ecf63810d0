"""Pictures of benchmark results: time against length."""

from __future__ import annotations

import math
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pithwood.bench.attention import measured
from pithwood.bench.cases import PASSES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOBA = ("#d1495b", "#2f6db3", "#2a9d6f", "#8e5bb5", "#c98a1b")
_DENSE = {"fa4": "#111827", "cudnn": "#4b5563", "flash": "#9ca3af", "varlen": "#6b7280", "sdpa": "#4b5563"}
_INK = "#1f2937"


def plot_attention(rows: list[dict[str, Any]], path: Path) -> bool:
    """Draw median time against length, both logarithmic; one panel per shape of heads and pass; False if no row fits.

    rows    of attention.json; what was not measured and packed documents of mixed lengths are left out
    path    PNG file, replaced atomically

    MoBA is drawn per (block size, top k) in colours, FlexAttention dotted, dense attention in greys. A line joins
    what differs in length alone: all points of a panel where all have about equally many tokens, else those of equally
    many sequences; there points of another number than most are hollow, and the label of the axis tells it.
    """
    from matplotlib.figure import Figure

    drawn = [row for row in rows if measured(row) and row["op"] in ("moba", "dense") and row["lengths"] is None]
    shapes = list(dict.fromkeys(_shape(row) for row in drawn))
    passes = [p for p in PASSES if any(row["pass"] == p for row in drawn)]
    if not drawn:
        return False
    blocks = sorted({(row["block_size"], row["top_k"]) for row in drawn if row["op"] == "moba"})
    colours = {block: _MOBA[i % len(_MOBA)] for i, block in enumerate(blocks)}
    panels: dict[tuple[Any, str], list[dict[str, Any]]] = {(shape, p): [] for shape in shapes for p in passes}
    for row in drawn:
        panels[_shape(row), row["pass"]].append(row)
    panels = {panel: here for panel, here in panels.items() if here}
    across = min(2, len(panels))
    down = math.ceil(len(panels) / across)
    fig = Figure(figsize=(5.6 * across + 0.6, 4.4 * down), layout="constrained", dpi=130)
    axes = fig.subplots(down, across, squeeze=False).flat
    for ax, ((shape, pass_), here) in zip(axes, panels.items(), strict=False):
        _panel(ax, here, colours)
        what = "forward + backward" if pass_ == "fwd+bwd" else "forward"
        ax.set_title(f"{what}\n{_title(shape)}", loc="left", fontsize=9.5, color=_INK)
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    fig.savefig(temporary, format="png")
    os.replace(temporary, path)
    return True


def _shape(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[c] for c in ("heads", "kv_heads", "head_dim", "dtype", "inputs"))


def _title(shape: tuple[Any, ...]) -> str:
    heads, kv_heads, dim, dtype, inputs = shape
    return f"{heads} query and {kv_heads} KV heads of {dim}, {dtype}, {inputs} inputs"


def _panel(ax: Axes, rows: list[dict[str, Any]], colours: dict[tuple[int, int], str]) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    lines: dict[tuple[str, int | None, int | None], list[tuple[int, int, float]]] = {}
    for row in rows:
        name = (row["impl"], row["block_size"], row["top_k"])
        lines.setdefault(name, []).append((row["length"], row["sequences"], row["median_ms"]))
    usual = _usual_sequences(rows)
    for (impl, block, k), points in sorted(lines.items(), key=lambda item: -max(ms for *_, ms in item[1])):
        points.sort()
        moba = block is not None and k is not None
        label = impl if not moba else f"{'MoBA' if impl == 'pithwood' else impl} ({block}, {k})"
        colour = colours[block, k] if block is not None and k is not None else _DENSE.get(impl, "#6b7280")
        style = ":" if impl == "flex" else "-" if moba else "--"
        counts = [None] if usual is None else list(dict.fromkeys(count for _, count, _ in points))
        for count in counts:
            own = [(length, ms) for length, other, ms in points if count in (None, other)]
            ax.plot(
                [length for length, _ in own], [ms for _, ms in own], style, color=colour, label=label,
                marker="o" if moba else "s", markersize=5 if moba else 3.5, linewidth=1.8 if moba else 1.2,
                markerfacecolor=colour if count == usual else "white",
            )  # fmt: skip
            label = "_"  # a legend's entry for the first line only
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    lengths = sorted({row["length"] for row in rows})
    ax.set_xticks(lengths, [_tokens(length) for length in lengths])
    ax.xaxis.set_minor_formatter(NullFormatter())
    times = [ms for points in lines.values() for *_, ms in points]
    if times:
        # whole decades, so that at least two of them are labelled
        ax.set_ylim(10 ** math.floor(math.log10(min(times))), 10 ** math.ceil(math.log10(max(times) * 1.05)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda ms, _: f"{ms:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel(f"tokens per sequence ({_sequences(rows, usual)})")
    ax.set_ylabel("median ms")
    ax.grid(which="major", color="#e5e7eb", linewidth=0.8)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    if lines:
        ax.legend(fontsize=8, frameon=False)


def _usual_sequences(rows: list[dict[str, Any]]) -> int | None:
    """How many sequences most rows have; None where all have about equally many tokens."""
    tokens = [row["length"] * row["sequences"] for row in rows]
    if max(tokens) < 1.1 * min(tokens):
        return None
    return Counter(row["sequences"] for row in rows).most_common(1)[0][0]


def _sequences(rows: list[dict[str, Any]], usual: int | None) -> str:
    """ "2 sequences; hollow: 1", "1 to 32 sequences, together about 64K tokens"."""
    counts = sorted({row["sequences"] for row in rows})
    if usual is None and len(counts) > 1:
        total = max(row["length"] * row["sequences"] for row in rows)
        return f"{counts[0]} to {counts[-1]} sequences, together about {_tokens(total)} tokens"
    most = counts[0] if usual is None else usual
    others = ", ".join(str(count) for count in counts if count != most)
    return f"{most} sequence{'' if most == 1 else 's'}" + (f"; hollow: {others}" if others else "")


def _tokens(length: int) -> str:
    for unit, name in ((1 << 20, "M"), (1 << 10, "K")):
        if length >= unit:
            return f"{length / unit:g}{name}"
    return str(length)
