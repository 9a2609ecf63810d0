"""All that is known of one run: its model, what it costs, what it does on its validation text, what its log says."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from pithwood.data.batches import Batch, sequential_batches
from pithwood.data.corpus import Corpus
from pithwood.facts.anatomy import cost_per_token, parameters_by_part
from pithwood.facts.curves import curves, summarise_curve, thin_curve
from pithwood.facts.routing import measure_routing
from pithwood.observe.events import EVENTS_FILE, read_events
from pithwood.run_folder import OpenRun

CURVE_POINTS = 200
"""Points of each curve among the facts; all of them are in the event log."""


def run_facts(opened: OpenRun, corpus: Corpus, samples: int) -> dict[str, Any]:
    """Everything that `pithwood inspect` tells, measured on the first `samples` samples of the validation split.

    returns  run: recipe, run_dir, step, steps, tokens, device, precision, mixers by layer
             parameters: {parts, total, active}; cost: see `cost_per_token`
             routing: see `measure_routing`, with the samples and seq_len that it was measured on
             curves: name -> {summary: see `summarise_curve`, steps, tokens, values}, thinned to CURVE_POINTS points
    raises   ValueError if the event log is missing or damaged, or samples is below 1
    """
    run, model = opened.run, opened.model
    log = run_curves(opened)
    parts = parameters_by_part(model)
    routing = measure_routing(model, validation_batches(opened, corpus, samples), opened.dtype)
    return {
        "run": {
            "recipe": run.name,
            "run_dir": str(opened.folder),
            "step": opened.step,
            "steps": run.steps,
            "tokens": opened.tokens,
            "device": str(opened.device),
            "precision": run.precision,
            "mixers": [type(mixer).__name__.removesuffix("Config") for mixer in model.cfg.mixers()],
        },
        "parameters": {
            "parts": parts,
            "total": sum(row["total"] for row in parts),
            "active": sum(row["active"] for row in parts),
        },
        "cost": cost_per_token(model, run.seq_len, opened.dtype.itemsize),
        "routing": {"samples": min(samples, available_samples(corpus, run.seq_len)), "seq_len": run.seq_len, **routing},
        "curves": {
            name: {"summary": summarise_curve(curve), **thin_curve(curve, CURVE_POINTS)} for name, curve in log.items()
        },
    }


def run_curves(opened: OpenRun) -> dict[str, dict[str, list[float]]]:
    """The curves of a run's event log up to the opened step, at full resolution; ValueError if there is no log."""
    path = opened.folder / EVENTS_FILE
    if not path.is_file():
        raise ValueError(f"{opened.folder} has no {EVENTS_FILE}; restore it from a copy, it cannot be made again")
    return curves([event for event in read_events(path) if event["step"] <= opened.step])


def validation_batches(opened: OpenRun, corpus: Corpus, samples: int) -> Iterator[Batch]:
    """The first samples of the validation split, in the batches of the run's own validations."""
    run = opened.run
    return sequential_batches(
        corpus,
        "validation",
        seq_len=run.seq_len,
        samples_per_batch=run.samples_per_micro_batch,
        max_samples=samples,
    )


def available_samples(corpus: Corpus, seq_len: int) -> int:
    """Samples of the validation split, the last of which may be shorter."""
    return math.ceil((corpus.num_tokens("validation") - 1) / seq_len)
