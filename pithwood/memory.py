"""Memory: what this machine allows, whether a run can fit, and what to change when it does not."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pithwood.checkpoint.load import list_checkpoints
from pithwood.errors import is_out_of_memory
from pithwood.run import Run


def check_memory(run: Run, figures: dict[str, Any], device: torch.device) -> list[str]:
    """Refuse a run that cannot fit, by the estimates of `plan`; returns a warning if it may not fit beside what runs.

    The estimates leave out what torch itself takes, so a run that is refused would not have worked: the kernel would
    have killed it without a word. Raises ValueError with the numbers and what to lower.
    """
    need = 1e9 * (figures["weights_gradients_optimizer_gb"] + figures["activations_gb"])
    limit, owner = memory_limit(device)
    estimate = (
        f"about {_gb(need)} ({figures['weights_gradients_optimizer_gb']:,.1f} GB of weights, gradients and optimizer "
        f"state, {figures['activations_gb']:,.1f} GB of activations)"
    )
    if need > limit:
        raise ValueError(f"the run needs {estimate}, but {owner} is {_gb(limit)}; {knobs(run)}")
    free = free_memory(device)
    if free is not None and need > free:
        return [f"WARNING: it needs {estimate}, but {_gb(free)} are free now; close other programs, or {knobs(run)}"]
    return []


def knobs(run: Run) -> str:
    """The settings that decide how much memory a run takes, with their values."""
    model = {name: getattr(run.model, name) for name in ("vocab_size", "model_dim", "num_layers")}
    model |= {f"moe.{name}": getattr(run.model.moe, name) for name in ("num_experts", "expert_dim")}
    sizes = ", ".join(f"model.{name}={size}" for name, size in model.items())
    return f"lower samples_per_micro_batch={run.samples_per_micro_batch}, seq_len={run.seq_len} or the model ({sizes})"


@contextmanager
def explained_memory(run: Run, folder: Path) -> Iterator[None]:
    """Context in which running out of memory becomes a MemoryError that names the settings and what is saved."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        saved = list_checkpoints(folder)
        kept = f"the checkpoint of step {saved[-1][0]} is intact" if saved else "there is no checkpoint yet"
        asked = re.search(r"tried to allocate ([\d.]+ ?\w+)", str(error), re.IGNORECASE)
        what = f" (asked for {asked[1]} more)" if asked else ""
        raise MemoryError(f"out of memory{what}; {knobs(run)}; {kept}") from error


def memory_limit(device: torch.device) -> tuple[int, str]:
    """Bytes that a process can have on a device at most, and what sets that limit, in words."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return properties.total_memory, f"the memory of {properties.name}"
    limits = [(2**63 - 1, "the largest address space")]
    if {"SC_PAGE_SIZE", "SC_PHYS_PAGES"} <= os.sysconf_names.keys():
        limits.append((os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "this machine's memory"))
    if (grouped := cgroup_limit()) is not None:
        limits.append((grouped, "the memory limit of this container (cgroup)"))
    import resource

    for name, words in (("RLIMIT_AS", "ulimit -v"), ("RLIMIT_DATA", "ulimit -d")):
        soft = resource.getrlimit(getattr(resource, name))[0]
        if soft != resource.RLIM_INFINITY:
            limits.append((soft, f"the memory limit of this process ({words})"))
    return min(limits)


def free_memory(device: torch.device) -> int | None:
    """Bytes of a device that are free now or can be made so at once; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def cgroup_limit(membership: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """The smallest memory limit among the control groups of this process, in bytes; None if there is none.

    Both versions are read: `memory.max` of the unified tree, `memory.limit_in_bytes` of the older memory tree. A group
    is bound by those above it; inside a container the path may be that of the host, then only the root is there.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return None
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory") and "memory" not in controllers.split(","):
            continue
        tree, name = (root, "memory.max") if not controllers else (root / "memory", "memory.limit_in_bytes")
        folder = tree / path.lstrip("/")
        for group in (folder, *folder.parents):
            try:
                text = (group / name).read_text().strip()
            except OSError:
                text = "max"
            # The older tree writes a huge number where there is no limit.
            if text.isdigit() and int(text) < 2**60:
                found.append(int(text))
            if group == tree:
                break
    return min(found, default=None)


def _gb(count: float) -> str:
    return f"{count / 1e9:,.1f} GB"
