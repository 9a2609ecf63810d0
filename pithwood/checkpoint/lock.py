"""One process per run folder, by a lock that the kernel drops when its holder dies, however it dies."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from pathlib import Path
from types import TracebackType

LOCK_FILE = ".lock"


def holds_lock_only(run_dir: Path) -> bool:
    """Whether a folder holds our lock, an empty folder for checkpoints, and nothing else: its run never began."""
    try:
        names = set(os.listdir(run_dir))
        if LOCK_FILE not in names or names - {LOCK_FILE, "checkpoints"}:
            return False
        ours = (run_dir / LOCK_FILE).read_bytes()[:8] in (b"", b"process ")
        return ours and not any((run_dir / "checkpoints").glob("*"))
    except OSError:
        return False


def in_use(run_dir: Path, holder: str) -> str:
    """What a refusal says about a folder that another process holds."""
    return f"run folder {run_dir} is in use by {holder}; wait for it to end, stop it, or give this run another folder"


class RunLock:
    """Context manager that holds `RUN/.lock`; the folder is made if it is not there.

    Raises ValueError naming the holder if another process has it. Forked children share the lock until they exit or
    exec. The file stays, unless nothing else is in the folder and nothing was when it was locked: then the folder goes
    again, with those above it that were made for it.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = Path(run_dir)
        self._handle: int | None = None
        self._made: list[Path] = []

    def __enter__(self) -> RunLock:
        self._made = [path for path in (self.run_dir, *self.run_dir.parents) if not path.exists()]
        if not self._made and holds_lock_only(self.run_dir):
            self._made = [self.run_dir]
        while self._handle is None:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            self._handle = self._take()
        os.ftruncate(self._handle, 0)
        os.pwrite(self._handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        return self

    def _take(self) -> int | None:
        """A locked handle of the file that has the name now; None if the folder went away meanwhile."""
        path = self.run_dir / LOCK_FILE
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its holder may have removed the file after it was opened here: the lock of a lost file protects nothing.
            named = os.stat(path)
            if (named.st_dev, named.st_ino) == (os.fstat(handle).st_dev, os.fstat(handle).st_ino):
                return handle
        except BlockingIOError:
            holder = os.pread(handle, 256, 0).decode(errors="replace").strip()
            os.close(handle)
            raise ValueError(in_use(self.run_dir, holder or "another process")) from None
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handle is None:
            return
        if self.run_dir in self._made and holds_lock_only(self.run_dir):
            with contextlib.suppress(OSError):
                (self.run_dir / "checkpoints").rmdir()
            (self.run_dir / LOCK_FILE).unlink()
            for path in self._made:
                try:
                    path.rmdir()
                except OSError:
                    break
        os.close(self._handle)
        self._handle = None
