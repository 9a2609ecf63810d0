"""The plans of docs/scaling.md: each is a run that its mesh takes and that fits; the tables say what is estimated."""

from __future__ import annotations

import pytest

from pithwood.config import apply_overrides
from pithwood.estimate.report import estimate
from pithwood.pages.generate import filled
from pithwood.pages.scaling import DEVICE, OTHERS, PLANS, RECIPE, STRONG, plans_table, scaling
from pithwood.recipes import load_recipe


@pytest.mark.quick
def test_the_plans_are_for_the_numbers_of_gpus_that_the_page_names():
    assert [plan.run().mesh.size for plan in PLANS] == [8, 64, 1024, 16_384]
    assert [plan.run().mesh.size for plan in STRONG] == [64, 256, 1024, 4096, 16_384]
    assert {plan.samples for plan in STRONG} == {4096}
    assert {plan.run().mesh.size for plan in OTHERS} == {8, 1024}


@pytest.mark.quick
def test_a_row_holds_what_the_command_estimates(tmp_path):
    plan = PLANS[0]
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in plans_table([plan], [], "x").splitlines()]
    found = estimate(apply_overrides(load_recipe(RECIPE), plan.overrides()), DEVICE, [], "x")
    row = dict(zip(table[0], table[2], strict=True))
    assert row["GPUs"] == "8"
    assert row["mesh"] == "`pp=2` `dp_shard=4` `ep=4` `schedule=dualpipe_v`"
    assert row["samples a step"] == "256 x 4K"
    assert row["GB of each"] == f"{found['peak_gb']:.0f}"
    assert row["tokens/s"] == f"{found['tokens_per_s']:,.0f}"
    assert found["fits"]
    page = filled("<!-- scaling links --><!-- end scaling -->", tmp_path, "x.md")
    assert "| NVLink 4, inside a host | 360 GB/s |" in page


def test_every_planned_run_fits():
    for plan in (*PLANS, *STRONG):
        assert estimate(plan.run(), DEVICE, [], "")["fits"], plan


@pytest.mark.quick
def test_an_unknown_table_is_named(tmp_path):
    with pytest.raises(ValueError, match="'goals' is no table of the scaling page"):
        scaling("goals", tmp_path)
