"""The attention benchmark on a CPU: its reference, its checks, budgets, memory of earlier rows, the picture."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import pytest
import torch
from matplotlib.figure import Figure

from pithwood.bench import attention, timing
from pithwood.bench.attention import Bench, Options, check, measured, relative_error
from pithwood.bench.cases import Case, Shape, dense_cases, grid, preset, row_key, row_order
from pithwood.bench.implementations import flex_attention_of, moba, route
from pithwood.bench.inputs import TrainedRun, load_qkv, random_inputs, save_qkv
from pithwood.bench.plot import _panel, plot_attention
from pithwood.bench.reference import masked_attention, selection_errors
from pithwood.bench.results import merge_rows, read_results, write_results
from pithwood.cli import main
from pithwood.ops import Packing, select, summarise
from pithwood.ops.select.means import rounded_means
from tests.numerics import assert_close
from tests.ops import reference

CPU = torch.device("cpu")
SMALL = Case(Shape((100, 1, 37), heads=4, kv_heads=2, head_dim=8, dtype="fp32"), "fwd+bwd", 16, 3)


@pytest.fixture(autouse=True)
def _few_repetitions(monkeypatch):
    """These tests ask what is measured, not how well."""
    monkeypatch.setattr(timing, "MOST_REPS", timing.LEAST_REPS)
    monkeypatch.setattr(timing, "CPU_MATMUL_SIZE", 512)


@pytest.mark.quick
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("live", [1, 300, 1 << 22])
def test_the_reference_is_that_of_the_op_tests_however_it_is_cut(sparse, live, monkeypatch):
    monkeypatch.setattr("pithwood.bench.reference.LIVE_SCORES", live)
    inputs = reference.make_inputs([70, 0, 1, 33], heads=4, kv_heads=2, dim=8, value_dim=12, dtype=torch.float64)
    selection = reference.random_selection(inputs.packing, 16, 3, sets=4) if sparse else None
    if selection is None:
        masks = reference.dense_masks(inputs.packing, 4)
    else:
        masks = reference.masks_of_ids(selection.ids, 16, inputs.packing)
    o, lse = reference.attention(*inputs, masks)
    grad_o = torch.randn_like(o)
    grads = torch.autograd.grad(o, inputs[:3], grad_o)
    ids = None if selection is None else selection.ids
    found = masked_attention(*inputs[:3], inputs.packing.cu_q, ids, 16, grad_o)
    assert_close(found["o"], o)
    reference.assert_lse_close(found["lse"], lse)
    for name, grad in zip(("dq", "dk", "dv"), grads, strict=True):
        assert_close(found[name], grad, what=name)


def choice(top_k: int = 3):
    """A correct selection and what `selection_errors` needs to judge it."""
    q, k, _, packing = reference.make_inputs([100, 0, 1, 37], heads=4, kv_heads=2, dim=8)
    means = summarise(k, packing, 16)
    ids = select(q, means, packing, top_k, block_size=16, mean_dtype="centered").ids
    scored = rounded_means(means, packing, 16, "centered", k.dtype)
    return ids, (q.detach(), scored, packing.cu_q, packing.unit_offsets(16), 16, top_k)


@pytest.mark.quick
@pytest.mark.parametrize("top_k", [1, 2, 3, 12])
def test_a_correct_selection_has_no_errors(top_k):
    ids, rest = choice(top_k)
    assert selection_errors(ids, *rest) == 0


@pytest.mark.quick
def test_every_kind_of_wrong_selection_is_counted():
    ids, rest = choice()
    row = 95  # in block 5: five candidates, two chosen
    chosen = set(ids[row, 0].tolist())
    left_out = min(set(range(5)) - chosen)
    for wrong in (
        sorted({left_out, *sorted(chosen)[1:]}),  # a worse block instead of a better one
        [*sorted(chosen)[:-1], -1],  # own block missing
        [5, -1, -1],  # too few
        [0, 0, 5],  # one twice
        [5, *sorted(chosen)[:-1]],  # not in order
        [*sorted(chosen)[1:], 6],  # a block of the future
    ):
        spoiled = ids.clone()
        spoiled[row, 0] = torch.tensor(wrong, dtype=torch.int32)
        assert selection_errors(spoiled, *rest) == 1, wrong


@pytest.mark.quick
@pytest.mark.parametrize("pass_", ["fwd", "fwd+bwd"])
@pytest.mark.parametrize("name", ["pithwood", "pithwood-torch", "sdpa"])
def test_correct_implementations_pass_their_check(name, pass_):
    case = Case(SMALL.shape, pass_, *(SMALL.blocks if name != "sdpa" else ()))
    errors, fault = check(case, name, random_inputs(case.shape, CPU))
    assert fault is None
    assert {"o", "dq", "dk", "dv"} & set(errors) == ({"o"} if pass_ == "fwd" else {"o", "dq", "dk", "dv"})


def test_an_implementation_that_is_wrong_gets_no_numbers(monkeypatch):
    def leaky(q, k, v, packing, **options):
        return moba(q, k, v, packing, **options).roll(1, 0)

    monkeypatch.setattr("pithwood.bench.implementations.moba", leaky)
    lines: list[str] = []
    bench = Bench(CPU, Options(("pithwood", "sdpa")), lines.append, lambda shape: random_inputs(shape, CPU))
    rows = [row for row in bench.run([SMALL]) if row["op"] != "peak"]
    assert [row["impl"] for row in rows] == ["pithwood", "sdpa"]
    assert "failed its check: o is off by" in rows[0]["status"]
    assert "median_ms" not in rows[0]
    assert rows[1]["median_ms"] > 0
    assert any("failed its check" in line for line in lines)


@pytest.mark.quick
def test_not_a_number_is_an_infinite_error():
    assert relative_error(torch.tensor([1.0, math.nan]), torch.ones(2)) == math.inf
    assert relative_error(torch.ones(2), torch.ones(2)) == 0.0


def test_an_error_in_one_implementation_leaves_the_others_their_rows(monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("no such\nkernel")

    def large(*args, **options):
        raise torch.cuda.OutOfMemoryError("too much")

    for function, status in ((broken, "failed: RuntimeError: no such kernel"), (large, "out of memory")):
        monkeypatch.setattr("pithwood.bench.implementations.moba", function)
        bench = Bench(CPU, Options(("pithwood", "sdpa")), lambda line: None, lambda shape: random_inputs(shape, CPU))
        found = {row["impl"]: row["status"] for row in bench.run([SMALL])}
        assert (found["pithwood"], found["sdpa"]) == (status, "ok")


def test_rows_that_the_budget_does_not_hold_are_reported_as_skipped():
    bench = Bench(
        CPU, Options(("pithwood",), budget_s=30.0), lambda line: None, lambda shape: random_inputs(shape, CPU)
    )
    long = Case(Shape((1 << 20,)), "fwd+bwd", 128, 8)
    rows = {row["length"]: row for row in bench.run([SMALL, long]) if row["op"] != "peak"}
    assert rows[100]["status"] == "ok"
    assert "skipped: about" in rows[1 << 20]["status"]


@pytest.mark.quick
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_flex_attention_gets_the_mask_of_the_selection(heads):
    shape = Shape((300, 1, 211), *heads, 16, "fp32")
    for size, k in ((16, 3), (64, 2), (200, 2)):
        case, inputs = Case(shape, "fwd", size, k), random_inputs(shape, CPU)
        selection = route(inputs.q, inputs.k, inputs.packing, case)
        run = flex_attention_of(inputs.q, inputs.k, inputs.packing, selection, compiled=False)
        expected = masked_attention(inputs.q, inputs.k, inputs.v, inputs.packing.cu_q, selection.ids, size)["o"]
        assert_close(run(inputs.q, inputs.k, inputs.v), expected)


@pytest.mark.quick
def test_flex_attention_lists_no_tile_that_nobody_needs():
    packing = Packing.from_lengths([1024])
    case = Case(Shape((1024,), 1, 1, 16, "fp32"), "fwd", 128, 1)
    inputs = random_inputs(case.shape, CPU)
    from pithwood.bench.implementations import _needed_tiles

    ids = route(inputs.q, inputs.k, packing, case).ids.transpose(0, 1)
    assert torch.equal(_needed_tiles(ids, packing, 128, 1024)[0], torch.eye(8, dtype=torch.bool))


@pytest.mark.quick
def test_merged_rows_keep_what_was_measured():
    case = SMALL.columns()
    old = [
        {**case, "impl": "a", "status": "ok", "median_ms": 1.0},
        {**case, "impl": "b", "status": "out of memory"},
        {**case, "impl": "c", "status": "ok", "median_ms": 3.0},
    ]
    new = [
        {**case, "impl": "a", "status": "ok", "median_ms": 9.0},
        {**case, "impl": "b", "status": "skipped: 5 s"},
        {**case, "impl": "c", "status": "skipped: 5 s"},
        {**case, "impl": "d", "status": "skipped: 5 s"},
    ]
    merged = merge_rows(old, new, row_key, measured)
    assert [(row["impl"], row.get("median_ms"), row["status"]) for row in merged] == [
        ("a", 9.0, "ok"),
        ("b", None, "skipped: 5 s"),
        ("c", 3.0, "ok"),
        ("d", None, "skipped: 5 s"),
    ]


@pytest.mark.quick
def test_rows_stand_by_their_heads_and_lengths_with_the_dense_ones_last():
    def row(length: int, op: str = "moba", **more) -> dict:
        heads = {"heads": 16, "kv_heads": 16, "head_dim": 128, "dtype": "bf16", "inputs": "random", "lengths": None}
        blocks = {"block_size": 128, "top_k": 8} if op == "moba" else {"block_size": None, "top_k": None}
        return {"op": op, "impl": "a", "pass": "fwd", "length": length, "sequences": 1, **heads, **blocks, **more}

    expected = [
        *({"op": "peak", "impl": "matmul"}, row(8), {**row(8), "pass": "fwd+bwd"}, row(8, block_size=512)),
        *(row(8, "dense"), row(64), row(64, "dense"), row(16, lengths=[16, 3]), row(8, kv_heads=4, heads=32)),
        *(row(8, head_dim=64), row(8, inputs="trained", layer=3), row(8, inputs="trained", layer=12)),
    ]
    mixed = random.Random(0).sample(expected, len(expected))
    assert sorted(mixed, key=row_order) == expected


@pytest.mark.quick
def test_files_that_are_no_results_of_this_machine_are_left_alone(tmp_path: Path):
    (tmp_path / "other.json").write_text('{"rows": 3}')
    with pytest.raises(ValueError, match="is not a results file"):
        read_results(tmp_path / "other.json")
    path = write_results("attention", [], tmp_path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "device": "abacus"}))
    with pytest.raises(ValueError, match="holds results of abacus, this machine is"):
        read_results(path)
    assert read_results(tmp_path / "missing.json") is None


def made_rows(cases: list[Case]) -> list[dict]:
    """Rows as a fast sparse and a quadratic dense kernel would give."""
    rows = []
    for case in (*cases, *dense_cases(cases)):
        names = ("pithwood", "flex") if case.op == "moba" else ("fa4", "cudnn")
        for i, name in enumerate(names):
            ms = attention.work_of(case).useful_flops / 4e11 * (1 + 0.5 * i)
            rows.append({**case.columns(), "impl": name, "status": "ok", "median_ms": ms})
    return rows


def test_the_picture_shows_every_shape_and_pass(tmp_path: Path):
    rows = made_rows(preset("issue") + preset("gqa"))
    assert plot_attention(rows, tmp_path / "a.png")
    pixels = matplotlib.image.imread(tmp_path / "a.png")[..., :3]
    assert pixels.shape[0] > 900  # two shapes
    assert pixels.std() > 0.01
    for colour in ("#d1495b", "#111827"):  # MoBA and flash-attention 4
        rgb = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        assert (abs(pixels - rgb).max(-1) < 0.02).sum() > 30
    one_pass = [row for row in rows if row["kv_heads"] == 16 or row["pass"] == "fwd"]
    assert plot_attention(one_pass, tmp_path / "a.png")
    skipped = [{**row, "status": "out of memory"} for row in rows]
    assert not plot_attention(skipped, tmp_path / "b.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def panel_of(rows: list[dict]):
    """What is drawn of rows of one shape: the axis's label, and of each line its lengths and whether it is hollow."""
    ax = Figure().subplots()
    _panel(ax, rows, {(128, 8): "#d1495b"})
    drawn = [([int(x) for x in line.get_xdata()], line.get_markerfacecolor() == "white") for line in ax.get_lines()]
    return ax.get_xlabel(), drawn, [text.get_text() for text in ax.get_legend().get_texts()]


@pytest.mark.quick
def test_a_line_joins_no_points_of_other_numbers_of_sequences():
    def rows(*shapes: tuple[int, int]) -> list[dict]:
        shape = {"impl": "pithwood", "block_size": 128, "top_k": 8, "median_ms": 2.0}
        return [{**shape, "length": length, "sequences": sequences} for length, sequences in shapes]

    assert panel_of(rows((1 << 20, 1), (8192, 2), (32768, 2))) == (
        "tokens per sequence (2 sequences; hollow: 1)",
        [([8192, 32768], False), ([1 << 20], True)],
        ["MoBA (128, 8)"],
    )
    # as many tokens in each: only their length differs
    assert panel_of(rows((2048, 32), (6144, 10), (65536, 1))) == (
        "tokens per sequence (1 to 32 sequences, together about 64K tokens)",
        [([2048, 6144, 65536], False)],
        ["MoBA (128, 8)"],
    )
    assert panel_of(rows((2048, 1), (4096, 1)))[0] == "tokens per sequence (1 sequence)"


@pytest.mark.quick
def test_rows_stand_beside_the_fastest_dense_attention_of_the_same_shape():
    cases = [c for c in preset("issue") if c.shape.length <= 32768]
    rows = [{**row, "peak_gb": 2.0 if row["op"] == "moba" else 1.6} for row in made_rows(cases)]
    fast = next(row for row in rows if row["impl"] == "cudnn" and row["length"] == 8192 and row["pass"] == "fwd")
    fast["median_ms"] = 1e-3
    beside = [row for row in attention.beside_dense(rows) if row["op"] == "moba" and row["impl"] == "pithwood"]
    assert len(beside) == len(cases)
    for row in beside:
        dense = [r for r in rows if r["op"] == "dense" and all(r[c] == row[c] for c in ("length", "pass"))]
        best = min(dense, key=lambda r: r["median_ms"])
        assert row["dense_impl"] == best["impl"]
        assert row["over_dense"] == pytest.approx(row["median_ms"] / best["median_ms"])
        assert row["memory_over_dense"] == pytest.approx(1.25)
        assert row["length_over_kb"] == row["length"] / (row["block_size"] * row["top_k"])
    only_moba = [row for row in rows if row["op"] == "moba"]
    assert not any("over_dense" in row for row in attention.beside_dense(only_moba))


def test_cheap_shapes_come_first_and_every_row_is_saved(monkeypatch):
    saved: list[int] = []
    cases = grid({"length": [96, 32], "heads": [2], "head_dim": [16], "dtype": ["fp32"], "blocks": [(16, 2)]})
    bench = Bench(
        CPU, Options(("pithwood", "sdpa"), budget_s=60), lambda line: None, lambda shape: random_inputs(shape, CPU),
        lambda rows: saved.append(len(rows)),
    )  # fmt: skip
    rows = bench.run(cases)
    assert [row["length"] for row in rows[2:]] == [32] * 4 + [96] * 4
    assert saved == list(range(3, 11))  # after the two peaks


def test_saved_queries_and_keys_are_measured_at_the_lengths_asked_for(tmp_path: Path, capsys):
    from types import SimpleNamespace
    from typing import Any, cast

    q, k, v = (torch.randn(150, heads, 16).bfloat16() for heads in (4, 2, 2))
    batch: Any = SimpleNamespace(packing=Packing.from_lengths([10, 100, 40]))
    trained = TrainedRun("run@7", cast(Any, None), cast(Any, None), batch, torch.float32)
    path = save_qkv(tmp_path / "qkv.npz", trained, 3, (q, k, v))
    found = load_qkv(path)
    assert (found.source, found.layer) == ("run@7", 3)
    assert torch.equal(found.q, q[10:110])
    inputs = found.inputs(found.shape(64, 2), CPU)
    assert torch.equal(inputs.v, v[10:74].repeat(2, 1, 1))
    words = ["bench", "attention", "--trained", str(path), "--blocks", "16x2", "--dtype", "fp32", "--json"]
    assert main([*words, "--length", "64,100", "--pass", "fwd", "--out", str(tmp_path)]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"][2:]
    assert [(row["length"], row["op"], row["layer"], row["source"]) for row in rows] == [
        (n, op, 3, "run@7") for n in (64, 100) for op in ("moba", "dense")
    ]
    assert rows[0]["over_dense"] == pytest.approx(rows[0]["median_ms"] / rows[1]["median_ms"])
    assert main([*words, "--length", "101", "--out", str(tmp_path)]) == 2
    assert "--length 101 is more than the 100 tokens" in capsys.readouterr().err


TINY = ["--documents", "70,1,90", "--heads", "2", "--head-dim", "16", "--dtype", "fp32", "--blocks", "16x2"]


def test_the_command_measures_appends_and_keeps_one_file(tmp_path: Path, capsys):
    words = ["bench", "attention", *TINY, "--out", str(tmp_path), "--json"]
    assert main([*words, "--pass", "fwd", "--breakdown"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert [row["op"] for row in first["rows"]] == ["peak", "peak", "moba", "dense"]
    assert first["rows"][2]["lengths"] == [70, 1, 90]
    assert {"summarise", "select", "attend_fwd"} == set(first["rows"][2]["breakdown"])
    assert first["plot"] is None
    assert main([*words, "--pass", "fwd+bwd", "--append"]) == 0
    capsys.readouterr()
    content = json.loads((tmp_path / "attention.json").read_text())
    assert [(row["op"], row.get("pass")) for row in content["rows"]] == [
        *(("peak", None), ("peak", None), ("moba", "fwd"), ("moba", "fwd+bwd")),
        *(("dense", "fwd"), ("dense", "fwd+bwd")),
    ]
    assert all(row["commit"] and row["date"] for row in content["rows"])
    took = {row["command"] for row in content["rows"] if row.get("pass") == "fwd"}
    assert ["--breakdown" in command for command in took] == [True]
    assert content["command"].split(" && ") == list(dict.fromkeys(row["command"] for row in content["rows"]))
    for row in content["rows"][2:]:
        assert row["median_ms"] >= row["floor_ms"] * 0.3
        assert row["over_floor"] == pytest.approx(row["median_ms"] / row["floor_ms"])
        assert row["check"]["o"] < 1e-4


def test_a_files_command_names_those_that_its_rows_are_of(tmp_path: Path):
    words, path = ["bench", "attention", *TINY, "--out", str(tmp_path), "--pass", "fwd"], tmp_path / "attention.json"
    assert main([*words, "--impls", "pithwood,sdpa"]) == 0
    content = json.loads(path.read_text())
    for row in content["rows"]:  # as files were before rows named their command
        del row["command"]
    path.write_text(json.dumps({**content, "command": "one && another"}))
    assert main([*words, "--impls", "pithwood", "--append"]) == 0
    assert json.loads(path.read_text())["command"].startswith("one && another && pithwood bench attention ")
    assert main([*words, "--impls", "sdpa", "--append"]) == 0
    last = json.loads(path.read_text())["command"]
    assert "another" not in last
    assert last.count("pithwood bench attention ") == 2


def test_a_picture_of_rows_that_the_file_no_longer_has_is_removed(tmp_path: Path):
    words = ["bench", "attention", "--pass", "fwd", "--out", str(tmp_path)]
    assert main([*words, "--length", "64", *TINY[2:]]) == 0
    assert (tmp_path / "attention.png").is_file()
    assert main([*words, *TINY, "--append"]) == 0
    assert (tmp_path / "attention.png").is_file()
    assert main([*words, *TINY]) == 0  # packed documents alone, which are not drawn
    assert [path.name for path in tmp_path.iterdir()] == ["attention.json"]


def test_without_json_there_is_a_line_per_row_and_where_it_was_written(tmp_path: Path, capsys):
    assert main(["bench", "attention", *TINY, "--pass", "fwd", "--out", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert [len(line) < 160 for line in lines] == [True] * len(lines)
    assert "(16,2) pithwood" in lines[0]
    assert lines[-2:] == ["2 rows measured, 0 not; spread is the interquartile range", f"{tmp_path}/attention.json"]
    # progress says what is being measured; the rows themselves stand on stdout only
    assert " ms (iqr" not in err
    assert [line.split()[-2:] for line in err.splitlines() if line.startswith("measuring ")] == [
        ["pithwood", "fwd"],
        ["sdpa", "fwd"],
    ]


def test_where_nothing_could_be_measured_the_file_keeps_its_rows(tmp_path: Path, capsys):
    words = ["bench", "attention", *TINY, "--out", str(tmp_path)]
    none = [*words, "--impls", "flash"]
    assert main(none) == 1
    assert capsys.readouterr().out.splitlines()[1:] == ["nothing was measured"]
    assert not list(tmp_path.iterdir())
    assert main([*words, "--impls", "pithwood,flash", "--pass", "fwd"]) == 0
    assert "1 rows measured, 1 not;" in capsys.readouterr().out
    before = (tmp_path / "attention.json").read_bytes()
    for more in ([], ["--append"]):
        assert main([*none, *more]) == 1
        assert capsys.readouterr().out.splitlines() == [
            "0 rows measured, 2 not; spread is the interquartile range",
            f"nothing was measured; {tmp_path}/attention.json keeps the rows it had",
        ]
        assert (tmp_path / "attention.json").read_bytes() == before
    assert main([*none, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["file"] is None


def test_floors_assume_the_products_of_the_rows_own_dtype(monkeypatch):
    peaks = {torch.float32: timing.Peaks(1e9, 1e12), torch.bfloat16: timing.Peaks(4e9, 1e12)}
    monkeypatch.setattr(timing.Timer, "peaks", lambda self, dtype: peaks[dtype])
    cases = [replace(SMALL, shape=replace(SMALL.shape, dtype=dtype), pass_="fwd") for dtype in ("fp32", "bf16")]
    rows = Bench(CPU, Options(("sdpa",)), lambda line: None, lambda shape: random_inputs(shape, CPU)).run(cases)
    assert [(row["impl"], row.get("dtype")) for row in rows[:3]] == [
        ("matmul", "fp32"),
        ("matmul", "bf16"),
        ("copy", None),
    ]
    floors = {row["dtype"]: row["floor_ms"] for row in rows[3:]}
    assert floors["fp32"] == pytest.approx(4 * floors["bf16"])


@pytest.mark.quick
def test_a_dry_run_measures_nothing(tmp_path: Path, capsys):
    assert main(["bench", "attention", "--rows", "issue", "--dry-run", "--json", "--out", str(tmp_path)]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert len(rows) == 14 + 8
    longest = next(row for row in rows if row["length"] == 1 << 20 and row["pass"] == "fwd")
    # 7 past blocks of 128 and half the own one, 16 heads; every query scores half of 8192 means
    assert longest["useful_tflop"] == pytest.approx(4 * 16 * 128 * 2**20 * (7.5 * 128) / 1e12, rel=0.01)
    assert longest["gate_tflop"] == pytest.approx(2 * 16 * 128 * 2**20 * 4096 / 1e12, rel=0.01)
    assert not list(tmp_path.iterdir())


@pytest.mark.quick
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rows", "all"], "--rows all is not known; choose among issue, gqa, d64, packed, smoke, 8K-128x8"),
        (["--blocks", "128"], "--blocks 128 is not block size x top k"),
        (["--blocks", "0x8"], "--blocks 0x8 is not block size x top k"),
        (["--length", "8k"], "--length 8k is not a whole number of at least 1"),
        (["--heads", "0"], "--heads 0 is not a whole number"),
        (["--heads", "6", "--kv-heads", "4"], "--heads 6 must be a multiple of --kv-heads 4"),
        (["--dtype", "fp8"], "--dtype fp8 is not known; choose among bf16, fp16, fp32"),
        (["--pass", "bwd"], "--pass bwd is not known; choose among fwd, fwd+bwd"),
        (["--impls", "fa5"], "--impls fa5 is not known; choose among pithwood"),
        (["--rows", "issue", "--length", "5"], "no row has length in [5]"),
        (["--layer", "0"], "--layer chooses layers of a trained run"),
        (["--trained", "x", "--heads", "4"], "--heads does not go with --trained x"),
        (["--trained", "x.npz"], "--trained x.npz needs --blocks"),
        (["--trained", "x.npz", "--blocks", "16x2"], "x.npz does not hold saved q, k, v"),
        (["--documents", "5", "--length", "5"], "--documents says all about lengths"),
        (["--budget-s", "0"], "--budget-s=0.0 must be above 0"),
    ],
)
def test_bad_options_give_one_clear_line(words, message, capsys, monkeypatch):
    monkeypatch.delenv("PITHWOOD_TRACEBACK", raising=False)
    assert main(["bench", "attention", *words]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err


def test_a_grid_is_measured_shape_by_shape_with_moba_first():
    cases = grid({"length": [64], "heads": [2], "head_dim": [16], "dtype": ["fp32"], "blocks": [(16, 2), (32, 1)]})
    bench = Bench(CPU, Options(("pithwood", "sdpa")), lambda line: None, lambda shape: random_inputs(shape, CPU))
    rows = [row for row in bench.run(cases) if row["op"] != "peak"]
    assert [row["impl"] for row in rows] == ["pithwood"] * 4 + ["sdpa"] * 2
