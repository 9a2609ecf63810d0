"""Devices that a run can be estimated for and how groups of them talk, as plain numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from pithwood.estimate.work import Peaks
from pithwood.observe.metrics import HOPPER_COPY_BYTES, HOPPER_MEASURED_FLOPS

HOPPER_FP32_FLOPS = 67e12
"""Dense fp32 FLOP/s that NVIDIA's datasheets of H100 SXM and H200 state: without tensor cores, as nothing here allows
TF32."""


@dataclass(frozen=True)
class Device:
    """One GPU and how it reaches others and its host. Speeds between GPUs are assumptions, nothing of them is measured
    yet."""

    name: str
    """Folder of its results files under bench/results."""
    memory_bytes: float
    """What torch reports as its total memory."""
    peaks: Peaks
    host_bytes_per_s: float = 62e9
    """To the host's pinned memory and from it, both together, as optimizer state travels. Measured on an H200: an
    update whose 24.9 GB of state go both ways took 806 ms; copies in one direction alone reach 55 GB/s."""
    nvlink_bytes_per_s: float = 360e9
    """One direction, to GPUs of the same host: 80 % of the 450 GB/s that NVLink 4 states."""
    network_bytes_per_s: float = 40e9
    """One direction, to other hosts: 80 % of one 400 Gb/s InfiniBand port for each GPU."""
    hop_s: float = 5e-6
    """From one process to the next of a ring, however little is sent."""
    per_host: int = 8
    """GPUs of a host."""


DEVICES = {
    "h200": Device("nvidia-h200", 150.1e9, Peaks(HOPPER_MEASURED_FLOPS, HOPPER_COPY_BYTES, HOPPER_FP32_FLOPS)),
    "h100": Device("nvidia-h100-80gb-hbm3", 84.9e9, Peaks(790e12, 3.02e12, HOPPER_FP32_FLOPS)),
}
"""By the name that --device takes. Peaks are those of bench/results (rows `peak` of attention.json), but for the
fp32 rate, which is stated."""


@dataclass(frozen=True)
class Reach:
    """How a group of devices lies on hosts, and what its exchanges take, in seconds, for the slowest member."""

    device: Device
    size: int
    hosts: int
    near: int
    """Members on a host, at least: so many network ports of a host work for the group."""

    @staticmethod
    def of(device: Device, ranks: Sequence[int]) -> Reach:
        """The group of these ranks, hosts being filled in their order."""
        on_host = Counter(rank // device.per_host for rank in ranks)
        return Reach(device, len(ranks), len(on_host), min(on_host.values()))

    def gather_s(self, total_bytes: float) -> float:
        """All members get all parts, `total_bytes` together; scattering a sum takes as long. Around a ring of hosts by
        all ports at once, and inside each host over NVLink meanwhile.
        """
        if self.size == 1:
            return 0.0
        inside = total_bytes * (1 - 1 / self.size) / self.device.nvlink_bytes_per_s if self.near > 1 else 0.0
        between = total_bytes * (1 - 1 / self.hosts) / (self.near * self.device.network_bytes_per_s)
        return max(inside, between) + (self.size - 1) * self.device.hop_s

    def all_reduce_s(self, part_bytes: float) -> float:
        """A sum over all members of `part_bytes`, known to all: scattered, then gathered."""
        return 2 * self.gather_s(part_bytes)

    def all_to_all_s(self, pair_bytes: float) -> float:
        """Every member sends every other one so many bytes."""
        if self.size == 1:
            return 0.0
        inside = (self.near - 1) * pair_bytes / self.device.nvlink_bytes_per_s
        between = (self.size - self.near) * pair_bytes / self.device.network_bytes_per_s
        return max(inside, between) + self.device.hop_s

    def send_s(self, num_bytes: float) -> float:
        """One member sends to the next one of the group."""
        if self.size == 1:
            return 0.0
        speed = self.device.nvlink_bytes_per_s if self.hosts == 1 else self.device.network_bytes_per_s
        return num_bytes / speed + self.device.hop_s
