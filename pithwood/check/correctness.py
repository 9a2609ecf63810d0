"""Do two settings, implementations or commits compute the same? Losses and raw gradients; NaN never passes."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from pithwood.check.checkout import ROOT
from pithwood.check.gates import Gate, GateError, require
from pithwood.check.numerics import rel_error, require_close
from pithwood.check.record import record
from pithwood.config import apply_overrides
from pithwood.recipes import load_recipe


@dataclass(frozen=True)
class Record:
    """What `pithwood.check.record` wrote."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]

    def group(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under `<prefix>.`, by the rest of their names."""
        start = f"{prefix}."
        return {n.removeprefix(start): t for n, t in self.tensors.items() if n.startswith(start)}


@dataclass(frozen=True)
class Limits:
    """Largest relative errors that pass; all zero demands the same bits."""

    loss: float = 1e-6
    """Of each loss term of step one."""
    gradient: float = 1e-5
    """Of each parameter's raw gradient in step one."""
    later_loss: float = 1e-3
    """Of the loss of each later step, where rounding has had time to grow."""


def correctness_gates(
    recipe: str, overrides: Sequence[str], against: Sequence[str], commit: str | None, limits: Limits, steps: int,
    runs_dir: Path, root: Path = ROOT,
) -> list[Gate]:  # fmt: skip
    """Gates that compare `recipe` with `overrides` to the same with `against` on top, at another commit if given.

    raises  ValueError if nothing differs between the two sides
    """
    if not against and commit is None:
        raise ValueError("nothing to compare with; give --against path=value, or --commit REV, or both")
    if steps < 1:
        raise ValueError(f"--steps={steps} must be at least 1")
    records: list[Record] = []

    def make() -> str:
        with tempfile.TemporaryDirectory() as folder:
            here, there = Path(folder) / "here.safetensors", Path(folder) / "there.safetensors"
            record(apply_overrides(load_recipe(recipe), overrides), here, steps, runs_dir)
            other = [*overrides, *against]
            if commit is None:
                record(apply_overrides(load_recipe(recipe), other), there, steps, runs_dir)
            else:
                _record_at(root, commit, recipe, other, there, steps, runs_dir)
            records.extend(read_record(path) for path in (here, there))
        return f"{recipe}, {steps} steps, against {' '.join(against) or 'the same settings'}" + (
            f" at {commit}" if commit else ""
        )

    def both() -> tuple[Record, Record]:
        return records[0], records[1]

    return [Gate("recorded", make), *comparison_gates(both, limits)]


def comparison_gates(both: Callable[[], tuple[Record, Record]], limits: Limits) -> list[Gate]:
    """The gates on two records, which `both()` returns when the first of them is tried."""
    return [
        Gate("finite", lambda: _finite(*both())),
        Gate("same data", lambda: _same_data(*both())),
        Gate("parameters", lambda: _parameters(*both())),
        Gate("loss", lambda: _loss(*both(), limit=limits.loss)),
        Gate("gradients", lambda: _gradients(*both(), limit=limits.gradient)),
        Gate("later losses", lambda: _later(*both(), limit=limits.later_loss)),
    ]


def read_record(path: Path) -> Record:
    """A record from its file."""
    with safe_open(path, framework="pt") as file:
        return Record({name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {})  # noqa: SIM118


def _record_at(
    root: Path, commit: str, recipe: str, overrides: Sequence[str], out: Path, steps: int, runs_dir: Path
) -> None:
    """Record in a checkout of another commit, which is removed afterwards; the recipe is that commit's."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        _git(root, "worktree", "add", "--detach", str(tree), commit)
        try:
            if not (tree / "pithwood" / "check" / "record.py").is_file():
                raise GateError(f"{commit} has no pithwood/check/record.py; compare with a commit that has it")
            words = [sys.executable, "-m", "pithwood.check.record", recipe, *overrides, "--out", str(out)]
            words += ["--steps", str(steps), "--runs-dir", str(runs_dir.resolve())]
            environment = {**os.environ, "PYTHONPATH": str(tree)}
            done = subprocess.run(words, cwd=tree, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise GateError(f"at {commit}: {done.stderr.strip().splitlines()[-1]}")
        finally:
            _git(root, "worktree", "remove", "--force", str(tree))


def _git(root: Path, *words: str) -> None:
    done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise GateError(f"git {' '.join(words[:2])}: {done.stderr.strip()}")


def _finite(here: Record, there: Record) -> str:
    checked = 0
    for side, item in (("here", here), ("there", there)):
        for name, tensor in item.tensors.items():
            if tensor.dtype.is_floating_point:
                checked += 1
                bad = int((~torch.isfinite(tensor)).sum())
                require(not bad, f"{side}, {name} holds {bad} values that are NaN or infinite, which equal nothing")
    return f"{checked} losses and gradients"


def _same_data(here: Record, there: Record) -> str:
    for name in ("corpus", "tokens_per_step"):
        a, b = here.metadata.get(name), there.metadata.get(name)
        require(a == b, f"{name} differs: {a} here, {b} there; only equal data can be compared")
    return f"{here.metadata['tokens_per_step']} tokens a step of corpus {here.metadata['corpus'][:12]}"


def _parameters(here: Record, there: Record) -> str:
    ours, theirs = here.group("grad"), there.group("grad")
    only = sorted(set(ours) ^ set(theirs))
    require(not only, f"{only[0] if only else ''} exists on one side only ({len(only)} such parameters)")
    for name, grad in ours.items():
        other = list(theirs[name].shape)
        require(list(grad.shape) == other, f"{name} has shape {list(grad.shape)} here and {other} there")
    return f"{len(ours)} with the same names and shapes"


def _loss(here: Record, there: Record, limit: float) -> str:
    ours, theirs = here.group("loss"), there.group("loss")
    require(ours.keys() == theirs.keys(), f"loss terms differ: {sorted(ours)} here, {sorted(theirs)} there")
    errors = {name: require_close(ours[name], theirs[name], limit, f"the loss term {name!r}") for name in ours}
    name = max(errors, key=lambda key: errors[key])
    return f"{len(errors)} terms, worst relative error {errors[name]:.0e} of {name}"


def _gradients(here: Record, there: Record, limit: float) -> str:
    ours, theirs = here.group("grad"), there.group("grad")
    require(any(bool(grad.any()) for grad in ours.values()), "every gradient is zero, which shows nothing")
    errors = {name: rel_error(ours[name], theirs[name]) for name in ours}
    name = max(errors, key=lambda key: errors[key])
    if not errors[name] <= limit:
        beyond = sum(not error <= limit for error in errors.values())
        raise GateError(
            f"{name} differs by {errors[name]:.1e}, allowed {limit:.0e}; so do {beyond} of {len(errors)} parameters; "
            + _decisions(here, there)
        )
    return f"{len(errors)} raw gradients, worst relative error {errors[name]:.0e} of {name}"


def _decisions(here: Record, there: Record) -> str:
    """How many expert and block ids differ: rounding flips a few, a wrong rule flips many."""
    ours, theirs = here.group("decision"), there.group("decision")
    shared = [key for key in ours if key in theirs and ours[key].shape == theirs[key].shape]
    total = sum(ours[key].numel() for key in shared)
    if not total:
        return "no decisions can be compared"
    flipped = sum(int((ours[key] != theirs[key]).sum()) for key in shared)
    return f"{flipped} of {total} ids chosen by routers and block selection differ"


def _later(here: Record, there: Record, limit: float) -> str:
    ours, theirs = here.tensors["losses"], there.tensors["losses"]
    worst = 0.0
    for step in range(len(ours)):
        worst = max(worst, require_close(ours[step], theirs[step], limit, f"the loss of step {step + 1}"))
    return f"{len(ours)} steps, worst relative error {worst:.0e}"
