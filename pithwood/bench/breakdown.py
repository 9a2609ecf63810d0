"""Where the time of one MoBA layer goes: its stages apart, and on a GPU every kernel by name."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from pithwood.bench.cases import Case
from pithwood.bench.implementations import MEAN_DTYPE, moba
from pithwood.bench.inputs import Inputs
from pithwood.bench.timing import Timer, synchronize
from pithwood.ops.attend import attend
from pithwood.ops.select import select
from pithwood.ops.summarise import summarise

MOST_KERNELS = 20
PROFILED_RUNS = 3
NAME_LENGTH = 80


def stages(case: Case, impl: str | None, inputs: Inputs, timer: Timer) -> dict[str, Any]:
    """Median ms of summarise, select, attend forward and (in a backward case) backward; on a GPU also `kernels`, the ms
    per pass of each kernel. Stages are timed apart, so their sum may differ from the whole."""
    (size, top_k), packing = case.blocks, inputs.packing
    both = case.pass_ == "fwd+bwd"
    q, k, v = (x.detach().requires_grad_(both) for x in (inputs.q, inputs.k, inputs.v))
    means = summarise(k, packing, size, impl=impl)

    def choose():
        return select(q, means, packing, top_k, block_size=size, mean_dtype=MEAN_DTYPE, impl=impl)

    selection = choose()

    def forward():
        with torch.set_grad_enabled(both):
            return attend(q, k, v, packing, selection, impl=impl)[0]

    def time_of(run: Callable[[], object]) -> float:
        run()
        return timer.measure(run).median_ms

    result: dict[str, Any] = {
        "summarise": time_of(lambda: summarise(k, packing, size, impl=impl)),
        "select": time_of(choose),
        "attend_fwd": time_of(forward),
    }
    if both:
        o = forward()
        result["attend_bwd"] = time_of(lambda: torch.autograd.grad(o, (q, k, v), inputs.grad_o, retain_graph=True))
        del o

    def whole() -> object:
        with torch.set_grad_enabled(both):
            o = moba(q, k, v, packing, size, top_k, impl)
        return torch.autograd.grad(o, (q, k, v), inputs.grad_o) if both else o

    if timer.device.type == "cuda":
        result["kernels"] = kernel_times(whole, timer.device)
    return result


def kernel_times(run: Callable[[], object], device: torch.device) -> dict[str, float]:
    """ms per run on the GPU by kernel name, longest first; what does not fit in the list is summed up as "other"."""
    from torch.profiler import ProfilerActivity, profile

    run()
    synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(PROFILED_RUNS):
            run()
        synchronize(device)
    spent: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        if event.self_device_time_total > 0:
            spent[event.key[:NAME_LENGTH]] += event.self_device_time_total / 1e3 / PROFILED_RUNS
    in_order = sorted(spent.items(), key=lambda item: -item[1])
    rest = sum(ms for _, ms in in_order[MOST_KERNELS:])
    return {**dict(in_order[:MOST_KERNELS]), **({"other": rest} if rest else {})}


def breakdown_lines(breakdown: dict[str, Any]) -> list[str]:
    """The breakdown as indented lines."""
    stage = ", ".join(f"{name} {ms:.3f}" for name, ms in breakdown.items() if name != "kernels")
    lines = [f"    ms apart: {stage}"]
    for name, ms in breakdown.get("kernels", {}).items():
        lines.append(f"    {ms:9.3f} {name}")
    return lines
