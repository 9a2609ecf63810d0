"""Delete run folders, and nothing else: what is not surely a run, is in use, or holds more than one run stays."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from pithwood.checkpoint.lock import RunLock
from pithwood.facts.listing import looks_like_run
from pithwood.run_folder import lock_holder


def find_to_delete(name: str, runs_dir: Path) -> Path:
    """The run folder of exactly this path or name, damaged ones included; ValueError if it may not be deleted.

    No beginnings of names and no recipes' names are taken: which run they mean changes from day to day.
    """
    # a bare name is one in runs_dir, whatever else of that name lies in the current folder
    places = [runs_dir / name, Path(name)] if name == Path(name).name else [Path(name), runs_dir / name]
    folder = next((place for place in places if name and os.path.lexists(place)), None)
    if folder is None:
        raise ValueError(
            f"no run {name!r} in {runs_dir}/; deleting takes a run's whole name, which `pithwood runs` lists, or a path"
        )
    check_can_delete(folder)
    return folder


def check_can_delete(folder: Path) -> None:
    """Raise ValueError unless a folder is one run that nobody uses and that can be removed."""
    if folder.is_symlink():
        raise ValueError(f"{folder} is a symbolic link; delete the run at its end by its own path")
    if not looks_like_run(folder):
        raise ValueError(f"{folder} is not a run folder, so it is not deleted; `pithwood runs` lists the runs")
    if Path.cwd().is_relative_to(folder.resolve()):
        raise ValueError(f"{folder} is or holds the current folder, so it is not deleted; go to another folder first")
    inner = [path for path in folder.iterdir() if not path.is_symlink() and path.is_dir() and looks_like_run(path)]
    if inner:
        raise ValueError(f"{folder} holds other runs ({inner[0].name}), so it is not deleted; move them out of it")
    if (holder := lock_holder(folder)) is not None:
        raise ValueError(f"{folder} is in use by {holder}; wait for it to end, or stop it")
    for place in (folder, folder.parent):
        if not os.access(place, os.W_OK | os.X_OK):
            raise ValueError(f"{folder} cannot be deleted: {place} cannot be written to")


def delete_run(folder: Path) -> None:
    """Remove a run folder with everything in it; ValueError, and nothing happens, if it may not be deleted.

    It vanishes from the list of runs by a rename, first of all: no half-deleted run is left under its name.
    """
    check_can_delete(folder)
    with RunLock(folder):  # nobody begins to train it meanwhile
        gone = folder.with_name(f".deleted-{folder.name}-{os.getpid()}")
        folder.rename(gone)
        shutil.rmtree(gone)
