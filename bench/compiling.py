"""Kernels compiled for a GPU on a machine without one, as the system itself launches them.

The work of bench/kernels.py runs on CPU tensors that claim to be on a GPU, with launches that end after compilation, so
every kernel gets the arguments, tile shapes and options that a GPU would see. Nothing is computed: memory that kernels
would write is zero. Only for a process of its own, since it changes torch and Triton.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

GPUS = {
    "a100": SimpleNamespace(major=8, minor=0, multi_processor_count=108, shared_memory_per_block_optin=166_912),
    "rtx4090": SimpleNamespace(major=8, minor=9, multi_processor_count=128, shared_memory_per_block_optin=101_376),
    "h200": SimpleNamespace(major=9, minor=0, multi_processor_count=132, shared_memory_per_block_optin=232_448),
    "b200": SimpleNamespace(major=10, minor=0, multi_processor_count=148, shared_memory_per_block_optin=232_448),
    "rtx5090": SimpleNamespace(major=12, minor=0, multi_processor_count=170, shared_memory_per_block_optin=101_376),
}
"""What torch tells of GPUs, in the words of CUDA: compute capability, processors, bytes of shared memory that a program
may have (CUDA C++ programming guide, "Compute capabilities")."""


class _Driver:
    """What Triton asks of a driver until a kernel is compiled."""

    def __init__(self, gpu: SimpleNamespace) -> None:
        self.gpu = gpu

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 10 * self.gpu.major + self.gpu.minor, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def compile_kernels(cases: Sequence[tuple[Any, ...]], gpu: str, as_json: bool = False) -> list[dict[str, Any]]:
    """Compile what the work launches, print a line per kernel (or one JSON object) and return the rows.

    cases    as `bench.kernels.work` takes them
    gpu      of `GPUS`
    returns  per kernel its name, registers and bytes of stack (where registers spill) per thread, bytes of shared
             memory, warps and bare arrivals, in the order of their first launch; a name appears once for every way it
             was compiled
    raises   SystemExit where Triton is set to interpret; what Triton raises for a kernel that does not compile
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("TRITON_INTERPRET=1 compiles nothing; unset it")
    found = _intercept_launches(GPUS[gpu])
    _claim_gpu(GPUS[gpu])
    from bench.kernels import work

    work("cpu", cases)
    rows = [_row(name, kernel) for name, kernel in found.values()]
    if as_json:
        import triton

        print(json.dumps({"gpu": gpu, "triton": triton.__version__, "kernels": rows}))
    else:
        for row in rows:
            print("{name:32}{registers:5} registers{stack:6} B stack{shared:8} B shared{warps:4} warps".format(**row))
    return rows


def _intercept_launches(gpu: SimpleNamespace) -> dict[str, tuple[str, Any]]:
    """Let launches compile only; returns where what they compile is put, by hash."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    driver.set_active(_Driver(gpu))
    found: dict[str, tuple[str, Any]] = {}
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        found.setdefault(kernel.hash, (self.__name__, kernel))
        return kernel

    JITFunction.run = compile_only
    return found


def _claim_gpu(gpu: SimpleNamespace) -> None:
    """Let torch say that CPU tensors lie on this GPU, and give memory that nobody wrote as zeros."""
    import torch.utils._device

    import bench.kernels  # noqa: F401  loads the modules whose names are changed below

    torch.Tensor.is_cuda = property(lambda self: True)  # type: ignore[assignment,misc]
    torch.cuda.get_device_capability = lambda *_: (gpu.major, gpu.minor)  # type: ignore[assignment]
    torch.cuda.get_device_properties = lambda *_: gpu  # type: ignore[assignment]
    torch.cuda.is_current_stream_capturing = lambda: False
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("pithwood.") and hasattr(module, "triton_misfit"):
            module.triton_misfit = lambda *_: None  # type: ignore[attr-defined]
    torch.utils._device._device_constructors()  # remembers the functions that are replaced now
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")):
        setattr(owner, name, _zeroed(getattr(owner, name)))


def _zeroed(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def made(*args: Any, **options: Any) -> torch.Tensor:
        return make(*args, **options).zero_()

    return made


def _row(name: str, kernel: Any) -> dict[str, Any]:
    """What a compiled kernel takes, by the tool that comes with Triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        told = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    counts = re.search(r"REG:(\d+) STACK:(\d+)", told)
    if counts is None:
        raise RuntimeError(f"cuobjdump says nothing of {name}: {told}")
    sizes = {"shared": kernel.metadata.shared, "warps": kernel.metadata.num_warps}
    registers = {"registers": int(counts[1]), "stack": int(counts[2])}
    return {"name": name, **registers, **sizes, "bare_arrivals": bare_arrivals(kernel.asm["ptx"])}


def bare_arrivals(ptx: str) -> int:
    """How many arrivals at an mbarrier no barrier of the arriving warps precedes, since their last access of memory.

    One thread arrives for all: without the barrier the others may still read or write what the arrival gives away.
    """
    found, last = 0, ""
    for line in ptx.splitlines():
        words = re.match(r"\s*(?:@\S+\s+)?((?:bar|barrier|mbarrier|cp|wgmma|ld|st|red|atom)\.[\w.:]+)", line)
        if words is None or words[1].startswith(("cp.async.mbarrier", "mbarrier.init", "mbarrier.inval")):
            continue
        arrives = words[1].startswith("mbarrier.arrive") and "expect_tx" not in words[1]
        if arrives and not last.startswith(("bar.", "barrier.", "mbarrier.arrive")):
            found += 1
        last = words[1]
    return found
