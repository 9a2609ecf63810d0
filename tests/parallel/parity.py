"""A mesh against one process, gate by gate: what `skills/check-mesh-parity` runs.

PYTHONPATH=. python -m tests.parallel.parity mesh.dp_shard=2 mesh.ep=2 model.attention=FullAttentionConfig
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from pithwood.attention.moba import MoBAConfig
from pithwood.check.gates import Gate, passed, report, require, run_gates
from pithwood.config import apply_overrides
from pithwood.parallel.mesh import Mesh
from pithwood.plan import check_phases
from pithwood.run import Run
from tests.parallel.spread import assert_same, steps_on, tiny_run
from tests.processes import run_on

STEPS = 3
BOUND = 1e-5
"""Relative error of a tensor, and of a loss."""
LOG_BOUND = 2e-5
"""Relative error of what the log says: a norm adds up the errors of all tensors."""


def run_of(words: Sequence[str]) -> Run:
    """Four small layers with every kind of part, as the settings change them; ValueError if they cannot work."""
    moe = {"balance": "global_batch", "num_shared_experts": 1, "bias_update_rate": 0.01, "z_loss_coef": 0.01}
    run = apply_overrides(tiny_run({"attention": MoBAConfig(block_size=8, top_k=2)}, moe), words)
    run.validate()
    check_phases(run)
    if run.mesh.size == 1:
        raise ValueError("one process is what a mesh is compared with; give its sizes, for instance mesh.dp_shard=2")
    return run


def parity_gates(run: Run) -> Iterator[Gate]:
    """Gates on three steps by the run's optimizer, then on three of plain descent, which hides no scale."""
    found: dict[str, Any] = {}

    def compute(update: str) -> str:
        found["alone"] = steps_on(Mesh.single(), run, STEPS, update)
        found["spread"] = run_on(run.mesh, steps_on, run, STEPS, update, found["alone"]["decisions"], seconds=600)
        return f"{STEPS} steps by {run.mesh.size} processes, and by one"

    yield Gate("optimizer", lambda: compute("run"))
    yield from comparison_gates(found["spread"], found["alone"])
    yield Gate("plain descent", lambda: compute("sgd"))
    yield Gate("its weights", lambda: _same(found["spread"], found["alone"], "last"))


def comparison_gates(spread: list[dict[str, Any]], alone: dict[str, Any]) -> list[Gate]:
    """What `steps_on` gave in every process of a mesh, against what it gave in one process."""
    return [
        Gate("initial weights", lambda: _same(spread, alone, "initial")),
        Gate("loss", lambda: _close([each["losses"] for each in spread], alone["losses"], BOUND)),
        Gate("gradients", lambda: _same(spread, alone, "gradients")),
        Gate("decisions", lambda: _alike(spread)),
        Gate("log", lambda: _logs(spread, alone)),
        Gate("weights", lambda: _same(spread, alone, "last")),
    ]


def _same(spread: list[dict[str, Any]], alone: dict[str, Any], kind: str) -> str:
    assert_same(spread, alone, kind, BOUND)
    return f"{len(alone[kind])} tensors, each within {BOUND:g}"


def _close(spread: list[dict[str, float]], alone: dict[str, float], bound: float) -> str:
    for rank, values in enumerate(spread):
        for name, value in alone.items():
            require(
                values[name] == pytest.approx(value, rel=bound, nan_ok=True),
                f"{name} is {values[name]:.9g} in process {rank}, and {value:.9g} in one process",
            )
    return f"{', '.join(alone)} within {bound:g}"


def _alike(spread: list[dict[str, Any]]) -> str:
    """Gradients are those of one process's decisions; left alone, every process decides the same."""
    for rank, each in enumerate(spread):
        require(not each["unlike"], f"process {rank} chooses otherwise: {', '.join(each['unlike'])}")
    return "experts and blocks are the same where nothing is replayed"


def _logs(spread: list[dict[str, Any]], alone: dict[str, Any]) -> str:
    for step, wanted in enumerate(alone["logs"]):
        # statistics of chosen blocks are means over processes, whatever each one's number of queries
        exact = {name: value for name, value in wanted.items() if not name.startswith("block_")}
        _close([each["logs"][step] for each in spread], exact, LOG_BOUND)
    return f"losses, norms, rates and loads of {len(alone['logs'])} steps, each within {LOG_BOUND:g}"


def main(words: Sequence[str]) -> int:
    """Print a line per gate, then PASS or FAIL; the exit code."""
    try:
        run = run_of(words)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        print("FAIL arguments: the line above says what to change")
        return 1
    results = run_gates(parity_gates(run))
    print(report(results))
    return 0 if passed(results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
