from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pithwood.data.sources import TextFolder
from pithwood.data.spool import Spool
from pithwood.data.tasks import Measure, Task, from_line, to_line
from pithwood.data.workers import Workers


@pytest.fixture
def tasks(folder, tmp_path) -> list[Task]:
    """Ten tasks over a spool."""
    spool = Spool(tmp_path / "spool", seed=0)
    (name,) = spool.fill(TextFolder(str(folder)))
    index = str(spool.folder / f"{name}.npy")
    return [Measure(str(spool.folder), index, row, row + 1, 0, 0.8, str(tmp_path / f"{row}.npy")) for row in range(10)]


def test_tasks_survive_the_way_to_a_process(tasks):
    assert [from_line(to_line(task)) for task in tasks] == tasks


def test_processes_leave_the_same_files_as_this_one_and_every_size_is_told_once(tasks):
    told: list[int] = []
    with Workers(3) as workers:
        workers.run([(task, row) for row, task in enumerate(tasks)], told.append)
    assert sorted(told) == list(range(10))
    made = [Path(task.out).read_bytes() for task in tasks]
    for task in tasks:
        task.run()
    assert [Path(task.out).read_bytes() for task in tasks] == made


def test_tasks_that_are_done_are_not_run_again(tasks):
    for task in tasks:
        np.save(task.out, np.zeros(1))
    told: list[int] = []
    with Workers(2) as workers:
        workers.run([(task, 1) for task in tasks], told.append)
    assert told == [1] * 10
    assert all(np.load(task.out).size == 1 for task in tasks)


@pytest.mark.parametrize("count", [1, 2])
def test_errors_of_a_task_arrive_as_what_they_are(tasks, tmp_path, count):
    (text,) = (tmp_path / "spool").glob("*.text")
    text.write_bytes(text.read_bytes()[::-1])
    with pytest.raises(ValueError, match=r"\.text is altered; delete"), Workers(count) as workers:
        workers.run([(tasks[0], 1)], lambda size: None)
    Path(tasks[0].index).unlink()
    with pytest.raises(FileNotFoundError) as caught, Workers(count) as workers:
        workers.run([(tasks[0], 1)], lambda size: None)
    assert caught.value.filename == tasks[0].index


def test_the_death_of_a_process_is_reported(tasks):
    with Workers(2) as workers:

        def deadly() -> Iterator[tuple[Task, int]]:
            yield tasks[0], 1
            for process in workers.process_ids():
                os.kill(process, signal.SIGKILL)
            yield from ((task, 1) for task in tasks[1:])

        with pytest.raises(ChildProcessError, match=r"died \(killed by signal 9\).*goes on where this one stopped"):
            workers.run(deadly(), lambda size: None)
