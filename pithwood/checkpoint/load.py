"""Find, check and read checkpoints."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pithwood.checkpoint.ranges import Held, as_held
from pithwood.checkpoint.storage import DamagedCheckpoint, Manifest, read_manifest, read_state, read_tensors
from pithwood.checkpoint.together import gather_or_raise
from pithwood.parallel.mesh import Group, Mesh
from pithwood.parallel.pieces import Piece


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


def latest_checkpoint(run_dir: Path, mesh: Mesh | None = None) -> Path | None:
    """The newest undamaged checkpoint of a run, every hash checked; None if the run has no checkpoint at all.

    A damaged one is named on stderr with the reason, and the one before it is tried. Raises ValueError if all are
    damaged, or if the newest has a newer format: starting over, or from an older one, would silently lose training.
    On a mesh every process calls it; they divide the hashes and all return or raise the same.
    """
    world = Group.alone() if mesh is None else mesh.world
    problems = []
    # what the first process finds: others may see a folder of a network file system as it was
    for path in reversed(gather_or_raise(world, *_attempted_list(run_dir))[0]):
        try:
            verify_checkpoint(path, mesh)
        except DamagedCheckpoint as error:
            if world.rank == 0:
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


def verify_checkpoint(path: Path, mesh: Mesh | None = None) -> Manifest:
    """Check every file of a checkpoint against its SHA-256, and that each element is there once; returns its manifest.

    Raises ValueError if there is no such folder or its format is newer, DamagedCheckpoint naming the bad file
    if it is damaged or no checkpoint of ours. On a mesh every process calls it, and they divide the files.
    """
    world = Group.alone() if mesh is None else mesh.world
    manifest, error = None, None
    try:
        manifest = read_manifest(Path(path), share=(world.rank, world.size))
    except ValueError as caught:
        error = caught
    gather_or_raise(world, None, error)
    assert manifest is not None
    return manifest


def load_checkpoint(
    path: Path,
    into: Mapping[str, Tensor | Held] | None = None,
    *,
    names: Iterable[str] | None = None,
    pieces: Mapping[str, Piece] | None = None,
    partial: bool = False,
    device: torch.device | str = "cpu",
    verify: bool = True,
    mesh: Mesh | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint; returns its tensors by name and its state.

    into      tensors to fill in place, whole or what this process holds of them; shapes and dtypes must be those saved.
              Of a piece, only its elements are read, from however many files hold them
    names     without `into`: the tensors to read into new ones on `device`; None reads all
    pieces    without `into`: of these tensors only that range, as a flat tensor
    partial   with `into`: let it name fewer tensors than the checkpoint holds
    verify    check all hashes first; False saves that pass right after `latest_checkpoint`
    mesh      every process of it calls this; each names the tensors of its layers, and the processes of a pipeline
              together all that the checkpoint holds, unless `partial`. All return or raise
    raises    ValueError naming what differs or the file that is damaged, before any tensor is filled

    The state comes back as it was saved, with `format_version`, `step` and `torch_version` added.
    """
    path = Path(path)
    world, pipeline = (Group.alone(), Group.alone()) if mesh is None else (mesh.world, mesh.pp)
    elsewhere = {name for others in pipeline.all_gather_objects(list(into or {})) for name in others}
    held: dict[str, Held] = {}
    state: dict[str, Any] = {}
    error: Exception | None = None
    try:
        manifest = read_manifest(path, hashes=verify, share=(world.rank, world.size))
        state = read_state(path)
        state |= {"format_version": manifest.format_version, "step": manifest.step}
        state |= {"torch_version": manifest.torch_version}
        if into is None:
            held = _new(path, manifest, names, pieces or {}, device)
        elif names is not None or pieces is not None:
            raise ValueError("give either into= (tensors to fill) or names= and pieces= (tensors to make), not both")
        else:
            held = as_held(into)
            _check_fits(path, held, manifest, elsewhere=None if partial else elsewhere)
    except (ValueError, OSError) as caught:
        error = caught
    gather_or_raise(world, None, error)
    try:
        read_tensors(path, manifest, held)
    except (ValueError, OSError) as caught:
        error = caught
    gather_or_raise(world, None, error)
    return {name: value.tensor for name, value in held.items()}, state


def _attempted_list(run_dir: Path) -> tuple[list[Path], Exception | None]:
    try:
        return [path for _, path in list_checkpoints(run_dir)], None
    except ValueError as error:
        return [], error


def _new(
    path: Path,
    manifest: Manifest,
    names: Iterable[str] | None,
    pieces: Mapping[str, Piece],
    device: torch.device | str,
) -> dict[str, Held]:
    """Memory for what is to be read; ValueError if the checkpoint has no such tensors."""
    chosen = list(manifest.tensors) if names is None else list(names)
    _check_known(path, [*chosen, *pieces], manifest)
    held = {}
    for name in chosen:
        stored = manifest.tensors[name]
        piece = pieces.get(name)
        shape = stored.shape if piece is None else (piece.numel,)
        tensor = torch.empty(shape, dtype=stored.dtype, device=device)
        held[name] = Held.whole(tensor) if piece is None else Held(tensor, piece)
    _check_fits(path, held, manifest, elsewhere=None)
    return held


def _check_known(path: Path, names: Iterable[str], manifest: Manifest) -> None:
    missing = [name for name in names if name not in manifest.tensors]
    if missing:
        raise ValueError(
            f"checkpoint {path} has no tensor {_first(missing)}; it was saved by another model or optimizer "
            f"(its {len(manifest.tensors)} tensors begin with {_first(sorted(manifest.tensors))})"
        )


def _check_fits(path: Path, into: Mapping[str, Held], manifest: Manifest, elsewhere: set[str] | None) -> None:
    _check_known(path, into, manifest)
    for name, held in into.items():
        stored = manifest.tensors[name]
        if held.piece.shape != stored.shape or held.tensor.dtype != stored.dtype:
            raise ValueError(
                f"checkpoint {path} has {name} as {stored.dtype} {list(stored.shape)}, the run needs "
                f"{held.tensor.dtype} {list(held.piece.shape)}; use the configuration that it was saved with"
            )
    left = sorted(set(manifest.tensors) - elsewhere) if elsewhere is not None else []
    if left:
        raise ValueError(
            f"checkpoint {path} also holds {_first(left)}, which the run has no place for; "
            "use the configuration that it was saved with, or read part of it with partial=True"
        )


def _first(names: list[str], limit: int = 4) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
