"""One process per run folder, by a lock that the kernel drops when its holder dies, however it dies."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path
from types import TracebackType


class RunLock:
    """Context manager that holds `RUN/.lock`; the folder is made if it is not there.

    Raises ValueError naming the holder if another process has it. The file itself stays: removing it would let a third
    process lock a new file while a second one waits on the old. Forked children share the lock until they exit or exec.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = Path(run_dir)
        self._handle: int | None = None

    def __enter__(self) -> RunLock:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.run_dir / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(handle, 256, 0).decode(errors="replace").strip()
            os.close(handle)
            raise ValueError(
                f"run folder {self.run_dir} is in use by {holder or 'another process'}; "
                "wait for it to end, stop it, or give this run another folder"
            ) from None
        except BaseException:
            os.close(handle)
            raise
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        self._handle = handle
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
