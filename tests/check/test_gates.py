"""Gates are tried in order, and the first that fails is named."""

from __future__ import annotations

import pytest
import torch

from pithwood.check.gates import Gate, GateError, as_json, passed, report, require, run_gates
from pithwood.check.numerics import require_close

pytestmark = pytest.mark.quick


def fail(message: str) -> str:
    raise GateError(message)


def test_the_last_line_is_pass_when_every_gate_holds():
    results = run_gates([Gate("one", lambda: "measured 3"), Gate("second", lambda: "fine")])
    assert passed(results)
    assert report(results).splitlines() == ["ok  one     measured 3", "ok  second  fine", "PASS"]


def test_the_first_failing_gate_is_named_and_nothing_after_it_is_tried():
    tried = []
    gates = [
        Gate("one", lambda: "fine"),
        Gate("two", lambda: fail("x is\nwrong")),
        Gate("three", lambda: str(tried.append(3))),
    ]
    results = run_gates(gates)
    assert report(results).splitlines()[-1] == "FAIL two: x is wrong"
    assert as_json(results, kind="k")["first_failing"] == "two"
    assert not tried


def test_what_code_under_test_raises_is_the_gates_finding():
    results = run_gates([Gate("one", lambda: str(1 // 0))])
    assert report(results) == "FAIL one: ZeroDivisionError: integer division or modulo by zero"


def test_a_check_without_gates_does_not_pass():
    assert not passed([])
    assert report([]).startswith("FAIL")


def test_equal_nan_is_not_close():
    bad = torch.tensor([1.0, float("nan")])
    with pytest.raises(GateError, match="the loss holds 1 values that are NaN"):
        require_close(bad, bad, 1.0, "the loss")
    infinite = torch.tensor([float("inf")])
    with pytest.raises(GateError, match="the reference of the loss holds"):
        require_close(torch.ones(1), infinite, float("inf"), "the loss")
    require(True, "never")
