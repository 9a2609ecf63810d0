"""Coherence of block selections, on selections made by hand and against loops."""

from __future__ import annotations

import math
from dataclasses import astuple

import pytest
import torch
from torch import Tensor

from pithwood.observe.metrics import selection_stats
from pithwood.observe.routing_stats import RoutingStats, routing_stats
from pithwood.ops.packing import Packing
from tests.observe.test_metrics import random_ids

pytestmark = pytest.mark.quick


def chosen(packing: Packing, block_size: int, k: int, choose) -> Tensor:
    """[T, 1, k] ids: the own block and `choose(position, own)`, any k - 1 or fewer past blocks."""
    ids = torch.full((packing.num_queries, 1, k), -1, dtype=torch.int32)
    for t, position in enumerate(packing.position_T.tolist()):
        row = sorted([*choose(position, position // block_size), position // block_size])
        ids[t, 0, : len(row)] = torch.tensor(row, dtype=torch.int32)
    return ids


def nearest(count: int):
    return lambda position, own: range(max(own - count, 0), own)


def test_rows_that_all_choose_the_same_blocks_have_a_union_of_one_row():
    packing = Packing.from_lengths([128 * 6])
    ids = chosen(packing, 128, 3, nearest(2))
    stats = routing_stats(ids, packing, 128)
    assert (stats.union_64, stats.union_128) == (1.0, 1.0)
    # neighbours in a block agree, across a boundary they share one of three; blocks 3 to 5 have a choice
    pairs = 3 * 128 - 1
    assert stats.jaccard == pytest.approx((pairs - 2 + 2 / 3) / pairs)
    # rows hold 1, 2, then 3 ids
    assert stats.own_share == pytest.approx(6 / (1 + 2 + 3 * 4))


def test_alternating_rows_double_the_union_and_share_nothing():
    packing = Packing.from_lengths([64 * 8])

    def choose(position: int, own: int):
        return [] if own == 0 else [position % 2] if own > 1 else [0]

    stats = routing_stats(chosen(packing, 64, 2, choose), packing, 64)
    # block 1 has one candidate (a union of 1), blocks 2 to 7 see both choices
    assert stats.union_64 == pytest.approx((1 + 6 * 2) / 7)
    assert stats.jaccard == 0.0
    assert stats.first_block_share == pytest.approx((1 + 6 / 2) / 7)


def test_a_sink_takes_the_share_of_the_top_column():
    packing = Packing.from_lengths([16 * 101])

    def choose(position: int, own: int):
        return [] if own == 0 else [0] if own == 1 else [0, own - 1]

    stats = routing_stats(chosen(packing, 16, 3, choose), packing, 16)
    hits = 16 * (1 + 2 * 99)
    assert stats.hits_max == 16 * 100
    assert stats.top_1_percent_share == pytest.approx(16 * 100 / hits)  # one of 100 columns
    assert stats.first_block_share == pytest.approx(16 * 100 / hits)
    assert stats.hits_max_over_mean == pytest.approx(16 * 100 / (hits / 100))


def test_distances_are_counted_in_powers_of_two():
    packing = Packing.from_lengths([4 * 9])

    def choose(position: int, own: int):
        return [own - 1] if own % 2 else [0] if own else []

    stats = routing_stats(chosen(packing, 4, 2, choose), packing, 4)
    # own 1, 3, 5, 7 at distance 1; own 2 at 2, own 4 and 6 at 4 and 6, own 8 at 8
    assert stats.distance_share == (4 / 8, 1 / 8, 2 / 8, 1 / 8)


def test_random_routing_meets_its_own_expectation():
    packing = Packing.from_lengths([64 * 24, 100, 64 * 16])
    stats = routing_stats(random_ids(packing, 3, 4, 64, seed=0), packing, 64)
    assert stats.union_64 == pytest.approx(stats.random_union_64, rel=0.02)
    assert stats.union_64 > 3
    assert stats.hits_max_over_mean > 2


def test_union_128_and_own_share_are_those_of_the_event_log():
    packing = Packing.from_lengths([500, 0, 1, 700])
    ids = random_ids(packing, 2, 3, 32, seed=1)
    stats, logged = routing_stats(ids, packing, 32), selection_stats(ids, packing, 32)
    assert stats.union_128 == pytest.approx(float(logged["union_128"]))
    assert stats.own_share == pytest.approx(float(logged["own_share"]))


def test_documents_do_not_mix():
    packing = Packing.from_lengths([256, 256])
    ids = chosen(packing, 16, 3, nearest(2))
    alone = routing_stats(ids[:256], Packing.from_lengths([256]), 16)
    both = routing_stats(ids, packing, 16)
    # the 1 % is one column in both, so its share halves; all else is the same
    same = RoutingStats(**{**vars(both), "top_1_percent_share": alone.top_1_percent_share})
    assert astuple(same)[:-1] == pytest.approx(astuple(alone)[:-1])
    assert same.distance_share == pytest.approx(alone.distance_share)


@pytest.mark.parametrize("lengths", [[], [0], [1], [5, 3]])
@pytest.mark.parametrize("k", [1, 3])
def test_what_cannot_be_measured_is_nan(lengths, k):
    packing = Packing.from_lengths(lengths)
    stats = routing_stats(chosen(packing, 8, k, nearest(k - 1)), packing, 8)
    assert all(math.isnan(x) for x in (stats.union_64, stats.union_128, stats.jaccard, stats.top_1_percent_share))
    assert stats.hits_max == 0
    assert stats.distance_share == ()


def test_bad_arguments_are_refused():
    packing = Packing.from_lengths([8])
    with pytest.raises(ValueError, match=r"expected \[T, S, k\] with T = 8"):
        routing_stats(torch.zeros(7, 1, 2, dtype=torch.int32), packing, 4)
    with pytest.raises(ValueError, match="block_size=0"):
        routing_stats(torch.zeros(8, 1, 2, dtype=torch.int32), packing, 0)
    with pytest.raises(ValueError, match="causal self-attention"):
        routing_stats(torch.zeros(8, 1, 2, dtype=torch.int32), Packing.from_lengths([8], [16]), 4)
