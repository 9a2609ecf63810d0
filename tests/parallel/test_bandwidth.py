"""The check of links: every pair of hosts and every group is measured, and what lags is named."""

from __future__ import annotations

from itertools import combinations

import pytest

from pithwood.parallel.bandwidth import ALL_PAIRS, LinkSpeed, link_lines, measure_links, rounds_of_hosts, slow_links
from pithwood.parallel.config import MeshConfig
from pithwood.parallel.mesh import Mesh
from tests.processes import run_on


@pytest.mark.quick
@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, ALL_PAIRS])
def test_every_pair_of_few_hosts_meets_once_and_nobody_has_two_partners(count):
    rounds = rounds_of_hosts(count)
    met = [pair for pairs in rounds for pair in pairs]
    assert sorted(met) == list(combinations(range(count), 2))
    for pairs in rounds:
        busy = [host for pair in pairs for host in pair]
        assert len(busy) == len(set(busy))


@pytest.mark.quick
@pytest.mark.parametrize("count", [17, 100, 2048])
def test_of_many_hosts_each_meets_some_in_few_rounds(count):
    rounds = rounds_of_hosts(count)
    assert len(rounds) <= count.bit_length()
    assert {host for pairs in rounds for pair in pairs for host in pair} == set(range(count))
    for pairs in rounds:
        busy = [host for pair in pairs for host in pair]
        assert len(busy) == len(set(busy))
        assert max(busy) < count


@pytest.mark.quick
def test_a_slow_pair_is_named_with_its_share_of_the_median():
    speeds = [LinkSpeed("hosts", f"between a and {name}", 40e9) for name in "bcd"]
    slow = LinkSpeed("hosts", "between b and c", 10e9)
    assert slow_links(speeds) == []
    (line,) = slow_links([*speeds, slow])
    assert line == ("WARNING: between b and c: 10.00 GB/s, 25% of what pairs of hosts have in the median (40.00 GB/s)")
    # groups are compared with their kind alone
    assert slow_links([*speeds, LinkSpeed("ep", "ep of ranks 0, 1 on a", 1e9)]) == []
    assert link_lines([*speeds, slow])[0] == "links: 4 pairs of hosts: 40.00 GB/s, 10.00 to 40.00"


@pytest.mark.quick
def test_one_process_has_no_links():
    assert measure_links(Mesh.single()) == []


def measured(mesh: Mesh) -> list[LinkSpeed]:
    # as if two processes lay on each of two hosts
    return measure_links(mesh, num_bytes=1 << 16, repeats=1, host=f"host{mesh.rank // 2}")


def test_pairs_of_hosts_and_groups_are_measured_alike_in_all_processes():
    results = run_on(MeshConfig(dp_shard=2, dp_replicate=2, ep=2), measured)
    assert all(result == results[0] for result in results)
    assert [speed.where for speed in results[0]] == [
        "between host0 and host1",
        "shard of ranks 0, 1 on host0",
        "replicate of ranks 0, 2 on host0, host1",
        "ep of ranks 0, 1 on host0",
        "replicate of ranks 1, 3 on host0, host1",
        "shard of ranks 2, 3 on host1",
        "ep of ranks 2, 3 on host1",
    ]
    assert all(speed.bytes_per_s > 0 for speed in results[0])
