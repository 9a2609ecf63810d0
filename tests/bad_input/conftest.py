"""The worlds in which the cases are tried."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.bad_input.case import Worlds


@pytest.fixture(scope="session")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worlds]:
    with Worlds(tmp_path_factory.mktemp("bad_input")) as made:
        yield made
