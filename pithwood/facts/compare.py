"""Runs side by side: the settings in which they differ, and their losses at equal tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from pithwood.facts.curves import curves
from pithwood.facts.listing import read_config
from pithwood.observe.events import EVENTS_FILE, read_events

WINDOW = 0.05
"""Training losses are means over this share of the tokens up to the point of comparison."""
NOT_SET = "-"
"""Stands for a setting that a run does not have."""


def compare_runs(folders: Sequence[Path]) -> dict[str, Any]:
    """Settings and metrics of two or more runs.

    returns  runs: their names
             settings: rows {key, values} for every setting that is not the same in all; a value that a run does not
             have is "-"
             same_text: whether all were validated on the same text as far as their settings tell; bits per byte of
             different texts, and losses of different tokenizers, say nothing of each other
             tokens: what the shortest run has seen
             logged_from: per run the tokens behind its first logged step; a branch's log begins where it branched off
             metrics: rows {tokens, values: per run {train_loss, train_bits_per_byte, validation_loss,
             validation_bits_per_byte, interpolated}} at a quarter, a half and all of these tokens; NaN where a run has
             no number. Training: the mean over the last 5 % of the tokens up to there. Validation: exact where one
             stands there, else on the line between its neighbours, and `interpolated` says so.
             speed: per run the median tokens_per_s
             curves: per run name -> curve, as `curves` returns them
    raises   ValueError if a run has no readable configuration, or no training step in its log
    """
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    settings = [_settings_of(folder) for folder in folders]
    logs = [_curves_of(folder) for folder in folders]
    tokens = min(log["loss"]["tokens"][-1] for log in logs)
    points = [round(tokens * share) for share in (0.25, 0.5, 1.0)]
    different = differing_settings(settings)
    return {
        "runs": names,
        "settings": different,
        "same_text": not any(row["key"].startswith("data.") for row in different),
        "tokens": tokens,
        "logged_from": [log["loss"]["tokens"][0] for log in logs],
        "metrics": [{"tokens": at, "values": [_metrics_at(log, at) for log in logs]} for at in points],
        "speed": [_median(log.get("tokens_per_s")) for log in logs],
        "curves": logs,
    }


def differing_settings(trees: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows {key, values} of the leaves that are not equal in all configuration trees, in the order of the trees."""
    flat = [flatten_settings(tree) for tree in trees]
    keys = dict.fromkeys(key for leaves in flat for key in leaves)
    rows = [{"key": key, "values": [leaves.get(key, NOT_SET) for leaves in flat]} for key in keys]
    return [row for row in rows if any(value != row["values"][0] for value in row["values"][1:])]


def flatten_settings(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted path -> leaf of a configuration's JSON form; entries of lists by their number, unless all are scalars."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
            value = {str(number): item for number, item in enumerate(value)}
        if isinstance(value, dict) and value:
            leaves |= flatten_settings(value, f"{path}.")
        else:
            leaves[path] = value
    return leaves


def _settings_of(folder: Path) -> dict[str, Any]:
    config = read_config(folder)
    if isinstance(config, str):
        raise ValueError(f"{folder}: {config}; a run without its settings cannot be compared")
    return config["run"]


def _curves_of(folder: Path) -> dict[str, dict[str, list[float]]]:
    path = folder / EVENTS_FILE
    found = curves(read_events(path)) if path.is_file() else {}
    if "loss" not in found:
        raise ValueError(f"{folder} has no training step in its {EVENTS_FILE} yet; compare it once it was trained")
    return found


def _metrics_at(log: Mapping[str, Mapping[str, Sequence[float]]], tokens: float) -> dict[str, Any]:
    loss, exact = _value_at(log.get("validation/loss"), tokens)
    bits, _ = _value_at(log.get("validation/bits_per_byte"), tokens)
    return {
        "train_loss": _mean_before(log.get("loss"), tokens),
        "train_bits_per_byte": _mean_before(log.get("bits_per_byte"), tokens),
        "validation_loss": loss,
        "validation_bits_per_byte": bits,
        "interpolated": not exact and math.isfinite(loss),
    }


def _mean_before(curve: Mapping[str, Sequence[float]] | None, tokens: float) -> float:
    """Mean of the values within the window that ends at `tokens`; a value that is not finite shows."""
    if curve is None:
        return math.nan
    pairs = [pair for pair in zip(curve["tokens"], curve["values"], strict=True) if pair[0] <= tokens]
    values = [value for at, value in pairs if at > (1 - WINDOW) * tokens] or [value for _, value in pairs[-1:]]
    return sum(values) / len(values) if values else math.nan


def _value_at(curve: Mapping[str, Sequence[float]] | None, tokens: float) -> tuple[float, bool]:
    """The curve at `tokens`, and whether a point stands exactly there; NaN outside of its ends."""
    if curve is None:
        return math.nan, False
    points = list(zip(curve["tokens"], curve["values"], strict=True))
    before = [point for point in points if point[0] <= tokens]
    after = [point for point in points if point[0] >= tokens]
    if not before or not after:
        return math.nan, False
    (x0, y0), (x1, y1) = before[-1], after[0]
    if x0 == tokens:
        return y0, True
    return y0 + (y1 - y0) * (tokens - x0) / (x1 - x0), False


def _median(curve: Mapping[str, Sequence[float]] | None) -> float:
    values = [value for value in (curve or {}).get("values", []) if math.isfinite(value)]
    return median(values) if values else math.nan
