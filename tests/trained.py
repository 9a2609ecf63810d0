"""Two small trained runs that many tests read. They are made once per test process; whoever changes one copies it."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from pithwood.attention.full import FullAttentionConfig
from pithwood.run import Run
from pithwood.train import train
from tests.test_train import small_run


@dataclass(frozen=True)
class Trained:
    """A runs folder with `small` (MoBA, 8 steps) and `dense` (the same with full attention and another rate)."""

    runs_dir: Path
    moba: Path
    dense: Path
    run: Run
    """Settings of `moba`."""


@functools.cache
def _train(folder: Path) -> Trained:
    folder.mkdir()
    run = small_run(folder / "text")
    full = dataclasses.replace(run.model, attention=FullAttentionConfig())
    dense = dataclasses.replace(run, name="dense", model=full, optim=dataclasses.replace(run.optim, lr=0.01))
    runs_dir = folder / "runs"
    moba, other = (
        train(settings, runs_dir=runs_dir, console=False, command=f"pithwood train {settings.name}")
        for settings in (run, dense)
    )
    return Trained(runs_dir, Path(moba["run_dir"]), Path(other["run_dir"]), run)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The two runs; read only."""
    return _train(tmp_path_factory.getbasetemp() / "trained")


@pytest.fixture
def copied(trained: Trained, tmp_path: Path) -> Trained:
    """A copy of the two runs that a test may damage, corpora included."""
    runs_dir = tmp_path / "runs"
    shutil.copytree(trained.runs_dir, runs_dir)
    return Trained(runs_dir, runs_dir / trained.moba.name, runs_dir / trained.dense.name, trained.run)
