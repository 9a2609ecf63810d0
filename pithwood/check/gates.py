"""A check is a list of named gates, tried in order up to the first that fails."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any


class GateError(ValueError):
    """What a gate found wrong, in words that tell what to change."""


@dataclass(frozen=True)
class Gate:
    """One requirement."""

    name: str
    """What is required, in a word or two; a failing check names it."""
    check: Callable[[], str]
    """Returns what was measured, or raises."""


@dataclass(frozen=True)
class GateResult:
    """How a gate went."""

    name: str
    passed: bool
    detail: str
    """What was measured, or what is wrong."""
    seconds: float


def run_gates(gates: Iterable[Gate]) -> list[GateResult]:
    """Results in order; the last one is the first that failed, if any did."""
    results: list[GateResult] = []
    for gate in gates:
        started = time.perf_counter()
        try:
            detail, passed = gate.check(), True
        except GateError as error:
            detail, passed = str(error), False
        except Exception as error:
            # What is under test is anybody's code: whatever it raises is the gate's finding.
            detail, passed = f"{type(error).__name__}: {error}", False
        results.append(GateResult(gate.name, passed, " ".join(detail.split()), time.perf_counter() - started))
        if not passed:
            break
    return results


def require(condition: bool, message: str) -> None:
    """Fail the gate with this message unless the condition holds."""
    if not condition:
        raise GateError(message)


def passed(results: Sequence[GateResult]) -> bool:
    """Whether every gate held; a check without gates has shown nothing."""
    return bool(results) and all(result.passed for result in results)


def report(results: Sequence[GateResult]) -> str:
    """A line per gate; the last line is PASS, or FAIL with the first failing gate's name and finding."""
    width = max((len(result.name) for result in results), default=0)
    lines = [f"ok  {result.name:<{width}}  {result.detail}" for result in results if result.passed]
    if passed(results):
        return "\n".join([*lines, "PASS"])
    last = results[-1] if results else GateResult("gates", False, "there are none", 0.0)
    return "\n".join([*lines, f"FAIL {last.name}: {last.detail}"])


def as_json(results: Sequence[GateResult], **more: Any) -> dict[str, Any]:
    """The same as one JSON object."""
    gates = [{"name": r.name, "passed": r.passed, "detail": r.detail, "seconds": r.seconds} for r in results]
    failed = next((r.name for r in results if not r.passed), None)
    return {"passed": passed(results), "first_failing": failed, "gates": gates, **more}
