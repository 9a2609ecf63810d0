"""Statistics of block selections against loops, and the figures that describe a step."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pithwood.observe.clock import StepClock, StepTime
from pithwood.observe.metrics import (
    HOPPER_PEAK_FLOPS,
    block_fields,
    finite_mean,
    measure_peak_flops,
    mfu,
    peak_flops,
    peak_memory_gb,
    selection_stats,
    speed_fields,
)
from pithwood.ops.packing import Packing, Selection


def random_ids(packing: Packing, sets: int, k: int, block_size: int, seed: int) -> Tensor:
    """Own block and up to k - 1 random past blocks, ascending, -1 padded."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((packing.num_queries, sets, k), -1, dtype=torch.int32)
    for t, position in enumerate(packing.query_key_position().tolist()):
        if position < 0:
            continue
        own = position // block_size
        for s in range(sets):
            past = torch.randperm(own, generator=generator)[: k - 1].tolist()
            chosen = sorted([*past, own])
            ids[t, s, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
    return ids


def loop_stats(ids: Tensor, packing: Packing, block_size: int) -> dict[str, float]:
    """The definitions of `selection_stats`, one entry at a time."""
    _, sets, k = ids.shape
    cu_q, cu_k = packing.cu_q.tolist(), packing.cu_k.tolist()
    own_entries = entries = 0
    weighted = weight = 0.0
    unions: list[float] = []
    for n in range(packing.num_docs):
        queries, keys = cu_q[n + 1] - cu_q[n], cu_k[n + 1] - cu_k[n]
        candidates = -(-keys // block_size) - (1 if packing.causal else 0)
        for s in range(sets):
            histogram: dict[int, int] = {}
            past: list[list[int]] = []
            for i in range(queries):
                own = (i + keys - queries) // block_size
                row = [b for b in ids[cu_q[n] + i, s].tolist() if b >= 0]
                entries += len(row)
                own_entries += row.count(own)
                past.append([b for b in row if b != own])
                for b in past[-1]:
                    histogram[b] = histogram.get(b, 0) + 1
            total = sum(histogram.values())
            if total and candidates > 1:
                entropy = -sum(c / total * math.log(c / total) for c in histogram.values())
                weighted += total * entropy / math.log(candidates)
                weight += total
            for start in range(0, queries - 127, 128):
                tile = past[start : start + 128]
                if k > 1 and all(len(row) == k - 1 for row in tile):
                    unions.append(len({b for row in tile for b in row}) / (k - 1))
    return {
        "own_share": own_entries / entries if entries else math.nan,
        "entropy": weighted / weight if weight else math.nan,
        "union_128": sum(unions) / len(unions) if unions else math.nan,
    }


@pytest.mark.quick
@pytest.mark.parametrize(
    ("lengths", "key_lengths", "sets", "k", "block_size"),
    [
        ([300], None, 2, 3, 16),
        ([513, 0, 130, 7, 260], None, 3, 4, 32),
        ([64, 64], None, 1, 1, 16),
        ([20, 0, 12], None, 2, 4, 64),
        ([130, 5], [400, 37], 2, 3, 24),
        ([40, 9], [8, 30], 2, 2, 4),
        ([0, 0], None, 2, 2, 16),
    ],
)
def test_selection_stats_equal_the_loops(lengths, key_lengths, sets, k, block_size):
    packing = Packing.from_lengths(lengths, key_lengths)
    ids = random_ids(packing, sets, k, block_size, seed=len(lengths))
    expected = loop_stats(ids, packing, block_size)
    actual = selection_stats(ids, packing, block_size)
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert value.shape == ()
        assert value.dtype == torch.float32
        assert float(value) == pytest.approx(expected[name], rel=1e-6, nan_ok=True), name


def test_the_cases_above_measure_every_statistic():
    packing = Packing.from_lengths([513, 0, 130, 7, 260])
    stats = loop_stats(random_ids(packing, 3, 4, 32, seed=5), packing, 32)
    assert all(math.isfinite(value) for value in stats.values())


def test_stats_do_not_depend_on_unused_offsets():
    ids = random_ids(Packing.from_lengths([300, 150]), 2, 3, 16, seed=0)
    plain = selection_stats(ids, Packing.from_lengths([300, 150]), 16)
    padded = selection_stats(ids, Packing.from_lengths([300, 150, 0, 0, 0], max_q=450, max_k=450), 16)
    for name, value in plain.items():
        assert float(padded[name]) == pytest.approx(float(value), rel=1e-6)


def test_extremes_of_routing():
    packing, block_size, k = Packing.from_lengths([1024]), 16, 3
    own = torch.arange(1024) // block_size
    first = torch.stack([torch.zeros(1024, dtype=torch.long), torch.ones(1024, dtype=torch.long), own], dim=-1)
    agree = torch.where((own >= 2)[:, None], first, torch.tensor([0, -1, -1])).int()[:, None]
    stats = selection_stats(agree, packing, block_size)
    assert float(stats["union_128"]) == 1.0
    assert float(stats["entropy"]) == pytest.approx(math.log(2) / math.log(63), abs=1e-3)
    random = selection_stats(random_ids(packing, 4, k, block_size, seed=1), packing, block_size)
    assert 0.8 < float(random["entropy"]) < 1.0
    # Tiles from the second on see 8 to 56 past blocks, and 128 rows of two random choices find nearly all of them.
    assert float(random["union_128"]) > 10


def test_own_share_counts_entries():
    packing = Packing.from_lengths([4])
    ids = torch.tensor([[[0, -1]], [[0, -1]], [[0, 1]], [[0, 1]]], dtype=torch.int32)
    assert float(selection_stats(ids, packing, 2)["own_share"]) == pytest.approx(4 / 6)


def test_wrong_shapes_are_named():
    packing = Packing.from_lengths([4])
    with pytest.raises(ValueError, match="T = 4"):
        selection_stats(torch.zeros(5, 1, 1, dtype=torch.int32), packing, 2)
    with pytest.raises(ValueError, match="block_size=0"):
        selection_stats(torch.zeros(4, 1, 1, dtype=torch.int32), packing, 0)


def test_block_fields_average_layers_and_pass_over_other_decisions():
    packing = Packing.from_lengths([300])
    ids = [random_ids(packing, 2, 3, 16, seed=s) for s in range(2)]
    count = (ids[0] >= 0).sum(-1).int()
    decisions = {
        "layers.0.blocks": Selection(ids[0], count, 16),
        "layers.1.blocks": Selection(ids[1], count, 16),
        "layers.1.experts": torch.zeros(300, 2),
    }
    fields = block_fields(decisions, packing)
    assert set(fields) == {"block_own_share", "block_entropy", "block_union_128"}
    mean = sum(float(selection_stats(i, packing, 16)["entropy"]) for i in ids) / 2
    assert float(fields["block_entropy"]) == pytest.approx(mean, rel=1e-6)
    assert block_fields({"layers.0.experts": torch.zeros(3)}, packing) == {}


def test_block_fields_spell_out_tiled_selections():
    packing = Packing.from_lengths([40, 24])
    tile = random_ids(Packing.from_lengths([3, 2]), 2, 2, 1, seed=0)  # rows of 16 queries, own "block" = row
    selection = Selection(tile, (tile >= 0).sum(-1).int(), unit=16, row_size=16)
    expected = selection_stats(tile[packing.row_of_query(16)], packing, 16)["own_share"]
    assert float(block_fields({"blocks": selection}, packing)["block_own_share"]) == pytest.approx(float(expected))


def test_mfu_and_peaks():
    assert mfu(989e12, 2.0, HOPPER_PEAK_FLOPS) == pytest.approx(0.5)
    assert mfu(1e12, 1.0, None) is None
    with pytest.raises(ValueError, match="seconds=0"):
        mfu(1e12, 0.0, 1e12)
    assert peak_flops("cpu") is None
    assert peak_flops("cpu", measured=True) is None


def test_speed_fields_follow_the_lap():
    peaks = {"mfu": 8e12, "mfu_measured": None}
    fields = speed_fields(StepTime(1.0, 3.0), tokens=100, training_flops=4e12, peaks=peaks)
    assert {name: value() for name, value in fields.items()} == {"step_s": 2.0, "tokens_per_s": 50.0, "mfu": 0.25}


def test_measured_peak_is_a_plausible_rate():
    rate = measure_peak_flops("cpu", size=128, seconds=0.02)
    assert 1e7 < rate < 1e15
    with pytest.raises(ValueError, match="size=0"):
        measure_peak_flops("cpu", size=0)


def test_peak_memory_covers_what_was_touched():
    before = peak_memory_gb("cpu")
    held = torch.ones(64 * 1024 * 1024 // 4)
    assert held.sum() > 0
    assert 0.01 < before <= peak_memory_gb("cpu") < 1000


def test_clock_laps_join_and_restart_leaves_pauses_out(monkeypatch):
    now = [10.0]
    monkeypatch.setattr("pithwood.observe.clock.time.perf_counter", lambda: now[0])
    clock = StepClock("cpu")
    now[0] = 11.5
    first = clock.lap()
    now[0] = 12.0
    second = clock.lap()
    now[0] = 50.0
    clock.restart()
    now[0] = 50.25
    assert [first.seconds(), second.seconds(), clock.lap().seconds()] == [1.5, 0.5, 0.25]


def test_finite_mean():
    assert finite_mean([1.0, math.nan, 3.0, math.inf]) == 2.0
    assert math.isnan(finite_mean([]))


@pytest.mark.gpu
def test_cuda_stats_equal_cpu_without_a_sync_and_the_clock_measures_device_time():
    packing = Packing.from_lengths([513, 0, 130, 7, 260])
    ids = random_ids(packing, 3, 4, 32, seed=5)
    expected = selection_stats(ids, packing, 32)
    device_packing, device_ids = packing.to("cuda"), ids.cuda()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        stats = selection_stats(device_ids, device_packing, 32)
        clock = StepClock("cuda")
        x = torch.randn(4096, 4096, device="cuda")
        clock.restart()
        for _ in range(20):
            x @ x
        lap = clock.lap()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name, value in expected.items():
        assert float(stats[name]) == pytest.approx(float(value), rel=1e-6)
    # 20 fp32 matmuls of 137 GFLOP cannot take less than 20 ms on one device.
    assert 2e-3 < lap.seconds() < 5
    assert peak_memory_gb("cuda") > 0.06
