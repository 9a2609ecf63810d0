"""What signs of life say, without processes: who hangs, who is slow, which error is only the echo of another."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from datetime import timedelta

import pytest
import torch.distributed as dist

from pithwood.parallel.stack import place_and_waiting
from pithwood.parallel.verdicts import (
    Beat,
    Bounds,
    Stragglers,
    awaited,
    hang_line,
    hanging,
    is_echo,
    is_sign,
    phase_limit,
)

pytestmark = pytest.mark.quick

WAITING = Beat(9, "late", 12, 40, "forward", 31.0, True, "parallel/mesh.py:61 (all_reduce)", 1, 0.5)
WORKING = replace(WAITING, waits=False, place="data/batches.py:88 (take)")
BOUNDS = Bounds()


def test_a_beat_travels_and_shows_its_sign_at_once():
    for sign in ("alive", "long", "late", "done"):
        beat = replace(WAITING, sign=sign)
        text = beat.to_text().encode()
        assert Beat.from_bytes(text) == beat
        assert is_sign(text, sign)
        assert not is_sign(text, "late" if sign != "late" else "done")


def test_the_process_that_does_not_wait_is_the_one_that_hangs():
    beats = {0: WAITING, 1: WAITING, 2: WORKING, 3: WAITING}
    assert hanging(beats, 30.0) == 2
    assert hang_line(2, beats) == (
        "hangs in step 12 forward for 31 s, at data/batches.py:88 (take), while 3 others wait"
    )


def test_of_several_that_do_not_wait_the_one_that_is_least_far_hangs():
    assert hanging({0: replace(WORKING, phases=41), 1: WORKING, 2: replace(WORKING, age_s=35.0, phases=41)}, 30.0) == 1


def test_nobody_hangs_while_all_wait_for_one_that_may_take_longer():
    saving = replace(WORKING, sign="alive", phase="save")
    assert hanging({0: saving, 1: WAITING}, 30.0) is None
    assert hanging({0: replace(saving, sign="late"), 1: WAITING}, 30.0) == 0


def test_nobody_hangs_when_the_one_that_all_waited_for_has_just_come():
    come = replace(WAITING, sign="alive", age_s=0.01, phases=41)
    assert hanging({0: come, 1: WAITING, 2: WAITING}, 30.0) is None
    assert hanging({0: replace(come, sign="late"), 1: WAITING, 2: WAITING}, 30.0) == 1
    # it may take longer, but at an exchange of its own it waits for ever
    assert hanging({0: replace(come, sign="long", age_s=40.0), 1: WAITING, 2: WAITING}, 30.0) == 1


def test_who_is_behind_is_awaited_however_long_another_may_take():
    saving = replace(WORKING, sign="long", phase="save")
    assert awaited({0: saving, 1: WAITING}) == 0
    behind = replace(WORKING, phases=39)
    assert awaited({0: saving, 1: WAITING, 2: behind}) == 2
    assert hanging({0: saving, 1: WAITING, 2: behind}, 30.0) == 2
    assert awaited({0: replace(saving, sign="done")}) is None


def test_processes_that_have_left_are_not_counted():
    left = replace(WORKING, sign="done")
    assert hanging({0: left}, 30.0) is None
    assert hanging({0: left, 1: WAITING}, 30.0) == 1
    assert "all do" in hang_line(1, {0: left, 1: WAITING})


def test_a_phase_may_take_five_median_steps_or_half_a_minute_and_its_own_time_counts_first():
    assert phase_limit(BOUNDS, [], None) == 600
    assert phase_limit(BOUNDS, [1.0, 1.0, 50.0], None) == 30
    assert phase_limit(BOUNDS, [1.0, 20.0, 20.0], None) == 100
    assert phase_limit(BOUNDS, [1.0], 7.0) == 7.0


def windows(stragglers: Stragglers, *worked: list[float]) -> list[dict[int, tuple[float, float]]]:
    return [
        stragglers.look({rank: replace(WORKING, window=number, worked_s=s) for rank, s in enumerate(each)})
        for number, each in enumerate(worked, 1)
    ]


def test_a_straggler_is_told_once_after_three_slow_windows_in_a_row():
    slow, even = [1.0, 1.0, 1.3], [1.0, 1.0, 1.1]
    found = windows(Stragglers(BOUNDS), slow, slow, even, slow, slow, slow, slow)
    assert found == [{}, {}, {}, {}, {}, {2: (1.3, 1.0)}, {}]


def test_a_window_counts_once_and_only_when_all_have_completed_it():
    stragglers = Stragglers(replace(BOUNDS, straggler_windows=1))
    beats = {0: replace(WORKING, window=2, worked_s=3.0), 1: replace(WORKING, window=1), 2: replace(WORKING, window=1)}
    assert list(stragglers.look(beats)) == [0]
    assert not stragglers.look({**beats, 1: replace(WORKING, window=1, worked_s=9.0)})


@pytest.mark.parametrize(
    ("error", "echo"),
    [
        (dist.DistBackendError("NCCL error: remote process exited"), True),
        (RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:3"), True),
        (ConnectionResetError("reset"), True),
        (RuntimeError("shape '[3]' is invalid for input of size 4"), False),
        (ValueError("Connection closed by peer"), False),
    ],
)
def test_errors_of_broken_exchanges_are_echoes(error, echo):
    assert is_echo(error) == echo


def test_the_cause_of_an_error_may_be_an_echo():
    error = KeyError("x")
    error.__cause__ = RuntimeError("Connection reset by peer")
    assert is_echo(error)


def test_a_thread_that_waits_for_an_exchange_is_seen_at_its_line():
    store, over = dist.HashStore(), []

    def waits() -> None:
        store.wait(["over"], timedelta(seconds=60))

    def works() -> None:
        while not over:
            time.sleep(0.01)

    seen = []
    for target in (waits, works):
        thread = threading.Thread(target=target)
        thread.start()
        time.sleep(0.1)
        seen.append(place_and_waiting(thread.ident))
        if target is waits:
            store.set("over", "")
        else:
            over.append(True)
        thread.join()
    (where, waiting), (place, working) = seen
    assert waiting
    assert not working
    assert where.startswith("parallel/test_verdicts.py:")
    assert place.endswith("(works)")
    assert place_and_waiting(None) == ("unknown", False)


def test_the_environment_changes_the_bounds_that_it_names(monkeypatch):
    monkeypatch.setenv("PITHWOOD_BOUNDS", "hang_s=120,straggler_windows=5")
    assert Bounds.from_environment() == replace(BOUNDS, hang_s=120.0, straggler_windows=5)
    monkeypatch.delenv("PITHWOOD_BOUNDS")
    assert Bounds.from_environment() == BOUNDS


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("hang=120", "holds 'hang=120'; write name=number, with a name of beat_s, silent_s, hang_s"),
        ("hang_s=", "holds 'hang_s='; write a positive number after hang_s="),
        ("hang_s=-1", "holds 'hang_s=-1'; write a positive number after hang_s="),
    ],
)
def test_bounds_that_cannot_be_are_refused(monkeypatch, given, words):
    monkeypatch.setenv("PITHWOOD_BOUNDS", given)
    with pytest.raises(ValueError, match=words):
        Bounds.from_environment()
