"""What makes a run fit, by estimate: nothing if it fits, else as little as is enough."""

from __future__ import annotations

import dataclasses

import pytest

from pithwood.config import apply_overrides
from pithwood.estimate.devices import DEVICES
from pithwood.estimate.fit import MARGIN, fitting_overrides
from pithwood.estimate.memory import estimate_memory
from pithwood.recipes import load_recipe

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


def test_what_fits_nowhere_gets_what_takes_least():
    words, fits = fitting_overrides(RUN, device_of(1e9))
    assert not fits
    assert need(words) <= need(["recompute=block"])
