"""The processes of a run and the groups in which they work together.

Rank = ((pp * dp_replicate + r) * dp_shard + s) * cp + c: context partners lie next to each other, pipeline stages
farthest apart. Experts fold over the data and context ranks of one replica: with i = s * cp + c, a process has the
experts' part i % ep, and shares it with the processes of equal i % ep. Every group has a one-process form, whose
operations are the identity.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from pithwood.parallel.config import MeshConfig
from pithwood.parallel.places import torchrun_store

STARTUP_SECONDS = 600
"""How long processes wait for each other before the first step, and in any one exchange."""
_NO_LIMIT = datetime.timedelta(days=365)

_STOPPED = "the mesh was stopped: its groups exchange nothing any more"

# torch 2.13 renamed them and warns of the old names
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_NEW_NAMES = hasattr(dist.ProcessGroup, "all_gather_single_coalesced")
_ALL_GATHER_SEVERAL = "all_gather_single_coalesced" if _NEW_NAMES else "allgather_into_tensor_coalesced"
_REDUCE_SCATTER_SEVERAL = "reduce_scatter_single_coalesced" if _NEW_NAMES else "reduce_scatter_tensor_coalesced"
_ALL_TO_ALL = "all_to_all_single" if hasattr(dist.ProcessGroup, "all_to_all_single") else "alltoall_base"


@dataclass(frozen=True)
class Group:
    """Processes that exchange tensors, in order; `handle` is None in a group of one, whose operations change nothing.

    Tensors lie on the mesh's device, contiguous. With `wait=False` an operation returns its work, to be waited for
    before its result is read, or None in a group of one.
    """

    ranks: tuple[int, ...]
    """In the numbering of the whole run."""
    rank: int
    """Place of this process among them."""
    handle: Any = None
    """The process group of torch.distributed."""

    @property
    def size(self) -> int:
        return len(self.ranks)

    def all_reduce(self, x: Tensor, op: str = "sum", wait: bool = True) -> Any:
        """Add x up over the group (or take its "max" or "min") in place."""
        if self.handle is None:
            return None
        return dist.all_reduce(x, _OPS[op], group=self.handle, async_op=not wait)

    def all_reduce_several(self, tensors: Sequence[Tensor], wait: bool = True) -> Any:
        """Add each of several tensors of one dtype up over the group, in place, in one exchange."""
        if self.handle is None or not tensors:
            return None
        # no buffer that joins them: NCCL takes them as they lie
        options = dist.AllreduceCoalescedOptions()
        options.asyncOp = not wait
        work = self.handle.allreduce_coalesced(list(tensors), options)
        if not wait:
            return work
        if work is not None:
            work.wait()
        return None

    def all_gather(self, whole: Tensor, part: Tensor, wait: bool = True) -> Any:
        """Fill whole [size * n] with every process's part [n], both flat."""
        if self.handle is None:
            if whole.data_ptr() != part.data_ptr():
                whole.copy_(part)
            return None
        return _all_gather(whole, part, group=self.handle, async_op=not wait)

    def reduce_scatter(self, part: Tensor, whole: Tensor, wait: bool = True) -> Any:
        """Fill part [n] with this process's range of the sum of all whole [size * n], both flat."""
        if self.handle is None:
            if whole.data_ptr() != part.data_ptr():
                part.copy_(whole)
            return None
        return _reduce_scatter(part, whole, group=self.handle, async_op=not wait)

    def all_gather_several(self, wholes: list[Tensor], parts: list[Tensor]) -> Any:
        """Begin `all_gather` of several pairs at once, of whatever dtypes; returns the work of all."""
        if self.handle is None:
            for whole, part in zip(wholes, parts, strict=True):
                self.all_gather(whole, part)
            return None
        # as bytes: one call takes one dtype
        as_bytes = ([x.view(torch.uint8) for x in tensors] for tensors in (wholes, parts))
        return getattr(self.handle, _ALL_GATHER_SEVERAL)(*as_bytes)

    def reduce_scatter_several(self, parts: list[Tensor], wholes: list[Tensor]) -> Any:
        """Begin `reduce_scatter` of several pairs of one dtype at once; returns the work of all."""
        if self.handle is None:
            for part, whole in zip(parts, wholes, strict=True):
                self.reduce_scatter(part, whole)
            return None
        return getattr(self.handle, _REDUCE_SCATTER_SEVERAL)(parts, wholes)

    def all_to_all(
        self, out: Tensor, given: Tensor, out_sizes: list[int] | None, given_sizes: list[int] | None, wait: bool = True
    ) -> Any:
        """Send rows of `given` to every process, given_sizes[i] of them to the i-th (None: equal parts)."""
        if self.handle is None:
            out.copy_(given)
            return None
        if wait:
            return dist.all_to_all_single(out, given, out_sizes, given_sizes, group=self.handle)
        # what `dist` does before it gets here takes 12 us, and every layer pays it several times
        return getattr(self.handle, _ALL_TO_ALL)(out, given, out_sizes or [], given_sizes or [])

    def send(self, x: Tensor, to: int, number: int = 0) -> Any:
        """The work of sending x to the to-th process; x stays as it is until the work is waited for."""
        return dist.isend(x, self.ranks[to], group=self.handle, tag=number)

    def receive(self, x: Tensor, source: int, number: int = 0) -> Any:
        """The work of filling x with what the source-th process sends under this number."""
        return dist.irecv(x, self.ranks[source], group=self.handle, tag=number)

    def all_gather_objects(self, value: Any) -> list[Any]:
        """What every process gives, in order; for small things outside a step."""
        if self.handle is None:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.handle)
        return found

    def agree(self, value: Any) -> Any:
        """What the first process gives; the others' values are not looked at."""
        return self.all_gather_objects(value if self.rank == 0 else None)[0]

    def barrier(self) -> None:
        if self.handle is not None:
            self.all_gather_objects(None)

    def await_first(self) -> None:
        """Return once the first process has come here too, however long that takes: exchanges, which this one is not,
        give up after `STARTUP_SECONDS`. The first does not go on before the others have come.

        raises  RuntimeError if a process of the group ends meanwhile
        """
        if self.handle is None:
            return
        word = torch.zeros(1)  # in host memory, also where the mesh is of GPUs
        if self.rank > 0:
            works = [self.receive(word, 0)]
        else:
            works = [self.send(word, to) for to in range(1, self.size)]
        for work in works:
            work.wait(_NO_LIMIT)

    @staticmethod
    def alone(rank: int = 0) -> Group:
        return Group((rank,), 0)


_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


@dataclass(frozen=True)
class Mesh:
    """This process's place and its groups. Made once per run by `start_mesh`, or `Mesh.single()`."""

    cfg: MeshConfig
    """The sizes."""
    rank: int
    """Of this process among all."""
    device: torch.device
    """Of this process alone."""
    world: Group
    """Everybody."""
    pp: Group
    """The stages of one pipeline, first to last."""
    data: Group
    """Who reads other samples: dp_replicate x dp_shard, at equal pp and cp."""
    replicate: Group
    """Who holds the same pieces of weights: dp_replicate."""
    shard: Group
    """Who divides dense weights: dp_shard x cp."""
    cp: Group
    """Who shares the tokens of each sample, in the order of the tokens."""
    ep: Group
    """Who divides the experts of a layer."""
    expert_shard: Group
    """Who divides the weights of the same experts: dp_shard x cp / ep."""
    tokens: Group
    """Who holds other tokens of a micro-batch: dp_replicate x dp_shard x cp, all processes of one pipeline stage."""
    further: list[Group] = field(default_factory=list, init=False, compare=False, repr=False)
    """Groups that others made with process groups of their own; left with the mesh."""

    @staticmethod
    def single(device: torch.device | str = "cpu") -> Mesh:
        """The mesh of one process."""
        one = Group.alone()
        return Mesh(MeshConfig(), 0, torch.device(device), one, one, one, one, one, one, one, one, one)

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for the run: it prints, logs and writes what is written once."""
        return self.rank == 0


def places(cfg: MeshConfig, rank: int) -> dict[str, tuple[int, ...]]:
    """The ranks of each group that `rank` belongs to, by the group's name."""
    p, r, s, c = coordinates(cfg, rank)
    fold = s * cfg.cp + c
    first = ((p * cfg.dp_replicate) + r) * cfg.dp_shard * cfg.cp

    def at(p: int = p, r: int = r, fold: int = fold) -> int:
        return (p * cfg.dp_replicate + r) * cfg.dp_shard * cfg.cp + fold

    folds, replicas = range(cfg.dp_shard * cfg.cp), range(cfg.dp_replicate)
    return {
        "world": tuple(range(cfg.size)),
        "pp": tuple(at(p=other) for other in range(cfg.pp)),
        "data": tuple(at(r=a, fold=b * cfg.cp + c) for a in replicas for b in range(cfg.dp_shard)),
        "replicate": tuple(at(r=other) for other in replicas),
        "shard": tuple(first + other for other in folds),
        "cp": tuple(at(fold=s * cfg.cp + other) for other in range(cfg.cp)),
        "ep": tuple(first + fold - fold % cfg.ep + other for other in range(cfg.ep)),
        "expert_shard": tuple(first + other for other in folds if other % cfg.ep == fold % cfg.ep),
        "tokens": tuple(at(r=a, fold=b) for a in replicas for b in folds),
    }


def coordinates(cfg: MeshConfig, rank: int) -> tuple[int, int, int, int]:
    """(pp, dp_replicate, dp_shard, cp) of a rank."""
    rest, c = divmod(rank, cfg.cp)
    rest, s = divmod(rest, cfg.dp_shard)
    p, r = divmod(rest, cfg.dp_replicate)
    return p, r, s, c


def world_from_environment() -> tuple[int, int, int]:
    """(rank, processes, rank on this node) as torchrun or SLURM set them; (0, 1, 0) if neither did."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
    for rank, size, local in names:
        if rank in os.environ and size in os.environ:
            return int(os.environ[rank]), int(os.environ[size]), int(os.environ.get(local, "0"))
    return 0, 1, 0


def own_device(kind: torch.device, local_rank: int) -> torch.device:
    """This process's device of a kind: on GPUs one for each process of a host, which kernels are launched on from now
    on."""
    if kind.type != "cuda" or kind.index is not None:
        return kind
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"process {local_rank} of this host has no GPU: torch sees {torch.cuda.device_count()}; "
            "start as many processes per host as it has GPUs"
        )
    # kernels of Triton go to the current device, wherever their tensors lie
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def check_world(cfg: MeshConfig, size: int) -> None:
    """Raise ValueError if so many processes are not the mesh's."""
    if cfg.size != size:
        raise ValueError(
            f"the mesh has {cfg.size} processes (pp={cfg.pp} x dp_replicate={cfg.dp_replicate} x "
            f"dp_shard={cfg.dp_shard} x cp={cfg.cp}), but {size} were started; start {cfg.size}, for instance with "
            f"torchrun --nproc-per-node {cfg.size}, or change the sizes so that they multiply to {size}"
        )


def start_mesh(cfg: MeshConfig, device: torch.device, *, store: dist.Store | None = None) -> Mesh:
    """Join the other processes and make the groups; every process of the run calls it, in the same way.

    device  this process's own ("cuda:1", "cpu"); NCCL carries its GPU tensors, gloo those in host memory
    store   where processes meet; None: as the environment says (MASTER_ADDR, MASTER_PORT)
    raises  ValueError if the environment's number of processes is not the mesh's
    """
    rank, size, _ = world_from_environment()
    check_world(cfg, size)
    return join_mesh(cfg, device, rank, size, store or torchrun_store(size))


def join_mesh(cfg: MeshConfig, device: torch.device, rank: int, size: int, store: dist.Store | None = None) -> Mesh:
    """As `start_mesh`, for a process that knows its rank and the number of processes."""
    check_world(cfg, size)
    if size == 1 and store is None:
        return Mesh.single(device)
    if not dist.is_initialized():
        dist.init_process_group(
            backend="cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            rank=rank,
            world_size=size,
            store=store,
            timeout=datetime.timedelta(seconds=STARTUP_SECONDS),
            device_id=device if device.type == "cuda" else None,
        )
    return Mesh(cfg, rank, device, **_groups(places(cfg, rank), rank))


class _Left:
    """Stands where a process group was: whoever calls it, or looks it up as torch does, is told."""

    def __getattr__(self, name: str) -> NoReturn:
        raise RuntimeError(_STOPPED)

    def __hash__(self) -> int:
        raise RuntimeError(_STOPPED)


def stop_mesh(mesh: Mesh) -> None:
    """Leave the process groups, whose threads end; a group of several that is used after it raises RuntimeError."""
    if mesh.world.handle is None or not dist.is_initialized():
        return
    dist.destroy_process_group()
    # gloo's threads live until nobody holds the groups. One that lets go of a tensor asks for the interpreter, and
    # aborts the process if that has begun to end by then
    own = [getattr(mesh, each.name) for each in fields(mesh)]
    for group in [group for group in own if isinstance(group, Group)] + mesh.further:
        if group.handle is not None:
            object.__setattr__(group, "handle", _Left())


def _groups(ranks: dict[str, tuple[int, ...]], rank: int) -> dict[str, Group]:
    """A process group for each distinct set of more than one process, in an order that all processes share."""
    made: dict[tuple[int, ...], Any] = {}
    found = {}
    for name, members in ranks.items():
        if len(members) > 1 and members not in made:
            made[members] = dist.group.WORLD if name == "world" else _new_group(members)
        found[name] = Group(members, members.index(rank), made.get(members))
    return found


def _new_group(members: Sequence[int]) -> Any:
    # only its members make a group: no process waits for groups that it is not in
    return dist.new_group(list(members), use_local_synchronization=True)


def topology(mesh: Mesh, hosts: Iterable[str]) -> list[str]:
    """Lines that say how the mesh lies on the hosts; one host per rank, in order."""
    cfg, hosts = mesh.cfg, list(hosts)
    if cfg.size == 1:
        return []
    sizes = [f"{name} {getattr(cfg, name)}" for name in ("pp", "dp_replicate", "dp_shard", "cp", "ep")]
    lines = [f"mesh: {cfg.size} processes on {len(set(hosts))} host{'s' * (len(set(hosts)) > 1)}: {', '.join(sizes)}"]
    for name in ("ep", "cp", "shard", "pp"):
        members = getattr(mesh, name).ranks
        if len(members) > 1:
            across = len({hosts[rank] for rank in members})
            lines.append(f"  {name}: {len(members)} processes on {across} host{'s' * (across > 1)}")
    if cfg.overlap == "pairs":
        lines.append("  passes in pairs: tokens travel to their experts under another micro-batch's compute")
    if cfg.cp > 1 and cfg.context == "ring":
        lines.append("  mesh.context=ring: full attention by ring, any other as mesh.context=gather")
    return lines
