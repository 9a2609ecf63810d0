"""The tables of docs/throughput.md, out of every GPU's train.json and estimate.json.

<!-- throughput goals -->      the workloads with what others reach, what is asked for and what was measured
<!-- throughput breakdown -->  where the step's time goes in them, part by part, beside the floor of each
<!-- throughput lengths -->    step time and memory against sequence length, full attention and MoBA, and the picture
<!-- throughput mesh -->       every row of several processes, and the pictures of their steps
<!-- throughput estimate -->   `pithwood estimate` beside what was measured

All but the table of meshes are about one process. Of several rows of one workload (other micro-batches, other settings)
the fastest is shown, with its settings; where a limit on memory is asked for, the fastest within it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pithwood.bench.train_plot import length_rows
from pithwood.bench.train_rows import measured, processes, profiled_slower
from pithwood.bench.train_text import attention_words, length_words, mesh_words

Row = dict[str, Any]
RECIPE = "qwen3_30b_8l"
NOTHING = "Not measured yet."


@dataclass(frozen=True)
class Goal:
    """A workload of the table."""

    seq_len: int
    sequences: int
    attention: str
    routing: str
    tokens: str
    others: str
    """What PithTrain reaches."""
    least: float | None
    """Tokens per second that are asked for; None: a share of the first workload's."""
    stretch: float | None
    share: tuple[float, float] | None = None
    """Least and stretch as shares of the first workload's speed."""
    most_gb: float | None = None

    def words(self) -> str:
        what = "full attention" if self.attention == "full" else "MoBA (128, 8)"
        routing = "balanced routing" if self.routing == "balanced" else "learned routing, real text"
        return f"{self.sequences} x {length_words(self.seq_len)}, {what}, {routing}"


GOALS = (
    Goal(4096, 16, "full", "balanced", "fake", "47,600 tok/s, 103 GB", 64_000, 74_000, most_gb=100),
    Goal(4096, 16, "full", "learned", "real", "", None, None, share=(0.90, 0.95)),
    Goal(32_768, 4, "full", "balanced", "fake", "out of memory", 33_000, 38_000),
    Goal(32_768, 4, "moba", "balanced", "fake", "", 56_000, 70_000),
    Goal(131_072, 1, "moba", "balanced", "fake", "", 50_000, 62_000),
    Goal(1_048_576, 1, "moba", "balanced", "fake", "", 33_000, 45_000),
)
"""The workloads of issue 5, eight layers of Qwen3-30B-A3B each, and what is asked of one H200."""


def throughput(what: str, root: Path) -> str:
    """The table of a kind, a section for every device; ValueError for a kind that there is not."""
    makers = {"goals": _goals, "breakdown": _breakdown, "lengths": _lengths, "mesh": _mesh, "estimate": _estimate}
    if what not in makers:
        raise ValueError(f"{what!r} is no table of the throughput page; write one of {', '.join(makers)}")
    file = "estimate.json" if what == "estimate" else "train.json"
    sections = []
    for path in sorted(root.glob(f"bench/results/nvidia-*/{file}")):
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        if what != "estimate":
            rows = [row for row in rows if (processes(row) > 1) == (what == "mesh")]
        found = makers[what](rows, path.parent)
        if found:
            sections.append(f"On `{path.parent.name}`:\n\n{found}")
    if not sections and what == "goals":
        return _goal_table([])
    return "\n\n".join(sections) or NOTHING


def fastest(rows: Sequence[Row], goal: Goal) -> Row | None:
    """The fastest measured row of a workload, of those within the memory asked for if there are any, else one that says
    why there is no speed, else None.
    """
    here = [row for row in rows if _is(row, goal)]
    speeds = [row for row in here if measured(row)]
    lean = [row for row in speeds if goal.most_gb is None or row["peak_gb"] <= goal.most_gb]
    speeds = lean or speeds
    return max(speeds, key=lambda row: row["tokens_per_s"]) if speeds else next(iter(here), None)


def _is(row: Row, goal: Goal) -> bool:
    same = all(row[name] == getattr(goal, name) for name in ("seq_len", "sequences", "routing", "tokens"))
    blocks = (row["attention"]["block_size"], row["attention"]["top_k"])
    right = row["attention"]["op"] == goal.attention and (goal.attention == "full" or blocks == (128, 8))
    return same and right and (row["recipe"], row["layers"], row["optimizer"]) == (RECIPE, 8, "muon")


def _goals(rows: Sequence[Row], folder: Path) -> str:
    return _goal_table(rows) if any(fastest(rows, goal) is not None for goal in GOALS) else ""


def _goal_table(rows: Sequence[Row]) -> str:
    head = [
        "workload",
        "PithTrain",
        "must",
        "stretch",
        "tokens/s",
        "spread",
        "MFU",
        "of 790",
        "peak GB",
        "start s",
        "settings",
    ]
    first = fastest(rows, GOALS[0])
    table = [head, ["---", "---", *["---:"] * 8, "---"]]
    for goal in GOALS:
        must, stretch = _asked(goal)
        row = fastest(rows, goal)
        if row is None:
            cells = ["not measured", *[""] * 6]
        elif not measured(row):
            cells = [row["status"], "", "", "", _number(row["peak_gb"], ".1f"), "", _settings(row)]
        else:
            met = _met(goal, row, first)
            speed = f"{row['tokens_per_s']:,.0f}" + ("" if met is None else f" ({met})")
            shares = [_number(row.get(name), ".1%") for name in ("mfu", "mfu_measured")]
            memory, start = _number(row["peak_gb"], ".1f"), _number(row["first_step_s"], ".0f")
            cells = [speed, _number(row["spread"], ",.0f"), *shares, memory, start, _settings(row)]
        table.append([goal.words(), goal.others, must, stretch, *cells])
    return _text(table)


def _asked(goal: Goal) -> tuple[str, str]:
    if goal.share is not None:
        return f"{goal.share[0]:.0%} of the first", f"{goal.share[1]:.0%}"
    memory = "" if goal.most_gb is None else f", <= {goal.most_gb:g} GB"
    return f"{goal.least:,.0f}{memory}", f"{goal.stretch:,.0f}"


def _met(goal: Goal, row: Row, first: Row | None) -> str | None:
    """Which of the two numbers a row reaches, in words; None where there is nothing to compare with."""
    least, stretch, speed = goal.least, goal.stretch, row["tokens_per_s"]
    if goal.share is not None:
        if first is None or not measured(first):
            return None
        least, stretch = (share * first["tokens_per_s"] for share in goal.share)
    assert least is not None
    assert stretch is not None
    if goal.most_gb is not None and row["peak_gb"] > goal.most_gb:
        return "missed: memory"
    return "stretch" if speed >= stretch else "must" if speed >= least else f"missed by {1 - speed / least:.0%}"


def _breakdown(rows: Sequence[Row], folder: Path) -> str:
    found = [(goal, fastest(rows, goal)) for goal in GOALS]
    shown = [(goal, row["breakdown"]) for goal, row in found if row is not None and row.get("breakdown")]
    if not shown:
        return ""
    table = [["ms a step (floor)", *(goal.words() for goal, _ in shown)], ["---", *["---:"] * len(shown)]]
    for part in shown[0][1]["ms"]:
        cells = []
        for _, breakdown in shown:
            floor = breakdown["floor_ms"].get(part)
            cells.append(f"{breakdown['ms'][part]:,.1f}" + (f" ({floor:,.1f})" if floor else ""))
        table.append([part, *cells])
    sums = [f"{b['total_ms']:,.1f} ({sum(b['floor_ms'].values()):,.1f})" for _, b in shown]
    unknown = [f"{b['unattributed_share']:.1%}" for _, b in shown]
    return _text([*table, ["all", *sums], ["share of busy time not attributed", *unknown]])


def _lengths(rows: Sequence[Row], folder: Path) -> str:
    by_op = length_rows(rows, RECIPE)
    lengths = sorted({length for found in by_op.values() for length in found})
    if not lengths:
        return ""
    names = {"full": "full attention", "moba": "MoBA (128, 8)"}
    ops = [op for op in names if by_op.get(op)]
    head = ["tokens", "sequences"]
    for op in ops:
        head += [f"{names[op]}: s a step", "tokens/s", "peak GB"]
    table = [head, ["---:"] * len(head)]
    for length in lengths:
        here = [by_op[op].get(length) for op in ops]
        sequences = next(row["sequences"] for row in here if row is not None)
        cells = [length_words(length), str(sequences)]
        for row in here:
            if row is None:
                cells += ["", "", ""]
            elif measured(row):
                cells += [f"{row['step_ms'] / 1e3:,.2f}", f"{row['tokens_per_s']:,.0f}", f"{row['peak_gb']:.1f}"]
            else:
                cells += [row["status"], "", ""]
        table.append(cells)
    layers = next(row["layers"] for found in by_op.values() for row in found.values())
    picture = folder / "train.png"
    shown = f"\n\n![step time and memory against sequence length](../bench/results/{folder.name}/train.png)"
    of_layers = "" if layers == 8 else f"With {layers} layers in place of 8:\n\n"
    return of_layers + _text(table) + (shown if picture.is_file() else "")


def _mesh(rows: Sequence[Row], folder: Path) -> str:
    head = ["mesh", "workload", "layers", "tokens/s", "spread", "MFU", "of 790", "peak GB", "hidden", "settings"]
    table = [head, ["---", "---", *["---:"] * 7, "---"]]
    for row in rows:
        what = f"{row['sequences']} x {length_words(row['seq_len'])}, {attention_words(row['attention'])}"
        cells = [mesh_words(row["mesh"]), f"{what}, {row['routing']} routing", str(row["layers"])]
        if measured(row):
            shares = [_number(row.get(name), ".1%") for name in ("mfu", "mfu_measured")]
            cells += [f"{row['tokens_per_s']:,.0f}", f"{row['spread']:,.0f}", *shares, _number(row["peak_gb"], ".1f")]
        else:
            cells += [row["status"], "", "", "", _number(row["peak_gb"], ".1f")]
        table.append([*cells, _hidden(row), _settings(row)])
    pictures = [
        f"![a step on {path.stem.removeprefix('timeline-')}](../bench/results/{folder.name}/{path.name})"
        for path in sorted(folder.glob("timeline-*.png"))
    ]
    return "\n\n".join([_text(table), *pictures]) if rows else ""


def _hidden(row: Row) -> str:
    """What of a row's exchanges was hidden, a dash where its profiled steps cannot tell of the timed ones."""
    exchanged = (row.get("breakdown") or {}).get("communication")
    if exchanged is None:
        return ""
    return "-" if profiled_slower(row) else f"{exchanged['hidden_share']:.0%} of {exchanged['ms']:,.0f} ms"


def _estimate(rows: Sequence[Row], folder: Path) -> str:
    head = [
        "run",
        "layers",
        "GB",
        "estimated",
        "error",
        "ms a step",
        "estimated",
        "error",
        "by the other rows alone",
        "settings",
    ]
    table = [head, ["---", *["---:"] * 8, "---"]]
    for row in rows:
        what = f"{row['sequences']} x {length_words(row['seq_len'])}, {attention_words(row['attention'])}"
        name = f"{what}, {row['routing']}"
        cells = [f"{row['measured_gb']:.1f}", f"{row['estimated_gb']:.1f}", f"{row['memory_error']:+.1%}"]
        cells += [f"{row['measured_ms']:,.1f}", f"{row['estimated_ms']:,.1f}", f"{row['time_error']:+.1%}"]
        table.append([name, str(row["layers"]), *cells, f"{row['others_error']:+.1%}", _settings(row)])
    return _text(table) if rows else ""


def _settings(row: Row) -> str:
    return " ".join(f"`{word}`" for word in [f"samples_per_micro_batch={row['micro_batch']}", *row["settings"]])


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _text(table: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in table)
