"""Losses and raw gradients of two settings or commits: equal ones pass, unequal ones and NaN never do."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from pithwood.check.checkout import ROOT
from pithwood.check.correctness import Limits, Record, comparison_gates, correctness_gates, read_record
from pithwood.check.gates import report, run_gates
from pithwood.check.record import record
from pithwood.run import Run
from tests.test_train import small_run


def made(**tensors: torch.Tensor) -> Record:
    basis = {"losses": torch.ones(2, dtype=torch.float64), "loss.loss": torch.ones(1), "grad.w": torch.ones(3)}
    return Record({**basis, **tensors}, {"corpus": "c", "tokens_per_step": "8"})


def verdict(here: Record, there: Record, limits: Limits | None = None) -> str:
    return report(run_gates(comparison_gates(lambda: (here, there), limits or Limits()))).splitlines()[-1]


@pytest.mark.quick
@pytest.mark.parametrize(
    ("here", "there", "last_line"),
    [
        (made(), made(), "PASS"),
        (made(), made(**{"grad.w": torch.ones(3) + 1e-4}), "FAIL gradients: w differs by 1.0e-04, allowed 1e-05"),
        (made(), made(**{"loss.loss": torch.ones(1) + 1e-4}), "FAIL loss: the loss term 'loss' differs"),
        (made(), made(losses=torch.tensor([1.0, 1.1]).double()), "FAIL later losses: the loss of step 2 differs"),
        (made(), made(**{"grad.w": torch.ones(4)}), "FAIL parameters: w has shape [3] here and [4] there"),
        (made(), made(**{"grad.v": torch.ones(4)}), "FAIL parameters: v exists on one side only"),
        (
            made(),
            dataclasses.replace(made(), metadata={"corpus": "d"}),
            "FAIL same data: corpus differs: c here, d there",
        ),
        (
            made(**{"grad.w": torch.zeros(3)}),
            made(**{"grad.w": torch.zeros(3)}),
            "FAIL gradients: every gradient is zero",
        ),
    ],
)
def test_the_gates_on_two_records(here, there, last_line):
    assert verdict(here, there).startswith(last_line)


@pytest.mark.quick
@pytest.mark.parametrize("name", ["grad.w", "loss.loss", "losses"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_never_pass_even_where_both_sides_have_them(name, value):
    bad = made()
    bad.tensors[name][-1] = value
    loose = Limits(1e9, 1e9, 1e9)
    assert verdict(bad, bad, loose).startswith(f"FAIL finite: here, {name} holds 1 values")
    assert verdict(made(), bad, loose).startswith(f"FAIL finite: there, {name} holds 1 values")


@pytest.mark.quick
def test_exact_limits_demand_the_same_bits():
    nudged = made(**{"grad.w": torch.nextafter(torch.ones(3), torch.full((3,), 2.0))})
    assert verdict(made(), nudged) == "PASS"
    assert verdict(made(), nudged, Limits(0.0, 0.0, 0.0)).startswith("FAIL gradients")


@pytest.mark.quick
def test_a_gradient_that_differs_comes_with_the_decisions_that_differ():
    ids = torch.tensor([[0, 1], [2, 3]])
    here = made(**{"decision.layers.0.experts": ids})
    there = made(**{"decision.layers.0.experts": ids.flip(1), "grad.w": 2 * torch.ones(3)})
    assert "4 of 4 ids chosen by routers and block selection differ" in verdict(here, there)


def small(folder: Path, **fields: object) -> Run:
    return dataclasses.replace(small_run(folder / "text"), **fields)  # type: ignore[arg-type]


def recorded(run: Run, folder: Path, name: str) -> Record:
    record(run, folder / name, 2, folder / "runs")
    return read_record(folder / name)


def test_micro_batches_do_not_change_losses_and_raw_gradients(tmp_path):
    run = small(tmp_path)
    moe = dataclasses.replace(run.model.moe, balance="sequence")
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, moe=moe))
    here = recorded(run, tmp_path, "a")
    there = recorded(dataclasses.replace(run, samples_per_micro_batch=4), tmp_path, "b")
    assert verdict(here, there) == "PASS"
    assert {"loss", "moe_balance"} <= set(here.group("loss"))


def test_a_changed_setting_shows_at_the_loss(tmp_path):
    run = small(tmp_path)
    attention = dataclasses.replace(run.model.attention, softmax_scale=0.1)  # type: ignore[type-var]
    other = dataclasses.replace(run, model=dataclasses.replace(run.model, attention=attention))
    here, there = recorded(run, tmp_path, "a"), recorded(other, tmp_path, "b")
    assert verdict(here, there).startswith("FAIL loss: the loss term 'loss' differs")


def test_a_model_that_diverges_at_once_does_not_pass_against_itself(tmp_path):
    run = small(tmp_path)
    wild = dataclasses.replace(run, model=dataclasses.replace(run.model, init_std=1e38))
    here = recorded(wild, tmp_path, "a")
    assert verdict(here, here, Limits(1e9, 1e9, 1e9)).startswith("FAIL finite: here, ")


def test_another_learning_rate_shows_in_later_losses_only(tmp_path):
    run = small(tmp_path)
    other = dataclasses.replace(run, optim=dataclasses.replace(run.optim, lr=0.2))
    here, there = recorded(run, tmp_path, "a"), recorded(other, tmp_path, "b")
    assert verdict(here, there).startswith("FAIL later losses: the loss of step 2 differs")


@pytest.mark.quick
def test_a_comparison_with_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="give --against path=value, or --commit REV"):
        correctness_gates("debug", [], [], None, Limits(), 1, tmp_path)


def commit(root: Path, message: str) -> str:
    """Commit everything in a repository of this test's own; returns the hash."""
    for words in (
        ["add", "-A"],
        ["-c", "user.name=test", "-c", "user.email=test@example.org", "commit", "-q", "-m", message],
    ):
        subprocess.run(["git", *words], cwd=root, check=True, capture_output=True)
    return subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.mark.slow
def test_commits_are_compared_with_the_present_code(tmp_path):
    root = tmp_path / "repository"
    shutil.copytree(ROOT / "pithwood", root / "pithwood", ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    same = commit(root, "The code as it is")
    swiglu = root / "pithwood" / "ops" / "swiglu" / "ref.py"
    before = swiglu.read_text()
    after = before.replace("hidden = F.silu(gate)", "hidden = 1.001 * F.silu(gate)")
    assert after != before
    swiglu.write_text(after)
    other = commit(root, "A product that is a little too large")
    settings = ["data.max_bytes=200_000", "seq_len=128", "samples_per_step=2", "samples_per_micro_batch=2"]

    def against(revision: str) -> str:
        exact = Limits(0.0, 0.0, 0.0)
        gates = correctness_gates("debug", settings, [], revision, exact, 2, tmp_path / "runs", root)
        return report(run_gates(gates)).splitlines()[-1]

    assert against(same) == "PASS"
    # at the start of training the loss hides the error entirely; the raw gradients show it
    assert against(other).startswith(("FAIL gradients: ", "FAIL loss: "))
    assert "FAIL recorded: git worktree add" in against("no-such-commit")
    left = subprocess.run(["git", "worktree", "list"], cwd=root, capture_output=True, text=True).stdout
    assert len(left.splitlines()) == 1
