"""The tables of docs/scaling.md, by `pithwood estimate`: nothing in them is measured.

<!-- scaling plans -->     a mesh for each number of GPUs, with the step that grows with it
<!-- scaling strong -->    the same step on ever more GPUs
<!-- scaling meshes -->    other meshes of 8 and 1,024 GPUs beside the planned ones
<!-- scaling links -->     the speeds of links that all of it assumes
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pithwood.bench.train_text import length_words
from pithwood.config import apply_overrides
from pithwood.estimate.devices import DEVICES
from pithwood.estimate.efficiency import Row, read_rows
from pithwood.estimate.report import estimate
from pithwood.recipes import load_recipe
from pithwood.run import Run

RECIPE = "qwen3_30b_8l"
DEVICE = DEVICES["h200"]
WHOLE = ("model.num_layers=48",)
"""The whole model: what RECIPE is eight layers of."""


@dataclass(frozen=True)
class Plan:
    """A mesh with the step that it takes, as overrides of RECIPE."""

    samples: int
    micro_batch: int
    """Samples per micro-batch, of all GPUs together."""
    mesh: tuple[str, ...]

    def overrides(self) -> list[str]:
        sizes = [f"samples_per_step={self.samples}", f"samples_per_micro_batch={self.micro_batch}"]
        return [*WHOLE, *sizes, *(f"mesh.{word}" for word in self.mesh)]

    def run(self) -> Run:
        """The run; ValueError if its parts contradict each other."""
        run = apply_overrides(load_recipe(RECIPE), self.overrides())
        run.validate()
        return run


DUAL = "schedule=dualpipe_v"
PLANS = (
    Plan(256, 8, ("pp=2", "dp_shard=4", "ep=4", DUAL)),
    Plan(1024, 64, ("pp=2", "dp_shard=32", "ep=8", DUAL)),
    Plan(4096, 1024, ("pp=2", "dp_replicate=8", "dp_shard=64", "ep=8", DUAL)),
    Plan(65_536, 32_768, ("dp_replicate=256", "dp_shard=64", "ep=8")),
)
"""On 8, 64, 1,024 and 16,384 GPUs."""

STRONG = (
    Plan(4096, 64, ("pp=2", "dp_shard=32", "ep=8", DUAL)),
    Plan(4096, 256, ("pp=2", "dp_replicate=2", "dp_shard=64", "ep=8", DUAL)),
    PLANS[2],
    Plan(4096, 512, ("pp=4", "dp_replicate=32", "dp_shard=16", "cp=2", "ep=8", DUAL)),
    Plan(4096, 512, ("pp=4", "dp_replicate=32", "dp_shard=16", "cp=8", "ep=8", DUAL)),
)
"""4,096 samples on 64, 256, 1,024, 4,096 and 16,384 GPUs."""

OTHERS = (
    PLANS[0],
    Plan(256, 8, ("pp=2", "dp_shard=4", "ep=4")),
    Plan(256, 16, ("dp_shard=8", "ep=8")),
    Plan(256, 8, ("dp_shard=8", "ep=1", "gather=forward", "reduce=micro_batch")),
    PLANS[2],
    Plan(4096, 2048, ("dp_replicate=16", "dp_shard=64", "ep=8")),
    Plan(4096, 2048, ("dp_replicate=128", "dp_shard=8", "ep=8")),
    Plan(4096, 2048, ("dp_shard=1024", "ep=8")),
    Plan(4096, 1024, ("dp_replicate=8", "dp_shard=64", "pp=2", "ep=64", DUAL)),
)


def scaling(what: str, root: Path) -> str:
    """The table of a kind; ValueError for a kind that there is not."""
    tables = {"plans": PLANS, "strong": STRONG, "meshes": OTHERS}
    if what == "links":
        return _links()
    if what not in tables:
        raise ValueError(f"{what!r} is no table of the scaling page; write one of {', '.join([*tables, 'links'])}")
    return plans_table(tables[what], *read_rows(root, DEVICE.name))


def plans_table(plans: Sequence[Plan], rows: Sequence[Row], where: str) -> str:
    """A row for every plan; rows, where: what was measured on one GPU, and its file."""
    head = ["GPUs", "mesh", "samples a step", "micro-batches", "GB of each", "s a step", "tokens/s", "of each", "MFU",
            "not hidden"]  # fmt: skip
    table = [head, ["---:", "---", *["---:"] * 8]]
    for plan in plans:
        run = plan.run()
        found = estimate(run, DEVICE, rows, where)
        table.append([f"{run.mesh.size:,}", " ".join(f"`{word}`" for word in plan.mesh), *_cells(run, found)])
    return _text(table)


def _cells(run: Run, found: dict[str, Any]) -> list[str]:
    waits = {kind: ms for kind, ms in found["communication_ms"].items() if ms / found["step_ms"] >= 0.01}
    told = ", ".join(f"{kind} {ms / found['step_ms']:.0%}" for kind, ms in sorted(waits.items(), key=lambda p: -p[1]))
    return [
        f"{run.samples_per_step:,} x {length_words(run.seq_len)}",
        f"{run.samples_per_step // run.samples_per_micro_batch}",
        f"{found['peak_gb']:.0f}" + ("" if found["fits"] else ": too many"),
        f"{found['step_ms'] / 1e3:.2f}",
        f"{found['tokens_per_s']:,.0f}",
        f"{found['tokens_per_s'] / found['devices']:,.0f}",
        f"{found['mfu']:.1%}",
        told or "under 1%",
    ]


def _links() -> str:
    table = [
        ["link", "assumed, for each GPU and direction", "that is"],
        ["---", "---:", "---"],
        ["NVLink 4, inside a host", f"{DEVICE.nvlink_bytes_per_s / 1e9:.0f} GB/s", "80 % of what it states"],
        ["InfiniBand NDR, between hosts", f"{DEVICE.network_bytes_per_s / 1e9:.0f} GB/s", "80 % of a 400 Gb/s port"],
        ["from one process of a ring to the next", f"{DEVICE.hop_s * 1e6:.0f} us", "besides what is sent"],
        ["GPUs of a host", str(DEVICE.per_host), ""],
    ]
    return _text(table)


def _text(table: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in table)
