"""Write checkpoints: complete or not there, the newest few kept, by one process or by many.

    RUN/checkpoints/step-00001200/                a complete checkpoint: it got its place by a rename, last of all
    RUN/checkpoints/.tmp-step-00001200-4711/      one being written; 4711 is the first process
    RUN/checkpoints/.old-step-00001200-4711/      one being replaced by a new one of the same step
    RUN/checkpoints/.trash-step-00001100-4711/    one being removed

A process may be killed between any two system calls: what it leaves is one of these names, and `clean_leftovers` deals
with it. On a mesh every process writes one file, and the first completes the checkpoint when all have written theirs.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from pithwood.checkpoint.files import check_storable, sync_folder
from pithwood.checkpoint.load import checkpoints_folder, list_checkpoints
from pithwood.checkpoint.ranges import Held, Listing, as_held, merge_listings
from pithwood.checkpoint.storage import Manifest, tensor_file, write_manifest, write_tensors
from pithwood.checkpoint.together import Meeting, check_shared, gather_or_raise
from pithwood.errors import explain_os_error, size_text
from pithwood.parallel.mesh import Group, Mesh

T = TypeVar("T")


def save_checkpoint(
    run_dir: Path,
    step: int,
    tensors: Mapping[str, Tensor | Held],
    state: dict[str, Any],
    keep: int = 2,
    keep_every: int | None = None,
    mesh: Mesh | None = None,
) -> Path:
    """Save tensors and state as the checkpoint of `step`, then remove old ones; returns the checkpoint's folder.

    tensors      name -> what this process holds of it, on any device; written bit for bit. A plain tensor is whole, and
                 the first process writes it
    state        JSON values with string keys, tuples become lists: data position, random state, counters,
                 configuration; the first process's is saved
    keep         checkpoints kept, this one included, >= 1
    keep_every   checkpoints whose step is a multiple of it are kept for ever; None keeps none
    mesh         of the run: every process calls this at the same step, with a folder that all of them see
    raises       ValueError on bad input, before anything is written; OSError if writing fails (disk full), with all
                 earlier checkpoints intact and nothing of this one left. On a mesh all processes raise, or none

    Files, folder and parent are synced to disk before it returns. Nothing old goes before the new one is complete. The
    caller holds the run's lock (on a mesh the first process does): one run writes.
    """
    return carry_out(prepare(run_dir, step, tensors, state, keep, keep_every, mesh))


def check_can_save(run_dir: Path, num_bytes: float, mesh: Mesh | None = None) -> None:
    """Find out before any training whether a checkpoint could be written; raises ValueError or OSError.

    num_bytes   what this process would write
    mesh        of the run: every process calls this, and all raise or none

    The folder is tried by making and removing an empty one, as nothing else tells whether the system will allow it.
    """
    world = Group.alone() if mesh is None else mesh.world
    total = sum(gather_or_raise(world, num_bytes))
    error: Exception | None = None
    if world.rank == 0:
        _, error = _attempt(lambda: _try_folder(run_dir, total))
    gather_or_raise(world, None, error)


def _try_folder(run_dir: Path, num_bytes: float) -> None:
    parent = checkpoints_folder(run_dir)
    probe = parent / f".tmp-step-00000000-{os.getpid()}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        probe.mkdir(exist_ok=True)
        probe.rmdir()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(parent)) from error
    free = shutil.disk_usage(parent).free
    if free < num_bytes:
        raise ValueError(no_room(parent, num_bytes, free))


def no_room(folder: Path, num_bytes: float, free: float) -> str:
    """What a refusal says about a disk that is too full for a checkpoint of `num_bytes`."""
    return (
        f"a checkpoint takes {size_text(num_bytes)}, but the disk of {folder} has {size_text(free)} free; "
        "free some space, or choose another folder with --runs-dir"
    )


def clean_leftovers(run_dir: Path) -> list[Path]:
    """Remove what dead writers left behind; returns what was found. Call it at the start, holding the run's lock.

    Only folders of our own naming whose process is gone (or is this one) are touched. A checkpoint that was being
    replaced when its writer died gets its name back if the new one had not taken it.
    """
    parent = checkpoints_folder(run_dir)
    found = []
    for path in sorted(parent.iterdir()) if parent.is_dir() else []:
        match = re.fullmatch(r"\.(tmp|old|trash)-(step-\d{8,})-(\d+)", path.name)
        if match is None or not path.is_dir() or path.is_symlink():
            continue
        kind, name, pid = match[1], match[2], int(match[3])
        # A restarted container hands out the same process ids again, so our own id means a dead writer as well.
        if pid != os.getpid() and _is_alive(pid):
            continue
        if kind == "old" and not (parent / name).exists():
            os.rename(path, parent / name)
        else:
            shutil.rmtree(path)
        found.append(path)
    if found:
        sync_folder(parent)
    return found


@dataclass(frozen=True)
class Save:
    """A save that has begun: its folder is there on all processes, and its input is in order."""

    step: int
    tensors: Mapping[str, Held]
    state: bytes
    keep: int
    keep_every: int | None
    tmp: Path
    final: Path
    meeting: Meeting

    @property
    def folder(self) -> Path:
        """Where its files are written."""
        return self.tmp / self.final.name

    def drop(self) -> None:
        """Remove what a save leaves beside the checkpoint; the first process does."""
        if self.meeting.rank == 0:
            shutil.rmtree(self.tmp, ignore_errors=True)


def prepare(
    run_dir: Path,
    step: int,
    tensors: Mapping[str, Tensor | Held],
    state: dict[str, Any],
    keep: int,
    keep_every: int | None,
    mesh: Mesh | None,
) -> Save:
    """Check the input and make the folder; all processes of the mesh raise, or none."""
    world = Group.alone() if mesh is None else mesh.world
    final = checkpoints_folder(run_dir) / f"step-{step:08d}"
    error: Exception | None = None
    try:
        _check_input(step, tensors, state, keep, keep_every)
    except ValueError as caught:
        error = caught
    pid = gather_or_raise(world, os.getpid(), error)[0]
    save = Save(
        step=step,
        tensors=as_held(tensors, writes=world.rank == 0),
        state=json.dumps(state).encode(),
        keep=keep,
        keep_every=keep_every,
        tmp=final.parent / f".tmp-{final.name}-{pid}",
        final=final,
        meeting=Meeting(final.parent / f".tmp-{final.name}-{pid}", world.rank, world.size),
    )
    try:
        if world.rank == 0:
            final.parent.mkdir(parents=True, exist_ok=True)
            if save.tmp.exists():
                shutil.rmtree(save.tmp)
            save.folder.mkdir(parents=True)
            save.meeting.open()
    except OSError as caught:
        error = _not_saved(save, caught)
    try:
        gather_or_raise(world, None, error)
        check_shared(world, save.folder)
    except BaseException:
        save.drop()
        raise
    return save


def carry_out(save: Save) -> Path:
    """Write what this process writes; the first then completes the checkpoint, the others wait for how that ends."""
    meeting, first = save.meeting, save.meeting.rank == 0
    try:
        listing, error = _attempt(lambda: write_tensors(save.folder, meeting.rank, save.tensors))
        if error is not None and not first:
            # room on a full disk for the few bytes that say so
            (save.folder / tensor_file(meeting.rank)).unlink(missing_ok=True)
        listings, error = meeting.gather(listing, error)
        if first:
            if error is None:
                _, error = _attempt(lambda: _complete(save, listings))
            if error is not None:
                shutil.rmtree(save.folder, ignore_errors=True)
                error = _not_saved(save, error)
        error = meeting.conclude(error)
        if error is not None:
            raise error
        return save.final
    finally:
        save.drop()


def _complete(save: Save, listings: list[Listing]) -> None:
    """Write what is written once, give the folder its place, and remove old checkpoints."""
    merged = merge_listings(listings)
    manifest = Manifest(save.step, torch.__version__, merged.tensors)
    write_manifest(save.folder, manifest, save.state, merged.sums)
    sync_folder(save.folder)
    _move_into_place(save.folder, save.final)
    _rotate(save.final.parent, save.step, save.keep, save.keep_every)


def _attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:
        return None, error


def _not_saved(save: Save, error: Exception) -> Exception:
    """The error as the caller gets it: of the file system, it says what is safe."""
    if not isinstance(error, OSError):
        return error
    told = OSError(
        error.errno,
        f"checkpoint of step {save.step} was not saved to {save.final}: {explain_os_error(error)}; "
        "earlier checkpoints are intact",
    )
    told.__cause__ = error
    return told


def _check_input(
    step: int, tensors: Mapping[str, Tensor | Held], state: dict[str, Any], keep: int, keep_every: int | None
) -> None:
    if step < 0:
        raise ValueError(f"step={step} must be >= 0")
    if keep < 1:
        raise ValueError(f"keep={keep} would remove the checkpoint just saved; use keep >= 1")
    if keep_every is not None and keep_every < 1:
        raise ValueError(f"keep_every={keep_every} must be >= 1 steps, or None to keep only the newest")
    for name, value in tensors.items():
        tensor = value.tensor if isinstance(value, Held) else value
        if not isinstance(name, str) or not name or name == "__metadata__":
            raise ValueError(f"{name!r} cannot name a tensor; use a non-empty string other than '__metadata__'")
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"tensor {name!r} is a {type(tensor).__name__}; put values that are not tensors into the state"
            )
        if type(tensor) not in (Tensor, torch.nn.Parameter):
            raise ValueError(
                f"tensor {name!r} is a {type(tensor).__name__}; give plain tensors, or what this process holds of one "
                "as Held"
            )
        if tensor.layout != torch.strided or tensor.device.type == "meta":
            raise ValueError(
                f"tensor {name!r} ({tensor.layout}, {tensor.device}) has no plain data; only dense tensors are saved"
            )
        check_storable(name, tensor.dtype)
    if state.get("step", step) != step:
        raise ValueError(f"state says step {state['step']}, but the checkpoint is of step {step}; save one of the two")
    for key in ("format_version", "torch_version"):
        if key in state:
            raise ValueError(f"state[{key!r}] is added by the checkpoint itself; give the entry another name")
    _check_json(state, "state")


def _check_json(value: Any, where: str) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{where} has the key {key!r}; JSON keeps only string keys, convert it")
            _check_json(item, f"{where}[{key!r}]")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            _check_json(item, f"{where}[{i}]")
    elif value is not None and type(value) not in (str, int, float, bool):
        # Exact types: a numpy or enum scalar would come back as something else.
        raise ValueError(f"{where} is a {type(value).__name__}; allowed are JSON values, tensors go into `tensors`")
    elif isinstance(value, str):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{where} is not valid Unicode: {error}") from error


def _move_into_place(tmp: Path, final: Path) -> None:
    """Rename a synced folder to its final name, durably; one of the same step is replaced, never lost on the way."""
    old = final.parent / f".old-{final.name}-{os.getpid()}"
    replaces = final.exists()
    if replaces:
        os.rename(final, old)
    try:
        os.rename(tmp, final)
    except BaseException:
        if replaces:
            os.rename(old, final)
        raise
    sync_folder(final.parent)
    if replaces:
        shutil.rmtree(old)


def _rotate(parent: Path, step: int, keep: int, keep_every: int | None) -> None:
    """Remove the checkpoints before `step` that are neither among the newest `keep` nor multiples of `keep_every`.

    Later steps stay: they are there only when the run went back to this one because they are damaged, and are the
    user's to judge.
    """
    earlier = [(number, path) for number, path in list_checkpoints(parent.parent) if number < step]
    for number, path in earlier[: max(0, len(earlier) - (keep - 1))]:
        if keep_every is None or number % keep_every:
            trash = parent / f".trash-{path.name}-{os.getpid()}"
            os.rename(path, trash)
            shutil.rmtree(trash)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
