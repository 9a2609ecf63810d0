"""The cheapest settings with which a run fits into a device's memory, by estimate."""

from __future__ import annotations

from collections.abc import Iterator

from pithwood.config import apply_overrides
from pithwood.estimate.devices import Device
from pithwood.estimate.memory import estimate_memory
from pithwood.run import Run

MARGIN = 0.93
"""Share of the device's memory that an estimate may fill: the rest is for what it misses and for gaps."""
CHUNKS = (65_536, 32_768)
"""Tokens whose expert rows exist at a time, tried in this order."""


def fitting_overrides(run: Run, device: Device) -> tuple[list[str], bool]:
    """(overrides, whether the run fits into one device with them): the cheapest of those tried that fit, [] if nothing
    is needed, else those that take least.

    Tried in order: norms computed again, then one block after another, then block inputs in host memory, then experts
    in chunks, then optimizer state in host memory.
    """
    least: tuple[float, list[str]] = float("inf"), []
    for words in _candidates(run):
        need = sum(estimate_memory(apply_overrides(run, words), device).values())
        if need <= MARGIN * device.memory_bytes:
            return words, True
        least = min(least, (need, words))
    return least[1], False


def _candidates(run: Run) -> Iterator[list[str]]:
    layers = run.model.num_layers
    yield []
    yield ["recompute=selective"]
    for blocks in range(1, layers):
        yield [f"recompute={','.join(['block'] * blocks + ['selective'] * (layers - blocks))}"]
    yield ["recompute=block"]
    whole = ["recompute=block", "offload_activations=true"]
    yield whole
    for tokens in CHUNKS:
        if tokens < run.samples_per_micro_batch * run.seq_len:
            yield ["recompute=block", f"model.moe.chunk_tokens={tokens}"]
            yield [*whole, f"model.moe.chunk_tokens={tokens}"]
    # slow for short steps, nothing beside those of very long sequences
    chunks = [] if CHUNKS[-1] >= run.samples_per_micro_batch * run.seq_len else [f"model.moe.chunk_tokens={CHUNKS[-1]}"]
    yield [*whole, *chunks, "optim.offload_state=true"]
