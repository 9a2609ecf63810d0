"""The worlds in which the cases are tried."""

from __future__ import annotations

import pytest

from tests.bad_input.case import Worlds
from tests.command_lines import Server


@pytest.fixture(scope="session")
def worlds(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Worlds:
    return Worlds(server, tmp_path_factory.mktemp("bad_input"))
