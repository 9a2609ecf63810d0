"""How fast the links of a mesh are, measured before the first step, and which of them lag behind the others.

Between hosts, pairs exchange a buffer over all of their processes at once, in rounds in which every host has at most
one partner, so that a slow cable, port or host is seen in its pairs alone. Then every group of the mesh does what it
will do in a step: gathers (shard, replicate) or exchanges all to all (ep, cp). Takes seconds; it is for clusters that
are new, or slower than they were.
"""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from pithwood.parallel.mesh import Group, Mesh

NUM_BYTES = 64 << 20
"""Sent by each process at a time: enough for a link to be at its full speed."""
REPEATS = 3
"""Exchanges of which the fastest counts, after one that is not measured."""
ALL_PAIRS = 16
"""Up to so many hosts every pair is measured; beyond, each host with those at distances 1, 2, 4, ..."""
SLOW = 0.7
"""Share of the median of its kind below which a link is slow."""
GROUPS = ("shard", "replicate", "ep", "cp")


@dataclass(frozen=True)
class LinkSpeed:
    """What was measured between two hosts or in one group."""

    kind: str
    """hosts, or the name of the groups."""
    where: str
    """Whose link, in words."""
    bytes_per_s: float
    """That each process sent, in the slowest of its processes."""


def measure_links(
    mesh: Mesh, num_bytes: int = NUM_BYTES, repeats: int = REPEATS, host: str | None = None
) -> list[LinkSpeed]:
    """The speeds of all links, the same list in every process; empty on one process. All processes call it together.

    host  name of this process's host, None: as the system says
    """
    if mesh.world.size == 1:
        return []
    hosts = mesh.world.all_gather_objects(host or socket.gethostname())
    found = _pairs(mesh, hosts, num_bytes, repeats)
    # groups of one kind at once, as in a step
    for name in GROUPS:
        group: Group = getattr(mesh, name)
        if group.size > 1:
            exchange = _all_to_all if name in ("ep", "cp") else _gather
            mine = _fastest(mesh, repeats, exchange(group, mesh.device, num_bytes))
            where = f"{name} of ranks {_ranks(group.ranks)} on {', '.join(sorted({hosts[r] for r in group.ranks}))}"
            found.append(LinkSpeed(name, where, num_bytes * (1 - 1 / group.size) / mine))
    return _slowest(mesh.world.all_gather_objects([asdict(speed) for speed in found]))


def slow_links(speeds: Sequence[LinkSpeed]) -> list[str]:
    """A line for every link that is slower than the median of its kind by more than `SLOW` allows, slowest first."""
    lines = []
    for kind in sorted({speed.kind for speed in speeds}):
        same = sorted((speed for speed in speeds if speed.kind == kind), key=lambda speed: speed.bytes_per_s)
        median = statistics.median(speed.bytes_per_s for speed in same)
        lines += [
            f"WARNING: {speed.where}: {speed.bytes_per_s / 1e9:.2f} GB/s, {speed.bytes_per_s / median:.0%} of what "
            f"{'pairs of hosts' if kind == 'hosts' else f'{kind} groups'} have in the median ({median / 1e9:.2f} GB/s)"
            for speed in same
            if speed.bytes_per_s < SLOW * median
        ]
    return lines


def link_lines(speeds: Sequence[LinkSpeed]) -> list[str]:
    """A line for each kind of link, then those that are slow."""
    lines = []
    for kind in dict.fromkeys(speed.kind for speed in speeds):
        same = [speed.bytes_per_s / 1e9 for speed in speeds if speed.kind == kind]
        what = f"{len(same)} pairs of hosts" if kind == "hosts" else f"{len(same)} x {kind}"
        lines.append(f"links: {what}: {statistics.median(same):.2f} GB/s, {min(same):.2f} to {max(same):.2f}")
    return [*lines, *slow_links(speeds)]


def rounds_of_hosts(count: int) -> list[list[tuple[int, int]]]:
    """Pairs of hosts in rounds in which each has one partner at most: all pairs of few, a sample of many."""
    if count <= ALL_PAIRS:
        # all but one go around a circle, Kirkman's schoolgirls' way; an odd one out has no partner
        circle = [*range(count), *([-1] if count % 2 else [])]
        rounds = []
        for _ in range(len(circle) - 1):
            pairs = zip(circle[: len(circle) // 2], reversed(circle), strict=False)
            rounds.append([(min(pair), max(pair)) for pair in pairs if -1 not in pair])
            circle = [circle[0], circle[-1], *circle[1:-1]]
        return rounds
    distances = [1 << power for power in range(count.bit_length()) if 1 << power < count]
    return [[(low, low + far) for low in range(count - far) if low // far % 2 == 0] for far in distances]


def _pairs(mesh: Mesh, hosts: list[str], num_bytes: int, repeats: int) -> list[LinkSpeed]:
    """What this process measured with its partner on each other host."""
    names = list(dict.fromkeys(hosts))
    members = {name: [rank for rank, host in enumerate(hosts) if host == name] for name in names}
    own = hosts[mesh.rank]
    place, found = members[own].index(mesh.rank), []
    for pairs in rounds_of_hosts(len(names)):
        partner, where = None, ""
        for low, high in pairs:
            if own in (names[low], names[high]):
                others = members[names[high] if own == names[low] else names[low]]
                partner = others[place] if place < len(others) else None
                where = f"between {names[low]} and {names[high]}"
        seconds = _fastest(mesh, repeats, _both_ways(mesh, partner, num_bytes))
        if partner is not None:
            found.append(LinkSpeed("hosts", where, num_bytes / seconds))
    return found


def _fastest(mesh: Mesh, repeats: int, exchange: Callable[[], None]) -> float:
    """Seconds of the fastest of several exchanges that all processes begin together."""
    times = []
    for turn in range(repeats + 1):
        mesh.world.barrier()
        began = time.perf_counter()
        exchange()
        if mesh.device.type == "cuda":
            torch.cuda.synchronize(mesh.device)
        if turn:
            times.append(time.perf_counter() - began)
    return max(min(times), 1e-9)


def _both_ways(mesh: Mesh, partner: int | None, num_bytes: int) -> Callable[[], None]:
    if partner is None:
        return lambda: None
    given = torch.zeros(num_bytes, dtype=torch.uint8, device=mesh.device)
    got = torch.empty_like(given)
    ops = [dist.P2POp(dist.isend, given, partner, mesh.world.handle),
           dist.P2POp(dist.irecv, got, partner, mesh.world.handle)]  # fmt: skip

    def exchange() -> None:
        for work in dist.batch_isend_irecv(ops):
            work.wait()

    return exchange


def _gather(group: Group, device: torch.device, num_bytes: int) -> Callable[[], None]:
    part, whole = _buffers(group, device, num_bytes)
    return lambda: group.all_gather(whole, part)


def _all_to_all(group: Group, device: torch.device, num_bytes: int) -> Callable[[], None]:
    _, given = _buffers(group, device, num_bytes)
    got = torch.empty_like(given)
    return lambda: group.all_to_all(got, given, None, None)


def _buffers(group: Group, device: torch.device, num_bytes: int) -> tuple[Tensor, Tensor]:
    """A part and what all parts come to, num_bytes."""
    size = max(num_bytes // group.size, 1)
    zeros = torch.zeros(size * (group.size + 1), dtype=torch.uint8, device=device)
    return zeros[:size], zeros[size:]


def _slowest(found: list[list[dict[str, object]]]) -> list[LinkSpeed]:
    """The slowest report of each link, in the order of the reports."""
    slowest: dict[tuple[str, str], LinkSpeed] = {}
    for report in (LinkSpeed(**fields) for of_one in found for fields in of_one):  # type: ignore[arg-type]
        key = report.kind, report.where
        if key not in slowest or report.bytes_per_s < slowest[key].bytes_per_s:
            slowest[key] = report
    return list(slowest.values())


def _ranks(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks)) if len(ranks) <= 8 else f"{ranks[0]}, {ranks[1]}, ..., {ranks[-1]}"
