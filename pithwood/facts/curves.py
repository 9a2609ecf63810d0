"""The curves in a run's event log: what moved over the steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

CURVES = (
    "loss",
    "bits_per_byte",
    "lr",
    "grad_norm",
    "expert_load_max_over_mean",
    "expert_load_entropy",
    "block_own_share",
    "block_entropy",
    "block_union_128",
    "tokens_per_s",
    "mfu",
    "peak_memory_gb",
)
"""Fields of train events that make a curve."""


def curves(events: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Name -> {steps, tokens, values} of every curve that the log holds; validation curves begin with "validation/".

    Values may be NaN or infinite where training was. Steps rise strictly: of a step logged twice the later line counts.
    """
    found: dict[str, dict[int, tuple[float, float]]] = {}
    for event in events:
        prefix = {"train": "", "validation": "validation/"}.get(event["kind"])
        if prefix is None:
            continue
        for name in CURVES:
            if name in event:
                found.setdefault(prefix + name, {})[event["step"]] = (event.get("tokens", math.nan), event[name])
    return {
        name: {
            "steps": sorted(points),
            "tokens": [points[step][0] for step in sorted(points)],
            "values": [points[step][1] for step in sorted(points)],
        }
        for name, points in found.items()
    }


def summarise_curve(curve: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """first, last, least, greatest and median of the finite values, and how many are not finite; NaN if none is."""
    values = [value for value in curve["values"] if math.isfinite(value)]
    lost = len(curve["values"]) - len(values)
    if not values:
        return {**dict.fromkeys(("first", "last", "least", "greatest", "median"), math.nan), "not_finite": lost}
    return {
        "first": values[0],
        "last": values[-1],
        "least": min(values),
        "greatest": max(values),
        "median": median(values),
        "not_finite": lost,
    }


def thin_curve(curve: Mapping[str, Sequence[float]], points: int) -> dict[str, list[float]]:
    """At most `points` of a curve's points, evenly spread, the first and the last among them."""
    count = len(curve["steps"])
    if count <= points:
        return {name: list(column) for name, column in curve.items()}
    kept = sorted({round(i * (count - 1) / (points - 1)) for i in range(points)})
    return {name: [column[i] for i in kept] for name, column in curve.items()}
