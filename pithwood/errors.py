"""What the system refused, in words: file errors with what to do about them, and running out of memory.

Imports nothing heavy, so that the command line can report before torch is there.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

EXHAUSTED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a disk or quota that is full, or of a file that may not grow."""

_REMEDIES = {
    errno.ENOSPC: "free some space, keep fewer checkpoints or choose another folder",
    errno.EDQUOT: "free some space of this user, keep fewer checkpoints or choose another folder",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f) or choose a file system that allows larger files",
    errno.EACCES: "change its permissions (chmod, chown) or choose another folder",
    errno.EPERM: "change its permissions (chmod, chown) or choose another folder",
    errno.EROFS: "choose a folder on a disk that is mounted for writing",
    errno.ENOTDIR: "a file stands where a folder is needed; move it or choose another folder",
    errno.EEXIST: "something else has this name; move it or choose another folder",
    errno.EISDIR: "a folder stands where a file is needed; move it",
    errno.ENOENT: "check the path",
    errno.ENAMETOOLONG: "choose a shorter name or path",
    errno.ELOOP: "symbolic links lead in a circle; mend them",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "close other programs: the system has no more open files to give",
    errno.EIO: "the disk or its connection failed; check it (dmesg) and choose another folder",
    errno.ESTALE: "the network file system lost the file; mount it again",
}

_WORDS = ("can't allocate memory", "not enough memory", "out of memory", "Cannot allocate memory", "bad_alloc")


def explain_os_error(error: OSError, unnamed: str = "") -> str:
    """The reason of a failed file operation in words: what the system said, which file, what to do about it.

    unnamed  what to call the file where the error does not say
    """
    reason = " ".join(str(error.strerror or error).split())
    # An explained error is raised again with the whole explanation as its reason.
    if any(remedy in reason for remedy in _REMEDIES.values()):
        return reason
    where = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes, os.PathLike)) else unnamed
    remedy = _REMEDIES.get(error.errno or 0, "")
    return f"{reason}{f': {where}' if where else ''}{f'; {remedy}' if remedy else ''}"


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Context in which an error of writing names the file, as the system does for opening one alone."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
        raise


@contextmanager
def promising(safe: str) -> Iterator[None]:
    """Context in which an error of a full disk also says what is safe, unless it does already."""
    try:
        yield
    except OSError as error:
        if error.errno not in EXHAUSTED or " intact" in str(error.strerror):
            raise
        raise OSError(error.errno, f"{explain_os_error(error, unnamed='a file')}; {safe}") from error


def explain_failure(error: Exception) -> tuple[str, int] | None:
    """One line and the exit code for an error of the system: 3 if memory or disk ran out, else 2; None for others."""
    if is_out_of_memory(error):
        known = str(error) if isinstance(error, MemoryError) else ""
        return known or "out of memory; ask for less (a smaller model, fewer tokens) or close other programs", 3
    if not isinstance(error, OSError):
        return None
    exhausted = error.errno in EXHAUSTED
    return explain_os_error(error, unnamed="while writing" if exhausted else ""), 3 if exhausted else 2


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had: Python's own, torch's on a GPU, or its allocator's on a CPU.

    torch's CPU allocator raises a plain RuntimeError, so its words decide.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS)


def size_text(num_bytes: float) -> str:
    """A number of bytes in the unit that shows it: "1.50 GB", "3.60 MB", "0.40 kB" (powers of 1000)."""
    unit, scale = next(((unit, scale) for unit, scale in (("GB", 1e9), ("MB", 1e6)) if num_bytes >= scale), ("kB", 1e3))
    return f"{num_bytes / scale:,.2f} {unit}"
