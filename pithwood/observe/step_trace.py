"""What ran in profiled steps, by kernel and by part of the step, read from a trace of torch's profiler.

On a GPU the work is kernels and copies; each leads to its launch on the host by the correlation id, and the launch to
the host's stack of that moment: Python frames, ops, autograd nodes. A backward op without frames of ours leads on to
the forward op that made its node, by the sequence number. On a CPU the work is the time that ops spend in themselves.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pithwood.observe.step_parts import (
    EXCHANGE,
    IDLE,
    PARTS,
    Evidence,
    decide,
    is_exchange,
    of_frame,
    of_op,
)
from pithwood.observe.step_timeline import Span, merged

STEP = "pithwood.step"
"""The annotation (`torch.profiler.record_function`) around each profiled step; its span is the step's."""

_NODE = "autograd::engine::evaluate_function: "
_HOST = ("cpu_op", "python_function", "user_annotation", "cuda_runtime", "cuda_driver")
_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass(frozen=True)
class KernelTime:
    """All runs of one kernel (or CPU op) in one part of the step."""

    part: str
    name: str
    count: float
    """Runs per step."""
    mean_us: float
    ms: float
    """Per step."""


@dataclass(frozen=True)
class StepProfile:
    """Where the time of a step went; times are means over the profiled steps."""

    kernels: list[KernelTime]
    """Longest first."""
    parts: dict[str, float]
    """ms per step by part, `exchange` only where there was any, `idle` last; they add up to `total_ms`."""
    total_ms: float
    """On a GPU an unprofiled step, but where the kernels of the profiled ones took longer than it, their sum: then
    `idle` is 0 and exchanges may hold waits that no unprofiled step has. On a CPU a profiled step."""
    profiled_ms: float
    """A step under the profiler."""
    unattributed_share: float
    """Of the busy time, what nothing told the part of; it is counted under `other`."""
    overlapped_ms: float
    """Time of kernels and copies that ran beside others; a moment belongs to the kernel that began first, to an
    exchange only if no other kernel ran."""
    steps: int
    communication: Communication | None
    """Of this process's GPU; None if it exchanged nothing."""
    spans: list[Span]
    """Every kernel of the last step in the order of its start, without copies; empty on a CPU."""
    last_ms: float
    """Length of the last step under the profiler."""


@dataclass(frozen=True)
class Communication:
    """Exchanges of one GPU with others, means over the profiled steps. A kernel of NCCL also waits for slower partners
    and for data that is not there yet: its time is not that of the transfer alone."""

    ms: float
    """Per step, while at least one kernel of NCCL runs."""
    hidden_ms: float
    """Of it, while at least one other kernel of the same GPU runs."""

    @property
    def hidden_share(self) -> float:
        return self.hidden_ms / self.ms if self.ms else 0.0


@dataclass
class _Entry:
    """One interval on a host thread."""

    kind: str
    name: str
    start: float
    end: float
    args: dict[str, Any]
    parent: _Entry | None
    inside: float = 0.0
    """Time of the ops directly within."""
    before: _Entry | None = None
    """Of a gradient's accumulation: the autograd node that ran before it on this thread."""


@dataclass
class _Host:
    """The host's side of a trace."""

    ops: list[_Entry] = field(default_factory=list)
    launches: dict[int, _Entry] = field(default_factory=dict)
    """By correlation id."""
    steps: list[_Entry] = field(default_factory=list)
    forward: dict[Any, dict[int, _Entry]] = field(default_factory=lambda: defaultdict(dict))
    """Thread -> sequence number -> the last op that had it: the one that made the autograd node."""
    main_id: int | None = None
    """What the trace calls the thread of the steps where it says which thread a node's forward ran on."""


def read_trace(trace: dict[str, Any], step_ms: float | None = None, gpu: bool = False) -> StepProfile:
    """The profile of the steps that a chrome trace holds.

    trace    content of the file that torch.profiler exported, with_stack=True, the steps annotated with STEP
    step_ms  how long a step takes without the profiler, whose own cost lies in the gaps between kernels: on a GPU the
             idle time is what remains of it, if anything does; None, or a CPU, takes the profiled steps' time
    gpu      whether the steps ran on a GPU: then a trace without kernels is refused
    raises   ValueError if the trace holds no annotated step, or no kernel where there must be some
    """
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    host = _read_host([event for event in events if event.get("cat") in _HOST])
    if not host.steps:
        raise ValueError(f"the trace has no {STEP!r} annotation; nothing was profiled")
    parts_of = _Attribution(host)
    device = [event for event in events if event.get("cat") in _DEVICE]
    if gpu and not device:
        raise ValueError("the trace holds no kernel: the profiler (CUPTI) cannot see this GPU; check its permissions")
    work = _device_work(device, host, parts_of) if device else _host_work(host, parts_of)
    count = len(host.steps)
    profiled = sum(step.end - step.start for step in host.steps) / count / 1e3
    spent: dict[tuple[str, str], list[float]] = defaultdict(list)
    parts = dict.fromkeys(PARTS, 0.0)
    unknown = overlapped = 0.0
    exchanged: list[tuple[float, float]] = []
    spans: list[Span] = []
    last = max(host.steps, key=lambda step: step.start)
    for item in work:
        spent[item.part, item.name].append(item.whole_us)
        parts[item.part] = parts.get(item.part, 0.0) + item.own_us / 1e3 / count
        unknown += 0.0 if item.told else item.own_us / 1e3 / count
        overlapped += (item.whole_us - item.own_us) / 1e3 / count
        if item.part == EXCHANGE:
            exchanged.append((item.start_us, item.start_us + item.whole_us))
        if item.is_kernel and item.start_us >= last.start:
            begin = (item.start_us - last.start) / 1e3
            spans.append((item.part, begin, begin + item.whole_us / 1e3))
    communication = None
    if exchanged:
        total = sum(end - start for start, end in merged(exchanged)) / 1e3 / count
        communication = Communication(total, total - parts[EXCHANGE])
    busy = sum(parts.values())
    whole = max(profiled if step_ms is None or not device else step_ms, busy)
    parts[IDLE] = whole - busy
    kernels = [
        KernelTime(part, name, len(times) / count, sum(times) / len(times), sum(times) / 1e3 / count)
        for (part, name), times in spent.items()
    ]
    return StepProfile(
        kernels=sorted(kernels, key=lambda kernel: -kernel.ms),
        parts=parts,
        total_ms=whole,
        profiled_ms=profiled,
        unattributed_share=unknown / busy if busy else 0.0,
        overlapped_ms=overlapped,
        steps=count,
        communication=communication,
        spans=sorted(spans, key=lambda span: span[1]),
        last_ms=(last.end - last.start) / 1e3,
    )


def _read_host(events: list[dict[str, Any]]) -> _Host:
    host = _Host()
    threads: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        threads[event["tid"]].append(event)
    first_node: _Entry | None = None
    for thread, own in threads.items():
        own.sort(key=lambda event: (event["ts"], -event.get("dur", 0.0)))
        top: _Entry | None = None
        node: _Entry | None = None
        for event in own:
            start, args = float(event["ts"]), event.get("args", {})
            while top is not None and top.end <= start:
                top = top.parent
            entry = _Entry(event["cat"], event["name"], start, start + float(event.get("dur", 0.0)), args, top)
            if entry.kind == "cpu_op":
                host.ops.append(entry)
                _note_op(entry, host.forward[thread])
                if entry.name.startswith(_NODE):
                    entry.before, node = node, entry
                    if first_node is None or entry.start < first_node.start:
                        first_node = entry
                above = _op_above(entry)
                if above is not None:
                    above.inside += entry.end - entry.start
            elif entry.kind.startswith("cuda") and "correlation" in args:
                host.launches[args["correlation"]] = entry
            elif entry.name == STEP:
                host.steps.append(entry)
            top = entry
    # the first node of a backward pass is that of the loss, which the steps' own thread computed
    host.main_id = None if first_node is None else first_node.args.get("Fwd thread id")
    return host


def _note_op(entry: _Entry, forward: dict[int, _Entry]) -> None:
    number = entry.args.get("Sequence number", -1)
    if number >= 0 and not entry.args.get("Fwd thread id"):
        forward[number] = entry


def _op_above(entry: _Entry) -> _Entry | None:
    above = entry.parent
    while above is not None and above.kind != "cpu_op":
        above = above.parent
    return above


class _Attribution:
    """The part of the step that an entry of the host belongs to."""

    def __init__(self, host: _Host) -> None:
        self._host = host
        self._main = next((thread for thread, ops in host.forward.items() if any(map(_annotated, ops.values()))), None)
        self._known: dict[int, Evidence | None] = {}

    def of(self, entry: _Entry | None, kernel: str = "") -> tuple[str, bool]:
        """(part, whether something told it)."""
        found = decide(self._evidence(entry, 0), kernel)
        return ("other", False) if found is None else (found.part, True)

    def _evidence(self, entry: _Entry | None, depth: int) -> Iterator[Evidence | None]:
        while entry is not None:
            if entry.kind == "python_function":
                yield of_frame(entry.name)
            elif entry.kind == "cpu_op" and entry.name.startswith(_NODE):
                yield self._of_node(entry, depth)
            elif entry.kind == "cpu_op":
                yield of_op(entry.name)
            entry = entry.parent

    def _of_node(self, node: _Entry, depth: int) -> Evidence | None:
        """Where the forward op of an autograd node belongs; an accumulation goes with the node that fed it."""
        if depth > 8:
            return None
        if node.name.endswith("AccumulateGrad"):
            fed = node.before
            while fed is not None and fed.name.endswith("AccumulateGrad"):
                fed = fed.before
            return None if fed is None else self._cached(fed, depth)
        number, thread = node.args.get("Sequence number", -1), node.args.get("Fwd thread id")
        places = self._host.forward
        if thread == self._host.main_id and self._main is not None:
            forward = places[self._main].get(number)
        else:  # recomputed on a backward thread
            others = (ops[number] for name, ops in places.items() if name != self._main and number in ops)
            forward = next(others, None)
        return None if forward is None else self._cached(forward, depth)

    def _cached(self, entry: _Entry, depth: int) -> Evidence | None:
        if id(entry) not in self._known:
            self._known[id(entry)] = decide(self._evidence(entry, depth + 1))
        return self._known[id(entry)]


def _annotated(entry: _Entry | None) -> bool:
    while entry is not None:
        if entry.name == STEP:
            return True
        entry = entry.parent
    return False


@dataclass(frozen=True)
class Work:
    """A kernel or copy of a GPU, or an op of a CPU, in us."""

    part: str
    told: bool
    """Whether something told the part."""
    name: str
    own_us: float
    """Counted to the part."""
    whole_us: float
    """That it ran."""
    start_us: float
    is_kernel: bool = False
    """Of a GPU, not a copy."""


def _host_work(host: _Host, parts_of: _Attribution) -> Iterator[Work]:
    """The time that each op of the steps spent in itself."""
    for op in host.ops:
        own = max(op.end - op.start - op.inside, 0.0)
        if own > 0 and not op.name.startswith(_NODE) and _annotated(op):
            part, told = parts_of.of(op)
            yield Work(part, told, op.name, own, own, op.start)


def _device_work(events: list[dict[str, Any]], host: _Host, parts_of: _Attribution) -> Iterator[Work]:
    """Every kernel and copy of the steps, and which of its moments it does not share with one that began before."""
    # kernels before exchanges before copies: an exchange beside a kernel costs nothing, nor a copy beside either
    events = sorted(
        events, key=lambda event: (event["cat"] != "kernel", is_exchange(event["name"]), float(event["ts"]))
    )
    spans = sorted((step.start, step.end) for step in host.steps)
    taken = _Taken()
    for event in events:
        start, length = float(event["ts"]), float(event.get("dur", 0.0))
        index = bisect_right(spans, (start, float("inf"))) - 1
        if index < 0 or start >= spans[index][1]:
            continue
        name, kernel = event["name"], event["cat"] == "kernel"
        if kernel and is_exchange(name):
            part, told = EXCHANGE, True
        else:
            part, told = parts_of.of(host.launches.get(event.get("args", {}).get("correlation")), name)
        yield Work(part, told, name, taken.add(start, start + length), length, start, kernel)


class _Taken:
    """Moments that are spoken for, as disjoint intervals in order."""

    def __init__(self) -> None:
        self._starts: list[float] = []
        self._ends: list[float] = []

    def add(self, start: float, end: float) -> float:
        """Take an interval; returns how much of it was free."""
        first, last = bisect_right(self._ends, start), bisect_left(self._starts, end)
        there = list(zip(self._starts[first:last], self._ends[first:last], strict=True))
        free = end - start - sum(min(e, end) - max(s, start) for s, e in there)
        if there:
            start, end = min(start, there[0][0]), max(end, there[-1][1])
        self._starts[first:last], self._ends[first:last] = [start], [end]
        return max(free, 0.0)
