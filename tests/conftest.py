"""What all tests share: fixed seeds and threads, skips where hardware is missing, and no other skips in CI."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import settings

from pithwood.check.numerics import poisoned_memory
from tests.browser import missing_browser
from tests.command_lines import Server

NUM_THREADS = int(os.environ.get("OMP_NUM_THREADS", "1"))
"""Threads of this process and, through the environment, of those that tests start."""

os.environ["OMP_NUM_THREADS"] = str(NUM_THREADS)
if not torch.cuda.is_available():
    # Triton decides at its first import: where there is no GPU its kernels run in the interpreter.
    os.environ["TRITON_INTERPRET"] = "1"
torch.set_num_threads(NUM_THREADS)
# The examples are a function of the test alone; a busy machine must not turn a slow example into a failure.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")

_skipped = pytest.StashKey[dict[str, str]]()
_left_out = pytest.StashKey[str]()


def pytest_addoption(parser: pytest.Parser) -> None:
    help_text = "fail if a test without gpu or multi_gpu mark is skipped; CI=true implies it"
    parser.addoption("--no-skips", action="store_true", help=help_text)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_skipped] = {}
    config.pluginmanager.register(_SkipWatch(config), "skip-watch")


def pytest_runtest_setup(item: pytest.Item) -> None:
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if item.get_closest_marker("multi_gpu") and found < 2:
        pytest.skip(f"needs two CUDA GPUs, torch sees {found}")
    if item.get_closest_marker("gpu") and found < 1:
        pytest.skip("needs a CUDA GPU, torch sees none")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    looking = [item for item in items if item.get_closest_marker("browser")]
    reason = missing_browser() if looking else None
    if reason is not None:
        # What is missing is a library of the system, which no package index has: these tests do not belong here.
        items[:] = [item for item in items if item not in looking]
        config.hook.pytest_deselected(items=looking)
        config.stash[_left_out] = f"{len(looking)} browser tests left out: {reason}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    reason = config.stash.get(_left_out, None)
    if reason is None and config.pluginmanager.hasplugin("dsession"):
        reason = missing_browser()
        reason = reason and f"browser tests are left out here: {reason}"
    if reason is not None:
        terminalreporter.write_line(reason)


class _SkipWatch:
    """Collects skips of tests that should have run here; with test processes (-n) it works where reports arrive."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.skipped = config.stash[_skipped]

    def active(self) -> bool:
        if hasattr(self.config, "workerinput"):  # a test process; the one that started it judges
            return False
        return bool(self.config.getoption("--no-skips")) or os.environ.get("CI", "").lower() in ("true", "1")

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
        passed = session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
        if self.active() and self.skipped and passed:
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


@pytest.fixture(autouse=True)
def _memory_given_back() -> Iterator[None]:
    """What a test took of a GPU and no longer uses goes back, so that several test processes can share one."""
    yield
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Command lines of `pithwood` in processes of their own, without the seconds that a fresh interpreter takes."""
    with Server(tmp_path_factory.mktemp("server")) as made:
        yield made


@pytest.fixture
def poison() -> Iterator[None]:
    """Fresh memory of torch.empty and its like holds NaN (or the largest int) in the test, so that reading it shows."""
    with poisoned_memory():
        yield
