"""A save beside the training holds what the tensors were when it began, and its errors surface on all processes."""

from __future__ import annotations

import resource
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from pithwood.checkpoint.background import begin_save
from pithwood.checkpoint.load import latest_checkpoint, list_checkpoints, load_checkpoint
from pithwood.checkpoint.ranges import Held
from pithwood.parallel.config import MeshConfig
from pithwood.parallel.mesh import Mesh
from pithwood.parallel.pieces import Piece
from tests.checkpoint.synthetic import held_on, wrong
from tests.processes import run_on


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """Larger files cannot be written in this process, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.quick
def test_what_changes_after_a_save_began_is_not_in_it(tmp_path):
    weights = {"a": torch.arange(400_000.0), "rows": torch.arange(6.0).view(2, 3).t(), "one": torch.tensor(1)}
    before = {name: tensor.clone() for name, tensor in weights.items()}
    state = {"tokens": [5]}
    saving = begin_save(tmp_path, 3, weights, state)
    for tensor in weights.values():
        tensor.zero_()
    state["tokens"].append(6)
    path = saving.wait()
    assert saving.done
    assert saving.step == 3
    tensors, back = load_checkpoint(path)
    assert all(tensors[name].equal(tensor) for name, tensor in before.items())
    assert back["tokens"] == [5]
    assert [child.name for child in path.parent.iterdir()] == ["step-00000003"]


@pytest.mark.quick
def test_one_save_is_under_way_at_a_time(tmp_path):
    saving = None
    for step in range(1, 6):
        saving = begin_save(tmp_path, step, {"a": torch.full((300_000,), float(step))}, {}, after=saving)
        assert sum(thread.name.startswith("save of step") for thread in threading.enumerate()) <= 1
        assert [number for number, _ in list_checkpoints(tmp_path) if number < step] == [*range(1, step)][-2:]
    assert saving is not None
    saving.wait()
    assert [step for step, _ in list_checkpoints(tmp_path)] == [4, 5]


@pytest.mark.quick
def test_bad_input_is_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match="'a' is a float"):
        begin_save(tmp_path, 1, {"a": 1.0}, {})  # type: ignore[dict-item]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.quick
def test_an_error_surfaces_at_the_end_and_at_the_next_save(tmp_path):
    begin_save(tmp_path, 1, {"a": torch.zeros(10)}, {}).wait()
    with files_of_at_most(50_000):
        saving = begin_save(tmp_path, 2, {"a": torch.zeros(100_000)}, {})
        with pytest.raises(OSError, match=r"step 2 was not saved .* earlier checkpoints are intact"):
            saving.wait()
    with pytest.raises(OSError, match="step 2 was not saved"):
        begin_save(tmp_path, 3, {"a": torch.zeros(10)}, {}, after=saving)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def training(mesh: Mesh, run_dir: Path) -> tuple[str, list[str], float]:
    """Begin a save, then use the groups and change the weights while it is written."""
    held = held_on(mesh, filled=True)
    saving = begin_save(run_dir, 7, held, {"rank": mesh.rank}, mesh=mesh)
    total = torch.zeros(1)
    for _ in range(50):
        mesh.world.all_reduce(total.add_(1))
        total /= mesh.world.size
        for part in held.values():
            part.tensor.add_(1)
    path = saving.wait()
    read = held_on(mesh, filled=False)
    load_checkpoint(path, read, mesh=mesh)
    return path.name, wrong(read), float(total)


def test_the_groups_are_free_while_a_mesh_saves(tmp_path):
    assert run_on(MeshConfig(dp_shard=2, ep=2), training, tmp_path) == [("step-00000007", [], 50.0)] * 2


def idle(mesh: Mesh, run_dir: Path) -> bool:
    saving = begin_save(run_dir, 7, held_on(mesh, filled=True), {}, mesh=mesh)
    end = time.monotonic() + 20
    while not saving.done and time.monotonic() < end:
        time.sleep(0.01)
    return saving.done


def test_a_save_of_a_mesh_completes_without_the_training_threads(tmp_path):
    assert run_on(MeshConfig(pp=2), idle, tmp_path) == [True, True]
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-00000007"


def failing(mesh: Mesh, run_dir: Path, failing_rank: int) -> list[str]:
    held = held_on(mesh, filled=True)
    begin_save(run_dir, 1, held, {}, mesh=mesh).wait()
    large = Piece.whole((200_000,)).part(mesh.rank, 2)
    told = []
    with files_of_at_most(50_000 if mesh.rank == failing_rank else resource.RLIM_INFINITY):
        saving = begin_save(run_dir, 2, {**held, "large": Held(torch.zeros(100_000), large)}, {}, mesh=mesh)
        for attempt in (saving.wait, lambda: begin_save(run_dir, 3, held, {}, mesh=mesh, after=saving)):
            try:
                attempt()
            except OSError as error:
                told.append(str(error))
    begin_save(run_dir, 4, held, {}, mesh=mesh).wait()
    return told


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_one_process_surfaces_on_all_and_the_next_save_is_whole(tmp_path, rank):
    told = run_on(MeshConfig(dp_shard=2), failing, tmp_path, rank)
    assert told[0] == told[1]
    assert len(told[0]) == 2
    assert all("step 2 was not saved" in line and f"rank {rank}: File too large" in line for line in told[0])
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000001", "step-00000004"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_save_from_a_gpu_holds_what_was_there_and_does_not_wait_for_it(tmp_path):
    weight = torch.zeros(64_000_000, device="cuda")
    begin_save(tmp_path, 1, {"a": weight}, {}).wait()
    weight.fill_(1.0)
    saving = begin_save(tmp_path, 2, {"a": weight}, {})
    weight.fill_(2.0)
    assert not saving.done
    tensors, _ = load_checkpoint(saving.wait())
    assert tensors["a"].eq(1.0).all()
    assert weight.eq(2.0).all()
