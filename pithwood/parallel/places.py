"""Where the processes of a run are: hosts, process numbers, addresses; and stores that are reached there."""

from __future__ import annotations

import datetime
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist


@dataclass(frozen=True)
class ProcessPlace:
    """Where a process runs."""

    host: str
    pid: int
    space: str
    """Processes of one space see each other's numbers; empty where that is not known."""
    address: str
    """Where its store is reached from other hosts, if it holds one."""
    port: int
    """Of its store; 0 if it holds none."""


def own_place(rank: int, port: int) -> ProcessPlace:
    """Where this process runs; port: of the store that it holds, 0 if it holds none."""
    return ProcessPlace(socket.gethostname(), os.getpid(), _space(), _address(rank), port)


def open_store(patience_s: float) -> dist.TCPStore:
    """A store in this process, on a port of the system's choice; patience_s: how long a call may wait for a key."""
    timeout = datetime.timedelta(seconds=patience_s)
    return dist.TCPStore("localhost", 0, None, True, timeout=timeout, wait_for_workers=False)


def connect(own: ProcessPlace, other: ProcessPlace, patience_s: float) -> dist.TCPStore:
    """A connection to the store that another process holds."""
    address = "localhost" if own.host == other.host else other.address
    return dist.TCPStore(address, other.port, None, False, timeout=datetime.timedelta(seconds=patience_s))


def find_neighbour(places: Sequence[ProcessPlace], own: int) -> tuple[int, int] | None:
    """(rank, handle) of the next process on this host, in a ring; the handle becomes readable when that process ends.

    None if there is none, or the system has no such handles (Linux has). The caller closes the handle.
    """
    if not places[own].space or not hasattr(os, "pidfd_open"):
        return None
    for distance in range(1, len(places)):
        rank = (own + distance) % len(places)
        if places[rank].space == places[own].space:
            with suppress(OSError):
                return rank, os.pidfd_open(places[rank].pid)
            return None
    return None


def torchrun_store(size: int) -> dist.Store | None:
    """Where the processes of this attempt meet under a torchrun that restarts them; None: where torch meets by itself.

    torchrun (torch 2.11 to 2.13) keeps one store over all attempts, in which a restarted process would find the
    addresses of processes that are gone. On one host attempts are told apart by their number; raises ValueError on
    several, whose agents count differently.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or os.environ.get("TORCHELASTIC_MAX_RESTARTS") == "0":
        return None
    if int(os.environ["LOCAL_WORLD_SIZE"]) != size:
        raise ValueError(
            "torchrun --max-restarts on several hosts hands restarted processes the addresses of the dead ones; set "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 where torchrun is called, as `pithwood launch` does"
        )
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), size, False)
    return dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)


def _space() -> str:
    """What processes share that see each other's process numbers: the boot of the host and the PID namespace."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _address(rank: int) -> str:
    """Where other hosts reach this process: rank 0 as the launcher says, others by the interface that leads to it."""
    master = os.environ.get("MASTER_ADDR", "localhost")
    if rank == 0:
        return master
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((master, 9))  # sends nothing
            return str(probe.getsockname()[0])
    except OSError:
        return socket.gethostname()
