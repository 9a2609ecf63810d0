"""Comparable runs get a difference with an interval over seeds; others are refused with the reason."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest

from pithwood.attention.full import FullAttentionConfig
from pithwood.check.experiment import Comparison
from pithwood.check.gates import passed, report, run_gates
from pithwood.run import Run
from pithwood.train import train
from tests.test_train import small_run


def variant_of(base: Run, name: str) -> Run:
    return dataclasses.replace(base, name=name, model=dataclasses.replace(base.model, attention=FullAttentionConfig()))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """Runs of two settings with two seeds each, and oddities; never to be altered. Their folders' names by label."""
    folder = tmp_path_factory.mktemp("experiment")
    base = dataclasses.replace(small_run(folder / "text"), steps=4, sample_prompts=())
    dense = variant_of(base, "dense")
    wide = dataclasses.replace(base.data, validation_fraction=0.3)
    runs = {
        "moba0": base,
        "moba1": dataclasses.replace(base, seed=1),
        "dense0": dense,
        "dense1": dataclasses.replace(dense, seed=1),
        "longer0": dataclasses.replace(dense, name="longer", seq_len=32),
        "other0": dataclasses.replace(dense, name="other", data=wide),
        "lr1": dataclasses.replace(base, name="lr", seed=1, optim=dataclasses.replace(base.optim, lr=0.01)),
    }
    names = {}
    for label, run in runs.items():
        names[label] = Path(train(run, runs_dir=folder / "runs", console=False)["run_dir"]).name
    return folder / "runs", names


def lines(trained: tuple[Path, dict[str, str]], variant: str, baseline: str, min_seeds: int = 2) -> list[str]:
    runs_dir, names = trained
    sides = [[names.get(word, word) for word in side.split()] for side in (variant, baseline)]
    comparison = Comparison(sides[0], sides[1], runs_dir, min_seeds)
    return report(run_gates(comparison.gates())).splitlines()


@pytest.mark.slow
def test_comparable_runs_pass_with_the_difference_and_its_interval(trained):
    runs_dir, names = trained
    comparison = Comparison([names["moba0"], names["moba1"]], [names["dense1"], names["dense0"]], runs_dir)
    results = run_gates(comparison.gates())
    assert passed(results), report(results)
    assert "they differ in model.attention.type" in report(results)
    loss = {label: json.loads((runs_dir / names[label] / "summary.json").read_text())["validation_loss"]
            for label in ("moba0", "moba1", "dense0", "dense1")}  # fmt: skip
    pairs = [loss["moba0"] - loss["dense0"], loss["moba1"] - loss["dense1"]]
    found = comparison.differences()[0]
    assert found.mean == pytest.approx(sum(pairs) / 2)
    # two pairs: their standard deviation is |a - b| / sqrt(2), one degree of freedom
    assert found.half_width == pytest.approx(12.706 * abs(pairs[0] - pairs[1]) / math.sqrt(2) / math.sqrt(2))
    assert "95 % interval over 2 seeds" in results[-1].detail


@pytest.mark.parametrize(
    ("variant", "baseline", "last_line"),
    [
        ("moba0 moba1", "dense0", "FAIL seeds: the variant has seeds [0, 1], the baseline [0]; train the missing"),
        ("moba0", "dense0", "FAIL seeds: 1 seed tells nothing about chance"),
        ("moba0 moba0", "dense0 dense1", "FAIL runs: moba0 is named twice"),
        ("moba0", "moba1", "FAIL settings: variant and baseline have the same settings"),
        ("moba0 lr1", "dense0 dense1", "FAIL settings: lr1 differs from the first variant in optim.lr"),
        ("moba0 nothing", "dense0 dense1", "FAIL runs: ValueError: no run 'nothing'"),
    ],
)
def test_runs_that_cannot_be_compared_fail_with_the_reason(trained, variant, baseline, last_line):
    for label, name in trained[1].items():
        last_line = last_line.replace(label, name)
    assert lines(trained, variant, baseline)[-1].startswith(last_line)


@pytest.mark.parametrize(
    ("baseline", "last_line"),
    [("other0", "FAIL corpus: the runs saw different text or tokenizers"), ("longer0", "FAIL tokens: tokens differs")],
)
def test_other_text_and_other_lengths_are_not_compared(trained, baseline, last_line):
    assert lines(trained, "moba0", baseline, min_seeds=1)[-1].startswith(last_line)


def test_one_seed_passes_only_if_asked_for_and_claims_nothing(trained):
    found = lines(trained, "moba0", "dense0", min_seeds=1)
    assert found[-1] == "PASS"
    assert found[-2].endswith("one seed")


@pytest.mark.parametrize(
    ("change", "last_line"),
    [
        ({"validation_loss": "nan"}, "FAIL finite: "),
        ({"steps": 3}, "FAIL finished: "),
        (None, "FAIL finished: "),
    ],
)
def test_unfinished_and_diverged_runs_are_refused(trained, tmp_path, change, last_line):
    runs_dir, names = trained
    shutil.copytree(runs_dir, tmp_path / "runs")
    path = tmp_path / "runs" / names["dense1"] / "summary.json"
    if change is None:
        path.unlink()
    else:
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    found = lines((tmp_path / "runs", names), "moba0 moba1", "dense0 dense1")
    assert found[-1].startswith(last_line)
    assert names["dense1"] in found[-1]
