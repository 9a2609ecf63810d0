"""TensorBoard, W&B and trackio: what arrives there, what a resumed run continues, what a failing sink may not do."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pithwood.config import apply_overrides
from pithwood.observe.events import EventLog, Sink, read_events
from pithwood.observe.sinks import (
    LoggingConfig,
    TensorBoardSink,
    WandbSink,
    check_sinks,
    open_sinks,
    scalars,
)
from pithwood.run_folder import run_dir
from pithwood.train import train
from pithwood.trainer import Trainer
from tests.test_train import small_run


class BrokenSink(Sink):
    """Takes the first batch of events and raises from then on."""

    def __init__(self):
        self.calls = 0

    def write(self, events):
        self.calls += 1
        if self.calls > 1:
            raise ConnectionError("network is unreachable")


class OpenSink(Sink):
    def __init__(self):
        self.events: list[dict[str, Any]] = []

    def write(self, events):
        self.events += events


def tensorboard_points(folder: Path, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder))
    reader.Reload()
    return [(point.step, point.value) for point in reader.Scalars(name)]


def wandb_records(folder: Path) -> list[Any]:
    """The records of all W&B files below a folder; W&B's own process may still write their ends when a run is over."""
    deadline = time.monotonic() + 30
    while True:
        files = [list(records_of(path)) for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"))]
        ended = all(file and file[-1].WhichOneof("record_type") == "exit" for file in files)
        if ended or time.monotonic() > deadline:
            return [record for file in files for record in file]
        time.sleep(0.02)


def records_of(path: Path) -> Iterator[Any]:
    """The whole records of a W&B file: LevelDB's log format, blocks of 32 KiB after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, place, whole = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        _, length, part = struct.unpack("<IHB", data[place : place + 7])
        if place + 7 + length > len(data):
            return
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if part in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def wandb_points(folder: Path, name: str) -> list[tuple[int, float]]:
    points = []
    for record in wandb_records(folder):
        if record.WhichOneof("record_type") == "history":
            row = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
            if name in row:
                points.append((int(row["step"]), float(json.loads(row[name]))))
    return points


def two_sittings(log_of: Any) -> None:
    """A run that is killed after step 4, whose last checkpoint was that of step 2, and goes on from it to step 6."""
    for kind, start, last in (("run", 0, 4), ("resume", 2, 6)):
        log = log_of()
        log.emit(kind, start, recipe="small")
        for step in range(start + 1, last + 1):
            log.emit("train", step, loss=1.0 / step, tokens=step * 100)
        log.emit("validation", last, loss=0.5)
        log.close()


EXPECTED = {step: pytest.approx(1.0 / step) for step in range(1, 7)}


@pytest.mark.quick
def test_scalars_are_the_numbers_of_curves():
    event = {"kind": "train", "step": 3, "time": 1.0, "loss": 2.5, "loss/balance": 1, "note": "x"}
    assert scalars(event) == {"train/loss": 2.5, "train/loss/balance": 1.0}
    assert scalars({"kind": "checkpoint", "step": 3, "time": 1.0, "seconds": 2.0}) == {}


def test_tensorboard_continues_a_resumed_run_without_a_second_take(tmp_path: Path):
    two_sittings(lambda: EventLog(None, [TensorBoardSink(tmp_path)], log_every=2))
    assert tensorboard_points(tmp_path, "train/loss") == list(EXPECTED.items())
    assert [step for step, _ in tensorboard_points(tmp_path, "validation/loss")] == [6]


@pytest.mark.slow
def test_wandb_offline_continues_a_resumed_run_over_the_same_steps(tmp_path: Path):
    def log_of() -> EventLog:
        # W&B names a sitting's folder by the second
        time.sleep(1.1)
        return EventLog(None, [WandbSink(tmp_path, "p", "small-1", "offline", {"steps": 6})], log_every=2)

    two_sittings(log_of)
    points = wandb_points(tmp_path, "train/loss")
    assert [step for step, _ in points] == [1, 2, 3, 4, 3, 4, 5, 6]
    assert dict(points) == EXPECTED
    runs = [record.run for record in wandb_records(tmp_path) if record.WhichOneof("record_type") == "run"]
    assert {run.run_id for run in runs} == {"small-1"}
    metrics = [record.metric for record in wandb_records(tmp_path) if record.WhichOneof("record_type") == "metric"]
    assert any(metric.step_metric == "step" for metric in metrics)


TRACKIO = """
import sys
from tests.observe.test_sinks import two_sittings
from pithwood.observe.events import EventLog
from pithwood.observe.sinks import TrackioSink
two_sittings(lambda: EventLog(None, [TrackioSink("p", "small-1", {"steps": 6})], log_every=2))
import json
from trackio.sqlite_storage import SQLiteStorage
rows = SQLiteStorage.get_logs("p", "small-1")
print(json.dumps([[row["step"], row["train/loss"]] for row in rows if "train/loss" in row]))
"""


@pytest.mark.slow
def test_trackio_continues_a_resumed_run_in_its_local_store(tmp_path: Path):
    # In a process of its own: trackio reads where its store lies when it is imported.
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", TRACKIO], env=environment, capture_output=True, text=True, check=True)
    lines = done.stdout.strip().splitlines()
    assert len(lines) == 1, "trackio's own words belong on stderr"
    points = json.loads(lines[0])
    assert [step for step, _ in points] == [1, 2, 3, 4, 3, 4, 5, 6]
    assert dict(points) == EXPECTED


def test_a_run_writes_the_sinks_that_its_settings_name_and_continues_them(tmp_path: Path, monkeypatch):
    run = apply_overrides(small_run(tmp_path / "text"), ["logging.tensorboard=true", "logging.wandb=offline"])
    step = Trainer.train_step

    def fail_at_six(self, number, *args, **kwargs):
        if number == 6:
            raise RuntimeError("power cut")
        return step(self, number, *args, **kwargs)

    monkeypatch.setattr(Trainer, "train_step", fail_at_six)
    with pytest.raises(RuntimeError, match="power cut"):
        train(run, runs_dir=tmp_path / "runs", console=False)
    monkeypatch.setattr(Trainer, "train_step", step)
    folder = Path(train(run, runs_dir=tmp_path / "runs", console=False)["run_dir"])
    losses = {event["step"]: event["loss"] for event in read_events(folder) if event["kind"] == "train"}
    points = tensorboard_points(folder / "tensorboard", "train/loss")
    assert [step for step, _ in points] == list(range(1, 9))
    assert dict(points) == pytest.approx(losses)
    assert dict(wandb_points(folder, "train/loss")) == pytest.approx(losses)
    names = {record.run.run_id for record in wandb_records(folder) if record.WhichOneof("record_type") == "run"}
    assert len(names) == 1


@pytest.mark.quick
def test_sinks_change_no_runs_folder(tmp_path: Path):
    run = small_run(tmp_path / "text")
    other = dataclasses.replace(run, logging=LoggingConfig(tensorboard=True, wandb="offline", project="x"))
    assert run_dir(run, tmp_path) == run_dir(other, tmp_path)


@pytest.mark.quick
def test_a_failing_sink_is_reported_once_and_leaves_the_others_whole(tmp_path: Path, capsys):
    broken, healthy = BrokenSink(), OpenSink()
    log = EventLog(tmp_path, [broken, healthy], log_every=1)
    returned = [event for step in range(1, 5) for event in log.emit("train", step, loss=1.0)]
    log.close()
    assert [event["step"] for event in returned if event["kind"] == "train"] == [1, 2, 3, 4]
    assert broken.calls == 2
    events = read_events(tmp_path)
    assert [event["step"] for event in events if event["kind"] == "train"] == [1, 2, 3, 4]
    reports = [event for event in events if event["kind"] == "sink"]
    assert [(event["name"], event["reason"]) for event in reports] == [
        ("broken", "ConnectionError: network is unreachable")
    ]
    assert [event["step"] for event in healthy.events if event["kind"] == "train"] == [1, 2, 3, 4]
    assert capsys.readouterr().err.count("logging to broken failed") == 1


@pytest.mark.quick
def test_a_sink_that_fails_to_close_is_still_in_the_log(tmp_path: Path):
    class Unclosable(Sink):
        def write(self, events):
            return None

        def close(self):
            raise OSError("disk is gone")

    log = EventLog(tmp_path, [Unclosable()])
    log.emit("train", 1, loss=1.0)
    log.close()
    assert [event["kind"] for event in read_events(tmp_path)] == ["train", "sink"]


def test_sinks_name_the_extra_when_their_package_is_missing(tmp_path: Path, monkeypatch):
    # An empty path hides every installed package from the search, and what was imported before from the cache.
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "meta_path", [])
    for name in ("tensorboard", "wandb", "trackio"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        cfg = LoggingConfig(**{name: "offline" if name == "wandb" else True})
        with pytest.raises(ValueError, match=rf"'{name}', which is not installed.*pithwood\[log\].*logging\.{name}"):
            check_sinks(cfg)
    check_sinks(LoggingConfig())


def test_a_missing_package_stops_a_run_before_it_makes_a_folder(tmp_path: Path, monkeypatch):
    run = apply_overrides(small_run(tmp_path / "text"), ["logging.trackio=true"])
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "trackio" else find(name))
    with pytest.raises(ValueError, match="trackio"):
        train(run, runs_dir=tmp_path / "runs", console=False)
    assert not (tmp_path / "runs").exists()


def test_wandb_online_without_a_key_is_refused_before_any_work(tmp_path: Path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    for name, value in {"HOME": "", "NETRC": "netrc", "WANDB_CONFIG_DIR": ""}.items():
        monkeypatch.setenv(name, str(tmp_path / value))
    with pytest.raises(ValueError, match=r"logging\.wandb=online finds no key"):
        check_sinks(LoggingConfig(wandb="online"))


@pytest.mark.quick
def test_a_projects_name_that_is_no_name_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"logging.*project='a/b'"):
        apply_overrides(small_run(tmp_path / "text"), ["logging.project=a/b"])


def test_a_store_that_cannot_be_opened_stops_the_run_in_one_line(tmp_path: Path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    code = (
        "from pithwood.observe.sinks import *\n"
        "try: TrackioSink('p', 'n')\n"
        "except ValueError as error: print('refused', error)"
    )
    environment = {**os.environ, "TRACKIO_DIR": str(blocked)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "refused trackio does not start" in done.stdout, done.stderr


@pytest.mark.quick
def test_no_sink_is_opened_unless_asked_for(tmp_path: Path):
    assert open_sinks(LoggingConfig(), tmp_path / "run", {}) == []
