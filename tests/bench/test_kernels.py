"""bench/sanitize.py: the work runs, and what a log of compute-sanitizer says is read right."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.sanitize import is_clean, main, told

ROOT = Path(__file__).parents[2]

MEMCHECK = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 2 bytes
=========     at _own_kernel+0x1230
=========     by thread (3,0,0) in block (1,0,0)
=========     Access to 0x7f0 is out of bounds
=========
========= ERROR SUMMARY: 1 error
"""
RACECHECK = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at _keys_hopper_kernel+0x4f30
=========     and Read access at _keys_hopper_kernel+0x5a10 [64 hazards]
=========
========= Error: Race reported between Read access at _keys_hopper_kernel+0x60
=========     and Write access at _keys_hopper_kernel+0x30 [4 hazards]
=========
========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)
"""
CLEAN = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"


def row(tool: str, log: str) -> dict:
    return {"tool": tool, **told(log)}


def test_reports_are_counted_by_kernel_and_the_summary_is_kept():
    assert told(MEMCHECK) == {"summary": "ERROR SUMMARY: 1 error", "reports": {"_own_kernel": 1}}
    found = told(RACECHECK)
    assert found["reports"] == {"_keys_hopper_kernel": 2}
    assert found["summary"] == "RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)"
    assert told(CLEAN) == {"summary": "ERROR SUMMARY: 0 errors", "reports": {}}


def test_what_counts_as_clean():
    assert is_clean(row("memcheck", CLEAN))
    assert not is_clean(row("memcheck", MEMCHECK))
    assert not is_clean(row("memcheck", ""))  # a tool that said nothing has shown nothing
    # misread barriers of kernels whose warps have roles; in any other kernel a race is one
    assert is_clean(row("racecheck", RACECHECK))
    assert not is_clean(row("racecheck", RACECHECK.replace("_keys_hopper_kernel", "_own_kernel")))
    assert not is_clean(row("racecheck", ""))


def test_words_and_machines_that_cannot_do_it_are_refused(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs a CUDA GPU"):
        main([])
    with pytest.raises(SystemExit):
        main(["--tokens", "0"])
    assert "--tokens 0 must be at least 1" in capsys.readouterr().err


@pytest.mark.slow
def test_the_work_runs_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "bench.sanitize", "--work", "--tokens", "40"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"  # the interpreter launches nothing
