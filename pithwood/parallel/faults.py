"""What happens when something goes wrong in one of many processes: every process ends, soon, and one line says why.

Every process gives a sign of life each second to a store that rank 0 holds, with the phase that the trainer named, and
looks whether a verdict is there. Verdicts come from

    a process that raises                     the first; errors of exchanges that broke off wait for the cause
    the neighbour of a process on its host    which sees it die (kill -9, out of memory) within a beat
    rank 0                                    a process that is silent, or the one that all others wait for (a hang)
    whoever loses the store                   rank 0 is dead or frozen; the last rank holds a second store for this case

The first verdict counts; its author prints it. The others leave quietly with exit code 4, if need be by force: a thread
ends the process after a grace period, and should it not get to run itself (the interpreter is held by a call that does
not return), a timer outside the interpreter does, with exit code 1. Nothing here waits for the device or calls a
collective after the start.
"""

from __future__ import annotations

import datetime
import faulthandler
import json
import math
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any, NoReturn

import torch.distributed as dist

from pithwood.errors import explain_failure
from pithwood.parallel.mesh import Mesh
from pithwood.parallel.places import ProcessPlace, connect, find_neighbour, open_store, own_place
from pithwood.parallel.stack import place_and_waiting
from pithwood.parallel.verdicts import (
    Beat,
    Bounds,
    Sign,
    Stragglers,
    awaited,
    hang_line,
    hanging,
    is_echo,
    is_sign,
    phase_limit,
)

OTHER_FAILED = 4
"""Exit code of a process that ends because another one failed."""
VERDICT = "verdict"


@dataclass(frozen=True)
class Straggler:
    """A process that needs longer for the work of a step than the others."""

    rank: int
    host: str
    worked_s: float
    """Of a step, without waiting for others."""
    median_s: float
    """The same of the median process."""


class Watch:
    """Context around all work of a process of a mesh; in a mesh of one process it does nothing.

    with Watch(mesh) as watch:
        watch.phase("reading the corpus", limit_s=math.inf)
        for step in steps:
            watch.step(step)
            watch.phase("forward")
            ...

    Every process enters it together. An exception that leaves it becomes SystemExit, after the line that names rank and
    cause was printed by the process where it came first: 2 bad input, 3 memory or disk, 130 interrupted, 1 others, 4 in
    all other processes. `step` and `phase` raise SystemExit once the run has failed elsewhere.
    """

    def __init__(self, mesh: Mesh, *, bounds: Bounds | None = None, tell: Callable[[str], None] | None = None) -> None:
        """tell: prints a line; None prints it on stderr"""
        self.mesh, self.bounds = mesh, bounds or Bounds()
        self._tell = tell or (lambda line: print(line, file=sys.stderr, flush=True))
        self._phase: tuple[str, float, float | None] = ("start", time.monotonic(), None)
        self._phases, self._step, self._beats = 0, -1, 0
        self._step_began, self._step_times = 0.0, deque[float](maxlen=64)
        self._ended, self._left = threading.Event(), threading.Event()
        self._done = self._lost = self._leaving = self._listens = self._anew = False
        self._handler: Any = None
        """What SIGTERM did before."""
        self._asked = math.inf
        """When the store was asked something that it has not answered."""
        self._verdict: dict[str, Any] | None = None
        self._found: list[Straggler] = []
        self._samples, self._waited, self._window, self._worked_s = 0, 0, 0, 0.0
        self._window_began, self._window_steps, self._steps_done = time.monotonic(), 0, 0
        self._waits, self._place, self._excused_s = False, "", 0.0

    @property
    def active(self) -> bool:
        """Whether there is anybody to watch."""
        return self.mesh.world.size > 1

    def phase(self, name: str, limit_s: float | None = None) -> None:
        """Say what the process begins to do, in a word or two.

        limit_s  how long it may take; None: `Bounds.hang_s` or `hang_steps`, and `startup_s` until a step is done
        """
        if self._verdict is not None:
            raise SystemExit(OTHER_FAILED)
        now = time.monotonic()
        self._excused_s += self._excused_now(now)
        self._phase = name, now, limit_s
        self._phases += 1

    def step(self, number: int) -> None:
        """Say that an optimizer step begins."""
        now = time.monotonic()
        if self._step >= 0:
            if not self._anew:  # the step before is of what was computed then
                self._step_times.append(now - self._step_began)
            self._steps_done += 1
        self._anew = False
        self._step, self._step_began = number, now
        self.phase("begins")

    def begin_anew(self) -> None:
        """Say that the next step may take as long as a first one: what it computes has changed."""
        self._step_times.clear()
        self._anew = True

    def stragglers(self) -> list[Straggler]:
        """Those found since the last call, on rank 0."""
        found, self._found = self._found, []
        return found

    def __enter__(self) -> Watch:
        if not self.active:
            return self
        if threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGTERM, self._terminated)
        rank, size = self.mesh.rank, self.mesh.world.size
        # rank 0 holds the store of all, the last rank the one that remains if rank 0 goes
        self._held: dist.TCPStore | None = None
        if rank in (0, size - 1):
            self._held = open_store(_patience(self.bounds))
            self._held.set(VERDICT, "")
        own = own_place(rank, self._held.port if self._held else 0)
        self._places: list[ProcessPlace] = self.mesh.world.all_gather_objects(own)
        self._store = self._connect(0)
        self._deputy = self._held if rank == size - 1 else self._connect(size - 1) if rank == 0 else None
        self._trainer = threading.get_ident()
        self._neighbour = find_neighbour(self._places, rank)
        self._heard = [time.monotonic()] * size
        self._values: list[bytes] = [b""] * size
        self._keys = [f"beat/{other}" for other in range(size)]
        self._judged, self._compared, self._late_since = time.monotonic(), time.monotonic(), math.inf
        self._long: tuple[int | None, float] = None, -math.inf
        """Who was last at work in a phase that may take long while others waited, and when."""
        self._stragglers = Stragglers(self.bounds)
        self._nothing = open(os.devnull, "w")
        self._give_sign("alive")
        self._store.wait(self._keys, datetime.timedelta(seconds=self.bounds.startup_s))
        self._phase = "start", time.monotonic(), None
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._look, self._talk)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.active:
            return
        self._leaving = True
        if error is None or (isinstance(error, SystemExit) and error.code in (0, None)):
            self._leave_in_order()
        else:
            self._fail(error)

    def _terminated(self, number: int, frame: FrameType | None) -> None:
        """SIGTERM where nobody else handles it. When a process has died the launcher sends it to all others: they stay
        until it is told why.
        """
        if not self._leaving and self._verdict is None:
            raise SystemExit(128 + number)

    def _leave_in_order(self) -> None:
        """Stop the thread; rank 0 stays for as long as others are at work, since they need its store."""
        if self._verdict is None:
            self._done = True
            self._give_sign("done")
            while self.mesh.is_first and self._verdict is None:
                values = self._store.multi_get(self._keys)
                if all(is_sign(value, "done") for value in values):
                    break
                time.sleep(min(self.bounds.beat_s, 0.2))
        if self._verdict is not None:
            self._quit(OTHER_FAILED)
        self._stop()

    def _stop(self) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._nothing.close()
        if self._neighbour is not None:
            os.close(self._neighbour[1])
        if self._handler is not None:
            signal.signal(signal.SIGTERM, self._handler)

    def _fail(self, error: BaseException) -> NoReturn:
        """Report an error, unless another one was first; leave."""
        if self._verdict is None and is_echo(error):
            # what broke the exchange is known soon: a neighbour sees a dead process, rank 0 a silent one
            self._listens = True
            self._phase = self._phase[0], time.monotonic(), math.inf
            end = time.monotonic() + self.bounds.silent_s + 3 * self.bounds.beat_s
            while self._verdict is None and time.monotonic() < end:
                time.sleep(self.bounds.beat_s / 10)
        if self._verdict is None:
            words, code, expected = _words(error)
            if self._claim(f"failed in {self._where()}: {words}", self.mesh.rank, quiet=True):
                if not expected:
                    traceback.print_exception(error)
                self._print(self._verdict)
                self._quit(code)
        self._quit(OTHER_FAILED)

    def _quit(self, code: int) -> NoReturn:
        """Leave after a failure."""
        self._linger()
        self._ended.set()
        for thread in self._threads:
            thread.join(timeout=1.0)
        if any(thread.is_alive() for thread in self._threads):
            # kept by a store that does not answer; an interpreter that ends under such a thread aborts
            _exit_now(code)
        raise SystemExit(code) from None

    def _linger(self) -> None:
        """Keep the stores of this process until the others have had time to read the verdict."""
        self._left.set()
        if self._held is not None:
            time.sleep(2.5 * self.bounds.beat_s)

    def _look(self) -> None:
        """The thread that looks at this process; it asks no store, so that nothing keeps it."""
        next_timer = 0.0
        while not self._ended.wait(self.bounds.sample_s):
            now = time.monotonic()
            if now >= next_timer:
                next_timer = now + self.bounds.beat_s
                self._arm_timer()
            self._sample()
            if now - self._asked > _patience(self.bounds):
                self._lost_store()
            if self._verdict is not None:
                self._end()

    def _talk(self) -> None:
        """The thread that gives signs of life and looks at those of others."""
        while not self._ended.wait(self.bounds.beat_s):
            self._asked = time.monotonic()
            try:
                self._beat()
            except (dist.DistError, RuntimeError, OSError):
                self._lost_store()
            self._asked = math.inf
            if self._verdict is not None:
                return

    def _beat(self) -> None:
        alive: Sign = "alive" if self._phase[2] is None or self._listens else "long"
        self._give_sign("done" if self._done else "late" if self._age() > self._limit() else alive)
        found = self._store.get(VERDICT)
        if found:
            self._verdict = json.loads(found)
            return
        self._look_at_neighbour()
        if self.mesh.is_first:
            self._judge()
        elif self._deputy is not None:
            self._judge_first()

    def _arm_timer(self) -> None:
        """Let the process end should nobody come here again, whatever keeps them."""
        faulthandler.dump_traceback_later(self.bounds.silent_s + self.bounds.grace_s, exit=True, file=self._nothing)

    def _give_sign(self, sign: Sign) -> None:
        self._close_window()
        self._beats += 1
        beat = Beat(self._beats, sign, self._step, self._phases, self._phase[0], self._age(), self._waits, self._place,
                    self._window, self._worked_s)  # fmt: skip
        text = beat.to_text()
        self._store.set(f"beat/{self.mesh.rank}", text)
        if self.mesh.is_first and self._deputy is not None:
            try:
                self._deputy.set("beat/0", text)
            except (dist.DistError, RuntimeError):
                self._deputy = None  # its process left, or died: others see that

    def _age(self) -> float:
        return time.monotonic() - self._phase[1]

    def _limit(self) -> float:
        return phase_limit(self.bounds, self._step_times, self._phase[2])

    def _where(self) -> str:
        return self._phase[0] if self._step < 0 else f"step {self._step} {self._phase[0]}"

    def _sample(self) -> None:
        self._place, self._waits = place_and_waiting(self._trainer)
        if self._phase[2] is None:
            self._samples += 1
            self._waited += self._waits

    def _close_window(self) -> None:
        """Work per step over the time since the last window, once that is long enough and holds a step."""
        now, steps = time.monotonic(), self._steps_done - self._window_steps
        if now - self._window_began < self.bounds.window_s or not steps or not self._samples:
            return
        spent = now - self._window_began - self._excused_s - self._excused_now(now)
        self._worked_s = max(spent, 0.0) / steps * (1 - self._waited / self._samples)
        self._window += 1
        self._window_began, self._window_steps, self._excused_s = now, self._steps_done, 0.0
        self._samples = self._waited = 0

    def _excused_now(self, now: float) -> float:
        """Seconds of this window in the present phase, if it is one of what a process does alone (it saves, it
        validates): that is not what a step takes it.
        """
        _, began, limit = self._phase
        return 0.0 if limit is None else now - max(began, self._window_began)

    def _look_at_neighbour(self) -> None:
        """Report the next process on this host if it has died without a word."""
        if self._neighbour is None:
            return
        rank, handle = self._neighbour
        if not select.select([handle], [], [], 0)[0]:
            return
        os.close(handle)
        self._neighbour = None
        last = self._store.get(f"beat/{rank}")
        if not is_sign(last, "done"):
            self._claim(f"died without a word (killed, or out of memory), {_last(last)}", rank)

    def _judge(self) -> None:
        """What rank 0 sees in the signs of all: silence, hangs, stragglers."""
        values, now = self._store.multi_get(self._keys), time.monotonic()
        # a judge that did not get to run for a while has not heard anybody
        rested = now - self._judged > 3 * self.bounds.beat_s
        self._judged = now
        for rank, value in enumerate(values):
            if value != self._values[rank] or rested:
                self._values[rank], self._heard[rank] = value, now
            elif now - self._heard[rank] > self.bounds.silent_s and not is_sign(value, "done"):
                self._claim(f"has not answered for {now - self._heard[rank]:.0f} s, {_last(value)}", rank)
                return
        if any(is_sign(value, "long") for value in values):
            beats = {rank: Beat.from_bytes(value) for rank, value in enumerate(values)}
            first = awaited(beats)
            if first is not None and beats[first].sign == "long" and not beats[first].waits:
                self._long = first, now
        late = any(is_sign(value, "late") for value in values)
        self._late_since = min(self._late_since, now) if late else math.inf
        # all that wait are late about then: two beats more, and their signs say so
        if now - self._late_since > 2 * self.bounds.beat_s:
            self._judge_late({rank: Beat.from_bytes(value) for rank, value in enumerate(values)}, now)
        elif now - self._compared > self.bounds.window_s / 2:
            self._compared = now
            self._compare({rank: Beat.from_bytes(value) for rank, value in enumerate(values)})

    def _judge_late(self, beats: dict[int, Beat], now: float) -> None:
        limit = phase_limit(self.bounds, self._step_times, None)
        culprit = hanging(beats, limit)
        rank, until = self._long
        # who waited for something long goes on in a phase that it is late in: it has the time of one from then on
        if culprit is not None and (culprit == rank or now - until > limit):
            self._claim(hang_line(culprit, beats), culprit)

    def _compare(self, beats: dict[int, Beat]) -> None:
        for rank, (worked, median) in self._stragglers.look(beats).items():
            self._found.append(Straggler(rank, self._places[rank].host, worked, median))
            self._tell(
                f"WARNING: {self._name(rank)} is slow: {worked:.3g} s of work in a step, {worked / median - 1:.0%} "
                f"over the median process ({median:.3g} s); all others wait for it"
            )

    def _judge_first(self) -> None:
        """What the last rank sees in the signs of rank 0, whose store may answer when it does not."""
        value, now = self._store.get("beat/0"), time.monotonic()
        rested = now - self._judged > 3 * self.bounds.beat_s
        self._judged = now
        if value != self._values[0] or rested:
            self._values[0], self._heard[0] = value, now
        elif now - self._heard[0] > self.bounds.silent_s and not is_sign(value, "done"):
            self._claim(f"has not answered for {now - self._heard[0]:.0f} s, {_last(value)}", 0)

    def _claim(self, what: str, rank: int, quiet: bool = False) -> bool:
        """Make this the verdict if there is none yet, and print it; returns whether it is."""
        mine, found = {"rank": rank, "what": what, "by": self.mesh.rank}, None
        if not self._lost:
            with suppress(dist.DistError, RuntimeError):
                found = json.loads(self._store.compare_set(VERDICT, "", json.dumps(mine)))
        self._verdict = found = found or self._claim_at_deputy(mine)
        if found != mine:
            return False
        if not quiet:
            self._print(mine)
        return True

    def _claim_at_deputy(self, mine: dict[str, Any]) -> dict[str, Any]:
        """The verdict of those that have lost rank 0's store; if the second one is gone too, everybody speaks."""
        with suppress(dist.DistError, RuntimeError):
            if self._deputy is None:
                self._deputy = self._connect(self.mesh.world.size - 1)
            found = json.loads(self._deputy.compare_set(VERDICT, "", json.dumps(mine)))
            assert isinstance(found, dict)
            return found
        return mine

    def _lost_store(self) -> None:
        """Rank 0 does not answer: it is dead, or stopped."""
        if self._ended.is_set() or self._verdict is not None:
            return
        # one that is frozen keeps whoever asks it, without end
        self._lost, where = True, ""
        with suppress(dist.DistError, RuntimeError):
            if self._deputy is None:
                self._deputy = self._connect(self.mesh.world.size - 1)
            where = f", {_last(self._deputy.get('beat/0'))}"
        self._claim(f"is gone or stopped: it does not answer{where}", 0)

    def _print(self, verdict: dict[str, Any] | None) -> None:
        assert verdict is not None
        self._tell(f"pithwood: error: {self._name(verdict['rank'])} {verdict['what']}")

    def _name(self, rank: int) -> str:
        place = self._places[rank]
        return f"rank {rank} of {self.mesh.world.size} ({place.host}, process {place.pid})"

    def _end(self) -> None:
        """Give the training thread time to leave by itself, then end the process."""
        wait = self.bounds.grace_s + (2.5 * self.bounds.beat_s if self._held is not None else 0.0)
        faulthandler.dump_traceback_later(2 * wait, exit=True, file=self._nothing)
        if not self._left.wait(self.bounds.grace_s):
            self._linger()
            _exit_now(OTHER_FAILED)
        self._ended.set()

    def _connect(self, rank: int) -> dist.TCPStore:
        return connect(self._places[self.mesh.rank], self._places[rank], _patience(self.bounds))


def _exit_now(code: int) -> NoReturn:
    """End the process without what the interpreter does at its end."""
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _patience(bounds: Bounds) -> float:
    """Seconds that a store may take to answer."""
    return 0.75 * bounds.silent_s


def _words(error: BaseException) -> tuple[str, int, bool]:
    """An error in words, its exit code, and whether the words are enough."""
    if isinstance(error, SystemExit):
        return f"left with exit code {error.code}", error.code if isinstance(error.code, int) else 1, True
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130, True
    lines = " ".join(str(error).split())
    if isinstance(error, ValueError):
        return lines, 2, os.environ.get("PITHWOOD_TRACEBACK") != "1"
    told = explain_failure(error) if isinstance(error, Exception) else None
    if told is not None:
        return told[0], told[1], os.environ.get("PITHWOOD_TRACEBACK") != "1"
    return f"{type(error).__name__}: {lines}", 1, False


def _last(value: bytes) -> str:
    return f"last heard of in {Beat.from_bytes(value).where}"
