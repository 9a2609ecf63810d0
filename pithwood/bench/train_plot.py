"""The picture of train.json: step time and memory against sequence length, full attention and MoBA."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pithwood.bench.train_rows import measured, processes
from pithwood.bench.train_sweep import STEP_TOKENS
from pithwood.bench.train_text import attention_words, length_words

Row = dict[str, Any]
COLOURS = {"full": "#111827", "moba": "#2f6db3"}
LINES = {"full": "s--", "moba": "o-"}
"""Where the two lie on each other both remain to be seen."""


def length_rows(rows: Sequence[Row], recipe: str | None = None) -> dict[str, dict[int, Row]]:
    """By attention and length the fastest row of a sweep over lengths: one process, random tokens, balanced routing,
    STEP_TOKENS a step or one sequence; of one number of layers and one (block size, top k) of MoBA, those with most
    rows.

    recipe  None takes that of most rows
    """
    fitting = [
        row
        for row in rows
        if processes(row) == 1
        and row["tokens"] == "fake"
        and row["routing"] == "balanced"
        and row["sequences"] == max(1, STEP_TOKENS // row["seq_len"])
        and row["attention"]["op"] in COLOURS
    ]
    kind = _commonest([_kind(row) for row in fitting if recipe in (None, row["recipe"])])
    found: dict[str, dict[int, Row]] = {}
    for op in COLOURS:
        own = [row for row in fitting if _kind(row) == kind and row["attention"]["op"] == op]
        blocks = _commonest([(row["attention"]["block_size"], row["attention"]["top_k"]) for row in own])
        for row in own:
            if (row["attention"]["block_size"], row["attention"]["top_k"]) != blocks:
                continue
            best = found.setdefault(op, {}).get(row["seq_len"])
            if best is None or _speed(row) > _speed(best):
                found[op][row["seq_len"]] = row
    return {op: dict(sorted(by_length.items())) for op, by_length in found.items()}


def plot_lengths(rows: Sequence[Row], path: Path) -> bool:
    """Draw seconds for STEP_TOKENS tokens, and peak memory, against length; False if fewer than two lengths are there.

    Where memory ran out a cross stands at the top of the memory panel. path: PNG file, replaced atomically.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    by_op = length_rows(rows)
    lengths = sorted({length for found in by_op.values() for length in found})
    if len(lengths) < 2:
        return False
    fig = Figure(figsize=(11.4, 4.4), layout="constrained", dpi=130)
    time, memory = fig.subplots(1, 2)
    for op, found in by_op.items():
        good = [row for row in found.values() if measured(row)]
        label = attention_words(next(iter(found.values()))["attention"])
        style = {"color": COLOURS[op], "markersize": 5, "linewidth": 1.8, "label": label}
        at = [row["seq_len"] for row in good]
        time.plot(at, [STEP_TOKENS / row["tokens_per_s"] for row in good], LINES[op], **style)
        memory.plot(at, [row["peak_gb"] for row in good], LINES[op], **style)
        lost = [row["seq_len"] for row in found.values() if not measured(row)]
        if lost:
            places = {"transform": memory.get_xaxis_transform(), "color": COLOURS[op]}
            memory.plot(lost, [0.97] * len(lost), "x", label=f"{label}: out of memory", **places)
    for ax, title in (
        (time, f"step time, seconds for {length_words(STEP_TOKENS)} tokens"),
        (memory, "peak memory, GB"),
    ):
        ax.set_xscale("log", base=2)
        ax.set_xticks(lengths)
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: length_words(round(value))))
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.set_title(title, loc="left", fontsize=9.5)
        ax.set_xlabel("tokens of a sequence")
        ax.grid(True, which="major", color="#e5e7eb", linewidth=0.7)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False)
    time.set_yscale("log", base=2)
    time.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    memory.set_ylim(bottom=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    fig.savefig(temporary, format="png")
    os.replace(temporary, path)
    return True


def _kind(row: Row) -> tuple[str, int]:
    return row["recipe"], row["layers"]


def _speed(row: Row) -> float:
    return row["tokens_per_s"] if measured(row) else 0.0


def _commonest(values: Sequence[Any]) -> Any:
    """The value that occurs most often, the first of several; None without values."""
    return max(values, key=values.count, default=None)
