"""The op's gates: every op with a reference passes them, and a folder with one thing wrong fails at that thing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import pithwood.ops
from pithwood.check.gates import passed, report, run_gates
from pithwood.check.op import ROOT, op_gates

HALVE = {
    "ref.py": '''
"""Half of a tensor: the definition."""

from torch import Tensor


def halve_ref(x: Tensor) -> Tensor:
    """x / 2."""
    return x / 2
''',
    "fast.py": '''
"""Half of a tensor, written into memory of its own."""

import torch
from torch import Tensor


class Halve(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        y = torch.empty_like(x)
        y[:] = x * 0.5
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad * 0.5
''',
    "__init__.py": '''
"""Half of a tensor."""

from torch import Tensor

from pithwood.ops.checks import check_impl
from pithwood.ops.halve.fast import Halve
from pithwood.ops.halve.ref import halve_ref


def halve(x: Tensor, *, impl: str | None = None) -> Tensor:
    """Half of x.

    impl     "ref" | "torch"
    returns  like x
    raises   ValueError for another impl
    """
    check_impl(impl, ("ref", "torch"))
    return halve_ref(x) if impl == "ref" else Halve.apply(x)
''',
}
TEST = """
import torch

from pithwood.ops.halve import halve


def test_halve():
    assert torch.equal(halve(torch.full((3,), 2.0)), torch.ones(3))
"""
CASES = """
import torch


def halve():
    for shape in ((3,), (0,), (2, 5)):
        yield {"x": torch.randn(shape).requires_grad_()}
"""


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A folder like a checkout that holds one op, `halve`, which Python finds among those of the package."""
    for folder in ("pithwood/ops/halve", "tests/ops"):
        (tmp_path / folder).mkdir(parents=True)
    for name, text in HALVE.items():
        (tmp_path / "pithwood/ops/halve" / name).write_text(text)
    (tmp_path / "tests/ops/cases.py").write_text(CASES)
    (tmp_path / "tests/ops/test_halve.py").write_text(TEST)
    monkeypatch.setattr(pithwood.ops, "__path__", [*pithwood.ops.__path__, str(tmp_path / "pithwood/ops")])
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("pithwood.ops.halve")]:
        del sys.modules[name]


@pytest.mark.quick
@pytest.mark.parametrize(
    "name",
    [
        "attend",
        "decode",
        "dense_attention",
        "embed",
        "gram",
        "grouped_mm",
        "linear_nll",
        "merge",
        "moba",
        "norm_rope",
        "permute",
        "rms_norm",
        "route",
        "select",
        "summarise",
        "swiglu",
    ],
)
def test_every_op_agrees_with_its_reference_on_poisoned_memory(name):
    results = run_gates(op_gates(name, run_tests=False))
    assert passed(results), report(results)
    assert results[-1].name == "agreement"


def test_every_op_folder_is_among_those_tested_here():
    folders = {path.parent.name for path in (ROOT / "pithwood/ops").glob("*/__init__.py")}
    mark = next(m for m in test_every_op_agrees_with_its_reference_on_poisoned_memory.pytestmark if m.args)
    assert folders == set(mark.args[1])


@pytest.mark.quick
def test_a_whole_op_passes(checkout):
    results = run_gates(op_gates("halve", run_tests=False, root=checkout))
    assert passed(results), report(results)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("file", "old", "new", "last_line"),
    [
        ("pithwood/ops/halve/__init__.py", None, None, "FAIL folder: pithwood/ops/halve/__init__.py does not exist"),
        ("pithwood/ops/halve/ref.py", None, None, "FAIL ref: pithwood/ops/halve/ref.py does not exist"),
        (
            "pithwood/ops/halve/ref.py",
            '"""Half of a tensor: the definition."""',
            "",
            "FAIL ref: ref.py has no docstring",
        ),
        (
            "pithwood/ops/halve/ref.py",
            "from torch import Tensor",
            "from torch import Tensor\n\nfrom pithwood.ops.halve.fast import Halve",
            "FAIL ref: ref.py imports pithwood.ops.halve.fast",
        ),
        (
            "pithwood/ops/halve/__init__.py",
            "impl:",
            "how:",
            "FAIL exports: pithwood/ops/halve/__init__.py has no public",
        ),
        (
            "pithwood/ops/halve/__init__.py",
            "    returns",
            "    gives",
            "FAIL exports: the docstring of halve does not say",
        ),
        ("tests/ops/test_halve.py", None, None, "FAIL test: GateError"),
        ("tests/ops/cases.py", "def halve", "def other", "FAIL cases: tests/ops/cases.py has no function halve()"),
        ("tests/ops/cases.py", "((3,), (0,), (2, 5))", "((3,),)", "FAIL cases: halve() in tests/ops/cases.py yields 1"),
        (
            "pithwood/ops/halve/__init__.py",
            '    check_impl(impl, ("ref", "torch"))',
            "",
            "FAIL impl: halve(impl='no-such') is not refused",
        ),
        (
            "pithwood/ops/halve/__init__.py",
            '("ref", "torch")',
            '("ref",)',
            "FAIL impl: halve has no implementation besides 'ref'",
        ),
        (
            "pithwood/ops/halve/fast.py",
            "y[:] = x * 0.5",
            "y[:-1] = x[:-1] * 0.5",
            "FAIL agreement: halve(impl='torch'), case 0: output 0 holds NaN: memory was read before it was written",
        ),
        (
            "pithwood/ops/halve/fast.py",
            "grad * 0.5",
            "grad * 0.6",
            "FAIL agreement: halve(impl='torch'), case 0: gradient 0 differs from ref",
        ),
        ("pithwood/ops/halve/fast.py", "return y", "return y.double()", "FAIL agreement: halve(impl='torch'), case 0"),
    ],
)
def test_one_thing_wrong_fails_at_its_gate(checkout, file, old, new, last_line):
    path = checkout / file
    if old is None:
        path.unlink()
    else:
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
    lines = report(run_gates(op_gates("halve", run_tests=False, root=checkout))).splitlines()
    assert lines[-1].replace("GateError: ", "").startswith(last_line.replace("GateError", "tests/ops/test_halve.py"))


def test_an_op_of_one_file_has_a_definition_elsewhere_or_fails(checkout):
    folder = checkout / "pithwood/ops/halve"
    for name in HALVE:
        if name != "__init__.py":
            (folder / name).unlink()
    lines = report(run_gates(op_gates("halve", run_tests=False, root=checkout))).splitlines()
    assert lines[-1].startswith("FAIL ref: pithwood/ops/halve/ref.py does not exist")


def test_a_failing_test_is_named(checkout):
    path = checkout / "tests/ops/test_halve.py"
    path.write_text("def test_wrong():\n    assert 1 == 2\n")
    lines = report(run_gates(op_gates("halve", root=checkout))).splitlines()
    assert lines[-1].startswith("FAIL tests pass: tests/ops/test_halve.py: FAILED")
    assert "test_wrong" in lines[-1]
