"""The cheapest settings with which a run fits into a device's memory, by estimate."""

from __future__ import annotations

import functools

from pithwood.config import apply_overrides
from pithwood.estimate.devices import Device
from pithwood.estimate.efficiency import efficiency
from pithwood.estimate.memory import estimate_memory
from pithwood.estimate.work import floors_ms, repeated, step_work
from pithwood.run import Run

MARGIN = 0.93
"""Share of the device's memory that an estimate may fill: the rest is for what it misses and for gaps."""
CHUNKS = (65_536, 32_768)
"""Tokens whose expert rows exist at a time; the larger ones come first."""

Words = tuple[str, ...]
"""Overrides."""


def fitting_overrides(run: Run, device: Device) -> tuple[list[str], bool]:
    """(overrides, whether the run fits into one device with them): the cheapest of those tried that fit, [] if nothing
    is needed, else those that take least.

    Tried are norms computed again, or one block after another too, each without chunks of experts and with them, and
    block inputs in host memory, by the time that passes take with what is computed twice; where that is the same, what
    changes less comes first. The last resort is optimizer state in host memory.
    """

    @functools.cache
    def need(words: Words) -> float:
        return sum(estimate_memory(apply_overrides(run, words), device).values())

    room = MARGIN * device.memory_bytes
    if need(()) <= room:
        return [], True
    # with the same chunks whatever keeps more than the inputs of blocks takes more
    families = _families(run)
    kept = [family for family in families if need(family[-1]) <= room]
    for words in _cheap_first(run, device, [words for family in kept for words in family]):
        if need(words) <= room:
            return list(words), True
    # slow for short steps, nothing beside those of very long sequences
    last = (*families[-1][-1], "optim.offload_state=true")
    least = min((*(family[-1] for family in families), last), key=need)
    return list(least), need(least) <= room


def _families(run: Run) -> list[list[Words]]:
    """What may be tried, for each number of tokens of a chunk; in each the last takes least memory."""
    layers = run.model.num_layers
    ways: list[Words] = [(), ("recompute=selective",)]
    for blocks in range(1, layers):
        ways.append((f"recompute={','.join(['block'] * blocks + ['selective'] * (layers - blocks))}",))
    ways += [("recompute=block",), ("recompute=block", "offload_activations=true")]
    tokens = run.samples_per_micro_batch * run.seq_len
    chunks: list[Words] = [(), *((f"model.moe.chunk_tokens={size}",) for size in CHUNKS if size < tokens)]
    return [[(*way, *chunk) for way in ways] for chunk in chunks]


def _cheap_first(run: Run, device: Device, tried: list[Words]) -> list[Words]:
    """By the time of passes, at the efficiencies that hold where nothing was measured: what is chosen does not change
    with results files.
    """
    floors, known = floors_ms(step_work(run), device.peaks), efficiency([], run).parts

    def passes_ms(words: Words) -> float:
        again = repeated(apply_overrides(run, words))
        return sum(floors[part] * again.get(part, 1.0) / share for part, share in known.items())

    return sorted(tried, key=passes_ms)
