"""The event log: what a file holds after kills and resumes, and when device values are fetched."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pithwood.observe.events import EVENTS_FILE, EventLog, Sink, read_events, to_json


class Recorder(Sink):
    def __init__(self):
        self.batches: list[list[dict]] = []
        self.steps: list[int] = []
        self.closed = 0

    def write(self, events):
        self.batches.append(events)

    def on_step(self, step):
        self.steps.append(step)

    def close(self):
        self.closed += 1


class OpCounter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def train(log: EventLog, first: int, last: int, offset: float = 0.0) -> None:
    for step in range(first, last + 1):
        log.emit("train", step, tokens=step * 100, loss=torch.tensor(1.0 / step + offset))
        if step % 4 == 0:
            log.emit("validation", step, loss=2.0 / step, tokens=step * 100)


def untimed(events: list[dict]) -> list[dict]:
    return [{k: v for k, v in event.items() if k != "time"} for event in events]


def test_values_keep_every_digit_and_their_type(tmp_path: Path):
    log = EventLog(tmp_path, log_every=1)
    loss = torch.tensor(2.3456789)
    log.emit("train", 1, loss=loss, tokens=torch.tensor(2**40 + 1), skipped=torch.tensor(True), lr=1e-3, absent=None)
    log.emit("checkpoint", 1, path=tmp_path / "step-1", parts={"a": [1, 2.5]})
    log.close()
    first, second = read_events(tmp_path)
    assert first["loss"] == loss.item()
    assert (first["tokens"], first["skipped"], first["lr"]) == (2**40 + 1, True, 1e-3)
    assert isinstance(first["tokens"], int)
    assert isinstance(first["skipped"], bool)
    assert "absent" not in first
    assert list(first)[:3] == ["kind", "step", "time"]
    assert second["path"] == str(tmp_path / "step-1")
    assert second["parts"] == {"a": [1, 2.5]}


def test_nan_and_infinities_are_valid_json_and_come_back(tmp_path: Path):
    log = EventLog(tmp_path, log_every=1)
    log.emit("train", 1, loss=torch.tensor(float("nan")), grad_norm=float("inf"), worst=[-math.inf])
    log.close()
    text = (tmp_path / EVENTS_FILE).read_text()

    def refuse(constant: str):
        raise AssertionError(f"{constant} is not JSON")

    raw = json.loads(text, parse_constant=refuse)
    assert (raw["loss"], raw["grad_norm"], raw["worst"]) == ("nan", "inf", ["-inf"])
    (event,) = read_events(tmp_path)
    assert math.isnan(event["loss"])
    assert event["grad_norm"] == math.inf
    assert event["worst"] == [-math.inf]


def test_train_events_wait_for_log_every_and_nothing_reads_the_device_before(tmp_path: Path):
    sink = Recorder()
    log = EventLog(tmp_path, [sink], log_every=4)
    values = [torch.rand(()) for _ in range(8)]
    counts = [torch.tensor(i) for i in range(8)]
    with OpCounter() as between:
        for step in range(1, 4):
            assert log.emit("train", step, loss=values[step - 1], n=counts[step - 1], t=lambda: 1.0) == []
    assert sink.batches == []
    assert (tmp_path / EVENTS_FILE).read_bytes() == b""
    assert sink.steps == [1, 2, 3]
    reads = {"aten::_local_scalar_dense", "aten::item", "aten::_to_copy", "aten::copy_", "aten::is_nonzero"}
    assert not reads & set(between.names), between.names
    flushed = log.emit("train", 4, loss=values[3], n=counts[3])
    assert [event["loss"] for event in flushed] == [v.item() for v in values[:4]]
    assert [event["n"] for event in flushed] == [0, 1, 2, 3]
    for step in range(5, 9):
        log.emit("train", step, loss=values[step - 1])
    assert [len(batch) for batch in sink.batches] == [4, 4]
    log.close()
    log.close()
    assert sink.closed == 1
    assert len(read_events(tmp_path)) == 8


def test_other_kinds_flush_what_waits_in_order(tmp_path: Path):
    sink = Recorder()
    log = EventLog(tmp_path, [sink], log_every=100)
    log.emit("train", 1, loss=torch.tensor(1.0))
    log.emit("train", 2, loss=torch.tensor(2.0))
    log.emit("validation", 2, loss=3.0)
    assert [(e["kind"], e["step"]) for e in sink.batches[0]] == [("train", 1), ("train", 2), ("validation", 2)]
    log.emit("train", 3, loss=torch.tensor(3.0))
    assert [e["step"] for e in log.sync()] == [3]
    assert [e["step"] for e in read_events(tmp_path)] == [1, 2, 2, 3]
    log.close()


def test_a_tensor_that_is_overwritten_after_emit_keeps_its_value():
    sink = Recorder()
    log = EventLog(None, [sink], log_every=10)
    running = torch.tensor([1.0])
    log.emit("train", 1, loss=running)
    running.fill_(7.0)
    log.emit("train", 2, loss=running)
    log.close()
    assert [event["loss"] for event in sink.batches[0]] == [1.0, 7.0]


def test_functions_are_called_at_the_flush_only():
    sink = Recorder()
    log = EventLog(None, [sink], log_every=2)
    calls: list[int] = []

    def late() -> float:
        calls.append(1)
        return 0.5

    log.emit("train", 1, step_s=late)
    assert calls == []
    log.emit("train", 2, step_s=late)
    assert [event["step_s"] for event in sink.batches[0]] == [0.5, 0.5]
    assert len(calls) == 2


def test_bad_fields_and_settings_are_named(tmp_path: Path):
    with pytest.raises(ValueError, match="log_every=0"):
        EventLog(tmp_path, log_every=0)
    log = EventLog(tmp_path)
    with pytest.raises(ValueError, match=r"'load' has shape \[3\]"):
        log.emit("train", 1, load=torch.ones(3))
    with pytest.raises(ValueError, match="'time' is set by the log"):
        log.emit("train", 1, time=3.0)
    with pytest.raises(ValueError, match="'what' is a set"):
        log.emit("train", 1, what={1})
    log.close()
    assert read_events(tmp_path) == []


def test_resumed_log_reads_like_an_unbroken_one(tmp_path: Path):
    unbroken = EventLog(tmp_path / "a", log_every=2)
    unbroken.emit("run", 0, recipe="demo")
    train(unbroken, 1, 10)
    unbroken.emit("done", 10)
    unbroken.close()

    log = EventLog(tmp_path / "b", log_every=2)
    log.emit("run", 0, recipe="demo")
    train(log, 1, 4)
    log.emit("checkpoint", 4)
    log.sync()
    train(log, 5, 9, offset=5.0)  # lost: the process dies after step 9
    log.flush()
    log = EventLog(tmp_path / "b", log_every=2, resume_step=4)
    log.emit("resume", 4)
    train(log, 5, 10)
    log.emit("done", 10)
    log.close()

    resumed = untimed(read_events(tmp_path / "b"))
    extra = [{"kind": "checkpoint", "step": 4}, {"kind": "resume", "step": 4}]
    assert [event for event in resumed if event["kind"] in ("checkpoint", "resume")] == extra
    assert [event for event in resumed if event not in extra] == untimed(read_events(tmp_path / "a"))


def test_a_second_resume_from_an_earlier_step_keeps_the_first_resume_on_record(tmp_path: Path):
    log = EventLog(tmp_path, log_every=1)
    train(log, 1, 6)
    log.emit("resume", 6)
    train(log, 7, 8)
    log.emit("done", 8)
    log.close()
    EventLog(tmp_path, resume_step=2).close()
    assert [(e["kind"], e["step"]) for e in read_events(tmp_path)] == [("train", 1), ("train", 2), ("resume", 6)]
    EventLog(tmp_path, resume_step=-1).close()
    assert [e["kind"] for e in read_events(tmp_path)] == ["resume"]


def test_what_follows_a_checkpoint_at_its_own_step_is_not_doubled(tmp_path: Path):
    log = EventLog(tmp_path, log_every=1)
    train(log, 1, 4)
    log.emit("checkpoint", 4)
    log.emit("phase", 4, index=1)
    log.emit("validation", 4, loss=9.0)
    log.flush()  # dies here, with the checkpoint of step 4 on disk
    log = EventLog(tmp_path, log_every=1, resume_step=4)
    log.emit("resume", 4)
    log.emit("phase", 4, index=1)
    log.close()
    kinds = [e["kind"] for e in read_events(tmp_path)]
    assert kinds == ["train"] * 4 + ["validation", "checkpoint", "resume", "phase"]


def test_a_finished_run_that_goes_on_has_one_done(tmp_path: Path):
    log = EventLog(tmp_path, log_every=1)
    train(log, 1, 3)
    log.emit("done", 3)
    log.close()
    EventLog(tmp_path, resume_step=3).close()
    assert [e["kind"] for e in read_events(tmp_path)] == ["train"] * 3


def test_every_torn_end_is_read_over_and_repaired(tmp_path: Path):
    log = EventLog(tmp_path, log_every=1)
    train(log, 1, 3)
    log.close()
    path = tmp_path / EVENTS_FILE
    whole = path.read_bytes()
    start = whole[:-1].rfind(b"\n") + 1
    for end in range(start, len(whole)):
        path.write_bytes(whole[:end])
        # The last line counts only when its closing brace is there.
        kept = 3 if end == len(whole) - 1 else 2
        assert [e["step"] for e in read_events(path)] == [1, 2, 3][:kept]
        log = EventLog(tmp_path, log_every=1)
        log.emit("train", 9)
        log.close()
        assert [e["step"] for e in read_events(path)] == [*[1, 2, 3][:kept], 9]
        assert path.read_bytes().count(b"\n") == kept + 1
    path.write_bytes(whole + b"\0" * 64)
    assert len(read_events(path)) == 3


def test_a_broken_line_in_the_middle_is_refused(tmp_path: Path):
    path = tmp_path / EVENTS_FILE
    path.write_text('{"kind": "train", "step": 1}\n{"kind": "tr\n{"kind": "train", "step": 3}\n')
    with pytest.raises(ValueError, match="line 2 is not an event"):
        read_events(path)
    with pytest.raises(ValueError, match="line 2"):
        EventLog(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_events(tmp_path / "nowhere")


def test_killed_writer_leaves_a_log_that_resumes(tmp_path: Path):
    code = f"""
from pithwood.observe.events import EventLog
log = EventLog({str(tmp_path)!r}, log_every=3)
step = 0
while True:
    step += 1
    log.emit("train", step, tokens=step, loss=1.0 / step, text="x" * 2000)
"""
    # Not through a shell, so that the kill reaches the writer itself.
    writer = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 60
    path = tmp_path / EVENTS_FILE
    while (not path.exists() or path.stat().st_size < 200_000) and time.monotonic() < deadline:
        time.sleep(0.01)
    writer.kill()
    writer.wait()
    steps = [event["step"] for event in read_events(path)]
    assert len(steps) > 50
    assert steps == list(range(1, len(steps) + 1))
    log = EventLog(tmp_path, log_every=1, resume_step=20)
    log.emit("train", 21)
    log.close()
    assert [event["step"] for event in read_events(path)] == list(range(1, 22))


def test_to_json_takes_nested_values():
    assert to_json({"a": (1, math.nan), "b": {"c": None}}) == '{"a": [1, "nan"], "b": {"c": null}}'


@pytest.mark.gpu
def test_emit_does_not_synchronise_cuda(tmp_path: Path):
    device = torch.device("cuda")
    log = EventLog(tmp_path, log_every=100)
    loss = torch.rand(20, device=device)
    counts = torch.arange(20, device=device)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(1, 20):
            log.emit("train", step, loss=loss[step], n=counts[step])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    log.close()
    events = read_events(tmp_path)
    assert [e["n"] for e in events] == list(range(1, 20))
    assert [e["loss"] for e in events] == loss[1:].tolist()
