"""Where a run lives on disk: its name, its lock, what makes two runs the same, and how one is opened to be used.

A run's folder is `<runs_dir>/<recipe>-<hash of everything but length and logging>`: the same settings always meet the
same folder, so typing a command again resumes it. A folder named before a setting existed is met too, if that setting
has its default.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pithwood.checkpoint.load import (
    checkpoints_folder,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
)
from pithwood.checkpoint.lock import RunLock
from pithwood.checkpoint.storage import read_manifest
from pithwood.config import config_hash, from_dict, to_dict
from pithwood.data.corpus import MANIFEST, Corpus, open_corpus
from pithwood.data.mixture import MixtureConfig, corpora_of, find_data, open_data
from pithwood.data.tokenizer import Tokenizer
from pithwood.data.tokenizer import load_tokenizer as load_tokenizer_file
from pithwood.models.qwen3_moe import Qwen3MoE
from pithwood.observe.events import EVENTS_FILE, read_events, to_json, write_atomically
from pithwood.observe.summary import SUMMARY_FILE
from pithwood.run import DTYPES, LENGTH_AND_LOGGING, Run, pick_device

CONFIG_FILE = "config.json"
CORPORA = "corpora"
"""Folder beside the runs that holds the prepared corpora."""


Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class OpenRun:
    """A run at one of its checkpoints, ready to be evaluated or looked into."""

    folder: Path
    run: Run
    step: int
    """Optimizer steps behind the weights."""
    tokens: int
    """Training tokens behind the weights."""
    model: Qwen3MoE
    """In evaluation mode, with the mixers of that step and averaged weights if the run keeps an average."""
    corpus_fingerprint: str
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """Activation dtype, as trained."""
        return DTYPES[self.run.precision]


def open_run(reference: str, runs_dir: Path, *, step: int | None = None, device: Device = "auto") -> OpenRun:
    """The run meant by a path or name (see `find_run`) at a step's checkpoint, by default its newest undamaged one.

    device  auto, cpu or cuda; where the run was trained does not matter
    raises  ValueError if there is no such run, checkpoint or device, or if anything that is needed is damaged
    """
    reference = reference if step is None else f"{reference}@{step}"
    path = find_checkpoint(reference, runs_dir)
    folder = path.parent.parent
    run = load_run(folder)
    target = pick_device(replace(run, device=device))
    # the newest undamaged one was found by checking its hashes
    manifest = read_manifest(path, hashes="@" in reference)
    names = [name for name in manifest.tensors if name.startswith(("model.", "optim.ema."))]
    tensors, state = load_checkpoint(path, names=names, device=target, verify=False)
    model = model_of(run, int(state["step"]), tensors, averaged=True).to(target)
    fingerprint = str(state["data"]["corpus"])
    return OpenRun(folder, run, int(state["step"]), int(state["tokens"]), model, fingerprint, target)


def open_run_corpus(
    opened: OpenRun, runs_dir: Path, progress: Callable[[str], None] = lambda line: None, part: str | None = None
) -> Corpus:
    """The corpus that a run was trained on, every byte checked; made again from its source if it is gone.

    part    which one, for a run that was trained on a mixture
    raises  ValueError if it is damaged, or gone and its source no longer gives the same corpus; if a mixture's part is
            not named, or one is named where there are none
    """
    cfg = opened.run.data
    if isinstance(cfg, MixtureConfig) and part not in cfg.parts:
        raise ValueError(
            f"{opened.folder.name} was trained on a mixture; choose which part to measure on with --part: "
            f"{', '.join(cfg.names)}" + (f" (given {part!r})" if part is not None else "")
        )
    if part is not None and not isinstance(cfg, MixtureConfig):
        raise ValueError(f"--part {part} names a part of a mixture, but {opened.folder.name} has one corpus; drop it")
    places = dict.fromkeys(((opened.folder.parent / CORPORA).resolve(), (runs_dir / CORPORA).resolve()))
    if isinstance(cfg, MixtureConfig):
        for place in places:
            found = find_data(cfg, place)
            if found is not None and found.fingerprint == opened.corpus_fingerprint:
                corpus = corpora_of(found)[str(part)]
                corpus.verify()
                return corpus
    for folder in prepared_corpora(places):
        if fingerprint_of(folder) == opened.corpus_fingerprint:
            corpus = open_corpus(folder)
            corpus.verify()
            return corpus
    gone = f"the corpus that {opened.folder.name} was trained on is not in {opened.folder.parent / CORPORA}/"
    way_out = "bring back the folder or the text that it was made of, or give text of your own with --text FILE"
    progress(f"opening the corpus of {opened.folder.name} from its source")
    try:
        data = open_data(cfg, opened.folder.parent / CORPORA, progress)
    except (ValueError, OSError) as error:
        raise ValueError(f"{gone} and cannot be prepared again ({error}); {way_out}") from error
    if data.fingerprint != opened.corpus_fingerprint:
        raise ValueError(f"{gone}, and its source gives another one now (text or tokenizer differ); {way_out}")
    return corpora_of(data)[part] if part is not None else next(iter(corpora_of(data).values()))


def prepared_corpora(places: Iterable[Path]) -> list[Path]:
    """The folders of complete corpora in these places."""
    return [path.parent for place in places for path in sorted(place.glob(f"[!.]*/{MANIFEST}"))]


def fingerprint_of(folder: Path) -> str | None:
    """The fingerprint in a corpus folder's manifest, None if that cannot be read."""
    try:
        return str(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def lock_holder(folder: Path) -> str | None:
    """Who holds a run folder's lock ("process 12 on host"), None if nobody does."""
    try:
        file = open(folder / ".lock", "rb")  # noqa: SIM115
    except OSError:
        return None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return file.read(256).decode(errors="replace").strip() or "another process"
    return None


def run_dir(run: Run, runs_dir: Path) -> Path:
    """The folder of a run of these settings: the one it has, else the one it will get."""
    wanted = config_hash(run, exclude=LENGTH_AND_LOGGING)
    folder = runs_dir / f"{run.name}-{wanted[:8]}"
    if folder.exists():
        return folder
    for older in sorted(runs_dir.glob(f"{run.name}-{'[0-9a-f]' * 8}")):
        try:
            same = config_hash(load_run(older), exclude=LENGTH_AND_LOGGING) == wanted
        except ValueError:
            # Settings that cannot be read are not known to be these.
            continue
        if same:
            return older
    return folder


def find_run(reference: str, runs_dir: Path) -> Path:
    """The run folder meant by a path, a folder's name, a recipe's name, or the start of a name; the newest of several.

    Runs that --new moved aside are meant by their whole name only. ValueError names what there is.
    """
    if not reference:
        raise ValueError("which run? give a run folder, its name, or the start of its name")
    for path in (Path(reference), runs_dir / reference):
        if (path / CONFIG_FILE).is_file():
            return path
    folders = [p for p in runs_dir.glob("[!.]*/") if (p / CONFIG_FILE).is_file() and ".old" not in p.name]
    have = sorted(folders, key=lambda p: (_start_number(p), (p / CONFIG_FILE).stat().st_mtime_ns))
    of_recipe = [p for p in have if p.name.rpartition("-")[0] == reference]
    matches = of_recipe or [p for p in have if p.name.startswith(reference)]
    if matches:
        return matches[-1]
    for path in (Path(reference), runs_dir / reference):
        if reference and path.is_dir():
            raise ValueError(f"{path} is not a run folder: it has no {CONFIG_FILE}; `pithwood runs` lists the runs")
    names = ", ".join(p.name for p in have[-5:]) or "none yet (start one with `pithwood train demo`)"
    raise ValueError(f"no run {reference!r} in {runs_dir}/; there are: {names}")


def find_checkpoint(reference: str, runs_dir: Path) -> Path:
    """The checkpoint meant by RUN@STEP (or RUN for its newest undamaged one)."""
    name, _, step = reference.partition("@")
    folder = find_run(name, runs_dir)
    found = dict(list_checkpoints(folder))
    if not found:
        raise ValueError(f"{folder} has no checkpoint yet; train it to its first save")
    if not step:
        path = latest_checkpoint(folder)
        assert path is not None
        return path
    if not step.isdigit() or int(step) not in found:
        raise ValueError(f"{folder.name} has no checkpoint at step {step!r}; there are {sorted(found)}")
    return found[int(step)]


def load_run(folder: Path) -> Run:
    """The resolved settings of a run folder."""
    try:
        with open(folder / CONFIG_FILE, encoding="utf-8") as file:
            data = json.load(file)["run"]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder}/config.json is not the configuration of a run ({error}); is this a run folder?"
        ) from None
    try:
        return from_dict(Run, data)
    except ValueError as error:
        raise ValueError(
            f"{folder}/config.json: {error} (--import FILE imports the file that defines a class of your own)"
        ) from error


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that the run was trained with; every run folder holds its own copy."""
    path = folder / "tokenizer.json"
    try:
        if not path.is_file():
            raise ValueError(f"tokenizer {path} is missing")
        return load_tokenizer_file(path)
    except ValueError as error:
        raise ValueError(
            f"{error}; copy tokenizer.json from the run's corpus (in corpora/ beside the run folder): "
            "the model's tokens mean nothing to another one"
        ) from None


def check_tokenizer(folder: Path, run: Run, tokenizer: Tokenizer, state: dict[str, Any]) -> None:
    """Raise ValueError if a run folder's tokenizer is not the one that a checkpoint was trained with."""
    trained = state.get("tokenizer")
    if tokenizer.vocab_size != run.data.vocab_size if trained is None else tokenizer.fingerprint() != trained:
        raise ValueError(
            f"{folder}/tokenizer.json ({tokenizer.vocab_size} tokens) is not the tokenizer that the run was trained "
            f"with ({run.data.vocab_size} tokens); copy it from the run's corpus (in corpora/ beside the run folder)"
        )


def model_of(run: Run, step: int, tensors: dict[str, Tensor], averaged: bool) -> Qwen3MoE:
    """A model in evaluation mode with a checkpoint's weights; `averaged` takes their moving average if there is one."""
    model = Qwen3MoE(replace(run.model, attention=run.phase(max(step - 1, 0)).attention))
    state = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
    if averaged:
        # the average also holds parameters that only another phase uses
        state |= {name: tensors[f"optim.ema.{name}"] for name in state if f"optim.ema.{name}" in tensors}
    model.load_state_dict(state)
    return model.eval()


def check_origin(run: Run, path: Path, state: dict[str, Any], *, branch: bool) -> None:
    """Raise ValueError if a checkpoint is no state of a training run, or `run` ends before it.

    branch  another run is to start from it, which must then have a step to do
    """
    if absent := {"data", "tokens", "rng"} - state.keys():
        raise ValueError(f"{path} is not a checkpoint of `pithwood train`: its state lacks {', '.join(sorted(absent))}")
    if int(state["step"]) > run.steps:
        raise ValueError(
            f"{path} is already past steps={run.steps}; raise steps to at least {state['step']}, "
            "or start over with --new"
        )
    if branch and int(state["step"]) >= run.steps:
        raise ValueError(f"{path} already has the {run.steps} steps asked for; raise steps to train on from it")


def check_begin(folder: Path, origin: Path | None, branch_from: str | None, new: bool) -> str | None:
    """The RUN@STEP that a run folder's run was begun from; ValueError if it may not begin from another one now.

    origin, branch_from   the checkpoint that --from means, and how it was written
    """
    if new:
        if origin is not None and folder in origin.parents:
            raise ValueError(
                f"--new would move away {folder}, from which --from wants to start; change a setting instead"
            )
        return None
    begun_from = branched_from(folder)
    if branch_from not in (None, begun_from) and list_checkpoints(folder):
        raise ValueError(
            f"{folder} already holds a run of these settings, begun from {begun_from or 'fresh weights'}; "
            "drop --from to resume it, or add --new to start over"
        )
    return begun_from


def check_same_corpus(path: Path, state: Mapping[str, Any], fingerprint: str) -> None:
    """Raise ValueError if a checkpoint was trained on another corpus than that with this fingerprint."""
    if state["data"]["corpus"] != fingerprint:
        raise ValueError(
            f"{path} was trained on another corpus than `data` describes now (text or tokenizer differ); "
            "start over with --new, or restore the corpus"
        )


def check_fits(path: Path, saved: Mapping[str, Any], model: Qwen3MoE) -> None:
    """Raise ValueError naming what differs unless saved tensors (or their descriptions) have the model's shapes."""
    expected = model.state_dict()
    wrong = [n for n in expected if n not in saved or tuple(saved[n].shape) != tuple(expected[n].shape)]
    wrong += [name for name in saved if name not in expected]
    if wrong:
        raise ValueError(
            f"{path} does not fit this model: {', '.join(sorted(wrong)[:4])} differ; "
            "use the settings that it was saved with"
        )


def write_config(folder: Path, run: Run, command: str, origin: str | None) -> None:
    """config.json: the resolved tree, with the command that asked for it and the branch it came from."""
    # a number that rises with every start tells which run is the newest, whatever the clock says
    others = [_start_number(path) for path in folder.parent.glob("*/") if path != folder]
    number = max(others, default=0) + 1
    content = {"run": to_dict(run), "command": command, "branched_from": origin, "start_number": number}
    write_atomically(folder / CONFIG_FILE, (to_json(content, indent=2) + "\n").encode())


def finished_summary(folder: Path, run: Run) -> dict[str, Any] | None:
    """The summary of a run that has already reached exactly `run.steps`, None otherwise."""
    path = folder / SUMMARY_FILE
    if not path.is_file():
        return None
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(summary, dict) or not isinstance(summary.get("steps"), int):
            raise ValueError("it does not say how many steps were done")
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); remove it, and the same command writes it again") from None
    # where it lies now: the folder may have been moved or copied since
    return {**summary, "run_dir": str(folder)} if summary["steps"] == run.steps else None


def check_not_lost(folder: Path) -> None:
    """Raise ValueError if a run's checkpoints are gone: to begin from scratch would throw its training away."""
    if list_checkpoints(folder) or not (folder / EVENTS_FILE).is_file():
        return
    saved = [event["step"] for event in read_events(folder) if event["kind"] == "checkpoint"]
    if saved:
        raise ValueError(
            f"{folder} saved a checkpoint of step {saved[-1]}, but {checkpoints_folder(folder)} holds none; "
            "restore it from a copy, or start over with --new (which moves the old folder aside)"
        )


def branched_from(folder: Path) -> str | None:
    """The RUN@STEP that a run folder's run was begun from, None for fresh weights or an empty folder."""
    path = folder / CONFIG_FILE
    try:
        return json.loads(path.read_text(encoding="utf-8"))["branched_from"]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not the configuration of a run ({error}); restore it, or use --new") from None


def _start_number(folder: Path) -> int:
    try:
        number = json.loads((folder / "config.json").read_text(encoding="utf-8"))["start_number"]
    except (OSError, KeyError, TypeError, ValueError):
        return 0
    return number if isinstance(number, int) else 0


@contextmanager
def moved_aside(folder: Path, tell: Callable[[str], None]) -> Iterator[None]:
    """Context in which a run folder is out of the way; it comes back if none took its place, as after bad settings."""
    with RunLock(folder):
        moved = start_over(folder)
    tell(f"starting over; the old run is now {moved}")
    try:
        yield
    finally:
        if moved is not None and not folder.exists():
            moved.rename(folder)
            tell(f"nothing was started; the old run is {folder} again")


def start_over(folder: Path) -> Path | None:
    """Move an existing run folder out of the way (nothing is deleted); returns where it went."""
    if not folder.exists():
        return None
    number = 1
    while (moved := folder.with_name(f"{folder.name}.old{number}")).exists():
        number += 1
    shutil.move(folder, moved)
    return moved
