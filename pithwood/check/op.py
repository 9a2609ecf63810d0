"""Is an op whole? Folder, reference, tests, a choice of implementation, and agreement on poisoned memory.

Inputs come from the function of the op's name in `tests/ops/cases.py`, a generator of keyword arguments. Every
implementation is run on them with fresh memory filled with NaN, and compared with `impl="ref"`: values, and the
gradient of every tensor that wants one.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pithwood.check.checkout import ROOT, case_function, run_test_file
from pithwood.check.gates import Gate, GateError, require
from pithwood.check.numerics import REL_ERROR, poisoned_memory, rel_error

CASES = "tests/ops/cases.py"


def op_gates(name: str, run_tests: bool = True, root: Path = ROOT) -> list[Gate]:
    """The gates of `pithwood/ops/<name>/` in a checkout; the last of them runs its tests."""
    gates = [
        Gate("folder", lambda: _folder(name, root)),
        Gate("ref", lambda: _ref(name, root)),
        Gate("exports", lambda: _exports(name)),
        Gate("test", lambda: str(_test_file(name, root).relative_to(root))),
        Gate("cases", lambda: _cases(name, root)),
        Gate("impl", lambda: _impl(name, root)),
        Gate("agreement", lambda: _agreement(name, root)),
    ]
    return [*gates, Gate("tests pass", lambda: run_test_file(_test_file(name, root), root))] if run_tests else gates


def _file(name: str, root: Path, file: str = "__init__.py") -> Path:
    return root / "pithwood" / "ops" / name / file


def _folder(name: str, root: Path) -> str:
    require(name.isidentifier(), f"{name!r} cannot be a folder of Python; give an op's name")
    have = sorted(path.parent.name for path in (root / "pithwood" / "ops").glob("*/__init__.py"))
    path = _file(name, root).relative_to(root)
    require(_file(name, root).is_file(), f"{path} does not exist; ops are {', '.join(have)}")
    return f"{path.parent}/"


def _ref(name: str, root: Path) -> str:
    path = _file(name, root, "ref.py")
    parts = _ops_within(name, root) if not path.is_file() else []
    if parts:
        return f"made of {', '.join(parts)}, each with a ref.py"
    require(path.is_file(), f"{path.relative_to(root)} does not exist; write the plain-torch definition first")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    require(ast.get_docstring(tree) is not None, "ref.py has no docstring that says what the op is")
    imported = [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module]
    imported += [alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names]
    own = f"pithwood.ops.{name}"
    siblings = [m for m in imported if m.startswith(own) or m.partition(".")[0] == "triton"]
    require(not siblings, f"ref.py imports {', '.join(siblings)}; the definition must not depend on what it judges")
    return "plain torch, imports nothing of its folder"


def _ops_within(name: str, root: Path) -> list[str]:
    """The other ops that the only file of an op's folder calls, if all of them have a reference."""
    if [file.name for file in _file(name, root).parent.glob("*.py")] != ["__init__.py"]:
        return []
    tree = ast.parse(_file(name, root).read_text(encoding="utf-8"))
    modules = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    ops = [module.removeprefix("pithwood.ops.") for module in modules if module.startswith("pithwood.ops.")]
    ops = [op for op in ops if _file(op, root).is_file()]
    return ops if all(_file(op, root, "ref.py").is_file() for op in ops) else []


def _functions(name: str) -> dict[str, Callable[..., Any]]:
    """The public functions of an op that offer a choice of implementation."""
    module = importlib.import_module(f"pithwood.ops.{name}")
    names = dict.fromkeys([name, *getattr(module, "__all__", ())])
    public = [(word, getattr(module, word, None)) for word in names]
    return {w: f for w, f in public if inspect.isfunction(f) and "impl" in inspect.signature(f).parameters}


def _exports(name: str) -> str:
    functions = _functions(name)
    require(bool(functions), f"pithwood/ops/{name}/__init__.py has no public function with a parameter `impl`")
    for word, function in functions.items():
        parameter = inspect.signature(function).parameters["impl"]
        require(parameter.default is None, f"{word}: impl must default to None, which chooses")
        doc = inspect.getdoc(function) or ""
        for part in ("returns", "raises", "impl"):
            require(part in doc, f"the docstring of {word} does not say `{part}`")
    return f"{', '.join(functions)} with impl=, documented"


def _test_file(name: str, root: Path) -> Path:
    found = sorted((root / "tests").rglob(f"test_{name}.py"))
    require(bool(found), f"tests/ops/test_{name}.py does not exist")
    return found[0]


def op_cases(function: str, root: Path = ROOT) -> Iterator[dict[str, Any]]:
    """Keyword arguments to try an op with, from `tests/ops/cases.py`; deterministic."""
    make = case_function(root, CASES, function)
    torch.manual_seed(0)
    return make()


def _cases(name: str, root: Path) -> str:
    counts, no_gradient = [], []
    for function in _functions(name):
        cases = list(op_cases(function, root))
        require(len(cases) >= 3, f"{function}() in {CASES} yields {len(cases)} cases; give at least 3, odd sizes too")
        counts.append(f"{len(cases)} for {function}")
        if not any(_wanting(case) for case in cases):
            no_gradient.append(function)
    return ", ".join(counts) + (f"; no gradient: {', '.join(no_gradient)}" if no_gradient else "")


def implementations(function: Callable[..., Any], case: dict[str, Any]) -> list[str]:
    """The names that `impl=` takes, "ref" first, as the refusal of an unknown one lists them."""
    try:
        function(**case, impl="no-such")
    except ValueError as error:
        names = [name for name in re.findall(r"'([\w-]+)'", str(error)) if name != "no-such"]
    else:
        raise GateError(f"{function.__name__}(impl='no-such') is not refused")
    require("ref" in names, f"the refusal of an unknown impl does not name 'ref': it names {names}")
    require(len(names) > 1, f"{function.__name__} has no implementation besides 'ref'")
    return ["ref", *(name for name in names if name != "ref")]


def _impl(name: str, root: Path) -> str:
    found = []
    for word, function in _functions(name).items():
        names = implementations(function, next(op_cases(word, root)))
        found.append(f"{word}: {', '.join(names)}")
    return "; ".join(found)


def _agreement(name: str, root: Path) -> str:
    """Every implementation against ref, outputs and gradients, on NaN-poisoned memory."""
    compared = []
    for word, function in _functions(name).items():
        names = implementations(function, next(op_cases(word, root)))
        for impl in names[1:]:
            worst, tried = 0.0, 0
            for number, case in enumerate(op_cases(word, root)):
                expected = _outputs_and_gradients(function, case, "ref")
                try:
                    found = _outputs_and_gradients(function, case, impl)
                except ValueError:
                    continue  # this implementation refuses such input here; the count below says for how many it ran
                tried += 1
                worst = max(worst, _compare(found, expected, f"{word}(impl={impl!r}), case {number}"))
            compared.append(f"{impl} in {tried} cases, worst {worst:.0e}" if tried else f"{impl} refuses to run here")
    require(
        any("worst" in line for line in compared),
        f"nothing to compare with ref here: {'; '.join(compared)}; on a CPU kernels run in Triton's interpreter: "
        "TRITON_INTERPRET=1, with triton installed by `scripts/install.sh .venv triton-cpu`",
    )
    return "; ".join(compared)


def _outputs_and_gradients(function: Callable[..., Any], case: dict[str, Any], impl: str) -> dict[str, Tensor]:
    with poisoned_memory():
        result = function(**case, impl=impl)
        outputs = {f"output {i}": tensor for i, tensor in enumerate(_tensors(result))}
        wanting = _wanting(case)
        pulled = [t for t in outputs.values() if t.requires_grad]
        if not wanting or not pulled:
            return {name: tensor.detach() for name, tensor in outputs.items()}
        generator = torch.Generator().manual_seed(1)
        total = torch.zeros((), dtype=torch.float64)
        for tensor in pulled:
            weight = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            # Rows that see nothing have a log-sum of -inf, and no gradient comes through it.
            finite = torch.isfinite(tensor)
            total = total + (torch.where(finite, tensor, 0.0).double() * weight).sum()
        grads = torch.autograd.grad(total, wanting, allow_unused=True)
    found = {name: tensor.detach() for name, tensor in outputs.items()}
    for number, (grad, tensor) in enumerate(zip(grads, wanting, strict=True)):
        found[f"gradient {number}"] = torch.zeros_like(tensor) if grad is None else grad
    return found


def _compare(found: dict[str, Tensor], expected: dict[str, Tensor], where: str) -> float:
    require(found.keys() == expected.keys(), f"{where}: gives {sorted(found)}, ref gives {sorted(expected)}")
    worst = 0.0
    for name, want in expected.items():
        have = found[name]
        require(not bool(have.isnan().any()), f"{where}: {name} holds NaN: memory was read before it was written")
        require(have.dtype == want.dtype, f"{where}: {name} is {have.dtype}, ref gives {want.dtype}")
        limit = REL_ERROR[want.dtype] if want.dtype.is_floating_point else 0.0
        error = rel_error(have, want)
        require(error <= limit, f"{where}: {name} differs from ref: relative error {error:.1e}, allowed {limit:.0e}")
        worst = max(worst, error)
    return worst


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists, dicts and dataclasses, in order."""
    if isinstance(value, Tensor):
        yield value
        return
    children: Iterable[Any] = ()
    if isinstance(value, (tuple, list)):
        children = value
    elif isinstance(value, dict):
        children = value.values()
    elif dataclasses.is_dataclass(value):
        children = (getattr(value, field.name) for field in dataclasses.fields(value))
    for child in children:
        yield from _tensors(child)


def _wanting(case: dict[str, Any]) -> list[Tensor]:
    return [tensor for tensor in _tensors(case) if tensor.requires_grad]
