"""Several rows of train.json in a row, cheap first, each in a process of its own, within a budget of seconds.

A process for each row: its peak memory, its start and its failure are its own, and what it measured is in the file
before the next begins.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pithwood.bench.train import Tell
from pithwood.config import apply_overrides
from pithwood.estimate.devices import Device
from pithwood.estimate.fit import fitting_overrides
from pithwood.recipes import load_recipe

FULL, MOBA = "model.attention=FullAttentionConfig", "model.attention=MoBAConfig"
"""MoBA's defaults are (128, 8)."""

LENGTHS = tuple(2**power for power in range(12, 21))
"""4K to 1M tokens."""
STEP_TOKENS = 65_536
"""Tokens of a step, or one sequence if that is longer."""
MICRO_BATCH_TOKENS = 16_384
"""Tokens of a micro-batch, or one sequence if that is longer."""
LONG_STEPS, LONG = (4, 1), 500_000
"""(--steps, --drop) of rows whose step costs as much as so many tokens without attention: three timed steps."""
FULL_LIMIT = 2**19
"""Longest length of full attention in the sweep over lengths: at 1M a step would take over ten minutes by estimate."""
FULL_COST, MOBA_COST = 24_000, 1.2
"""Full attention over 24K tokens costs an H200 as much as the rest of qwen3_30b_8l's step, MoBA's a fifth of it."""


@dataclass(frozen=True)
class SweepRow:
    """One command of a sweep."""

    name: str
    overrides: tuple[str, ...]
    routing: str
    tokens: str
    steps: int
    drop: int
    cost: float
    """Roughly, in tokens that need no attention."""

    def fitted(self, recipe: str, more: Sequence[str], device: Device, tell: Tell) -> SweepRow:
        """The row with what `fitting_overrides` adds for a device; `more` are overrides for every row."""
        run = apply_overrides(load_recipe(recipe), [*self.overrides, *more])
        added, fits = fitting_overrides(run, device)
        if not fits:
            tell(f"{self.name}: by estimate it does not fit into {device.name}, even with {' '.join(added)}")
        return replace(self, overrides=(*self.overrides, *added))

    def words(self, recipe: str, more: Sequence[str]) -> list[str]:
        """The command line after `pithwood`; `more` are overrides and options for every row, and win over the row's."""
        options = ["--routing", self.routing, "--tokens", self.tokens, "--steps", str(self.steps)]
        return ["bench", "train", recipe, *self.overrides, *options, "--drop", str(self.drop), *more]


def sweep_rows(sweep: str, steps: int, drop: int) -> list[SweepRow]:
    """The rows of a sweep, cheap first.

    sweep   issue: the six workloads of docs/throughput.md; lengths: 4K to 1M tokens, full attention and MoBA; or
            lengths of one's own, N,N,...
    raises  ValueError for another name
    """
    if sweep == "issue":
        rows = [
            _row(4096, 16, FULL, "balanced", "fake", steps, drop),
            _row(4096, 16, FULL, "learned", "real", steps, drop),
            _row(32_768, 4, FULL, "balanced", "fake", steps, drop),
            _row(32_768, 4, MOBA, "balanced", "fake", steps, drop),
            _row(131_072, 1, MOBA, "balanced", "fake", steps, drop),
            _row(1_048_576, 1, MOBA, "balanced", "fake", steps, drop),
        ]
    elif sweep == "lengths":
        rows = _over_lengths(LENGTHS, steps, drop)
    else:
        words = sweep.split(",")
        if not all(word.isdigit() and int(word) > 1 for word in words):
            raise ValueError(f"--sweep {sweep} is not known; choose issue, lengths, or lengths such as 4096,8192")
        rows = _over_lengths(sorted({int(word) for word in words}), steps, drop)
    return sorted(rows, key=lambda row: row.cost)


def _over_lengths(lengths: Sequence[int], steps: int, drop: int) -> list[SweepRow]:
    return [
        _row(length, max(1, STEP_TOKENS // length), attention, "balanced", "fake", steps, drop)
        for attention in (MOBA, FULL)
        for length in lengths
        if attention is MOBA or length <= FULL_LIMIT
    ]


def _row(seq_len: int, samples: int, attention: str, routing: str, tokens: str, steps: int, drop: int) -> SweepRow:
    micro = max(1, min(samples, MICRO_BATCH_TOKENS // seq_len))
    while samples % micro:
        micro -= 1
    overrides = (f"seq_len={seq_len}", f"samples_per_step={samples}", f"samples_per_micro_batch={micro}", attention)
    cost = samples * seq_len * (1 + seq_len / FULL_COST if attention is FULL else MOBA_COST)
    if cost >= LONG:
        steps, drop = LONG_STEPS
    name = f"{seq_len} {'full' if attention is FULL else 'MoBA'} {routing} {tokens}"
    return SweepRow(name, overrides, routing, tokens, steps, drop, cost)


def run_sweep(
    rows: Sequence[SweepRow], recipe: str, more: Sequence[str], budget_s: float, tell: Tell
) -> list[dict[str, Any]]:
    """Run each row as a command and return what it printed: keys `name`, `exit`, and `row` or `error`.

    A row for which no time is left is reported as skipped, one that takes longer than what is left is stopped.
    """
    begun = time.monotonic()
    results: list[dict[str, Any]] = []
    slowest_start = 0.0
    for row in rows:
        left = budget_s - (time.monotonic() - begun)
        if left <= slowest_start:
            results.append({"name": row.name, "exit": None, "error": f"skipped: {max(left, 0):.0f} s of budget left"})
            tell(f"{row.name}: {results[-1]['error']}")
            continue
        tell(f"{row.name}: pithwood {' '.join(row.words(recipe, more))}")
        results.append({"name": row.name, **_run(row.words(recipe, [*more, "--json"]), left)})
        done = results[-1].get("row")
        slowest_start = max(slowest_start, done.get("first_step_s", 0.0) if done else 0.0)
        tell(f"{row.name}: {outcome(results[-1])}")
    return results


def _run(words: list[str], seconds: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "pithwood", *words]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=min(seconds, 86_400), cwd=Path.cwd())
    except subprocess.TimeoutExpired:
        return {"exit": None, "error": f"stopped: it took longer than the {seconds:.0f} s of budget left"}
    if not done.stdout.strip():
        return {"exit": done.returncode, "error": f"exit code {done.returncode}; its own words are above"}
    return {"exit": done.returncode, "row": json.loads(done.stdout)["row"]}


def outcome(result: dict[str, Any]) -> str:
    """Speed and memory of a row, or why it has none."""
    row = result.get("row")
    if row is None:
        return str(result["error"])
    return f"{row['tokens_per_s']:,.0f} tokens/s, {row['peak_gb']:.1f} GB" if row["status"] == "ok" else row["status"]
