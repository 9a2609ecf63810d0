"""Write checkpoints: complete or not there, the newest few kept.

    RUN/checkpoints/step-00001200/                a complete checkpoint: it got this name by a rename, last of all
    RUN/checkpoints/.tmp-step-00001200-4711/      one being written by process 4711
    RUN/checkpoints/.old-step-00001200-4711/      one being replaced by a new one of the same step
    RUN/checkpoints/.trash-step-00001100-4711/    one being removed

A process may be killed between any two system calls: what it leaves is one of these names, and `clean_leftovers` deals
with it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, DefaultSavePlanner
from torch.distributed.tensor import DTensor

from pithwood.checkpoint.files import check_storable, sync_folder
from pithwood.checkpoint.load import checkpoints_folder, list_checkpoints
from pithwood.checkpoint.storage import CheckpointWriter, Manifest, reraise_first, write_manifest
from pithwood.errors import explain_os_error, size_text


def save_checkpoint(
    run_dir: Path,
    step: int,
    tensors: dict[str, Tensor],
    state: dict[str, Any],
    keep: int = 2,
    keep_every: int | None = None,
) -> Path:
    """Save tensors and state as the checkpoint of `step`, then remove old ones; returns the checkpoint's folder.

    tensors      name -> tensor of any shape, on any device; written bit for bit
    state        JSON values with string keys, tuples become lists: data position, random state, counters, configuration
    keep         checkpoints kept, this one included, >= 1
    keep_every   checkpoints whose step is a multiple of it are kept for ever; None keeps none
    raises       ValueError on bad input, before anything is written; OSError if writing fails (disk full), with all
                 earlier checkpoints intact and nothing of this one left

    Files, folder and parent are synced to disk before it returns. Nothing old goes before the new one is complete. The
    caller holds the run's lock: one process writes.
    """
    _check_input(step, tensors, state, keep, keep_every)
    parent = checkpoints_folder(run_dir)
    final = parent / f"step-{step:08d}"
    tmp = parent / f".tmp-{final.name}-{os.getpid()}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        if tmp.exists():
            shutil.rmtree(tmp)
        tmp.mkdir()
        write_checkpoint(tmp, step, tensors, state)
        sync_folder(tmp)
        _move_into_place(tmp, final)
    except BaseException as error:
        shutil.rmtree(tmp, ignore_errors=True)
        if isinstance(error, OSError):
            raise OSError(
                error.errno,
                f"checkpoint of step {step} was not saved to {final}: {explain_os_error(error)}; "
                "earlier checkpoints are intact",
            ) from error
        raise
    _rotate(parent, step, keep, keep_every)
    return final


def check_can_save(run_dir: Path, num_bytes: float) -> None:
    """Find out before any training whether a checkpoint of `num_bytes` could be written; raises ValueError or OSError.

    The folder is tried by making and removing an empty one, as nothing else tells whether the system will allow it.
    """
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


def write_checkpoint(folder: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Write the files of a checkpoint into an existing empty folder; each file is synced, the folder is not."""
    writer = CheckpointWriter(folder)
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        with warnings.catch_warnings():
            # One process is what is meant here.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.save(dict(tensors), storage_writer=writer, planner=planner, no_dist=True)
    except CheckpointException as wrapped:
        reraise_first(wrapped)
    write_manifest(folder, Manifest(step, torch.__version__, writer.tensors), state, writer.sums)


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


def _check_input(
    step: int, tensors: dict[str, Tensor], state: dict[str, Any], keep: int, keep_every: int | None
) -> None:
    if step < 0:
        raise ValueError(f"step={step} must be >= 0")
    if keep < 1:
        raise ValueError(f"keep={keep} would remove the checkpoint just saved; use keep >= 1")
    if keep_every is not None and keep_every < 1:
        raise ValueError(f"keep_every={keep_every} must be >= 1 steps, or None to keep only the newest")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not name or name == "__metadata__":
            raise ValueError(f"{name!r} cannot name a tensor; use a non-empty string other than '__metadata__'")
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"tensor {name!r} is a {type(tensor).__name__}; put values that are not tensors into the state"
            )
        if isinstance(tensor, DTensor):
            raise ValueError(f"tensor {name!r} is sharded over a mesh; gather it with full_tensor() before saving")
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
