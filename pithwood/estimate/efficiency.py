"""How much longer than its floor each part of a step takes: from the breakdowns of results files, else from constants.

Between measured lengths the efficiency is interpolated over the logarithm of the length; beyond them it stays that of
the nearest. Rows of the same attention come first; the other parts do not depend on it, so any row will do for them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from pithwood.estimate.work import attention_op
from pithwood.observe.step_parts import IDLE, PARTS
from pithwood.run import Run

Row = dict[str, Any]

ATTENTION = {"full": 0.70, "moba": 0.23}
DEFAULTS = {
    "experts": 0.65,
    "router and dispatch": 0.30,
    "dense": 0.60,
    "head and loss": 0.75,
    "optimizer": 0.60,
}
"""Floor over time where nothing was measured. ATTENTION: floor_ms / median_ms of forward and backward at 32K tokens in
bench/results/nvidia-h100-80gb-hbm3/attention.json. Experts: grouped products of 609 and 532 TFLOP/s of 790 on an H200,
and the SwiGLU between them. The rest is what such kernels usually reach."""
REST_SHARE = 0.04
"""Idle time and `other` as a share of the step where nothing was measured."""

OFFLOADED = "optim.offload_state=true"
"""A row with this setting does not tell how efficient an update is: its state's way decides how long it takes."""


@dataclass(frozen=True)
class Efficiency:
    """Of one run: floor over time by part, and what has no floor as a share of the rest of the step."""

    parts: dict[str, float]
    rest: float
    """Time of `other` and `idle` over the time of all other parts."""
    source: str
    """Where the numbers come from, in words."""
    layer_parameters: float | None = None
    """Parameters of the narrowest model that was measured, over its layers; None where nothing was measured."""


def efficiency(rows: Sequence[Row], run: Run, where: str = "results files") -> Efficiency:
    """What the breakdowns among `rows` say of a run's attention at its length.

    Of several rows at one length those count that are most like the run: first in their routing, then in the tokens of
    a micro-batch.
    """
    attention, seq_len = attention_op(run.phase(0).attention), run.seq_len
    known = [row for row in rows if row.get("status") == "ok" and row.get("breakdown")]
    same = [row for row in known if row["attention"]["op"] == attention]
    parts: dict[str, float] = {}
    for part in PARTS:
        if part == "other":
            continue
        chosen = same if part == "attention" or same else known
        if part == "optimizer":
            chosen = [row for row in chosen if OFFLOADED not in row.get("settings", ())]
        points = [(row["seq_len"], _of(row, part)) for row in _most_alike(chosen, run)]
        parts[part] = _interpolated(points, seq_len) or default(part, attention)
    rest = _interpolated([(row["seq_len"], _rest(row)) for row in _most_alike(same or known, run)], seq_len)
    if not known:
        return Efficiency(parts, REST_SHARE, "constants, as no breakdown of this device was measured")
    lengths = sorted({row["seq_len"] for row in same or known})
    said = f"breakdowns in {where} at {', '.join(map(str, lengths))} tokens"
    if not same:
        said += f", none of them with {attention} attention"
    precisions = {row["precision"] for row in same or known}
    if run.precision not in precisions:
        said += f", all in {' or '.join(sorted(precisions))} where this run is {run.precision}"
    narrowest = min(row["parameters"] / row["layers"] for row in same or known)
    return Efficiency(parts, REST_SHARE if rest is None else rest, said, narrowest)


def _most_alike(rows: Sequence[Row], run: Run) -> list[Row]:
    """At each length the rows that are most like the run."""

    def likeness(row: Row) -> tuple[bool, bool]:
        tokens = row["micro_batch"] * row["seq_len"] == run.samples_per_micro_batch * run.seq_len
        return row["routing"] == run.model.moe.routing, tokens

    best: dict[int, tuple[bool, bool]] = {}
    for row in rows:
        best[row["seq_len"]] = max(best.get(row["seq_len"], (False, False)), likeness(row))
    return [row for row in rows if likeness(row) == best[row["seq_len"]]]


def default(part: str, attention: str) -> float:
    """The constant of a part; attention that is not known counts as full."""
    return ATTENTION.get(attention, ATTENTION["full"]) if part == "attention" else DEFAULTS[part]


def read_rows(root: Path, device: str) -> tuple[list[Row], str]:
    """The rows of a device's train.json under bench/results and the file's name; no rows if there is none."""
    name = f"bench/results/{device}/train.json"
    path = root / name
    if not path.is_file():
        return [], name
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert isinstance(rows, list)
    return rows, name


def _of(row: Row, part: str) -> float | None:
    found = row["breakdown"]
    ms, floor = found["ms"].get(part, 0.0), found["floor_ms"].get(part, 0.0)
    return floor * found.get("repeated", {}).get(part, 1.0) / ms if ms > 0 and floor > 0 else None


def _rest(row: Row) -> float:
    ms = row["breakdown"]["ms"]
    rest = ms.get("other", 0.0) + ms.get(IDLE, 0.0)
    return rest / (sum(ms.values()) - rest)


def _interpolated(points: Sequence[tuple[int, float | None]], length: int) -> float | None:
    """The value at a length, linear in its logarithm between the means at measured lengths; None without points."""
    by_length: dict[int, list[float]] = {}
    for at, value in points:
        if value is not None:
            by_length.setdefault(at, []).append(value)
    known = sorted((at, sum(values) / len(values)) for at, values in by_length.items())
    if not known:
        return None
    if length <= known[0][0]:
        return known[0][1]
    for (low, low_value), (high, high_value) in pairwise(known):
        if length <= high:
            share = math.log(length / low) / math.log(high / low)
            return low_value + share * (high_value - low_value)
    return known[-1][1]
