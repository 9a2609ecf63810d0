"""Timing on a GPU: what the host takes to launch is not in it, what the GPU takes is."""

from __future__ import annotations

import time

import pytest
import torch

from pithwood.bench.timing import Timer

pytestmark = pytest.mark.gpu


def test_a_host_that_is_slow_to_launch_is_not_timed():
    x = torch.zeros(1024, device="cuda")

    def run() -> None:
        x.add_(1)
        time.sleep(3e-3)
        x.add_(1)

    assert Timer(torch.device("cuda"), target_s=0.05).measure(run).median_ms < 1


def test_a_run_takes_as_long_as_its_kernels():
    """Never less than its arithmetic allows: other processes' work on the same GPU can only lengthen a run."""
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    flops_per_s = 5e15  # more than any card reaches with such products
    floor_ms = 4 * 2 * 8192**3 / flops_per_s * 1e3
    assert Timer(torch.device("cuda"), 0.1).measure(lambda: [x @ x for _ in range(4)]).median_ms > floor_ms
