"""Find, check and read checkpoints."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, DefaultLoadPlanner

from pithwood.checkpoint.storage import (
    FORMAT_VERSION,
    CheckpointReader,
    DamagedCheckpoint,
    Manifest,
    read_manifest,
    read_state,
    reraise_first,
)


def checkpoints_folder(run_dir: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return Path(run_dir) / "checkpoints"


def list_checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """Step and folder of a run's complete checkpoints, oldest first; whether they are undamaged is not looked at."""
    parent = checkpoints_folder(run_dir)
    if not parent.is_dir():
        if parent.exists():
            raise ValueError(f"{parent} is not a folder; move that file away")
        return []
    named = ((re.fullmatch(r"step-(\d{8,})", path.name), path) for path in parent.iterdir())
    return sorted((int(match[1]), path) for match, path in named if match is not None and path.is_dir())


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest undamaged checkpoint of a run, every hash checked; None if the run has no checkpoint at all.

    A damaged one is named on stderr with the reason, and the one before it is tried. Raises ValueError if all are
    damaged, or if the newest has a newer format: starting over, or from an older one, would silently lose training.
    """
    problems = []
    for _, path in reversed(list_checkpoints(run_dir)):
        try:
            verify_checkpoint(path)
        except DamagedCheckpoint as error:
            print(f"WARNING: skipped {error}", file=sys.stderr, flush=True)
            problems.append(str(error))
        else:
            return path
    if problems:
        raise ValueError(
            f"all {len(problems)} checkpoints in {checkpoints_folder(run_dir)} are damaged (see above); "
            "restore one from a copy, or start over with --new"
        )
    return None


def verify_checkpoint(path: Path) -> Manifest:
    """Check every file of a checkpoint against its SHA-256; returns its manifest.

    Raises ValueError if there is no such folder or its format is newer, DamagedCheckpoint naming the bad file
    if it is damaged or no checkpoint of ours.
    """
    return read_manifest(Path(path), hashes=True)


def load_checkpoint(
    path: Path,
    into: dict[str, Tensor] | None = None,
    *,
    names: Iterable[str] | None = None,
    partial: bool = False,
    device: torch.device | str = "cpu",
    verify: bool = True,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint; returns its tensors by name and its state.

    into      tensors to fill in place (parameters, sharded DTensors on any mesh); shapes and dtypes must be those saved
    names     without `into`: the tensors to read into new ones on `device`; None reads all
    partial   with `into`: let it name fewer tensors than the checkpoint holds
    verify    check all hashes first; False saves that pass right after `latest_checkpoint`
    raises    ValueError naming what differs or the file that is damaged, before any tensor is filled

    The state comes back as it was saved, with `format_version`, `step` and `torch_version` added.
    """
    path = Path(path)
    manifest = read_manifest(path, hashes=verify)
    if into is None:
        chosen = list(manifest.tensors) if names is None else list(names)
        _check_known(path, chosen, manifest)
        into = {
            name: torch.empty(manifest.tensors[name].shape, dtype=manifest.tensors[name].dtype, device=device)
            for name in chosen
        }
    else:
        if names is not None:
            raise ValueError("give either into= (tensors to fill) or names= (tensors to make), not both")
        _check_fits(path, into, manifest, partial)
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        with warnings.catch_warnings():
            # Each process reads what it needs by itself, on a mesh too.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(dict(into), storage_reader=CheckpointReader(path, manifest), planner=planner, no_dist=True)
    except CheckpointException as wrapped:
        reraise_first(wrapped)
    added = {"format_version": FORMAT_VERSION, "step": manifest.step, "torch_version": manifest.torch_version}
    return into, {**read_state(path), **added}


def _check_known(path: Path, names: Iterable[str], manifest: Manifest) -> None:
    missing = [name for name in names if name not in manifest.tensors]
    if missing:
        raise ValueError(
            f"checkpoint {path} has no tensor {_first(missing)}; it was saved by another model or optimizer "
            f"(its {len(manifest.tensors)} tensors begin with {_first(sorted(manifest.tensors))})"
        )


def _check_fits(path: Path, into: dict[str, Tensor], manifest: Manifest, partial: bool) -> None:
    _check_known(path, into, manifest)
    for name, tensor in into.items():
        stored = manifest.tensors[name]
        if tuple(tensor.shape) != stored.shape or tensor.dtype != stored.dtype:
            raise ValueError(
                f"checkpoint {path} has {name} as {stored.dtype} {list(stored.shape)}, the run needs {tensor.dtype} "
                f"{list(tensor.shape)}; use the configuration that it was saved with"
            )
    left = sorted(set(manifest.tensors) - set(into))
    if left and not partial:
        raise ValueError(
            f"checkpoint {path} also holds {_first(left)}, which the run has no place for; "
            "use the configuration that it was saved with, or read part of it with partial=True"
        )


def _first(names: list[str], limit: int = 4) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
