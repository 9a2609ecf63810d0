"""Pictures of what `inspect`, `evaluate` and `runs compare` measured. They draw the plain data of `pithwood.facts`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pithwood.observe.console import format_count
from pithwood.observe.plots import common_sigma, in_points, new_figure, new_panels, save_figure, smooth

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curve = Mapping[str, Sequence[float]]

_INK, _GREY, _GRID = "#1f2937", "#6b7280", "#e5e7eb"
_COLOURS = ("#2f6db3", "#d1495b", "#2a9d6f", "#b7791f", "#7b5ea7", "#4b5563", "#c2577f", "#168aad")

_PANELS = (
    ("loss, nats per token", "loss", False),
    ("learning rate", "lr", False),
    ("gradient norm", "grad_norm", True),
    ("busiest expert over the mean", "expert_load_max_over_mean", False),
    ("tokens per second", "tokens_per_s", False),
    ("entropy of block choices", "block_entropy", False),
)
"""Title, curve, and whether the axis is logarithmic."""


def plot_curves(curves: Mapping[str, Curve], path: Path | str, title: str) -> None:
    """Draw loss, learning rate, gradient norm, expert load, speed and block choices over the steps, one panel each.

    curves  as `facts.curves.curves` returns them; panels without a curve are left out, values that are not finite leave
            a gap; validation losses stand in the panel of the loss
    path    PNG file, replaced atomically
    """
    shown = [panel for panel in _PANELS if panel[1] in curves]
    if not shown:
        _note("no steps logged", path)
        return
    columns = min(3, len(shown))
    fig, axes = new_panels(math.ceil(len(shown) / columns), columns)
    fig.set_size_inches(3.1 * columns + 0.6, 2.3 * math.ceil(len(shown) / columns) + 0.5)
    for ax, (name, key, logarithmic) in zip(axes, shown, strict=False):
        x, y = _points(curves[key], "steps")
        if key in ("lr",) or len(x) < 30:
            ax.plot(x, y, color=_COLOURS[0], linewidth=1.6, marker="o" if len(x) == 1 else "")
        else:
            ax.plot(x, y, color=_COLOURS[0], linewidth=0.6, alpha=0.3)
            ax.plot(x, smooth(y), color=_COLOURS[0], linewidth=1.6)
        if key == "loss" and "validation/loss" in curves:
            x, y = _points(curves["validation/loss"], "steps")
            ax.plot(x, y, "o-", color=_COLOURS[1], linewidth=1.0, markersize=3.5)
            for place, text, colour in ((0.98, "train", _COLOURS[0]), (0.86, "validation", _COLOURS[1])):
                ax.text(0.98, place, text, transform=ax.transAxes, ha="right", va="top", color=colour, fontsize=8)
        _dress(ax, name)
        if logarithmic and np.nanmin(y, initial=math.inf) > 0:
            _logarithmic(ax)
        if key == "tokens_per_s":
            ax.set_ylim(bottom=0)
            ax.yaxis.set_major_formatter(lambda value, _: format_count(value).replace(".0", ""))
        ax.xaxis.set_major_formatter(lambda value, _: format_count(value).replace(".0", ""))
        ax.set_xlabel("step", fontsize=8)
    for ax in axes[len(shown) :]:
        ax.set_axis_off()
    fig.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold", color=_INK)
    save_figure(fig, path)


def plot_routing(routing: Mapping[str, Any], path: Path | str, title: str) -> None:
    """Draw each layer's expert load as a row of a map, and how far back its selected blocks lie.

    routing  as `facts.routing.measure_routing` returns it
    path     PNG file, replaced atomically

    The map shows load over the mean, experts sorted by it; white is an even load. The lines show the share of entries
    by distance over that of a selection without preference, 1 being none.
    """
    experts, blocks = routing["experts"], routing["blocks"]
    if not experts and not blocks:
        _note("this model has no router and selects no blocks", path)
        return
    fig, axes = new_panels(1, bool(experts) + bool(blocks))
    fig.set_size_inches(4.8 * len(axes), 3.6)
    if experts:
        _expert_map(axes[0], experts)
    if blocks:
        _distances(axes[-1], blocks)
    fig.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold", color=_INK)
    save_figure(fig, path)


def plot_positions(results: Mapping[str, Sequence[Mapping[str, Any]]], path: Path | str, title: str) -> None:
    """Draw loss by position, a line per result, with two standard errors to either side.

    results  label -> buckets as `evaluate.position.loss_by_position` returns them
    path     PNG file, replaced atomically
    """
    fig, ax = new_figure(7.2, 4.2)
    for number, (label, buckets) in enumerate(results.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        # the middle of a bucket on the logarithmic axis, on which position 0 stands at 1
        x = np.array([math.sqrt((row["from"] + 1) * (row["to"] + 1)) for row in buckets])
        y = np.array([row["loss"] for row in buckets])
        error = 2 * np.nan_to_num(np.array([row["standard_error"] for row in buckets], dtype=np.float64))
        ax.fill_between(x, y - error, y + error, color=colour, alpha=0.15, linewidth=0)
        ax.plot(x, y, "o-", color=colour, linewidth=1.6, markersize=4, label=label)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    ax.set_xlabel("tokens seen (position in the document, plus 1)", fontsize=9)
    ax.set_ylabel("loss, nats per token", fontsize=9)
    ax.grid(color=_GRID, linewidth=0.8)
    if len(results) > 1:
        ax.legend(frameon=False, fontsize=9)
    ax.text(0.99, 0.02, "bands: two standard errors", transform=ax.transAxes, ha="right", color=_GREY, fontsize=8)
    ax.set_title(title, loc="left", fontsize=11, fontweight="bold", color=_INK)
    save_figure(fig, path)


def plot_comparison(runs: Mapping[str, Mapping[str, Curve]], path: Path | str) -> None:
    """Draw the losses of several runs against tokens: training smoothed over the same tokens in all, validation as
    points.

    runs  name -> curves as `facts.curves.curves` returns them. Bits per byte if all runs logged them, else nats
    path  PNG file, replaced atomically
    """
    in_bits = all("bits_per_byte" in curves for curves in runs.values())
    key, unit = ("bits_per_byte", "bits per byte") if in_bits else ("loss", "loss, nats per token")
    fig, ax = new_figure(7.6, 4.4)
    sigma = common_sigma([curves[key]["tokens"] for curves in runs.values()])
    tails = []
    for number, (name, curves) in enumerate(runs.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        x, y = _points(curves[key], "tokens")
        y = smooth(y, in_points(sigma, curves[key]["tokens"]))
        ax.plot(x, y, color=colour, linewidth=1.5, marker="o" if len(x) == 1 else "", label=name)
        tails += [*y[len(y) // 10 :]]
        if (valid := curves.get(f"validation/{key}")) is not None:
            x, y = _points(valid, "tokens")
            ax.plot(x, y, "o", color=colour, markersize=5, markeredgecolor="white")
            tails += [*y]
    shown = [value for value in tails if math.isfinite(value)]
    if shown:
        # the first steps, near a uniform guess, would flatten the rest
        margin = 0.08 * max(max(shown) - min(shown), 0.02)
        ax.set_ylim(min(shown) - margin, max(shown) + margin)
    ax.xaxis.set_major_formatter(lambda value, _: format_count(value).replace(".0", ""))
    ax.set_xlim(left=0)
    ax.set_xlabel("training tokens")
    ax.set_ylabel(unit)
    ax.grid(axis="y", color=_GRID, linewidth=0.8)
    ax.legend(frameon=False, fontsize=9)
    over = f", means over about {format_count(2.5 * sigma)} tokens" if sigma else ""
    title = f"training (lines{over}) and validation (points)"
    ax.set_title(title, loc="left", fontsize=11, fontweight="bold", color=_INK)
    save_figure(fig, path)


def _expert_map(ax: Axes, experts: Sequence[Mapping[str, Any]]) -> None:
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.ticker import MaxNLocator

    widest = max(len(row["counts"]) for row in experts)
    load = np.full((len(experts), widest), np.nan)
    for number, row in enumerate(experts):
        counts = np.sort(np.array(row["counts"], dtype=np.float64))[::-1]
        load[number, : len(counts)] = counts / max(counts.mean(), 1e-12)
    norm = TwoSlopeNorm(1.0, vmin=0.0, vmax=max(2.0, float(np.nanmax(load))))
    image = ax.imshow(load, norm=norm, cmap="RdBu_r", aspect="auto", interpolation="nearest")
    ax.set_yticks(range(len(experts)), [str(row["layer"]) for row in experts], fontsize=8)
    ax.set_ylabel("layer", fontsize=9)
    ax.set_xlabel("experts, busiest first", fontsize=9)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.tick_params(labelsize=8, length=2)
    ax.set_title("expert load over the mean", loc="left", fontsize=9.5, color=_INK)
    assert ax.figure is not None
    bar = ax.figure.colorbar(image, ax=ax, shrink=0.9, pad=0.02)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)  # type: ignore[operator]


def _distances(ax: Axes, blocks: Sequence[Mapping[str, Any]]) -> None:
    for number, row in enumerate(blocks):
        past = [part for part in row["distances"] if part["from"] > 0 and part["uniform"] > 0]
        # many layers: a ramp from light to dark, so that depth can be seen
        shade = 1 - 0.75 * (len(blocks) - 1 - number) / max(len(blocks) - 1, 1)
        x = [math.sqrt(part["from"] * part["to"]) for part in past]
        y = [part["share"] / part["uniform"] for part in past]
        ax.plot(x, y, "o-", color=_COLOURS[0], alpha=shade, linewidth=1.3, markersize=3, label=f"layer {row['layer']}")
    ax.axhline(1.0, color=_GREY, linewidth=1.0, linestyle=(0, (5, 3)))
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    _dress(ax, "chosen over expected without preference")
    ax.set_ylim(bottom=0)
    ax.set_xlabel("blocks before the query's own", fontsize=9)
    if len(blocks) <= 8:
        ax.legend(frameon=False, fontsize=7.5)


def _points(curve: Curve, axis: str) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.array(curve[axis], dtype=np.float64), np.array(curve["values"], dtype=np.float64)
    return x, np.where(np.isfinite(y), y, np.nan)


def _dress(ax: Axes, title: str) -> None:
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    ax.set_title(title, loc="left", fontsize=9.5, color=_INK)
    ax.grid(axis="y", color=_GRID, linewidth=0.8)
    ax.tick_params(labelsize=8, length=2)


def _logarithmic(ax: Axes) -> None:
    """A logarithmic axis labelled with plain numbers, between powers of ten too: most curves span less than one."""
    from matplotlib.ticker import LogLocator, NullFormatter

    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.yaxis.set_minor_formatter(NullFormatter())


def _note(text: str, path: Path | str) -> None:
    fig, ax = new_figure(6.0, 2.0)
    ax.set_axis_off()
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", color=_GREY)
    save_figure(fig, path)
