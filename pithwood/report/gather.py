"""What a report says of each run: the facts, its blocks' choices, its samples of text, its spikes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pithwood.config import to_dict
from pithwood.facts.compare import compare_runs, flatten_settings
from pithwood.facts.listing import describe_run
from pithwood.facts.run import run_curves, run_facts, validation_batches
from pithwood.finish import chosen_blocks
from pithwood.observe.events import EVENTS_FILE, read_events
from pithwood.observe.plots import block_shares
from pithwood.observe.summary import SUMMARY_FILE, read_summary
from pithwood.run_folder import Device, open_run, open_run_corpus

MOST_BLOCKS = 64
"""Rows and columns of a block map; more blocks are drawn together."""
MOST_MAPS = 8
"""Layers whose block maps are drawn: the first and the last half of them if there are more."""
MOST_SPIKES = 20
"""Spikes that are told of, the latest ones."""
MOST_TEXT = 20_000
"""Characters of samples that are shown."""


def gather_run(
    reference: str,
    runs_dir: Path,
    *,
    samples: int,
    device: Device = "auto",
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """All that the report says of one run, measured at its newest checkpoint (or RUN@STEP's).

    returns  name, about: see `describe_run`; facts: see `run_facts`; summary: that of a finished run, {} otherwise;
             curves: every curve at full resolution; maps: rows {layer, block_size, blocks, together, shares: rows of
             floats up to the diagonal}; sample: text, "" if the run has left none; spikes: see `spikes_of`;
             settings: dotted path -> value
    raises   ValueError if the run, its checkpoint, log or corpus is missing or damaged
    """
    opened = open_run(reference, runs_dir, device=device)
    progress(f"{opened.folder.name}: measuring at step {opened.step}")
    corpus = open_run_corpus(opened, runs_dir, progress)
    facts = run_facts(opened, corpus, samples)
    sample = opened.folder / "sample.txt"
    finished = (opened.folder / SUMMARY_FILE).is_file()
    batch = next(iter(validation_batches(opened, corpus, 1)))
    return {
        "name": opened.folder.name,
        "about": describe_run(opened.folder),
        "facts": facts,
        "summary": read_summary(opened.folder) if finished else {},
        "gzip_bits_per_byte": corpus.gzip_bits_per_byte,
        "curves": run_curves(opened),
        "maps": _block_maps(chosen_blocks(opened.model, batch, opened.dtype)),
        "sample": sample.read_text(encoding="utf-8")[:MOST_TEXT] if sample.is_file() else "",
        "spikes": spikes_of([e for e in read_events(opened.folder / EVENTS_FILE) if e["step"] <= opened.step]),
        "settings": flatten_settings(to_dict(opened.run)),
    }


def gather_comparison(folders: Sequence[Path]) -> dict[str, Any] | None:
    """What `compare_runs` says, without the curves; None for a single run."""
    if len(folders) < 2:
        return None
    return {name: value for name, value in compare_runs(folders).items() if name != "curves"}


def spikes_of(events: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The latest spikes in a log, oldest first.

    returns  rows {step, reason, value, usual (NaN if unknown), steps: rows {step, documents, gradient_norms,
             activation_rms}} where steps are those around the spike that the log tells of
    """
    told = {event["step"]: event for event in events if event["kind"] == "spike_step"}
    rows = []
    for event in [event for event in events if event["kind"] == "spike"][-MOST_SPIKES:]:
        steps = [told[step] for step in range(event["first_step"], event["last_step"] + 1) if step in told]
        rows.append(
            {
                "step": event["step"],
                "reason": event["reason"],
                "value": event["value"],
                "usual": event.get("usual", math.nan),
                "steps": [
                    {
                        "step": row["step"],
                        "documents": [
                            str(name) for batch in row["batches"] for sample in batch for name in sample["documents"]
                        ],
                        "gradient_norms": row.get("gradient_norms", {}),
                        "activation_rms": row.get("activation_rms", {}),
                    }
                    for row in steps
                ],
            }
        )
    return rows


def _block_maps(chosen: Mapping[str, tuple[torch.Tensor, int]]) -> list[dict[str, Any]]:
    layers = list(chosen)
    if len(layers) > MOST_MAPS:
        layers = [*layers[: MOST_MAPS // 2], *layers[-MOST_MAPS // 2 :]]
    maps = []
    for layer in layers:
        ids_TSk, block_size = chosen[layer]
        share_QB = block_shares(ids_TSk, block_size)
        blocks = len(share_QB)
        together = math.ceil(blocks / MOST_BLOCKS)
        if together > 1:
            share_QB = _draw_together(share_QB, together)
        shares = [row[: number + 1] for number, row in enumerate(share_QB.tolist())]
        maps.append(
            {"layer": layer, "block_size": block_size, "blocks": blocks, "together": together, "shares": shares}
        )
    return maps


def _draw_together(share_QB: torch.Tensor, factor: int) -> torch.Tensor:
    """Mean over `factor` query blocks of the largest share among `factor` key blocks: single stripes stay visible."""
    missing = -len(share_QB) % factor
    count = (len(share_QB) + missing) // factor
    padded = torch.nn.functional.pad(share_QB, (0, missing, 0, missing), value=math.nan)
    largest = padded.view(-1, count, factor).nan_to_num(nan=0.0).amax(dim=2)
    rows = largest.view(count, factor, count)
    known = (~padded[:, :1].isnan()).view(count, factor, 1)
    return (rows * known).sum(dim=1) / known.sum(dim=1)
