"""What checks need of a checkout of the repository: its root, the functions of a file of cases, its tests."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pithwood
from pithwood.check.gates import GateError, require

ROOT = Path(pithwood.__file__).parents[1]


def case_function(root: Path, file: str, name: str) -> Callable[[], Any]:
    """The generator function `name` of a file of cases, read afresh; fails the gate if there is none."""
    path = root / file
    require(path.is_file(), f"{file} does not exist: the check runs in a checkout of the repository")
    spec = importlib.util.spec_from_file_location("pithwood_check_cases", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    make = getattr(module, name, None)
    if make is None:
        raise GateError(f"{file} has no function {name}(); write one that yields what to try")
    return make


def run_test_file(path: Path, root: Path = ROOT) -> str:
    """Run one file of tests in a process of its own; fails the gate with the first failing test's name."""
    if importlib.util.find_spec("pytest") is None:
        raise GateError("pytest is not installed; `make test` installs it, `--no-tests` leaves this gate out")
    words = [sys.executable, "-m", "pytest", str(path), "-n", "0", "-x", "-p", "no:cacheprovider", "--durations=0"]
    words += ["-r", "fE", "-m", "not slow and not gpu and not multi_gpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=root, env=environment, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or [""]
    if done.returncode:
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        raise GateError(f"{path.relative_to(root)}: {failed[0] if failed else lines[-1]}")
    return lines[-1].strip("= ")
