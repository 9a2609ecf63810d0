"""A recipe whose runs meet with a misfortune: what the environment variable MISFORTUNE says, as JSON.

{"what": "kill", "rank": 1, "micro_batch": 9, "folder": "/tmp/x"}     as in doomed.py; only in the first of all attempts

The micro-batches of a process are counted from 1.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace

from torch import Tensor

from pithwood.data.batches import Batch
from pithwood.losses import LossTerm
from pithwood.objectives import Head, NextToken
from pithwood.recipes.demo import debug
from pithwood.run import Run
from tests.parallel.doomed import misfortune


@dataclass(frozen=True)
class Doomed(NextToken):
    """The next token, until the misfortune."""

    def terms(self, hidden_TD: Tensor, head: Head, batch: Batch) -> list[LossTerm]:
        self._befall()
        return super().terms(hidden_TD, head, batch)

    def _befall(self) -> None:
        fault = json.loads(os.environ.get("MISFORTUNE", "{}"))
        if not fault or (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) != (str(fault["rank"]), "0"):
            return
        count = int(os.environ.get("MICRO_BATCHES", "0")) + 1
        os.environ["MICRO_BATCHES"] = str(count)
        if count == fault["micro_batch"]:
            misfortune(fault, fault["folder"])


def doomed() -> Run:
    """A small debug run, two micro-batches a step, a line a step, a checkpoint each fourth step, on two processes."""
    run = replace(debug(), name="doomed", objective=Doomed())
    mesh = replace(run.mesh, dp_shard=2, ep=2)
    return replace(run, steps=16, seq_len=64, log_every=1, checkpoint_every=4, validate_every=100, validation_samples=4,
                   sample_tokens=4, threads=1, device="cpu", mesh=mesh)  # fmt: skip
