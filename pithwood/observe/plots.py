"""Pictures of a run: the loss curve, and which blocks each query block chose.

Legend: T tokens, S selections per token, k ids per selection, Q query blocks, B key blocks.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pithwood.errors import naming
from pithwood.observe.console import format_count
from pithwood.observe.metrics import selection_stats
from pithwood.ops.packing import Packing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TRAIN, _VALIDATION, _GZIP, _INK, _FUTURE = "#2f6db3", "#d1495b", "#6b7280", "#1f2937", "#eceef1"


def plot_loss(
    events: Sequence[Mapping[str, Any]], gzip_bits_per_byte: float | None, path: Path | str, title: str | None = None
) -> None:
    """Draw train and validation bits per byte against tokens seen, with `gzip -9` of the validation text as a line.

    events              as `read_events` returns them; train and validation events with `bits_per_byte` and `tokens` are
                        drawn
    gzip_bits_per_byte  None or not finite: no line
    path                PNG file, replaced atomically
    title               default: the recipe named by the last `run` event

    Steps that are not finite leave a gap. The axis is cut so that the first steps, near 8 bits, do not flatten the
    rest.
    """
    train_x, train_y = _curve(events, "train")
    valid_x, valid_y = _curve(events, "validation")
    gzip_bits = gzip_bits_per_byte if gzip_bits_per_byte is not None and math.isfinite(gzip_bits_per_byte) else None
    smooth_y = smooth(train_y)

    low, high = loss_limits(train_y, smooth_y, valid_y, gzip_bits)

    fig, ax = new_figure(7.6, 4.4)
    labels: list[tuple[float, str, str]] = []
    if len(train_x):
        if len(train_x) > 1:
            ax.plot(train_x, train_y, color=_TRAIN, linewidth=0.7, alpha=0.3)
        alone = len(train_x) == 1
        ax.plot(train_x, smooth_y, color=_TRAIN, linewidth=1.8, marker="o" if alone else "", clip_on=not alone)
        _label_last(labels, smooth_y, "train", _TRAIN)
    if len(valid_x):
        ax.plot(valid_x, valid_y, color=_VALIDATION, linewidth=1.2)
        # Not clipped, or the last marker would be cut in half by the edge; those above the axis are left out by hand.
        visible = np.where(valid_y <= high, valid_y, np.nan)
        ax.plot(
            valid_x, visible, "o", color=_VALIDATION, markersize=4.8, markeredgecolor="white", clip_on=False, zorder=3
        )
        _label_last(labels, valid_y, "validation", _VALIDATION)
    if gzip_bits is not None:
        ax.axhline(gzip_bits, color=_GZIP, linewidth=1.2, linestyle=(0, (5, 3)))
        labels.append((gzip_bits, f"gzip -9  {gzip_bits:.3f}", _GZIP))

    ax.set_ylim(low, high)
    last = max([*train_x, *valid_x], default=1.0)
    ax.set_xlim(0, max(last, 1.0))
    ax.xaxis.set_major_formatter(lambda value, _: format_count(value).replace(".0", ""))
    ax.set_xlabel("training tokens")
    ax.set_ylabel("bits per byte")
    ax.set_title(_loss_title(events, title), loc="left", fontsize=11, color=_INK, fontweight="bold")
    ax.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    if not labels:
        ax.text(0.5, 0.5, "no losses logged", transform=ax.transAxes, ha="center", color=_GZIP)
    for (value, text, colour), y in zip(labels, _spread([v for v, _, _ in labels], low, high), strict=True):
        # A label next to the end of its line; a leader where it had to move to stay legible.
        ax.annotate(
            text,
            xy=(1.0, min(max(value, low), high)),
            xytext=(1.025, y),
            xycoords=("axes fraction", "data"),
            textcoords=("axes fraction", "data"),
            color=colour,
            va="center",
            fontsize=9.5,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.7, "shrinkA": 1, "shrinkB": 0},
        )
    save_figure(fig, path)


def plot_blocks(selections: Mapping[Any, tuple[Tensor, int]], path: Path | str, title: str | None = None) -> None:
    """Draw, for each layer, how often the queries of each block chose each key block.

    selections  layer (number or title) -> (ids [T, S, k] int32 of one document that starts at query 0, block_size);
                {} draws a note instead
    path        PNG file, replaced atomically

    Colour is the share of (query, set) pairs of the query block that chose the key block: the own block on the diagonal
    is 1, the first k - 1 blocks see everything, blocks that no query can see are grey. Panel titles carry own share and
    entropy as `selection_stats` defines them.
    """
    from matplotlib.colors import PowerNorm
    from matplotlib.ticker import MaxNLocator

    if not selections:
        fig, ax = new_figure(6.0, 2.0)
        ax.set_axis_off()
        ax.text(0.5, 0.5, "no layer of this model selects blocks", transform=ax.transAxes, ha="center", color=_GZIP)
        save_figure(fig, path)
        return

    columns = min(len(selections), max(2, math.ceil(math.sqrt(len(selections)))) if len(selections) > 4 else 4)
    rows = math.ceil(len(selections) / columns)
    fig, axes = new_panels(rows, columns)
    # Most shares of past blocks lie near (k - 1) / blocks: the square root keeps them visible beside the diagonal.
    norm = PowerNorm(0.5, vmin=0.0, vmax=1.0)
    image = None
    for index, (layer, (ids_TSk, block_size)) in enumerate(selections.items()):
        ax = axes[index]
        share_QB = block_shares(ids_TSk, block_size).numpy()
        future = np.triu(np.ones(share_QB.shape, dtype=bool), k=1)
        image = ax.imshow(
            np.ma.masked_array(share_QB, future), norm=norm, cmap=_block_colours(), interpolation="nearest"
        )
        stats = selection_stats(ids_TSk, Packing.from_lengths([ids_TSk.shape[0]], device=ids_TSk.device), block_size)
        name = layer if isinstance(layer, str) else f"layer {layer}"
        own, entropy = float(stats["own_share"]), float(stats["entropy"])
        ax.set_title(f"{name}\nown {own:.0%}, entropy {_number(entropy)}", fontsize=9, color=_INK)
        ax.set_facecolor(_FUTURE)
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        ax.tick_params(labelsize=8, length=2)
        if index + columns >= len(selections):
            ax.set_xlabel("key block", fontsize=9)
        if index % columns == 0:
            ax.set_ylabel("query block", fontsize=9)
    for ax in axes[len(selections) :]:
        ax.set_axis_off()
    assert image is not None
    bar = fig.colorbar(image, ax=axes, shrink=0.85 if rows == 1 else 0.6, pad=0.015, ticks=[0, 0.05, 0.2, 0.5, 1])
    bar.ax.set_yticklabels(["0", "5%", "20%", "50%", "100%"], fontsize=8)
    bar.set_label("queries that chose the block", fontsize=9)
    bar.outline.set_visible(False)  # type: ignore[operator]
    sizes = sorted({block_size for _, block_size in selections.values()})
    head = title or "Chosen blocks"
    fig.suptitle(
        f"{head}  (block size {', '.join(map(str, sizes))})", x=0.01, ha="left", fontsize=11, fontweight="bold"
    )
    save_figure(fig, path)


def block_shares(ids_TSk: Tensor, block_size: int) -> Tensor:
    """[Q, B] fp64 on the CPU: share of the (query, set) pairs of each query block that chose each key block.

    Raises ValueError if the ids name blocks that the document does not have.
    """
    tokens, sets, _ = ids_TSk.shape
    ids_TSk = ids_TSk.detach().cpu().long()
    blocks = max(1, -(-tokens // block_size))
    if ids_TSk.numel() and int(ids_TSk.max()) >= blocks:
        raise ValueError(
            f"block id {int(ids_TSk.max())} in a document of {blocks} blocks; pass the ids of one document only"
        )
    query_block_T = torch.arange(tokens) // block_size
    cell_TSk = query_block_T[:, None, None] * blocks + ids_TSk
    count = torch.bincount(cell_TSk[ids_TSk >= 0], minlength=blocks * blocks).view(blocks, blocks)
    queries_Q = torch.bincount(query_block_T, minlength=blocks)
    return count.double() / (queries_Q * sets).clamp(min=1).double()[:, None]


def loss_limits(
    train_y: np.ndarray, smooth_y: np.ndarray, valid_y: np.ndarray, gzip_bits: float | None
) -> tuple[float, float]:
    """Limits of the loss axis: everything after the first tenth of the run, gzip's line, and some air."""
    tail = np.concatenate([smooth_y[len(smooth_y) // 10 :], valid_y[len(valid_y) // 10 :]])
    raw = train_y[len(train_y) // 3 :]
    reference = [] if gzip_bits is None else [gzip_bits]
    shown = [*tail[np.isfinite(tail)], *reference]
    if not shown:
        return 0.0, 8.0
    noise = [*raw[np.isfinite(raw)]] or shown
    # The noise of single steps is kept in view, single spikes are not.
    low = min([*shown, float(np.percentile(noise, 1))])
    high = max([*shown, float(np.percentile(noise, 99))])
    margin = max(0.06 * (high - low), 0.02 * abs(high), 0.02)
    return max(0.0, low - margin), high + margin


def _curve(events: Sequence[Mapping[str, Any]], kind: str) -> tuple[np.ndarray, np.ndarray]:
    tokens_at = {event["step"]: event["tokens"] for event in events if event["kind"] == "train" and "tokens" in event}
    points = []
    for event in events:
        if event["kind"] == kind and "bits_per_byte" in event:
            # A validation stands where its step stands, whatever it counts itself.
            x = tokens_at.get(event["step"], event.get("tokens"))
            if x is not None:
                points.append((float(x), float(event["bits_per_byte"])))
    points.sort()
    array = np.array(points, dtype=np.float64).reshape(-1, 2)
    return array[:, 0], np.where(np.isfinite(array[:, 1]), array[:, 1], np.nan)


def smooth(y: np.ndarray, sigma: float | None = None) -> np.ndarray:
    """Centred Gaussian mean, gaps ignored; it does not lag behind the curve.

    sigma  the Gaussian's width in points; by default its window is about a fiftieth of the run
    """
    sigma = max(len(y) / 120 if sigma is None else sigma, 0.5)
    reach = math.ceil(3 * sigma)
    weight = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    known = np.isfinite(y)
    if not known.any():
        return y.copy()
    middle = slice(reach, reach + len(y))
    total = np.convolve(np.where(known, y, 0.0), weight)[middle]
    mass = np.convolve(known.astype(np.float64), weight)[middle]
    return np.where(known, total / np.maximum(mass, 1e-12), np.nan)


def common_sigma(tokens: Sequence[Sequence[float]]) -> float:
    """Width in tokens of a Gaussian that smooths several curves alike, whatever their lengths; 0 if none has two
    points.

    tokens  where the points of each curve stand, rising; they are as good as evenly spaced

    It suits the longest, but is at most a twentieth of the shortest, which would otherwise lose its shape.
    """
    several = [(x[-1] - x[0], len(x) - 1) for x in tokens if len(x) > 1 and x[-1] > x[0]]
    if not several:
        return 0.0
    spans = [span for span, _ in several]
    # less than half a step is no mean, and steps may hold different numbers of tokens
    return max(min(max(spans) / 120, min(spans) / 20), 0.5 * max(span / steps for span, steps in several))


def in_points(sigma: float, tokens: Sequence[float]) -> float:
    """A width in tokens as one in points of a curve."""
    several = len(tokens) > 1 and tokens[-1] > tokens[0]
    return sigma * (len(tokens) - 1) / (tokens[-1] - tokens[0]) if several else 0.0


def _label_last(labels: list[tuple[float, str, str]], y: np.ndarray, name: str, colour: str) -> None:
    known = y[np.isfinite(y)]
    if len(known):
        labels.append((float(known[-1]), f"{name}  {known[-1]:.3f}", colour))


def _spread(values: Sequence[float], low: float, high: float) -> list[float]:
    """Positions near the values, in the limits, no two closer than a line of text."""
    gap = 0.065 * (high - low)
    order = sorted(range(len(values)), key=lambda i: values[i])
    placed = [min(max(values[i], low), high) for i in order]
    # Push up from below, then back down from the top edge.
    for i in range(1, len(placed)):
        placed[i] = max(placed[i], placed[i - 1] + gap)
    limit = high
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], limit)
        limit = placed[i] - gap
    result = [0.0] * len(values)
    for i, y in zip(order, placed, strict=True):
        result[i] = y
    return result


def _loss_title(events: Sequence[Mapping[str, Any]], title: str | None) -> str:
    if title is not None:
        return title
    recipes = [str(event["recipe"]) for event in events if event["kind"] in ("run", "resume") and "recipe" in event]
    return f"{recipes[-1]}: loss while training" if recipes else "loss while training"


def _number(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "-"


def _block_colours() -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("blocks", ["#ffffff", "#bcd5f0", "#5b9bd8", "#1f5fa8", "#0b2545"])


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """One axes on a figure of its own: no pyplot, hence no global state and no display."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(width, height), layout="constrained", dpi=150)
    ax = fig.add_subplot()
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    return fig, ax


def new_panels(rows: int, columns: int) -> tuple[Figure, list[Axes]]:
    """A grid of small axes, row by row."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(max(2.5 * columns + 1.0, 4.6), 2.75 * rows + 0.5), layout="constrained", dpi=150)
    return fig, list(fig.subplots(rows, columns, squeeze=False).flat)


def save_figure(fig: Figure, path: Path | str) -> None:
    """Write a figure as a PNG file, replaced atomically; its folder is made if it is missing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with naming(path):
        fig.savefig(temporary, format="png")
    os.replace(temporary, path)
