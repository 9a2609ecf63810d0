"""Memory: what this machine allows, whether a run can fit, and what to change when it does not."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pithwood.checkpoint.load import list_checkpoints
from pithwood.data.curriculum import Stage
from pithwood.errors import is_out_of_memory, size_text
from pithwood.models.qwen3_moe import Qwen3MoE
from pithwood.models.recompute import ActivationPlan
from pithwood.ops.packing import Packing
from pithwood.optim.config import STATE_DTYPES, MuonConfig
from pithwood.optim.groups import ParamPlan
from pithwood.optim.muon import matrices_per_chunk, resolve_ns_dtype
from pithwood.optim.optimizer import Optimizer
from pithwood.run import DTYPES, Run, pick_device

SHARE_FOR_COPIES = 0.9
"""Copies of the weights are kept if the estimate with them stays below this share of the device's memory."""


def check_memory(run: Run, figures: dict[str, Any], device: torch.device) -> list[str]:
    """Refuse a run that cannot fit, by the estimates of `plan`; returns a warning if it may not fit beside what runs.

    The estimates leave out what torch itself takes, so a run that is refused would not have worked: the kernel would
    have killed it without a word. Raises ValueError with the numbers and what to lower. On a mesh it is the least that
    a process can have: what is gathered, and stages that are not alike, come on top.
    """
    mesh = run.mesh
    weights = figures["weights_gradients_optimizer_gb"] / (mesh.pp * mesh.dp_shard * mesh.cp)
    activations = figures["activations_gb"] / (mesh.data_size * mesh.cp)
    need = 1e9 * (weights + activations)
    limit, owner = memory_limit(device)
    estimate = (
        f"about {_gb(need)}{' or more in each process' if mesh.size > 1 else ''} ({weights:,.1f} GB of weights, "
        f"gradients and optimizer state, {activations:,.1f} GB of activations)"
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
    least = all(kept == "block" for kept in run.recompute_by_block())
    return (
        f"lower samples_per_micro_batch={run.samples_per_micro_batch}, seq_len={run.seq_len} or the model ({sizes})"
        + ("" if least else ", or set recompute=block")
    )


def memory_by_kind(run: Run, device: torch.device | None = None, *, copies: bool | None = None) -> dict[str, float]:
    """Bytes on the device at the moment when a step holds most, by kind; their sum is the predicted peak.

    device   None: the one that the run would take here. An estimate for a GPU may be asked for on a machine without.
    copies   whether weight copies are kept; None: as `keep_weight_copies` says, with "auto" as if they fit
    returns  weights, weight_copies, gradients, optimizer_state, weight_average, activations, workspace

    Of the moments of `memory_moments` the one that takes most. Nothing is allocated: model and optimizer are built
    without memory and asked for their sizes. What torch and the driver take for themselves is left out.
    """
    moments = memory_moments(run, device, copies=copies)
    return max((kinds for _, kinds in moments), key=lambda kinds: sum(kinds.values()))


def memory_moments(
    run: Run, device: torch.device | None = None, *, copies: bool | None = None
) -> list[tuple[str, dict[str, float]]]:
    """The same at each moment that may be the fullest, with the part of the step: of every phase the end of a step's
    last `forward` pass, the `backward` pass of the first block, and the `update`.
    """
    device = pick_device(run) if device is None else device
    if copies is None:
        copies = run.keep_weight_copies == "always" or (run.keep_weight_copies == "auto" and _wants_copies(run, device))
    with torch.device("meta"):
        model = Qwen3MoE(dataclasses.replace(run.model, attention=run.phase(0).attention))
    model.keep_activations(activation_plan(run))
    optimizer: Optimizer | None = None
    moments: list[tuple[str, dict[str, float]]] = []
    stages = run.stages()
    for index in range(max(len(run.phases), 1)):
        begin = run.phases[index - 1].until_step if index else 0
        phase = run.phase(begin)
        with torch.device("meta"):
            if phase.attention != model.cfg.attention:
                model.set_attention(phase.attention)
            names, roles = dict(model.named_parameters()), model.parameter_roles()
            if optimizer is None:
                optimizer = Optimizer(run.optim, names, roles, run.steps)
            optimizer.set_phase(names, roles, trainable=phase.trainable, lr_scales=phase.lr_scales)
        stage = next((stage for stage in stages if begin < stage.until_step), stages[-1])
        moments += _moments(run, model, optimizer, stage, device, copies)
    return moments


def _moments(
    run: Run, model: Qwen3MoE, optimizer: Optimizer, stage: Stage, device: torch.device, copies: bool
) -> list[tuple[str, dict[str, float]]]:
    """What is on the device at the end of a step's last forward pass, in the backward pass of its first block, which
    comes last, and during its update.
    """
    params = list(model.parameters())
    state = optimizer.state_dict()
    average = 0.0 if optimizer.average is None else float(_bytes(optimizer.average.average.values()))
    gradients = float(_bytes(param for param in params if param.requires_grad))
    # on the host but for a few scalars
    away = run.optim.offload_state and device.type == "cuda"
    resident = {
        "weights": float(_bytes(params)),
        "weight_copies": 2.0 * sum(weight.numel() for weight in model.product_weights().values()) if copies else 0.0,
        "optimizer_state": 0.0 if away else _bytes(state.values()) - average,
        "weight_average": average,
    }
    # samples of one length cost the same: a thousand of them are priced, one by one, and multiplied
    many = min(stage.samples_per_batch, 1000)
    packing, element = Packing.from_lengths([stage.seq_len] * many), DTYPES[run.precision].itemsize
    whole, first = model.cost(packing, element), model.first_block_cost(packing, element)
    share = stage.samples_per_batch / many
    # gradients are dropped after each update: the first backward pass makes them anew as the activations go, and the
    # head's is among its workspace
    alone = run.samples_per_micro_batch == run.samples_per_step
    return [
        (
            "forward",
            {
                **resident,
                "gradients": 0.0 if alone else gradients,
                "activations": whole.saved_bytes * share,
                "workspace": whole.workspace_bytes * share,
            },
        ),
        (
            "backward",
            {
                **resident,
                "gradients": gradients,
                "activations": first.saved_bytes * share,
                "workspace": first.workspace_bytes * share,
            },
        ),
        (
            "update",
            {
                **resident,
                "gradients": gradients,
                "activations": 0.0,
                "workspace": _update_bytes(run, list(optimizer.plans.values()), device),
            },
        ),
    ]


def _update_bytes(run: Run, plans: list[ParamPlan], device: torch.device) -> float:
    """Temporary bytes of an update: of the largest batch of matrices that Muon orthogonalises at once, and the two
    windows through which state on the host visits a GPU.
    """
    cfg = run.optim
    if not isinstance(cfg, MuonConfig):
        return 0.0
    dtype, counts = resolve_ns_dtype(cfg.ns_dtype, device), dict[tuple[int, int], int]()
    for plan in plans:
        if plan.trainable and plan.muon:
            shape = plan.matrix_shape[1], plan.matrix_shape[2]
            counts[shape] = counts.get(shape, 0) + plan.matrix_shape[0]
    most = 0
    for (rows, cols), count in counts.items():
        many = min(count, matrices_per_chunk(rows, cols, dtype, device))
        # X twice, the Gram matrix and the polynomial
        need = 2 * (rows * cols + min(rows, cols) ** 2) * dtype.itemsize
        if cfg.offload_state and device.type == "cuda":
            need += 2 * rows * cols * STATE_DTYPES[cfg.momentum_dtype].itemsize
        most = max(most, many * need)
    return float(most)


def activation_plan(run: Run) -> ActivationPlan:
    """How the blocks of a run's model keep their activations."""
    return ActivationPlan(run.recompute_by_block(), run.offload_activations)


def keeps_copies(run: Run, device: torch.device, memory_bytes: float | None = None) -> bool:
    """Whether a run keeps copies of its weights on a device; memory_bytes: the device's memory, None asks it."""
    if run.keep_weight_copies != "auto":
        return run.keep_weight_copies == "always"
    if not _wants_copies(run, device):
        return False
    if run.mesh.size > 1:
        # of divided weights a process gathers copies anyway
        return True
    limit = memory_limit(device)[0] if memory_bytes is None else memory_bytes
    return sum(memory_by_kind(run, device, copies=True).values()) <= SHARE_FOR_COPIES * limit


def memory_line(run: Run, device: torch.device, copies: bool) -> str:
    """What a run will take and what it does about it, in words: for the lines at its start."""
    if run.mesh.size > 1:
        return "`pithwood estimate` tells the share of a process"
    kinds = memory_by_kind(run, device, copies=copies)
    each = run.recompute_by_block()
    kept = {
        "none": "activations kept",
        "selective": "cheap activations computed again",
        "block": f"block inputs kept {'in host memory' if run.offload_activations else 'alone'}",
    }
    counts = ", ".join(
        text if each.count(name) == len(each) else f"{text} in {each.count(name)} of {len(each)} blocks"
        for name, text in kept.items()
        if name in each
    )
    weights = (
        f"{run.precision} copies of the weights ({size_text(kinds['weight_copies'])})" if copies else "no weight copies"
    )
    return f"about {size_text(sum(kinds.values()))} at most; {counts}; {weights}"


def _wants_copies(run: Run, device: torch.device) -> bool:
    return run.precision != "fp32" and device.type == "cuda"


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


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
