"""Where a thread is, told from outside."""

from __future__ import annotations

import threading

import pytest

from pithwood.parallel.stack import place_and_waiting

pytestmark = pytest.mark.quick


def spin(begun: threading.Event, stop: list[bool]) -> None:
    begun.set()
    while not stop:
        pass


def seen(line_table: bytes) -> tuple[str, bool]:
    """What is told of a thread in `spin`, compiled with such a table of lines."""
    begun, stop = threading.Event(), list[bool]()
    target = type(spin)(spin.__code__.replace(co_linetable=line_table), globals())
    thread = threading.Thread(target=target, args=(begun, stop))
    thread.start()
    begun.wait()
    try:
        # until it has left the event's own frames
        for _ in range(10_000):
            place, waits = place_and_waiting(thread.ident)
            if "spin" in place and not waits:
                return place, waits
    finally:
        stop.append(True)
        thread.join()
    raise AssertionError(place)


def test_a_thread_is_told_by_its_line():
    place, waits = seen(spin.__code__.co_linetable)
    number = int(place.partition(":")[2].partition(" ")[0])
    assert place.startswith("parallel/test_stack.py:")
    assert number - spin.__code__.co_firstlineno in (2, 3)
    assert not waits


def test_a_frame_without_a_line_is_told_all_the_same():
    # an interpreter stands in such frames now and then, and the thread that looks must outlive it
    assert seen(b"") == ("parallel/test_stack.py:0 (spin)", False)
