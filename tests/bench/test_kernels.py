"""bench/kernels.py: the work runs, compiles for a Hopper GPU, and a log of compute-sanitizer is read right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bench.kernels
from bench.compiling import GPUS, bare_arrivals
from bench.kernels import ROLES, is_clean, main, told
from pithwood.bench import results

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
========= Error: Race reported between Write access at _keys_hopper_kernel+0x4f30 in /a/b/keys.py:120
=========     and Read access at _keys_hopper_kernel+0x5a10 in /a/b/keys.py:180 [64 hazards]
=========     and Read access at _keys_hopper_kernel+0x5a20 in /a/b/keys.py:180 [64 hazards]
=========     and Read access at _keys_hopper_kernel+0x5a30 in /a/b/keys.py:181 [64 hazards]
=========
========= Error: Race reported between Read access at _keys_hopper_kernel+0x60
=========     and Write access at _keys_hopper_kernel+0x30 [4 hazards]
=========
========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)
"""
NAMES = ["_keys_hopper_kernel", "_own_kernel"]
CLEAN = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"


def row(tool: str, log: str) -> dict:
    return {"tool": tool, **told(log, NAMES)}


def test_reports_are_counted_by_kernel_and_the_summary_is_kept():
    assert told(MEMCHECK, NAMES) == {"summary": "ERROR SUMMARY: 1 error", "reports": {"_own_kernel": 1}, "races": {}}
    found = told(RACECHECK, NAMES)
    assert found["races"] == {
        "_keys_hopper_kernel: Write keys.py:120, Read keys.py:180, Read keys.py:181": 1,
        "_keys_hopper_kernel: Read ?, Write ?": 1,
    }
    assert found["reports"] == {"_keys_hopper_kernel": 2}
    assert found["summary"] == "RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)"
    assert told(CLEAN, NAMES) == {"summary": "ERROR SUMMARY: 0 errors", "reports": {}, "races": {}}


def test_what_counts_as_clean():
    assert is_clean(row("memcheck", CLEAN))
    assert not is_clean(row("memcheck", MEMCHECK))
    assert not is_clean(row("memcheck", ""))  # a tool that said nothing has shown nothing
    # misread barriers of kernels whose warps have roles; in any other kernel a race is one
    assert is_clean(row("racecheck", RACECHECK))
    assert not is_clean(row("racecheck", RACECHECK.replace("_keys_hopper_kernel", "_own_kernel")))
    assert not is_clean(row("racecheck", ""))
    # what came after the last race that was kept, nobody has looked at
    told_last = "========= Warning: Maximum number of hazards reached. Environment variable X helps.\n========= \n"
    full = row("racecheck", told_last + RACECHECK)
    assert full["reports"] == {"left out": 1, "_keys_hopper_kernel": 2}
    assert not is_clean(full)


def test_tools_may_run_apart(monkeypatch, tmp_path):
    for name, value in (("is_available", True), ("get_device_name", "NVIDIA H200"), ("device_count", 1)):
        monkeypatch.setattr(torch.cuda, name, lambda *args, value=value: value)
    monkeypatch.setattr(results, "COMMIT", "first")
    logs = {"memcheck": CLEAN, "racecheck": RACECHECK}
    monkeypatch.setattr(bench.kernels, "run_under", lambda tool, *args: {**row(tool, logs[tool]), "kernels": NAMES})
    words = ["sanitize", "--out", str(tmp_path), "--tools"]
    assert main([*words, "memcheck", "racecheck"]) == 0
    monkeypatch.setattr(results, "COMMIT", "second")
    assert main([*words, "racecheck", "--append"]) == 0
    rows = json.loads((tmp_path / "sanitize.json").read_text())["rows"]
    assert [(row["tool"], row["commit"]) for row in rows] == [("memcheck", "first"), ("racecheck", "second")]
    logs["racecheck"] = RACECHECK.replace("_keys_hopper_kernel", "_own_kernel")
    assert main([*words, "racecheck"]) == 1
    assert len(json.loads((tmp_path / "sanitize.json").read_text())["rows"]) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_sanitized():
    with pytest.raises(SystemExit, match="needs a CUDA GPU"):
        main(["sanitize"])


def test_words_that_ask_for_nothing_are_refused(capsys):
    for words, message in (
        (["work", "--tokens", "0"], "--tokens 0 must be at least 1"),
        (["compile", "--cases", "bfloat16/80"], "--cases bfloat16/80 is in none of float32/64/64/3, "),
    ):
        with pytest.raises(SystemExit):
            main(words)
        assert message in capsys.readouterr().err


def test_arrivals_that_no_barrier_precedes_are_counted():
    read, barrier, arrive = (
        "ld.shared.b32 %r1, [%r2];",
        "\tbar.sync 0, 128;",
        "@%p1 mbarrier.arrive.shared::cta.b64 _, [%r3];",
    )
    assert bare_arrivals("\n".join([read, barrier, arrive, arrive])) == 0
    assert bare_arrivals("\n".join([barrier, read, arrive])) == 1
    assert bare_arrivals("\n".join([read, "mbarrier.arrive.expect_tx.shared.b64 _, [%r3], 64;"])) == 0


def command(*words: str, interpret: bool) -> str:
    """The last line of the program's output, run in a process of its own."""
    environment = {**os.environ, "TRITON_INTERPRET": str(int(interpret)), "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "bench.kernels", *words]
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.slow
def test_the_work_runs_in_the_interpreter():
    assert command("work", "--tokens", "40", interpret=True) == "[]"  # which launches nothing


def compiled(gpu: str, *cases: str) -> list[dict]:
    """What kernels take of a GPU; each fits it."""
    kernels = json.loads(command("compile", "--gpu", gpu, "--json", "--cases", *cases, interpret=False))["kernels"]
    assert {kernel["name"] for kernel in kernels} >= {"_keys_kernel", "_early_kernel", "_gather_rows"}
    for kernel in kernels:
        assert kernel["shared"] <= GPUS[gpu].shared_memory_per_block_optin, kernel
        assert kernel["registers"] <= 255, kernel
    return kernels


@pytest.mark.slow
def test_all_kernels_compile_for_a_hopper_gpu_within_what_it_has():
    chosen = [f"bfloat16/{dim}/{block}" for dim in (64, 128) for block in (128, 256)]
    kernels = compiled("h200", *chosen)
    gate = {"select_short_kernel", "podiums_kernel", "listed_kernel", "rounds_kernel"}
    assert {kernel["name"] for kernel in kernels} >= {*ROLES, *gate}
    # Registers that spill cost the Hopper kernels their speed: no more than were there when they were measured.
    spilled = {"_keys_hopper_kernel": 40, "_parts_hopper_kernel": 208}
    for kernel in kernels:
        if kernel["name"] in ROLES:
            assert kernel["stack"] <= spilled.get(kernel["name"], 0), kernel
            assert kernel["bare_arrivals"] == 0, kernel


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gpu", "cases"),
    [("rtx4090", ["bfloat16/64/128", "bfloat16/128/256", "bfloat16/256", "float32"]), ("b200", ["bfloat16/128/128"])],
    ids=["desktop", "blackwell"],
)
def test_all_kernels_compile_for_other_gpus_within_what_they_have(gpu, cases):
    compiled(gpu, *cases)
