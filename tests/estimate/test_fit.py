"""What makes a run fit, by estimate: nothing if it fits, else as little as is enough."""

from __future__ import annotations

import dataclasses

import pytest

from pithwood.config import apply_overrides
from pithwood.estimate.devices import DEVICES
from pithwood.estimate.efficiency import efficiency
from pithwood.estimate.fit import MARGIN, fitting_overrides
from pithwood.estimate.memory import estimate_memory
from pithwood.estimate.time import estimate_time
from pithwood.recipes import load_recipe
from pithwood.run import Run

pytestmark = pytest.mark.quick

RUN = apply_overrides(load_recipe("qwen3_30b_8l"), ["keep_weight_copies=never"])


def need(words: list[str]) -> float:
    return sum(estimate_memory(apply_overrides(RUN, words), DEVICES["h200"]).values())


def device_of(size: float):
    return dataclasses.replace(DEVICES["h200"], memory_bytes=size / MARGIN)


def test_a_run_that_fits_is_left_alone():
    assert fitting_overrides(RUN, device_of(need([]))) == ([], True)


def test_as_few_blocks_are_computed_again_as_are_enough():
    least, most = need(["recompute=block"]), need(["recompute=selective"])
    assert least < most < need([])
    (words,), fits = fitting_overrides(RUN, device_of((least + most) / 2))
    assert fits
    blocks = words.removeprefix("recompute=").split(",").count("block")
    assert 0 < blocks < 8
    fewer = ",".join(["block"] * (blocks - 1) + ["selective"] * (9 - blocks))
    assert need([words]) <= (least + most) / 2 < need([f"recompute={fewer}"])


def long_run(seq_len: int) -> Run:
    words = [f"seq_len={seq_len}", "samples_per_step=1", "samples_per_micro_batch=1", "model.attention=MoBAConfig"]
    return apply_overrides(load_recipe("qwen3_30b_8l"), words)


def test_chunks_of_experts_come_before_blocks_computed_again():
    run, device = long_run(2**18), DEVICES["h200"]
    words, fits = fitting_overrides(run, device)
    assert fits
    assert words == ["recompute=selective", "model.moe.chunk_tokens=65536"]
    blocks = ["recompute=block,block,block,block,block,block,block,selective"]

    def step_ms(words: list[str]) -> float:
        chosen = apply_overrides(run, words)
        return estimate_time(chosen, device, efficiency([], chosen)).step_ms

    assert sum(estimate_memory(apply_overrides(run, blocks), device).values()) <= MARGIN * device.memory_bytes
    assert step_ms(words) < step_ms(blocks)


def test_with_chunks_no_more_blocks_are_computed_again_than_is_needed():
    words, fits = fitting_overrides(long_run(2**19), DEVICES["h200"])
    assert fits
    assert words[1:] == ["model.moe.chunk_tokens=65536"]
    assert 0 < words[0].count("block") < 8


def test_state_goes_to_host_memory_where_nothing_else_is_enough():
    words, fits = fitting_overrides(long_run(2**20), DEVICES["h200"])
    assert fits
    assert words == [
        "recompute=block",
        "offload_activations=true",
        "model.moe.chunk_tokens=32768",
        "optim.offload_state=true",
    ]


def test_settings_of_a_run_that_fits_stay():
    run = apply_overrides(RUN, ["recompute=block"])
    assert fitting_overrides(run, DEVICES["h200"]) == ([], True)


def test_what_fits_nowhere_gets_what_takes_least():
    words, fits = fitting_overrides(RUN, device_of(1e9))
    assert not fits
    assert need(words) <= need(["recompute=block"])
