"""Several processes make one checkpoint: they agree in the training thread by their group, and beside it by files.

A checkpoint that is written while the training goes on must not call collectives: the training does. Its processes meet
in a folder that all of them see:

    RUN/checkpoints/.tmp-step-00001200-4711/
        step-00001200/          the checkpoint's files; it gets its final place by a rename
        listings/3.json         what process 3 wrote, or why it could not; it removes this once it knows the outcome
        outcome/outcome.json    how all ended, by the first process
"""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pithwood.checkpoint.files import DTYPE_CODES, DTYPES
from pithwood.checkpoint.ranges import Chunk, Listing, StoredTensor
from pithwood.checkpoint.storage import DamagedCheckpoint
from pithwood.errors import explain_os_error
from pithwood.parallel.mesh import Group

T = TypeVar("T")

PATIENCE_SECONDS = 1800.0
"""How long processes wait for each other's part of a checkpoint; one that has died is noticed elsewhere, and sooner."""
ACKNOWLEDGE_SECONDS = 60.0
"""How long the first process waits for the others to read the outcome before it removes the folder."""
VISIBLE_SECONDS = 5.0
"""How long a new folder may take to be seen on all hosts; network file systems keep what they saw for a while."""


def gather_or_raise(group: Group, value: T, error: Exception | None = None) -> list[T]:
    """What every process of a group gives, in order; if one gives an error, all raise the first of them.

    A collective: every process of the group calls it, in the training thread. Errors keep their meaning (ValueError,
    OSError and its number) and name the rank that they come from on all other processes.
    """
    if group.size == 1:
        if error is not None:
            raise error
        return [value]
    found = group.all_gather_objects((value, None if error is None else _packed(error)))
    first = next((rank for rank, (_, packed) in enumerate(found) if packed is not None), None)
    if first is not None:
        raise error if first == group.rank and error is not None else _unpacked(found[first][1], group.ranks[first])
    return [value for value, _ in found]


def check_shared(group: Group, folder: Path) -> None:
    """Raise ValueError on all processes unless all of them see a folder that the first one has made."""
    if group.size == 1:
        return
    error = None
    end = time.monotonic() + VISIBLE_SECONDS
    while not folder.is_dir() and time.monotonic() < end:
        time.sleep(0.1)
    if not folder.is_dir():
        error = ValueError(
            f"{socket.gethostname()} does not see {folder}, which the first process made; choose a folder for runs "
            "that all hosts share, with --runs-dir"
        )
    gather_or_raise(group, None, error)


class Meeting:
    """The files by which the processes of one save tell each other what they wrote and how it ended; no collectives."""

    def __init__(self, folder: Path, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._listings, self._outcome = folder / "listings", folder / "outcome"

    def open(self) -> None:
        """Make its folders; the first process does."""
        if self.size > 1:
            self._listings.mkdir()
            self._outcome.mkdir()

    def gather(self, listing: Listing | None, error: Exception | None) -> tuple[list[Listing], Exception | None]:
        """On the first process the listings of all in order, or the first error; on others what they gave.

        Exactly one of listing and error is given.
        """
        own = _packed(error) if listing is None and error is not None else _packed_listing(listing)
        if self.size == 1 or self.rank:
            if self.rank:
                _put(self._listings / f"{self.rank}.json", own)
            return [] if listing is None else [listing], error
        found = {0: own}

        def arrived() -> bool:
            for name in os.listdir(self._listings):
                rank, _, ending = name.partition(".")
                if ending == "json" and int(rank) not in found:
                    found[int(rank)] = json.loads((self._listings / name).read_text(encoding="utf-8"))
            return len(found) == self.size

        if not _wait_until(arrived, PATIENCE_SECONDS):
            absent = [rank for rank in range(self.size) if rank not in found]
            return [], OSError(
                errno.ETIMEDOUT, f"rank {absent[0]} has not written its part after {PATIENCE_SECONDS:.0f} s"
            )
        failed = next((rank for rank in range(self.size) if "kind" in found[rank]), None)
        if failed is not None:
            return [], _unpacked(found[failed], failed)
        return [_unpacked_listing(found[rank]) for rank in range(self.size)], None

    def conclude(self, error: Exception | None) -> Exception | None:
        """How the save ended, the same on all processes: what the first one gives here."""
        if self.size == 1:
            return error
        if self.rank == 0:
            _put(self._outcome / "outcome.json", {} if error is None else _packed(error))
            # the folder may go only when all others know
            _wait_until(lambda: not os.listdir(self._listings), ACKNOWLEDGE_SECONDS)
            return error

        def known() -> bool:
            try:
                return "outcome.json" in os.listdir(self._outcome)
            except FileNotFoundError:
                raise RuntimeError(f"{self._outcome.parent} went away before it was said how the save ended") from error

        if not _wait_until(known, PATIENCE_SECONDS):
            return OSError(errno.ETIMEDOUT, f"rank 0 has not completed it after {PATIENCE_SECONDS:.0f} s")
        told = json.loads((self._outcome / "outcome.json").read_text(encoding="utf-8"))
        (self._listings / f"{self.rank}.json").unlink(missing_ok=True)
        return _unpacked(told) if told else None


def _put(path: Path, content: dict[str, Any]) -> None:
    """Write a file that others see whole or not at all; it need not outlive the machine."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content), encoding="utf-8")
    os.rename(part, path)


def _wait_until(true: Callable[[], bool], seconds: float) -> bool:
    """Whether it became true in time. A folder is listed each time: a network file system answers that anew, while it
    may remember for a while that a name was not there."""
    end, pause = time.monotonic() + seconds, 0.001
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(pause)
        pause = min(0.25, 1.5 * pause)
    return True


def _packed(error: Exception) -> dict[str, Any]:
    if isinstance(error, OSError):
        return {"kind": "OSError", "number": error.errno, "text": explain_os_error(error)}
    known = next((kind for kind in (DamagedCheckpoint, ValueError) if isinstance(error, kind)), type(error))
    return {"kind": known.__name__, "number": None, "text": str(error)}


def _unpacked(packed: dict[str, Any], rank: int | None = None) -> Exception:
    """The error again; with a rank, it says which process it comes from."""
    text = packed["text"] if rank is None else f"rank {rank}: {packed['text']}"
    if packed["kind"] == "OSError":
        return OSError(packed["number"], text)
    for kind in (DamagedCheckpoint, ValueError, RuntimeError):
        if packed["kind"] == kind.__name__:
            return kind(text)
    return RuntimeError(f"{text} ({packed['kind']})")


def _packed_listing(listing: Listing | None) -> dict[str, Any]:
    assert listing is not None
    tensors = {
        name: [DTYPE_CODES[t.dtype], t.shape, [(c.start, c.stop, c.writer, c.key) for c in t.chunks]]
        for name, t in listing.tensors.items()
    }
    return {"tensors": tensors, "sums": listing.sums}


def _unpacked_listing(packed: dict[str, Any]) -> Listing:
    tensors = {
        name: StoredTensor(DTYPES[dtype], tuple(shape), tuple(Chunk(*chunk) for chunk in chunks))
        for name, (dtype, shape, chunks) in packed["tensors"].items()
    }
    return Listing(tensors, packed["sums"])
