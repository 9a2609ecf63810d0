"""The loop of the processes of doomed.py; importing it loads torch."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pithwood.checkpoint.signals import StopRequest
from pithwood.parallel.agreement import StopAgreement
from pithwood.parallel.config import MeshConfig
from pithwood.parallel.faults import Watch
from pithwood.parallel.mesh import join_mesh, stop_mesh
from pithwood.parallel.verdicts import Bounds
from tests.parallel.doomed import misfortune

STEP_S = 0.02
"""What a step takes without a fault."""


def loop(
    folder: str, rank: int, size: int, fault: dict[str, Any], bounds: dict[str, Any], steps: int, kind: str
) -> None:
    """Steps of a sleep and a sum over all processes; in the given rank and step, the fault."""
    torch.set_num_threads(1)
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    mesh = join_mesh(MeshConfig(dp_shard=size), device, rank, size, dist.FileStore(f"{folder}/store", size))
    mine = fault.get("rank") == rank
    with Watch(mesh, bounds=Bounds(**bounds)) as watch, StopRequest() as stop, StopAgreement(mesh) as agreement:
        if mine and fault.get("step") == -1:
            misfortune(fault, folder)
        for step in range(steps):
            watch.step(step)
            watch.phase("forward")
            time.sleep(STEP_S)
            if mine and fault["what"] == "slow" and step >= fault["step"]:
                time.sleep(fault["seconds"])
            elif mine and fault.get("step") == step and fault["what"] == "save":
                watch.phase("save", limit_s=60)
                time.sleep(fault["seconds"])
            elif mine and fault.get("step") == step and fault["what"] == "signal":
                signal.raise_signal(signal.SIGTERM)
            elif mine and fault.get("step") == step:
                misfortune(fault, folder)
            watch.phase("exchange", fault.get("exchange_s"))
            total = torch.ones(8, device=device)
            mesh.world.all_reduce(total)
            assert total[0].item() == size
            if fault.get("step") == step:
                time.sleep(fault.get("then", 0.0))
            if agreement.after_step(stop.signal_number):
                break
    if "folder" in fault:
        Path(fault["folder"], f"done.{rank}").write_text(str(step))
    stop_mesh(mesh)
