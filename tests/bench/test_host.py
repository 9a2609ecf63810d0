"""`python -m bench.host`: what a step costs the host, on one process."""

from __future__ import annotations

from bench import host
from pithwood.config import apply_overrides
from pithwood.recipes import load_recipe

SMALL = ["model.num_layers=3", "seq_len=32", "samples_per_step=2", "samples_per_micro_batch=1", "device=cpu"]


def test_a_row_tells_times_and_calls_per_layer_of_each_pass(monkeypatch):
    for name, value in (("WARM", 1), ("REPEATS", 3), ("PROFILED", 2), ("MOST", 1000)):
        monkeypatch.setattr(host, name, value)
    full, again = host.variants(apply_overrides(load_recipe("debug"), SMALL))[2:]
    rows = host.measured([full, again])
    assert [(row["attention"], row["recompute"]) for row in rows] == [
        ("FullAttention", "none"),
        ("FullAttention", "selective"),
    ]
    for row in rows:
        assert (row["mesh"], row["layers"], row["tokens"], row["device"]) == ("one process", 3, 32, "cpu")
        assert list(row["ms_per_layer"]) == ["forward", "backward", "gradients", "update"]
        assert min(row["ms_per_layer"].values()) > 0
        assert row["until_idle_ms"] is None
        for name, functions in row["functions"].items():
            own = [item["own_us"] for item in functions]
            assert own == sorted(own, reverse=True), name
        for name, file, calls in (
            ("forward", "attention/full.py", [1]),
            ("gradients", "attention/full.py", [1]),
            ("backward", "moe/experts.py", [1]),
            ("update", "attention/full.py", []),
        ):
            functions = row["functions"][name]
            named = [item for item in functions if item["function"].endswith((" forward", " backward"))]
            assert [item["calls"] for item in named if file in item["function"]] == calls, name
