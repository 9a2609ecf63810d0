"""Every Triton and Gluon kernel of the system on small shapes: under compute-sanitizer, or compiled for a GPU.

    python -m bench.kernels sanitize [--tools memcheck racecheck] [--append] [--out DIR]   a GPU; writes sanitize.json
    python -m bench.kernels compile [--gpu h200] [--cases TEXT ...]    any Linux machine; a line per kernel

`sanitize` does the work under each tool and keeps the kernels that ran, the tool's own summary, how many of its
reports name which kernel, and between which lines each race was seen. memcheck must have no report: exit code 1 if it
does. racecheck does not follow the barriers between the warp roles of the Hopper kernels, so what it reports of those
is for a person to judge (docs/log.md, "compute-sanitizer"); of any other kernel a report gives exit code 1. It takes
ten minutes; `--append` keeps what an earlier command found by another tool.

`compile` shows without a GPU that all kernels compile for one with this version of Triton, and what they take of it
(bench/compiling.py). `work` does the work and nothing else, also on a CPU with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

try:
    from bench.compiling import GPUS, compile_kernels
    from bench.results import FOLDER, write_results
    from pithwood.bench.results import device_name, merge_rows, origin, read_results
    from pithwood.bench.train import mesh_of, one_step, start
    from pithwood.config import apply_overrides
    from pithwood.generate.sample import generate
    from pithwood.ops import Packing, attend, select, summarise
    from pithwood.ops.decode import decode_attend
    from pithwood.ops.gram import gram, gram_polynomial
    from pithwood.recipes import load_recipe
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}; install it, or run from the checkout's root with PYTHONPATH=.") from None

SANITIZER = "/usr/local/cuda/bin/compute-sanitizer"
"""Where it lies if it is not on the PATH."""
MOST_HAZARDS = 1 << 26
"""Pairs of accesses that racecheck keeps, of all launches together. Left alone it keeps ten million and sees no race
after them; the Hopper backward at heads of 128 takes most of these."""
ROLES = (
    *("_early_hopper_kernel", "_rows_hopper_kernel", "_parts_hopper_kernel"),
    *("_keys_hopper_kernel", "_keys_apart_kernel"),
)
"""Kernels of the Hopper GPU, whose warps have roles: racecheck misreads them."""
BLOCKS = ((32, 3), (64, 3), (96, 2), (128, 2), (192, 2), (256, 2))
"""Block sizes and blocks per query: of one tile, of several, of broken ones; more than 32 of a document and fewer."""
CASES = (
    (torch.float32, 64, 64, 3),
    (torch.bfloat16, 256, 64, 2),
    *((torch.bfloat16, 64, *blocks) for blocks in BLOCKS),
    (torch.float16, 64, 128, 2),
    *((torch.bfloat16, 128, *blocks) for blocks in BLOCKS),
    (torch.float16, 128, 128, 2),
)
LENGTHS = (700, 0, 1, 65, 1300, 128)
"""Tokens of the packed documents: some early, some listed, whole blocks and parts of them."""
STEP = (
    *("model.head_dim=64", "model.attention.block_size=32", "compile=false", "seq_len=512", "samples_per_step=2"),
    *("samples_per_micro_batch=1", "steps=2", "model.moe.chunk_tokens=256"),
)


def work(device: str, cases: Sequence[tuple[Any, ...]] = CASES, tokens: int = 1300) -> None:
    """Choices among many blocks, decoding, symmetric products, a training step, a few generated tokens, attention of
    documents of at most `tokens` tokens.

    cases   (dtype, head dim, block size, blocks per query) of attention, of `CASES`
    """
    lengths = [min(length, tokens) for length in LENGTHS]
    for dtype, dim in dict.fromkeys(case[:2] for case in cases):
        _decode(device, dtype, dim, min(tokens, 1000))
        _choice(device, lengths, dtype, dim)
    for dtype in dict.fromkeys(case[0] for case in cases):
        _symmetric_products(device, dtype)
    _steps_and_generation(device)
    # Last, and CASES in the order of head dims, for its kernels use up what racecheck can keep.
    for case in cases:
        _attention(device, lengths, *case)


def _normal(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(*shape, device=device).to(dtype)


def _attention(device: str, lengths: Sequence[int], dtype: torch.dtype, dim: int, block: int, top_k: int) -> None:
    """Forward and backward, fast and deterministic, of heads that share keys and values."""
    packing = Packing.from_lengths(lengths, device=device)
    q, k, v = (_normal(sum(lengths), heads, dim, dtype=dtype, device=device).requires_grad_() for heads in (4, 2, 2))
    with torch.no_grad():
        means = summarise(k, packing, block, impl="triton")
        selection = select(q, means, packing, top_k, block_size=block, impl="triton")
    for deterministic in (False, True):
        o, _ = attend(q, k, v, packing, selection, impl="triton", deterministic=deterministic)
        torch.autograd.grad(o, (q, k, v), torch.randn_like(o))


def _choice(device: str, lengths: Sequence[int], dtype: torch.dtype, dim: int) -> None:
    """Among as many blocks as tokens: few, with rows that are sought again from lists, and many."""
    packing = Packing.from_lengths(lengths, device=device)
    q, k = (_normal(sum(lengths), heads, dim, dtype=dtype, device=device) for heads in (4, 2))
    means = summarise(k, packing, 1, impl="triton")
    for top_k in (8, 20):
        select(q, means, packing, top_k, block_size=1, impl="triton")


def _decode(device: str, dtype: torch.dtype, dim: int, tokens: int) -> None:
    """A few queries of two documents, to chosen blocks and to all keys."""
    packing = Packing.from_lengths([2, 1], [tokens, tokens // 3], device=device)
    k, v = (_normal(tokens + tokens // 3, 2, dim, dtype=dtype, device=device) for _ in range(2))
    q = _normal(3, 4, dim, dtype=dtype, device=device)
    means = summarise(k, packing, 32, impl="triton")
    selection = select(q, means, packing, 3, block_size=32, impl="triton")
    for chosen in (selection, None):
        decode_attend(q, k, v, packing, chosen, impl="triton")


def _symmetric_products(device: str, dtype: torch.dtype) -> None:
    """Those of Muon, of wide and of tall matrices; there is no kernel for fp32, nor for GPUs before Hopper."""
    for shape in ((2, 96, 200), (2, 200, 96)):
        x_MRC = _normal(*shape, dtype=dtype, device=device)
        if dtype == torch.float32 or (x_MRC.is_cuda and torch.cuda.get_device_capability(x_MRC.device) < (9, 0)):
            return
        product_MKK = gram(x_MRC, impl="triton")
        gram_polynomial(product_MKK, 3.4, -4.8, 2.0, impl="triton")


def _steps_and_generation(device: str) -> None:
    """Two optimizer steps of a small model on random tokens, and tokens that it makes."""
    run = apply_overrides(load_recipe("debug"), [*STEP, f"device={device}"])
    with tempfile.TemporaryDirectory() as folder, mesh_of(run, print) as (mesh, watch):
        started = start(run, mesh, watch, "fake", Path(folder), print)
        for step in range(run.steps):
            one_step(started, step)
        generate(started.trainer.model, [[1, 2, 3], list(range(100))], 3)


# ---- under compute-sanitizer


def run_under(tool: str, cases: Sequence[str] = ("",), logs: Path | None = None) -> dict[str, Any]:
    """The work under a tool of compute-sanitizer: a row of the results.

    cases   only these of attention (`--cases`)
    logs    folder that gets all that the tool says, as TOOL.log
    """
    sanitizer = shutil.which("compute-sanitizer") or SANITIZER
    if not Path(sanitizer).is_file():
        raise SystemExit(f"compute-sanitizer is neither on the PATH nor at {SANITIZER}; it comes with the CUDA toolkit")
    # freed blocks that torch keeps would hide accesses past their end
    environment = {
        **os.environ,
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        "NV_COMPUTE_SANITIZER_MAX_RACECHECK_HAZARDS": str(MOST_HAZARDS),
    }
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        options = ["--tool", tool, "--log-file", str(log), "--print-limit", "1000"]
        command = [sanitizer, *options, sys.executable, "-m", "bench.kernels", "work", "--cases", *cases]
        begun = time.monotonic()
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
        text = log.read_text(errors="replace") if log.is_file() else ""
    if logs is not None:
        logs.mkdir(parents=True, exist_ok=True)
        (logs / f"{tool}.log").write_text(text)
    if done.returncode or not done.stdout.strip():
        raise SystemExit(f"{tool}: the work ended with {done.returncode}\n{text[-3000:]}")
    kernels = json.loads(done.stdout.splitlines()[-1])
    return {"tool": tool, "seconds": time.monotonic() - begun, **told(text, kernels), "kernels": kernels}


def told(log: str, kernels: Collection[str]) -> dict[str, Any]:
    """What a log of compute-sanitizer says.

    summary   its last line
    reports   how many there are of each kernel; one of "left out" if racecheck did not keep all that it saw
    races     how many there are between accesses at which places, as "Write hopper.py:120, Read hopper.py:180"
    """
    reports: Counter[str] = Counter()
    races: Counter[str] = Counter()
    for report in re.split(r"\n=+ *\n", log):
        if re.search(r"Race reported|Invalid |Error: |Warning: |hazard", report) and "SUMMARY" not in report:
            kernel = next((word for word in re.findall(r"\w+", report) if word in kernels), "other")
            if "Maximum number of hazards" in report:
                kernel = "left out"
            reports[kernel] += 1
            accesses = re.findall(r"(\w+) access at \w+\+0x[0-9a-f]+(?: in (?:\S*/)?(\S+:\d+))?", report)
            places = dict.fromkeys(f"{kind} {place or '?'}" for kind, place in accesses)
            if places:
                races[f"{kernel}: {', '.join(places)}"] += 1
    summary = [line.strip("= ") for line in log.splitlines() if "SUMMARY" in line]
    return {"summary": summary[-1] if summary else "none", "reports": dict(reports), "races": dict(races)}


def is_clean(row: dict[str, Any]) -> bool:
    """Whether a tool has nothing to say of the kernels that it can judge."""
    if row["tool"] == "racecheck":
        return "RACECHECK SUMMARY" in row["summary"] and set(row["reports"]) <= set(ROLES)
    return not row["reports"] and " 0 errors" in row["summary"]


def _sanitize(args: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        raise SystemExit("compute-sanitizer needs a CUDA GPU, torch sees none; `compile` and `work` do without")
    folder = args.out or FOLDER / device_name()
    kept = (read_results(folder / "sanitize.json") or {}).get("rows", []) if args.append else []
    rows: list[dict[str, Any]] = []
    for tool in args.tools:
        row = run_under(tool, args.cases, args.logs)
        rows.append({**row, **origin()})
        write_results("sanitize", merge_rows(kept, rows, lambda row: row["tool"], lambda row: True), folder)
        print(f"{tool}: {len(row['kernels'])} kernels, {row['summary']}, reports {row['reports']}")
    return 0 if all(map(is_clean, rows)) else 1


def _work(cases: Sequence[tuple[Any, ...]], tokens: int) -> int:
    """Do the work and print the names of the kernels that were launched as JSON (none in the interpreter)."""
    from triton import knobs

    names: set[str] = set()

    def note(launch: Any) -> None:
        names.add(launch.get()["name"])

    knobs.runtime.launch_enter_hook.add(note)
    torch.manual_seed(0)
    if torch.cuda.is_available():
        work("cuda", cases, tokens)
        torch.cuda.synchronize()
    else:
        # Triton's interpreter multiplies bf16 wrongly
        work("cpu", [case for case in cases if case[0] != torch.bfloat16], tokens)
    print(json.dumps(sorted(names)))
    return 0


def main(words: Sequence[str] | None = None) -> int:
    """The command; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    sanitizing = commands.add_parser("sanitize", help="do the work under compute-sanitizer")
    sanitizing.add_argument("--tools", nargs="+", default=["memcheck", "racecheck"], help="tools of compute-sanitizer")
    sanitizing.add_argument("--append", action="store_true", help="keep what sanitize.json says of the other tools")
    sanitizing.add_argument("--out", type=Path, help="folder for sanitize.json (default: bench/results/<device>)")
    sanitizing.add_argument("--logs", type=Path, help="folder for all that the tools say (default: not kept)")
    compiling = commands.add_parser("compile", help="compile all kernels for a GPU, without one")
    compiling.add_argument("--gpu", default="h200", choices=list(GPUS), help="default: %(default)s")
    compiling.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    working = commands.add_parser(
        "work",
        help="do the work, alone",
        description="Do the work and print the names of the kernels that were launched, as JSON. In Triton's "
        "interpreter (on a CPU, ten minutes) none has a name, and cases in bf16, which it multiplies wrongly, are left "
        "out.",
    )
    working.add_argument("--tokens", type=int, default=1300, help="tokens of the longest document, at least 1")
    for command in (sanitizing, compiling, working):
        command.add_argument("--cases", nargs="+", default=[""], help="only these of attention, as bfloat16/128/64")
    args = parser.parse_args(words)
    for asked in args.cases:
        if not any(told_case(case).startswith(asked) for case in CASES):
            parser.error(f"--cases {asked} is in none of {', '.join(map(told_case, CASES))}")
    if args.command == "sanitize":
        return _sanitize(args)
    if importlib.util.find_spec("triton") is None:
        parser.error(f"{args.command} needs triton, which is not installed: scripts/install.sh .venv triton-cpu")
    chosen = [case for case in CASES if told_case(case).startswith(tuple(args.cases))]
    if args.command == "work":
        if args.tokens < 1:
            parser.error(f"--tokens {args.tokens} must be at least 1")
        if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
            parser.error("torch sees no GPU; TRITON_INTERPRET=1 does the work in Triton's interpreter")
        return _work(chosen, args.tokens)
    compile_kernels(chosen, args.gpu, args.json)
    return 0


def told_case(case: tuple[Any, ...]) -> str:
    """dtype/head dim/block size/blocks per query."""
    return "/".join(str(part).removeprefix("torch.") for part in case)


if __name__ == "__main__":
    sys.exit(main())
