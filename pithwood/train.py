"""The training loop, top to bottom: set up, resume, step, validate, save, finish.

A step reads: batch -> forward and backward over micro-batches -> norm, clip and update -> log. Nothing waits for the
device outside logging steps. Sample order, initial weights and schedules are pure functions of (seed, step), so a
resumed run repeats the unbroken one to the last digit on the same machine and thread count.
"""

from __future__ import annotations

import math
import platform
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pithwood.checkpoint.load import latest_checkpoint
from pithwood.checkpoint.lock import RunLock
from pithwood.checkpoint.save import check_can_save, clean_leftovers
from pithwood.checkpoint.signals import StopRequest
from pithwood.config import to_dict
from pithwood.data.batches import TrainingBatches
from pithwood.data.corpus import Corpus
from pithwood.data.mixture import Mixture, open_data
from pithwood.data.origins import step_origins
from pithwood.data.together import open_together
from pithwood.data.usage import epochs_read, read_so_far, training_batches
from pithwood.finish import finish, finish_alone
from pithwood.memory import check_memory, explained_memory
from pithwood.observe.clock import StepClock
from pithwood.observe.console import ConsoleSink
from pithwood.observe.events import EventLog, Sink, read_events, write_atomically
from pithwood.observe.metrics import speed_fields
from pithwood.observe.sinks import check_sinks, open_sinks
from pithwood.optim.schedule import idle_end
from pithwood.parallel.agreement import StopAgreement
from pithwood.parallel.faults import Watch
from pithwood.parallel.mesh import (
    Mesh,
    check_world,
    own_device,
    start_mesh,
    stop_mesh,
    topology,
    world_from_environment,
)
from pithwood.parallel.verdicts import Bounds
from pithwood.plan import plan
from pithwood.run import Run, check_device_settings, pick_device
from pithwood.run_folder import (
    CORPORA,
    check_begin,
    check_not_lost,
    find_checkpoint,
    finished_summary,
    moved_aside,
    run_dir,
    write_config,
)
from pithwood.trainer import Trainer

LONG_S = 3600.0
"""How long a validation or a checkpoint may take before the process counts as hanging."""


def train(
    run: Run,
    *,
    runs_dir: Path,
    new: bool = False,
    branch_from: str | None = None,
    console: bool = True,
    command: str = "",
) -> dict[str, Any]:
    """Train `run` to its last step in its run folder, from scratch or from where it stopped; returns the summary.

    new          start over; an existing folder of the same settings is moved aside
    branch_from  "RUN@STEP": start from another run's weights and optimizer state instead of fresh ones
    console      show progress on stderr: a live line on a terminal, a line per log interval elsewhere
    returns      the content of summary.json; key "interrupted" holds the number of the signal that stopped the run, if
                 one did
    raises       ValueError before any work for settings that cannot work or a folder in use
    """
    figures = plan(run)
    check_sinks(run.logging)
    bounds = Bounds.from_environment()
    _, size, local_rank = world_from_environment()
    check_world(run.mesh, size)
    device = pick_device(run)
    if size > 1:
        device = own_device(device, local_rank)
    check_device_settings(run, device)
    crowded = check_memory(run, figures, device)
    if run.threads:
        torch.set_num_threads(run.threads)
    mesh = start_mesh(run.mesh, device)
    with Watch(mesh, bounds=bounds) as watch:
        summary = _train(run, mesh, watch, runs_dir, new, branch_from, console and mesh.is_first, command, crowded)
    stop_mesh(mesh)
    if mesh.is_first:
        # the others have left: nobody waits, and what trained is gone from memory
        tell = partial(print, file=sys.stderr, flush=True) if console else lambda line: None
        summary = finish_alone(run, summary, runs_dir, device, tell)
    return summary


def _train(
    run: Run,
    mesh: Mesh,
    watch: Watch,
    runs_dir: Path,
    new: bool,
    branch_from: str | None,
    console: bool,
    command: str,
    crowded: list[str],
) -> dict[str, Any]:
    """`train` on a mesh that has started. The first process looks after the folder, and the others do as it does."""
    folder = run_dir(run, runs_dir)
    origin = find_checkpoint(branch_from, runs_dir) if branch_from else None
    tell = partial(print, file=sys.stderr, flush=True) if console else lambda line: None
    if mesh.is_first:
        check_begin(folder, origin, branch_from, new)
    aside = moved_aside(folder, tell) if mesh.is_first and new and folder.exists() else nullcontext()
    lock = RunLock(folder) if mesh.is_first else nullcontext()
    with aside, lock, StopRequest(tell=console) as stop, explained_memory(run, folder):
        begun_from = check_begin(folder, origin, branch_from, new) if mesh.is_first else None
        watch.phase("looking at the folder", math.inf)
        done = mesh.world.agree(finished_summary(folder, run) if mesh.is_first else None)
        if done is not None:
            tell(f"{folder} is complete ({run.steps} steps); raise steps to train on, or start over with --new")
            return done
        if mesh.is_first:
            clean_leftovers(folder)
            check_not_lost(folder)
        corpora = runs_dir / CORPORA
        make = partial(stop.unless_stopped, partial(open_data, run.data, corpora, tell))
        corpus = open_together(run.data, corpora, mesh, watch, make)
        asked = mesh.world.agree(stop.signal_number)
        if asked or corpus is None:
            return _interrupted(run, folder, 0, 0, asked, command)
        source = training_batches(corpus, run.stages(), seed=run.seed, steps=run.steps)
        epochs = epochs_read(corpus, source.curriculum, run.steps)
        watch.phase("start")
        trainer = Trainer(run, mesh.device, corpus, mesh)
        trainer.tell_phase = watch.phase
        start = trainer.resume(folder, origin)
        laid_out = topology(mesh, mesh.world.all_gather_objects(platform.node()))
        sinks: list[Sink] = []
        check_can_save(folder, trainer.checkpoint_bytes(), mesh)
        if mesh.is_first:
            write_config(folder, run, command, branch_from or begun_from)
            write_atomically(folder / "tokenizer.json", corpus.tokenizer.to_json().encode())
            for line in (
                *trainer.describe(folder, start, epochs),
                *laid_out,
                *crowded,
                *idle_end(run.optim.schedule, run.steps),
            ):
                tell(line)
            sinks = open_sinks(run.logging, folder, to_dict(run))
        if console:
            sinks.append(
                ConsoleSink(
                    run.steps,
                    log_every=run.log_every,
                    start_step=start,
                    validate_every=run.validate_every,
                    save_every=run.checkpoint_every,
                )
            )
        events = EventLog(
            folder if mesh.is_first else None, sinks, log_every=run.log_every, resume_step=start if start else -1
        )
        if mesh.is_first:
            trainer.spikes.remember(read_events(folder))
        try:
            events.emit("resume" if start else "run", start, **trainer.origin_fields(corpus), epochs=epochs)
            signal_number = _loop(trainer, source, corpus, folder, events, start, stop, watch)
            if trainer.step < run.steps:
                return _interrupted(run, folder, trainer.step, trainer.tokens, signal_number, command)
            watch.phase("last validation", LONG_S)
            return mesh.world.agree(finish(trainer, corpus, folder, events, source.curriculum))
        finally:
            events.close()


def _interrupted(run: Run, folder: Path, steps: int, tokens: int, signal_number: int, command: str) -> dict[str, Any]:
    """The summary of a run that was asked to stop."""
    return {
        "recipe": run.name,
        "run_dir": str(folder),
        "steps": steps,
        "tokens": tokens,
        "interrupted": signal_number,
        "command": command,
    }


def _loop(
    trainer: Trainer,
    source: TrainingBatches,
    corpus: Corpus | Mixture,
    folder: Path,
    events: EventLog,
    start: int,
    stop: StopRequest,
    watch: Watch,
) -> int:
    """Steps until the run is complete or asked to stop; either way the last state is saved. Returns the number of the
    signal that asked for it, 0 if none did.
    """
    run, clock = trainer.run, StepClock(trainer.device)

    def look(written: list[dict[str, Any]]) -> None:
        """Whatever flushes the log, every train event passes here once."""
        trainer.spikes.look(events, written, lambda done: step_origins(source, corpus, done - 1))
        report_skips(run, events, folder, written)

    held_s = 0.0

    def complete(wait: bool) -> None:
        """Log a checkpoint that was written beside the training: when it is there, not before."""
        saving = trainer.saving
        if saving is not None and (wait or saving.path is not None):
            watch.phase("save", math.inf)
            events.emit("checkpoint", saving.step, path=saving.wait().name, seconds=held_s)
            trainer.saving = None

    with StopAgreement(trainer.mesh) as agreement:
        for step in range(start, run.steps):
            complete(wait=run.phase_index(step) != trainer.phase)
            if trainer.enter_phase(step):
                watch.begin_anew()
                look(events.emit("phase", step, index=trainer.phase, **source.curriculum.settings(step)))
            done, last = step + 1, step + 1 == run.steps
            logged = done % run.log_every == 0 or last
            watch.step(step)
            clock.restart()
            values, flops = trainer.train_step(step, source.step(step, trainer.share), statistics=logged)
            speed = speed_fields(clock.lap(), run.samples_per_step * run.seq_len, flops, trainer.peaks)
            look(events.emit("train", done, tokens=trainer.tokens, training_flops=flops, **values, **speed))
            if logged:
                look(events.flush())
                for slow in watch.stragglers():
                    events.emit(
                        "straggler",
                        done,
                        rank=slow.rank,
                        host=slow.host,
                        worked_s=slow.worked_s,
                        median_s=slow.median_s,
                    )
            if done % run.validate_every == 0 and not last and trainer.strictly_causal():
                look(events.flush())
                watch.phase("validation", LONG_S)
                started = time.perf_counter()
                fields = trainer.validate(corpus, run.validation_samples) | read_so_far(corpus, source.curriculum, done)
                events.emit("validation", done, tokens=trainer.tokens, **fields, seconds=time.perf_counter() - started)
            stopping = agreement.after_step(stop.signal_number)
            if done % run.checkpoint_every == 0 or last or stopping:
                complete(wait=True)
                # The log up to here is on disk before the checkpoint exists: a run resumed from it misses no line.
                started = time.perf_counter()
                look(events.sync())
                watch.phase("save", LONG_S)
                path = trainer.save(folder, wait=last or bool(stopping))
                held_s = time.perf_counter() - started
                if path is not None:
                    events.emit("checkpoint", done, path=path.name, seconds=held_s)
            if stopping:
                return stopping
    return 0


def report_skips(run: Run, events: EventLog, folder: Path, written: list[dict[str, Any]]) -> None:
    """Say which of the steps just written to the log were not finite; several in a row stop the run.

    The optimizer left the weights as they were before the first of them.
    """
    for event in written:
        if event["kind"] != "train" or not event["skipped"]:
            continue
        step, skips = event["step"], event["consecutive_skips"]
        events.emit("skip", step, consecutive=skips, reason="gradient norm is not finite")
        if skips >= run.max_skipped_steps:
            raise ValueError(
                f"{skips} steps in a row had a gradient norm that is not finite; stopped at step {step} without "
                f"changing the weights. Last good checkpoint: {latest_checkpoint(folder) or 'none yet'}. "
                f"Lower optim.lr, or read the steps before it in {folder}/events.jsonl"
            )
