"""The tables of docs/throughput.md and its picture, from rows such as `pithwood bench train` writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from pithwood.bench.train_plot import length_rows, plot_lengths
from pithwood.bench.train_rows import workload
from pithwood.bench.train_sweep import sweep_rows
from pithwood.config import apply_overrides
from pithwood.observe.step_parts import IDLE, PARTS
from pithwood.pages.generate import filled
from pithwood.pages.throughput import GOALS, NOTHING, fastest
from pithwood.recipes import load_recipe

pytestmark = pytest.mark.quick


def row(*overrides: str, speed: float = 60_000.0, gb: float = 90.0, routing: str = "balanced", tokens: str = "fake"):
    words = [*overrides, f"model.moe.routing={routing}"]
    run = apply_overrides(load_recipe("qwen3_30b_8l"), words)
    step_ms = 1e3 * run.samples_per_step * run.seq_len / speed
    measured = {"status": "ok", "tokens_per_s": speed, "spread": 100.0, "step_ms": step_ms, "peak_gb": gb}
    return {
        **workload(run, "qwen3_30b_8l", words, tokens),
        **measured,
        "mfu": 0.4,
        "mfu_measured": 0.5,
        "first_step_s": 32.0,
        "breakdown": None,
    }


def out_of_memory(*overrides: str) -> dict[str, Any]:
    return {**row(*overrides), "status": "out of memory", "tokens_per_s": None, "mfu": None, "step_ms": None}


def page(rows: list[dict[str, Any]], what: str, root: Path, file: str = "train.json") -> list[str]:
    """The lines of a generated part."""
    folder = root / "bench" / "results" / "nvidia-h200"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text(json.dumps({"rows": rows}))
    text = filled(f"<!-- throughput {what} --><!-- end throughput -->", root, "throughput.md")
    return text.removesuffix("<!-- end throughput -->").partition("-->")[2].strip().splitlines()


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_each_goal_shows_its_fastest_row_and_whether_that_is_enough(tmp_path):
    rows = [
        row(speed=60_000.0),
        row("samples_per_micro_batch=8", "optim.momentum=0.9", speed=70_000.0),
        row(speed=64_000.0, routing="learned", tokens="real"),
        out_of_memory("seq_len=32768", "samples_per_step=4", "samples_per_micro_batch=1"),
    ]
    lines = page(rows, "goals", tmp_path)
    assert lines[0] == "On `nvidia-h200`:"
    table = [cells(line) for line in lines[2:]]
    assert len(table) == 2 + len(GOALS)
    assert table[2][2:5] == ["64,000, <= 100 GB", "74,000", "70,000 (must)"]
    assert table[2][-1] == "`samples_per_micro_batch=8` `optim.momentum=0.9`"
    assert table[3][2:5] == ["90% of the first", "95%", "64,000 (must)"]
    assert table[4][4] == "out of memory"
    assert table[7][4] == "not measured"


def test_a_goal_that_is_missed_says_by_how_much_or_for_want_of_what(tmp_path):
    assert cells(page([row(speed=48_000.0)], "goals", tmp_path)[4])[4] == "48,000 (missed by 25%)"
    assert cells(page([row(speed=90_000.0, gb=101.0)], "goals", tmp_path)[4])[4] == "90,000 (missed: memory)"
    assert cells(page([row(speed=90_000.0)], "goals", tmp_path)[4])[4] == "90,000 (stretch)"


def test_a_row_within_the_memory_asked_for_comes_before_a_faster_one(tmp_path):
    rows = [row(speed=70_000.0, gb=96.0), row("samples_per_micro_batch=8", speed=76_000.0, gb=108.0)]
    assert cells(page(rows, "goals", tmp_path)[4])[4] == "70,000 (must)"


def test_rows_of_other_blocks_or_layers_do_not_count():
    moba = ("seq_len=32768", "samples_per_step=4", "samples_per_micro_batch=1", "model.attention=MoBAConfig")
    goal = GOALS[3]
    assert fastest([row(*moba, "model.attention.block_size=512")], goal) is None
    assert fastest([row(*moba, "model.num_layers=4")], goal) is None
    assert fastest([row(*moba)], goal) is not None


def test_the_breakdown_has_a_line_for_every_part_with_its_floor(tmp_path):
    ms = dict.fromkeys((*PARTS, IDLE), 100.0)
    floors = {part: 50.0 for part in PARTS if part != "other"}
    parts = {"ms": ms, "floor_ms": floors, "total_ms": 800.0, "unattributed_share": 0.01}
    table = [cells(line) for line in page([{**row(), "breakdown": parts}], "breakdown", tmp_path)[2:]]
    assert table[2] == ["attention", "100.0 (50.0)"]
    assert [line[0] for line in table[2:]] == [*PARTS, IDLE, "all", "share of busy time not attributed"]
    assert table[-2:] == [["all", "800.0 (300.0)"], ["share of busy time not attributed", "1.0%"]]


def test_lengths_stand_in_order_beside_each_other_with_the_picture(tmp_path):
    rows = [
        row("seq_len=32768", "samples_per_step=2", "samples_per_micro_batch=1", speed=40_000.0),
        row(),
        row("model.attention=MoBAConfig", "seq_len=32768", "samples_per_step=2", "samples_per_micro_batch=1"),
        row("seq_len=32768", "samples_per_step=4", "samples_per_micro_batch=1", speed=99_000.0),
        out_of_memory("seq_len=131072", "samples_per_step=1", "samples_per_micro_batch=1"),
    ]
    picture = tmp_path / "bench" / "results" / "nvidia-h200" / "train.png"
    assert plot_lengths(rows, picture)
    assert matplotlib.image.imread(picture).std() > 0.01
    lines = page(rows, "lengths", tmp_path)
    table = [cells(line) for line in lines[2:-2]]
    assert table[2][:5] == ["4K", "16", "1.09", "60,000", "90.0"]
    assert table[3] == ["32K", "2", "1.64", "40,000", "90.0", "1.09", "60,000", "90.0"]
    assert table[4][2] == "out of memory"
    assert lines[-1].endswith("(../bench/results/nvidia-h200/train.png)")


def test_rows_of_fewer_layers_are_shown_apart_where_they_are_most_and_reach_no_goal(tmp_path):
    few = [row("model.num_layers=4", f"seq_len={n}", f"samples_per_step={65536 // n}", "samples_per_micro_batch=1")
           for n in (4096, 8192)]  # fmt: skip
    lines = page([row(), *few], "lengths", tmp_path)
    assert lines[2] == "With 4 layers in place of 8:"
    assert [cells(line)[0] for line in lines[6:]] == ["4K", "8K"]
    assert cells(page(few, "goals", tmp_path)[2])[4] == "not measured"


def test_estimates_stand_beside_measurements(tmp_path):
    compared = {**row(), "measured_gb": 56.2, "estimated_gb": 58.0, "memory_error": 0.032, "measured_ms": 642.8}
    compared |= {"estimated_ms": 638.8, "time_error": -0.006, "others_error": -0.049}
    table = [cells(line) for line in page([compared], "estimate", tmp_path, "estimate.json")[2:]]
    assert table[2][:-1] == [
        "16 x 4K, full attention, balanced", "8", "56.2", "58.0", "+3.2%", "642.8", "638.8", "-0.6%", "-4.9%",
    ]  # fmt: skip


EXCHANGED = {"ms": 120.0, "hidden_ms": 90.0, "hidden_share": 0.75}


@pytest.mark.parametrize(("longer", "shown"), [(1.0, "75% of 120 ms"), (1.02, "75% of 120 ms"), (1.04, "-")])
def test_where_the_profiled_steps_were_slower_no_share_of_exchanges_is_shown(longer, shown, tmp_path):
    ep = row("mesh.dp_shard=2", "mesh.ep=2", "samples_per_micro_batch=4")
    ep["breakdown"] = {"total_ms": longer * ep["step_ms"], "communication": EXCHANGED}
    assert cells(page([ep], "mesh", tmp_path)[4])[8] == shown


def test_rows_of_several_processes_stand_in_a_table_of_their_own(tmp_path):
    ep = row("model.num_layers=12", "samples_per_step=32", "samples_per_micro_batch=8", "mesh.dp_shard=2", "mesh.ep=2",
             speed=91_000.0)  # fmt: skip
    ep["breakdown"] = {"total_ms": ep["step_ms"], "communication": EXCHANGED}
    pp = row("samples_per_micro_batch=4", "mesh.pp=2", "mesh.schedule=dualpipe_v", "model.tie_embeddings=false")
    lines = page([row(), ep, pp], "mesh", tmp_path)
    table = [cells(line) for line in lines[2:]]
    assert table[2:] == [
        ["dp_shard 2, ep 2", "32 x 4K, full attention, balanced routing", "12", "91,000", "100", "40.0%", "50.0%",
         "90.0", "75% of 120 ms", "`samples_per_micro_batch=8`"],
        ["pp 2", "16 x 4K, full attention, balanced routing", "8", "60,000", "100", "40.0%", "50.0%", "90.0", "",
         "`samples_per_micro_batch=4` `mesh.schedule=dualpipe_v` `model.tie_embeddings=false`"],
    ]  # fmt: skip


def test_pictures_of_meshes_stand_below_their_table(tmp_path):
    rows = [row("mesh.dp_shard=2", "samples_per_micro_batch=4")]
    page(rows, "mesh", tmp_path)
    (tmp_path / "bench" / "results" / "nvidia-h200" / "timeline-dp_shard2.png").touch()
    last = page(rows, "mesh", tmp_path)[-1]
    assert last == "![a step on dp_shard2](../bench/results/nvidia-h200/timeline-dp_shard2.png)"


def test_tables_and_picture_of_one_process_ignore_meshes(tmp_path):
    mesh = row("mesh.dp_shard=2", "samples_per_micro_batch=4", speed=99_000.0)
    assert cells(page([row(), mesh], "goals", tmp_path)[4])[4] == "60,000 (missed by 6%)"
    assert length_rows([row(), mesh])["full"][4096]["tokens_per_s"] == 60_000.0
    assert page([row()], "mesh", tmp_path) == [NOTHING]


def test_one_length_makes_no_picture(tmp_path):
    assert not plot_lengths([row()], tmp_path / "train.png")
    assert not list(tmp_path.iterdir())


def test_every_row_of_the_sweep_over_lengths_is_drawn():
    rows = [row(*each.overrides) for each in sweep_rows("lengths", 12, 3)]
    found = length_rows(rows)
    assert list(found["moba"]) == [2**power for power in range(12, 21)]
    assert list(found["full"]) == [2**power for power in range(12, 20)]


def test_every_goal_is_a_row_of_the_sweep():
    rows = [row(*each.overrides, routing=each.routing, tokens=each.tokens) for each in sweep_rows("issue", 12, 3)]
    assert all(fastest(rows, goal) is not None for goal in GOALS)
    assert len(rows) == len(GOALS)


def test_without_results_the_page_says_so(tmp_path):
    lines = filled("<!-- throughput lengths --><!-- end throughput -->", tmp_path, "x.md").splitlines()
    assert lines[1] == NOTHING
    goals = filled("<!-- throughput goals --><!-- end throughput -->", tmp_path, "x.md").splitlines()
    assert cells(goals[3])[4] == "not measured"


def test_an_unknown_table_is_named(tmp_path):
    with pytest.raises(ValueError, match="'speeds' is no table of the throughput page"):
        filled("<!-- throughput speeds --><!-- end throughput -->", tmp_path, "x.md")
