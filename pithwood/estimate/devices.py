"""Devices that a run can be estimated for, and meshes of them, as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass, fields

from pithwood.estimate.work import Peaks
from pithwood.observe.metrics import HOPPER_COPY_BYTES, HOPPER_MEASURED_FLOPS
from pithwood.run import Run


@dataclass(frozen=True)
class Device:
    """One GPU and how it reaches others."""

    name: str
    """Folder of its results files under bench/results."""
    memory_bytes: float
    """What torch reports as its total memory."""
    peaks: Peaks
    nvlink_bytes_per_s: float = 360e9
    """One direction, to GPUs of the same host: 80 % of the 450 GB/s that NVLink 4 states."""
    network_bytes_per_s: float = 40e9
    """One direction, to other hosts: 80 % of one 400 Gb/s InfiniBand port for each GPU."""
    per_host: int = 8
    """GPUs of a host."""


DEVICES = {
    "h200": Device("nvidia-h200", 150.1e9, Peaks(HOPPER_MEASURED_FLOPS, HOPPER_COPY_BYTES)),
    "h100": Device("nvidia-h100-80gb-hbm3", 84.9e9, Peaks(790e12, 3.02e12)),
}
"""By the name that --device takes. Peaks are those of bench/results (rows `peak` of attention.json)."""


@dataclass(frozen=True)
class MeshSizes:
    """How many ways the work is divided: pp * dp_replicate * dp_shard * cp devices, the experts over ep of them."""

    pp: int = 1
    """Pipeline stages; each holds as many layers."""
    dp_replicate: int = 1
    """Copies of the whole state; each takes its share of the samples."""
    dp_shard: int = 1
    """Devices that share one copy of weights, gradients and optimizer state; each takes its share of the samples."""
    cp: int = 1
    """Devices that share a sequence, and one copy of the state with dp_shard."""
    ep: int = 1
    """Devices of dp_shard * cp that share the experts."""

    @property
    def world(self) -> int:
        return self.pp * self.dp_replicate * self.dp_shard * self.cp

    @property
    def data_ranks(self) -> int:
        """Groups of devices that take different samples."""
        return self.dp_replicate * self.dp_shard

    @property
    def shards(self) -> int:
        """Devices over which one copy of a stage's state is divided."""
        return self.dp_shard * self.cp


def mesh_from_text(words: list[str]) -> MeshSizes:
    """The mesh of words such as `dp_shard=8`; ValueError for a name or number that cannot be."""
    names = [field.name for field in fields(MeshSizes)]
    sizes: dict[str, int] = {}
    for word in words:
        name, equals, number = word.partition("=")
        if not equals or name not in names:
            raise ValueError(f"--mesh {word} is no part of a mesh; write NAME=N with NAME among {', '.join(names)}")
        if not number.isdigit() or int(number) < 1:
            raise ValueError(f"--mesh {word} must be a whole number of at least 1")
        if name in sizes:
            raise ValueError(f"--mesh gives {name} twice")
        sizes[name] = int(number)
    return MeshSizes(**sizes)


def check_mesh(mesh: MeshSizes, run: Run) -> None:
    """Raise ValueError, in the words of mesh and run, for a mesh that cannot divide the run."""
    model = run.model
    if mesh.shards % mesh.ep:
        raise ValueError(
            f"ep={mesh.ep} must divide dp_shard * cp = {mesh.shards}: the experts lie on devices that share one state"
        )
    if model.moe.num_experts % mesh.ep:
        raise ValueError(f"ep={mesh.ep} must divide model.moe.num_experts={model.moe.num_experts}")
    if model.num_layers % mesh.pp:
        raise ValueError(f"pp={mesh.pp} must divide model.num_layers={model.num_layers}")
    if run.seq_len % mesh.cp:
        raise ValueError(f"cp={mesh.cp} must divide seq_len={run.seq_len}")
    each, rest = divmod(run.samples_per_step, mesh.data_ranks)
    if rest or each % run.samples_per_micro_batch:
        raise ValueError(
            f"samples_per_step={run.samples_per_step} must be a multiple of dp_replicate * dp_shard = "
            f"{mesh.data_ranks} times samples_per_micro_batch={run.samples_per_micro_batch}, which is per device"
        )
