"""Checkpoints of runs on a mesh: what is refused without harm, and when the log tells of one.

That runs go on on other meshes is shown in test_run_checkpoints.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pithwood.attention.full import FullAttentionConfig
from pithwood.attention.moba import MoBAConfig
from pithwood.checkpoint.load import list_checkpoints
from pithwood.checkpoint.signals import StopRequest
from pithwood.observe.events import EventLog, Sink, read_events
from pithwood.optim.config import AdamWConfig
from pithwood.parallel.config import MeshConfig
from pithwood.parallel.faults import Watch
from pithwood.parallel.mesh import Mesh
from pithwood.run import Run
from pithwood.train import _loop
from pithwood.trainer import Trainer
from tests import processes
from tests.parallel.spread import Documents, tiny_run

SHARD, EP = MeshConfig(dp_shard=2), MeshConfig(dp_shard=2, ep=2)


def run_of(cfg: MeshConfig) -> Run:
    """Two mixers, shared experts, a selection bias, averaged weights: whatever a checkpoint holds."""
    attention = (MoBAConfig(block_size=8, top_k=2), FullAttentionConfig(key_conv=3)) * 2
    run = tiny_run({"attention": attention}, {"num_shared_experts": 1, "bias_update_rate": 0.01}, mesh=cfg)
    return replace(run, optim=replace(run.optim, ema_decay=0.9))


def saved(mesh: Mesh, run: Run, folder: Path) -> None:
    """Two steps and a checkpoint."""
    trainer = Trainer(run, mesh.device, None, mesh)
    source = Documents(run)
    for step in range(2):
        trainer.train_step(step, source.step(step, trainer.share))
    trainer.save(folder)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that two processes saved."""
    folder = tmp_path_factory.mktemp("shard")
    processes.run_on(SHARD, saved, run_of(SHARD), folder)
    return folder


def refused(mesh: Mesh, run: Run, folder: Path) -> tuple[str, bool]:
    trainer = Trainer(run, mesh.device, None, mesh)
    before = [param.clone() for param in trainer.parameters().values()]
    try:
        trainer.resume(folder, None)
    except ValueError as error:
        return str(error), all(map(torch.equal, before, trainer.parameters().values()))
    return "resumed", False


def test_another_optimizers_checkpoint_is_refused_and_nothing_is_filled(written):
    run = run_of(EP)
    run = replace(run, optim=AdamWConfig(lr=run.optim.lr, eps=run.optim.eps))
    told = processes.run_on(EP, refused, run, written)
    assert all("has no tensor optim." in line and untouched for line, untouched in told)


def test_another_models_checkpoint_is_refused_and_nothing_is_filled(written):
    run = run_of(EP)
    run = replace(run, model=replace(run.model, model_dim=64))
    told = processes.run_on(EP, refused, run, written)
    assert all("the run needs" in line and untouched for line, untouched in told)


class Witness(Sink):
    """A reader of events that looks whether a checkpoint is there when the log says so."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.there = folder, dict[int, bool]()

    def write(self, events: list[dict[str, Any]]) -> None:
        for event in events:
            if event["kind"] == "checkpoint":
                self.there[event["step"]] = (self.folder / "checkpoints" / event["path"]).is_dir()


def looped(mesh: Mesh, run: Run, folder: Path) -> tuple[dict[int, bool], list[tuple[str, int]]]:
    trainer = Trainer(run, mesh.device, None, mesh)
    witness = Witness(folder)
    events = EventLog(folder if mesh.is_first else None, [witness] if mesh.is_first else [], log_every=1)
    with Watch(mesh) as watch:
        _loop(trainer, Documents(run), None, folder, events, 0, StopRequest(), watch)  # type: ignore[arg-type]
    events.close()
    told = read_events(folder) if mesh.is_first else []
    return witness.there, [(event["kind"], event["step"]) for event in told if event["kind"] != "train"]


def test_the_log_tells_of_a_checkpoint_when_it_is_there(tmp_path):
    run = run_of(SHARD)
    run = replace(run, steps=6, checkpoint_every=2, validate_every=100, keep_checkpoints=3)
    (there, lines), _ = processes.run_on(SHARD, looped, run, tmp_path)
    assert there == {2: True, 4: True, 6: True}
    assert lines == [("checkpoint", 2), ("checkpoint", 4), ("checkpoint", 6)]
    assert [step for step, _ in list_checkpoints(tmp_path)] == [2, 4, 6]
