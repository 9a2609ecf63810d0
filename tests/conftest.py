"""What all tests share: fixed seeds and threads, markers that skip where hardware is missing, and no silent skips in CI."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import settings

NUM_THREADS = int(os.environ.get("OMP_NUM_THREADS", "1"))
"""Threads of this process and, through the environment, of those that tests start."""

os.environ["OMP_NUM_THREADS"] = str(NUM_THREADS)
torch.set_num_threads(NUM_THREADS)
# The examples are a function of the test alone; a busy machine must not turn a slow example into a failure.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")

_skipped = pytest.StashKey[dict[str, str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--no-skips", action="store_true", help="fail if a test without gpu or multi_gpu mark is skipped (CI=true implies it)"
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_skipped] = {}
    config.pluginmanager.register(_SkipWatch(config), "skip-watch")


def pytest_runtest_setup(item: pytest.Item) -> None:
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if item.get_closest_marker("multi_gpu") and found < 2:
        pytest.skip(f"needs two CUDA GPUs, torch sees {found}")
    if item.get_closest_marker("gpu") and found < 1:
        pytest.skip("needs a CUDA GPU, torch sees none")


class _SkipWatch:
    """Collects skips of tests that should have run here; with test processes (-n) it works where their reports arrive."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.skipped = config.stash[_skipped]

    def active(self) -> bool:
        is_worker = hasattr(self.config, "workerinput")
        return not is_worker and (
            self.config.getoption("--no-skips") or os.environ.get("CI", "").lower() in ("true", "1")
        )

    def note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        expected = hasattr(report, "wasxfail") or {"gpu", "multi_gpu"} & set(getattr(report, "keywords", ()))
        if report.skipped and not expected:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self.skipped[report.nodeid] = reason

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.note(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self.note(report)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if (
            self.active()
            and self.skipped
            and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
        ):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.active() and self.skipped:
            terminalreporter.section("skipped although they need no GPU: this fails the run", red=True)
            for nodeid, reason in sorted(self.skipped.items()):
                terminalreporter.write_line(f"{nodeid}: {reason}")


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def poison() -> Iterator[None]:
    """Fresh memory of torch.empty and its like holds NaN (or the largest int) during the test, so that reading it shows."""
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    was_warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    was_filling = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_deterministic, warn_only=was_warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = was_filling
