"""The rows of train.json: what says which workload one is, what replaces what, and the last committed one to compare
with.
"""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pithwood
from pithwood.attention.base import MixerConfig
from pithwood.attention.moba import MoBAConfig
from pithwood.bench.results import Row, device_name
from pithwood.estimate.work import attention_op
from pithwood.optim.config import MuonConfig
from pithwood.run import Run

ROOT = Path(pithwood.__file__).parents[1]
MESH = ("pp", "dp_replicate", "dp_shard", "cp", "ep")
"""The sizes in the column `mesh`."""

WORKLOAD = (
    "recipe", "layers", "seq_len", "sequences", "attention", "mesh", "optimizer", "routing", "tokens", "precision",
)  # fmt: skip
"""Columns that say what is trained; `settings` and `micro_batch` say how."""

TOLD_BY_COLUMNS = (
    "seq_len", "samples_per_step", "samples_per_micro_batch", "steps", "precision", "model.num_layers",
    "model.moe.routing", "model.attention", "model.attention.block_size", "model.attention.top_k",
    *(f"mesh.{size}" for size in MESH),
)  # fmt: skip
"""Overrides that a row does not repeat under `settings`."""


def workload(run: Run, recipe: str, overrides: Sequence[str], tokens: str) -> Row:
    """The columns of a row that say what is measured: WORKLOAD, `micro_batch` (samples), `settings` (the other
    overrides, sorted), and `overrides`, with which the recipe makes the run again.
    """
    settings = [word for word in overrides if word.partition("=")[0].strip() not in TOLD_BY_COLUMNS]
    return {
        "recipe": recipe,
        "layers": run.model.num_layers,
        "seq_len": run.seq_len,
        "sequences": run.samples_per_step,
        "attention": attention_of(run.phase(0).attention),
        "mesh": {size: getattr(run.mesh, size) for size in MESH},
        "optimizer": "muon" if isinstance(run.optim, MuonConfig) else "adamw",
        "routing": run.model.moe.routing,
        "tokens": tokens,
        "precision": run.precision,
        "micro_batch": run.samples_per_micro_batch,
        "settings": sorted(settings),
        "overrides": list(overrides),
    }


def attention_of(attention: MixerConfig | Sequence[MixerConfig]) -> dict[str, Any]:
    """The `attention` column: op (full, moba, a mixer's class name, or mixed), block_size, top_k, impl."""
    kinds = {attention} if isinstance(attention, MixerConfig) else set(attention)
    first = next(iter(kinds))
    blocks = (first.block_size, first.top_k) if len(kinds) == 1 and isinstance(first, MoBAConfig) else (None, None)
    return {
        "op": attention_op(attention) if len(kinds) == 1 else "mixed",
        "block_size": blocks[0],
        "top_k": blocks[1],
        "impl": "pithwood",
    }


def row_key(row: Row) -> str:
    """What tells rows of train.json apart: the workload, the micro-batch and the settings."""
    return json.dumps([row.get(column) for column in (*WORKLOAD, "micro_batch", "settings")], sort_keys=True)


def processes(row: Row) -> int:
    """How many processes a row was measured on."""
    return math.prod(row["mesh"][size] for size in MESH if size != "ep")


def measured(row: Row) -> bool:
    """Whether the row has a speed."""
    return row.get("status") == "ok"


SLOWER = 1.03
"""From how many times the timed step on a breakdown's sum says that the profiled steps were slower."""


def profiled_slower(row: Row) -> bool:
    """Whether what ran in the profiled steps of a row's breakdown does not fit into its timed step: then what waited in
    them, exchanges above all, says nothing about the timed ones."""
    return row["breakdown"]["total_ms"] > SLOWER * row["step_ms"]


def same_workload(a: Row, b: Row) -> bool:
    """Whether two rows train the same, however they do it."""
    return all(a.get(column) == b.get(column) for column in WORKLOAD)


def committed_rows() -> tuple[list[Row], str]:
    """The rows of this device's train.json in the last commit, and where they come from.

    Where git or the history is missing (a copy on a GPU machine) the file beside the code stands for it.
    """
    name = f"bench/results/{device_name()}/train.json"
    try:
        shown = subprocess.run(["git", "-C", str(ROOT), "show", f"HEAD:{name}"], capture_output=True, text=True)
        text, where = (shown.stdout, f"HEAD:{name}") if shown.returncode == 0 else (None, "")
    except OSError:
        text, where = None, ""
    if text is None:
        path = ROOT / name
        if not path.is_file():
            return [], "nothing: no results of this device are committed"
        text, where = path.read_text(encoding="utf-8"), name
    rows = json.loads(text)["rows"]
    assert isinstance(rows, list)
    return rows, where


def verdict(row: Row, against: dict[str, Any] | None, limit: float) -> str:
    """PASS if a row is neither slower nor larger than the committed one by more than `limit` percent, else FAIL, the
    gate and the reason.

    against  what `comparison` returned
    """
    if not measured(row):
        return f"FAIL status: {row['status']}"
    if against is None:
        return "FAIL committed: no row of this workload is committed for this device"
    slower, larger = 100 * (1 / against["speed"] - 1), 100 * ((against["memory"] or 1) - 1)
    for gate, change, words in (("speed", slower, "more time"), ("memory", larger, "more memory")):
        if change > limit:
            return f"FAIL {gate}: {change:.1f} % {words} than {against['from']}; {limit:g} % are allowed"
    return "PASS"


def comparison(row: Row, committed: Sequence[Row], where: str) -> dict[str, Any] | None:
    """How a measured row compares with the committed one of the same workload: of equal settings if there is one, else
    the fastest; None without either number.

    returns  from, commit, settings, tokens_per_s and peak_gb of the other, `speed` (tokens/s over its), `memory` (peak
             over its, None where one has none)
    """
    candidates = [other for other in committed if measured(other) and same_workload(row, other)]
    if not measured(row) or not candidates:
        return None
    equal = [other for other in candidates if row_key(other) == row_key(row)]
    other = equal[0] if equal else max(candidates, key=lambda candidate: candidate["tokens_per_s"])
    peaks = row["peak_gb"], other["peak_gb"]
    return {
        "from": where,
        "commit": other.get("commit"),
        "settings": other["settings"],
        "tokens_per_s": other["tokens_per_s"],
        "peak_gb": other["peak_gb"],
        "speed": row["tokens_per_s"] / other["tokens_per_s"],
        "memory": peaks[0] / peaks[1] if all(peaks) else None,
    }
