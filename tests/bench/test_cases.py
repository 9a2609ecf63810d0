"""Shapes and floors of the attention benchmark: counted by loops, and the presets that the issue asks for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pithwood.bench.cases import (
    PRESETS,
    Case,
    Shape,
    check_case,
    dense_cases,
    grid,
    mixed_lengths,
    narrowed,
    preset,
    row_key,
    work_of,
)

pytestmark = pytest.mark.quick


def counted(lengths: tuple[int, ...], block: int | None, k: int) -> tuple[int, int]:
    """(visible keys, scored candidate blocks) of all queries, one by one."""
    visible = scored = 0
    for length in lengths:
        for t in range(length):
            own = t // block if block else 0
            past = min(own, k - 1)
            visible += t - own * block + 1 + past * block if block else t + 1
            scored += own if own > k - 1 else 0
    return visible, scored


@pytest.mark.parametrize("lengths", [(1,), (16, 16), (100,), (95, 0, 17, 1)])
@pytest.mark.parametrize(("block", "k"), [(None, 0), (16, 1), (16, 3), (7, 4), (128, 2)])
def test_useful_flops_count_every_visible_key_once(lengths, block, k):
    case = Case(Shape(lengths, heads=4, kv_heads=2, head_dim=8), "fwd", block, k if block else None)
    visible, scored = counted(lengths, block, k)
    work = work_of(case)
    assert work.useful_flops == 4 * 4 * 8 * visible
    assert work.gate_flops == 2 * 4 * 8 * scored
    tokens = sum(lengths)
    assert work.bytes == 2 * tokens * 8 * (4 + 2 + 2 + 4)
    both = work_of(replace(case, pass_="fwd+bwd"))
    assert both.useful_flops == 3.5 * work.useful_flops
    assert both.gate_flops == work.gate_flops
    assert both.bytes == work.bytes + 2 * tokens * 8 * (4 * 4 + 4 * 2)  # q, o, dO, dq and k, v, dk, dv


def test_the_floor_is_the_slower_of_compute_and_copy():
    work = work_of(Case(Shape((1024,), 1, 1, 64), "fwd"))
    assert work.floor_ms(work.useful_flops, float("inf")) == pytest.approx(1e3)
    assert work.floor_ms(float("inf"), work.bytes) == pytest.approx(1e3)


def test_the_issue_preset_is_the_table_of_the_issue_in_both_passes():
    found = {(c.shape.length, len(c.shape.lengths), c.blocks, c.pass_) for c in preset("issue")}
    table = [(8, 128, 8), (32, 128, 8), (32, 512, 3), (128, 128, 8), (128, 512, 8), (128, 2048, 8), (1024, 128, 8)]
    expected = {(n * 1024, 1 if n == 1024 else 2, (b, k), p) for n, b, k in table for p in ("fwd", "fwd+bwd")}
    assert found == expected
    assert {(c.shape.heads, c.shape.kv_heads, c.shape.head_dim, c.shape.dtype) for c in preset("issue")} == {
        (16, 16, 128, "bf16")
    }


@pytest.mark.parametrize("name", ["gqa", "d64"])
def test_the_sweeps_reach_from_2_kb_tokens_on(name):
    cases = preset(name)
    for size, k in {case.blocks for case in cases}:
        lengths = sorted({case.shape.length for case in cases if case.blocks == (size, k)})
        assert lengths[0] == 2 * size * k
        assert lengths[1] == 4 * size * k
    shape = cases[0].shape
    assert (shape.heads, shape.kv_heads) == (32, 4) if name == "gqa" else shape.head_dim == 64


def test_packed_documents_fill_the_tokens_with_lengths_from_1_to_the_longest():
    lengths = mixed_lengths(131072, 32768, seed=0)
    assert sum(lengths) == 131072
    assert (min(lengths), max(lengths)) == (1, 32768)
    assert len(set(lengths)) > 10
    assert lengths == mixed_lengths(131072, 32768, seed=0) != mixed_lengths(131072, 32768, seed=1)
    assert all(case.shape.mixed for case in preset("packed"))


@pytest.mark.parametrize("name", PRESETS)
def test_check_cases_are_small_and_still_sparse(name):
    for case in preset(name):
        small = check_case(case)
        size, k = case.blocks
        assert small.shape.heads <= 8
        assert small.shape.heads // small.shape.kv_heads == case.shape.heads // case.shape.kv_heads
        assert small.shape.length <= max((k + 2) * size + 17, 1041)
        assert small.shape.length > k * size
        assert small.shape.mixed == case.shape.mixed


def test_dense_attention_is_measured_once_per_shape_and_pass():
    dense = dense_cases(preset("issue"))
    assert len(dense) == len({(c.shape.length, c.pass_) for c in preset("issue")})
    assert {case.op for case in dense} == {"dense"}


def test_rows_differ_in_key_exactly_where_something_else_was_measured():
    rows = [{**case.columns(), "impl": "pithwood"} for name in PRESETS for case in preset(name)]
    cases = [case for name in PRESETS for case in preset(name)]
    assert len({row_key(row) for row in rows}) == len(set(cases))
    assert row_key({**rows[0], "median_ms": 1.0, "commit": "x"}) == row_key(rows[0])


def test_options_narrow_a_preset_or_span_a_grid():
    cases = preset("issue")
    kept = narrowed(cases, {"length": [8192, 32768], "blocks": [(128, 8)], "pass": ["fwd"]})
    assert [(c.shape.length, c.blocks, c.pass_) for c in kept] == [(n, (128, 8), "fwd") for n in (8192, 32768)]
    with pytest.raises(ValueError, match=r"no row has length in \[4096\]; the chosen rows have 1048576, 131072"):
        narrowed(cases, {"length": [4096]})
    assert len(grid({"length": [64, 128], "blocks": [(16, 2), (32, 2)], "heads": [4], "kv_heads": [1, 2]})) == 16
    assert grid({"documents": [3, 1, 5]})[0].shape.lengths == (3, 1, 5)
    with pytest.raises(ValueError, match="--heads 4 must be a multiple of --kv-heads 3"):
        grid({"heads": [4], "kv_heads": [3]})
