"""What `train` would refuse before its first step, found without writing anything: the checks of `--dry-run`."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pithwood.checkpoint.load import checkpoints_folder, latest_checkpoint
from pithwood.checkpoint.lock import in_use
from pithwood.checkpoint.save import no_room
from pithwood.checkpoint.storage import read_manifest, read_state
from pithwood.data.corpus import Corpus
from pithwood.data.mixture import Mixture, corpora_of, look_up_data
from pithwood.data.usage import data_plan, training_batches
from pithwood.memory import check_memory
from pithwood.models.qwen3_moe import Qwen3MoE
from pithwood.observe.events import EVENTS_FILE, read_events
from pithwood.observe.sinks import check_sinks
from pithwood.optim.optimizer import Optimizer
from pithwood.optim.schedule import idle_end
from pithwood.plan import plan
from pithwood.run import Run, check_device_settings, pick_device
from pithwood.run_folder import (
    CORPORA,
    check_begin,
    check_fits,
    check_not_lost,
    check_origin,
    check_same_corpus,
    find_checkpoint,
    fingerprint_of,
    finished_summary,
    lock_holder,
    prepared_corpora,
    run_dir,
)


def dry_run(
    run: Run,
    runs_dir: Path,
    *,
    new: bool = False,
    branch_from: str | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """What a run would take, after every check that `train` makes before its first step; nothing is written.

    new, branch_from   as those of `train`
    tell               called with a line when something takes a while
    returns            the fields of `plan`, and: run_folder; state: new, resumes or finished; resumes_after: steps
                       done, null at the start; corpus: by part, where it lies prepared, or what is to be prepared
                       first; from: the checkpoint that branch_from means; warnings
    raises             what `train` would; of a corpus that is yet to be prepared, what `check_source` finds
    """
    figures = plan(run)
    check_sinks(run.logging)
    device = pick_device(run)
    check_device_settings(run, device)
    warnings = check_memory(run, figures, device)
    folder = run_dir(run, runs_dir)
    origin = find_checkpoint(branch_from, runs_dir) if branch_from else None
    if (holder := lock_holder(folder)) is not None:
        raise ValueError(in_use(folder, holder))
    check_begin(folder, origin, branch_from, new)
    figures |= {"run_folder": str(folder), "state": "new", "resumes_after": None, "warnings": warnings}
    if origin is not None:
        figures["from"] = str(origin)
    # --new moves the folder away first: nothing in it matters
    if not new and folder.exists():
        if finished_summary(folder, run) is not None:
            return figures | {"state": "finished", "resumes_after": run.steps}
        check_not_lost(folder)
        if (folder / EVENTS_FILE).is_file():
            read_events(folder)
    for place in (folder,) if new else (checkpoints_folder(folder), folder):
        check_writable(place)
    data = look_up_data(run.data, runs_dir / CORPORA, tell)
    if isinstance(data, dict):
        check_writable(runs_dir / CORPORA)
        found = {name: f"not prepared; would read {survey.description}" for name, survey in data.items()}
    else:
        found = {name: f"prepared in {corpus.folder}" for name, corpus in corpora_of(data).items()}
        batches = training_batches(data, run.stages(), seed=run.seed, steps=run.steps)
        figures["data"] = data_plan(data, batches.curriculum, run.steps)
    resumed = None if new else latest_checkpoint(folder)
    if (path := resumed or origin) is not None:
        step = check_checkpoint(run, path, None if isinstance(data, dict) else data, branch=path == origin)
        figures |= {"state": "resumes" if resumed is not None else "new", "resumes_after": step}
        trained_on = str(read_state(path)["data"]["corpus"])
        if isinstance(data, dict) and trained_on in map(fingerprint_of, prepared_corpora([runs_dir / CORPORA])):
            warnings.append(
                f"WARNING: {path} was trained on a corpus that is there, but the text or the settings of `data` are "
                "others now: if they give another corpus, training will refuse to go on from it"
            )
    model, optimizer = shapes_after(run, figures["resumes_after"] or 0)
    saved = (*model.state_dict().values(), *optimizer.state_dict().values())
    check_room(checkpoints_folder(folder), sum(tensor.nbytes for tensor in saved))
    return figures | {"corpus": found, "warnings": [*warnings, *idle_end(run.optim.schedule, run.steps)]}


def check_checkpoint(run: Run, path: Path, data: Corpus | Mixture | None, *, branch: bool) -> int:
    """The step of a checkpoint that a run would go on from; ValueError if it cannot, by shapes alone.

    data    what the run would read, None if that is not known yet
    branch  another run is to start from it; its hashes are checked, those of the run's own newest have been
    """
    manifest, state = read_manifest(path, hashes=branch), read_state(path)
    check_origin(run, path, {**state, "step": manifest.step}, branch=branch)
    if data is not None:
        check_same_corpus(path, state, data.fingerprint)
    saved = {
        prefix: {n.removeprefix(prefix): t for n, t in manifest.tensors.items() if n.startswith(prefix)}
        for prefix in ("model.", "optim.")
    }
    model, optimizer = shapes_after(run, manifest.step)
    check_fits(path, saved["model."], model)
    with torch.device("meta"):
        optimizer.load_state_dict({name: torch.empty(t.shape, dtype=t.dtype) for name, t in saved["optim."].items()})
    return manifest.step


def shapes_after(run: Run, steps: int) -> tuple[Qwen3MoE, Optimizer]:
    """Model and optimizer of a run behind so many steps, without memory for their tensors."""
    optimizer: Optimizer | None = None
    with torch.device("meta"):
        # through every phase in turn, so that state of parameters that only an earlier one used has its place
        for begin in (0, *(phase.until_step for phase in run.phases if phase.until_step < steps)):
            phase = run.phase(begin)
            model = Qwen3MoE(replace(run.model, attention=phase.attention))
            parameters, roles = dict(model.named_parameters()), model.parameter_roles()
            changes: dict[str, Any] = {"trainable": phase.trainable, "lr_scales": phase.lr_scales}
            if optimizer is None:
                optimizer = Optimizer(run.optim, parameters, roles, run.steps, **changes)
            else:
                optimizer.set_phase(parameters, roles, **changes)
    assert optimizer is not None
    return model, optimizer


def check_writable(folder: Path) -> None:
    """Raise an OSError as making files in a folder would, which may not be there yet."""
    missing = folder
    while not missing.exists() and not missing.parent.exists():
        missing = missing.parent
    there = folder if folder.exists() else missing.parent
    if not there.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(missing))
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(missing))


def check_room(folder: Path, num_bytes: float) -> None:
    """Raise ValueError if the disk of a folder that may not be there yet has no room for a checkpoint."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < num_bytes:
        raise ValueError(no_room(folder, num_bytes, free))
