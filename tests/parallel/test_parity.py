"""The gates of skills/check-mesh-parity find what a mesh could get wrong, in what processes and one process gave."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest

from pithwood.check.gates import run_gates
from pithwood.parallel.mesh import Mesh
from tests.parallel.parity import comparison_gates, main, run_of
from tests.parallel.spread import steps_on

pytestmark = pytest.mark.quick


@functools.cache
def one_process() -> dict[str, Any]:
    return steps_on(Mesh.single(), run_of(["mesh.dp_shard=2"]), 1, "run")


def outcome(spread: dict[str, Any]) -> tuple[str, bool]:
    """The last gate tried on what a process gave, and whether it held."""
    last = run_gates(comparison_gates([{"unlike": [], **spread}], one_process()))[-1]
    return last.name, last.passed


def test_equal_results_pass_every_gate():
    assert outcome(one_process()) == ("weights", True)


@pytest.mark.parametrize(
    ("kind", "gate"), [("initial", "initial weights"), ("gradients", "gradients"), ("last", "weights")]
)
def test_a_tensor_of_another_scale_fails_its_gate(kind, gate):
    other = copy.deepcopy(one_process())
    start, values = other[kind]["lm_head.weight"]
    other[kind]["lm_head.weight"] = start, 1.001 * values
    assert outcome(other) == (gate, False)


def test_elements_that_nobody_holds_fail_the_gate():
    other = copy.deepcopy(one_process())
    start, values = other["gradients"]["lm_head.weight"]
    other["gradients"]["lm_head.weight"] = start, values[:-1]
    assert outcome(other) == ("gradients", False)


def test_a_process_that_chooses_other_experts_fails_the_gate():
    assert outcome({**one_process(), "unlike": ["layers.0.experts"]}) == ("decisions", False)


def test_another_loss_or_norm_fails_its_gate():
    other = copy.deepcopy(one_process())
    other["logs"][0]["grad_norm"] *= 2
    assert outcome(other) == ("log", False)
    other["losses"]["loss"] *= 1.001
    assert outcome(other) == ("loss", False)


def test_one_process_has_nothing_to_be_compared_with(capsys):
    assert main([]) == 1
    said = capsys.readouterr()
    assert "mesh.dp_shard=2" in said.err
    assert said.out == "FAIL arguments: the line above says what to change\n"
