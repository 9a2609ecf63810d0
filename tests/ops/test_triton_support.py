"""What Triton is asked for before any kernel is compiled."""

from __future__ import annotations

import importlib
import os

import pytest

from pithwood.ops import triton_support

pytestmark = pytest.mark.quick
FUSION = "TRITON_DEFAULT_FP_FUSION"


@pytest.mark.parametrize(("before", "after"), [(None, "1"), ("0", "0")])
def test_products_and_sums_are_fused_unless_a_user_says_otherwise(monkeypatch, before, after):
    if before is None:
        monkeypatch.delenv(FUSION, raising=False)
    else:
        monkeypatch.setenv(FUSION, before)
    importlib.reload(triton_support)
    assert os.environ[FUSION] == after
