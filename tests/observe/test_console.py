"""Progress output: how many lines, how wide, and whether the time left makes sense."""

from __future__ import annotations

import io
import re

import pytest

from pithwood.observe.console import ConsoleSink, TimeLeft, event_line, fit_line, format_count, format_duration
from pithwood.observe.events import EventLog


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def emit_run(sink: ConsoleSink, total: int, log_every: int, validate_every: int) -> None:
    log = EventLog(None, [sink], log_every=log_every)
    log.emit("run", 0, recipe="demo")
    for step in range(1, total + 1):
        speed = {"step_s": 0.5, "tokens_per_s": 2000.0, "mfu": 0.4}
        log.emit("train", step, tokens=step * 1000, loss=3.0, bits_per_byte=1.5, **speed)
        if step % validate_every == 0:
            log.emit("validation", step, loss=2.9, bits_per_byte=1.4, seconds=2.0)
            log.emit("checkpoint", step, seconds=1.0)
    log.emit("done", total)
    log.close()


def test_plain_output_is_one_line_per_interval_and_validation():
    stream = io.StringIO()
    emit_run(ConsoleSink(55, log_every=10, validate_every=25, stream=stream), 55, 10, 25)
    lines = stream.getvalue().splitlines()
    steps = [line for line in lines if "validation" not in line]
    assert [line.split(" |")[0] for line in steps] == [f"step {s}/55" for s in (10, 20, 30, 40, 50, 55)]
    assert [line for line in lines if line not in steps] == [
        "step 25/55 | validation | loss 2.900 | 1.400 bits/byte | took 2.0s",
        "step 50/55 | validation | loss 2.900 | 1.400 bits/byte | took 2.0s",
    ]
    assert steps[0] == "step 10/55 | loss 3.000 | 1.500 bits/byte | 2.0k tokens/s | MFU 40% | 22s left"
    assert "\x1b" not in stream.getvalue()


def test_stdout_stays_clean(capsys):
    emit_run(ConsoleSink(10, log_every=5), 10, 5, 5)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 4


@pytest.mark.parametrize("width", [200, 80, 40, 12])
def test_a_terminal_redraws_one_line_within_its_width(monkeypatch, width: int):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(width))
    stream = Terminal()
    emit_run(ConsoleSink(20, log_every=5, stream=stream), 20, 5, 10)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    drawn = [part for line in text.split("\n") for part in line.split("\r")]
    assert max(len(part.rstrip()) for part in drawn) <= width
    # What stays on the screen: two validations and the last state. Every redraw erases its own line, and the end of the
    # live display goes back up by one.
    assert text.count("\n") - stream.getvalue().count("\x1b[1A") == 3
    assert "step 20/20"[: width - 1] in drawn[-2]


def test_a_dumb_terminal_gets_plain_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    emit_run(ConsoleSink(20, log_every=10, stream=stream), 20, 10, 100)
    assert stream.getvalue().count("\n") == 2
    assert "\x1b" not in stream.getvalue()


def test_skipped_steps_and_divergence_show():
    stream = io.StringIO()
    log = EventLog(None, [ConsoleSink(4, log_every=2, stream=stream)], log_every=2)
    log.emit("train", 1, loss=1.0)
    log.emit("train", 2, loss=float("nan"))
    log.emit("skip", 2, reason="loss is not finite")
    log.emit("train", 3, loss=1.0)
    log.emit("train", 4, loss=1.0)
    log.close()
    first, second = stream.getvalue().splitlines()
    assert first == "step 2/4 | loss nan"
    assert second == "step 4/4 | 1 skipped | loss 1.000"


def test_time_left_of_even_steps_and_pauses_is_exact():
    left = TimeLeft(total_steps=100, validate_every=30, save_every=50)
    assert left.seconds() is None
    left.add_step(1, 60.0)  # compiles
    for step in range(2, 31):
        left.add_step(step, 0.5)
    assert left.seconds() == pytest.approx(35.0)
    left.add_pause("validation", 30, 4.0)
    # After steps 60, 90 and the last one.
    assert left.seconds() == pytest.approx(35.0 + 3 * 4.0)
    for step in range(31, 51):
        left.add_step(step, 0.5)
    left.add_pause("checkpoint", 50, 2.0)
    assert left.seconds() == pytest.approx(25.0 + 3 * 4.0 + 2.0)
    left.add_step(100, 0.5)
    left.add_pause("validation", 100, 4.0)
    left.add_pause("checkpoint", 100, 2.0)
    assert left.seconds() == 0.0


def test_time_left_shrugs_off_a_hiccup_and_follows_a_lasting_change():
    left = TimeLeft(total_steps=1000)
    for step in range(1, 101):
        left.add_step(step, 1.0)
    left.add_step(101, 500.0)
    assert left.seconds() == pytest.approx(899, rel=0.12)
    for step in range(102, 202):
        left.add_step(step, 8.0)
    assert left.seconds() == pytest.approx(799 * 8, rel=0.15)


def test_time_left_of_a_resumed_run_counts_what_remains():
    left = TimeLeft(total_steps=100, start_step=90, validate_every=10)
    left.add_step(91, 1.0)
    left.add_step(92, 1.0)
    left.add_pause("validation", 90, 3.0)
    assert left.seconds() == pytest.approx(8 + 3)


def test_texts():
    assert [format_duration(s) for s in (0.42, 8.13, 9.97, 45, 200, 3599.7, 7500, 273600)] == [
        "0.42s", "8.1s", "10s", "45s", "3m20s", "1h00m", "2h05m", "3d04h",
    ]  # fmt: skip
    assert [format_count(n) for n in (950, 12_345, 999_960, 4_100_000, 1.2e9)] == [
        "950", "12.3k", "1.0M", "4.1M", "1.20B",
    ]  # fmt: skip
    assert format_duration(float("nan")) == format_count(float("inf")) == "?"
    assert fit_line(["step 1/9", "loss 3.1", "speed"], 20) == "step 1/9 | loss 3.1"
    assert fit_line(["step 1/9", "loss 3.1"], 3) == "step 1/9"


def test_a_mixture_shows_each_part_and_what_a_phase_changes():
    check = {"kind": "validation", "step": 8, "loss": 2.5, "bits_per_byte": 1.9}
    parts = {"bits_per_byte/code": 1.7, "bits_per_byte/prose": 2.3, "epochs/code": 0.514, "epochs/prose": 12.3}
    assert event_line({**check, **parts}, 9) == (
        "step 8/9 | validation | loss 2.500 | 1.900 bits/byte | code 1.700 after 0.51 epochs, "
        "prose 2.300 after 12 epochs"
    )
    phase = {"kind": "phase", "step": 4, "index": 1, "seq_len": 512, "shares": {"code": 0.7, "prose": 0.3}}
    assert event_line(phase, 9) == "step 4/9 | phase 1 | seq_len 512 | code 70.0%, prose 30.0%"
