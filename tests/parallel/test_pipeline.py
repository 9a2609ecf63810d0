"""Pipelines against one process: losses and raw gradients of a whole model, on every schedule."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from pithwood.attention.full import FullAttentionConfig
from pithwood.attention.moba import MoBAConfig
from pithwood.data.batches import Batch
from pithwood.evaluate.loss import token_losses
from pithwood.losses import LossLedger
from pithwood.models.pipelined import MicroBatch, ModelPipeline, carried_names
from pithwood.models.qwen3_moe import Qwen3MoE, Qwen3MoEConfig
from pithwood.models.recompute import ActivationPlan
from pithwood.moe.config import MoEConfig
from pithwood.moe.experts import GroupedExperts
from pithwood.moe.layer import MoELayer
from pithwood.objectives import NextToken
from pithwood.ops.packing import Packing
from pithwood.parallel.config import MeshConfig, Schedule
from pithwood.parallel.expert import ExpertExchange
from pithwood.parallel.links import Links, rounds
from pithwood.parallel.mesh import Mesh
from pithwood.parallel.pipeline import PipelineExecutor, Travels
from pithwood.parallel.schedule import parts_of, pipeline_actions
from pithwood.passes import forward_backward
from tests.numerics import rel_error
from tests.processes import run_on
from tests.toy_mixer import ToyRecurrenceConfig

TOKENS = 32
MOBA = MoBAConfig(block_size=8, top_k=2)
CFG = Qwen3MoEConfig(
    vocab_size=61, model_dim=24, num_layers=5, num_heads=4, num_kv_heads=2, head_dim=8,
    attention=(MOBA, FullAttentionConfig(), MOBA, MOBA, FullAttentionConfig()),
    moe=MoEConfig(
        num_experts=4, top_k=2, expert_dim=12, num_shared_experts=1, balance="micro_batch", balance_coef=0.1,
        z_loss_coef=0.01,
    ),
    dense_layers=(1,), dense_dim=20, rope_theta=10_000.0, init_std=0.2,
)  # fmt: skip
CARRIED = dataclasses.replace(CFG, attention=(ToyRecurrenceConfig(), MOBA, MOBA, ToyRecurrenceConfig(), MOBA))


def batches(count: int, rank: int = 0, size: int = 1) -> list[Batch]:
    """Micro-batches of two samples, of which this process has its share, of uneven documents and loss weights."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for micro in range(count):
        tokens = torch.randint(0, 61, (TOKENS,), generator=generator)
        weight = (torch.rand(TOKENS, generator=generator) > 0.2 + 0.05 * micro).float()
        mine = slice(rank * TOKENS // size, (rank + 1) * TOKENS // size)
        columns = {"tokens": tokens[mine], "targets": tokens.roll(-1)[mine], "loss_weight": weight[mine]}
        lengths = [5 + micro % 8, 0, 11 - micro % 8, 16, 0, 0][3 * rank : 3 * rank + 6 // size]
        made.append(Batch(columns, Packing.from_lengths(lengths)))
    return made


def fresh(cfg: Qwen3MoEConfig, recompute: Sequence[Any] = ("none",) * 5) -> Qwen3MoE:
    model = Qwen3MoE(cfg)
    model.init_weights(0)
    model.keep_activations(ActivationPlan(tuple(recompute)))
    return model


def divide_experts(model: Qwen3MoE, mesh: Mesh) -> None:
    """Let a whole model keep this process's experts alone."""
    for block in model.blocks:
        mlp = block.mlp
        if isinstance(mlp, MoELayer):
            mlp.exchange = ExpertExchange(mesh.ep, mlp.cfg.num_experts)
            mlp.gate.tokens_group = mesh.tokens
            for param in mlp.experts.parameters():
                param.data = param.detach().chunk(mesh.ep.size)[mesh.ep.rank].clone()


def scaled_loss(model: Qwen3MoE, batch: Batch, ledger: LossLedger, hidden_TD: Tensor) -> Tensor:
    (term,) = NextToken().terms(hidden_TD, model, batch)
    ledger.record(term)
    return term.sum * (term.coef / ledger.total(term.name))


def compared(
    mesh: Mesh,
    cfg: Qwen3MoEConfig = CFG,
    counts: Sequence[int] = (),
    pauses: bool = False,
    recompute: Sequence[Any] = ("none",) * 5,
) -> list[tuple[float, set[str]]]:
    """For each number of micro-batches: the largest relative error of the gradients of this process's layers and of the
    losses, and the names of the parameters that have one.
    """
    model = fresh(cfg, recompute)
    if pauses or mesh.tokens.size > 1:
        divide_experts(model, mesh)
    pipeline = ModelPipeline(model, model, mesh, torch.float32)
    for stage in pipeline.stages.values():
        stage.pauses = pauses
    found = []
    for count in counts:
        totals = {"tokens": float(TOKENS * count), **NextToken().totals(batches(count))}
        whole, ledger = fresh(cfg), LossLedger(totals)
        for batch in batches(count):
            forward_backward(whole, NextToken(), batch, ledger, torch.float32)
        model.zero_grad()
        mine = LossLedger(totals)
        losses = pipeline.run(
            [
                MicroBatch(
                    batch.columns["tokens"],
                    model.context(batch.packing, ledger=mine),
                    partial(scaled_loss, model, batch, mine),
                )
                for batch in batches(count, mesh.data.rank, mesh.data.size)
            ]
        )
        names, errors = set(), []
        for (name, param), wanted in zip(model.named_parameters(), whole.parameters(), strict=True):
            if param.grad is not None:
                grad, reference = param.grad, wanted.grad
                assert reference is not None
                if ".experts." in name:
                    reference = reference.chunk(mesh.ep.size)[mesh.ep.rank]
                    mesh.expert_shard.all_reduce(grad)
                    mesh.replicate.all_reduce(grad)
                else:
                    mesh.tokens.all_reduce(grad)
                names.add(name)
                errors.append(rel_error(grad, reference))
        if mesh.cfg.num_stages - 1 in pipeline.stages:
            assert len(losses) == count
            loss = torch.stack(losses).sum().float()
            mesh.tokens.all_reduce(loss)
            errors.append(rel_error(loss, ledger.sums["loss"] / totals["loss"]))
        else:
            assert not losses
        found.append((max(errors), names))
    return found


def assert_all(results: list[list[tuple[float, set[str]]]], cfg: Qwen3MoEConfig = CFG) -> None:
    """All errors are small, and each parameter got its gradient in one process."""
    names = [name for name, _ in Qwen3MoE(cfg).named_parameters()]
    for each in zip(*results, strict=True):
        assert max(error for error, _ in each) < 1e-6
        assert sorted(name for _, some in each for name in some) == sorted(names)


@pytest.mark.parametrize(
    ("schedule", "counts"),
    [("1f1b", (1, 2, 3, 8)), ("interleaved", (2, 3, 5, 8)), ("zero_bubble_v", (1, 2, 3, 8)), ("dualpipe_v", (4, 5, 8))],
)
@pytest.mark.parametrize("pauses", [pytest.param(False, marks=pytest.mark.slow), True])
def test_losses_and_gradients_are_those_of_one_process(schedule: Schedule, counts: tuple[int, ...], pauses: bool):
    assert_all(run_on(MeshConfig(pp=2, schedule=schedule), compared, CFG, counts, pauses))


@pytest.mark.parametrize(
    "schedule",
    ["1f1b", *(pytest.param(name, marks=pytest.mark.slow) for name in ("interleaved", "zero_bubble_v")), "dualpipe_v"],
)
def test_carry_between_stages_keeps_its_gradient(schedule: Schedule):
    for pauses in (False, True):
        assert_all(run_on(MeshConfig(pp=2, schedule=schedule), compared, CARRIED, (4,), pauses), CARRIED)


@pytest.mark.parametrize(
    ("schedule", "layers"),
    [
        pytest.param("1f1b", (4, 1), marks=pytest.mark.slow),
        ("interleaved", (1, 2, 1, 1)),
        ("zero_bubble_v", (2, 1, 1, 1)),
        pytest.param("dualpipe_v", (1, 1, 2, 1), marks=pytest.mark.slow),
    ],
)
def test_uneven_stages_that_recompute_their_blocks_give_the_same(schedule: Schedule, layers: tuple[int, ...]):
    cfg = MeshConfig(pp=2, schedule=schedule, layers_per_stage=layers)
    recompute = ("block", "none", "selective", "block", "selective")
    for pauses in (False, True):
        assert_all(run_on(cfg, compared, CFG, (4,), pauses, recompute))


@pytest.mark.parametrize("schedule", ["zero_bubble_v", pytest.param("dualpipe_v", marks=pytest.mark.slow)])
def test_experts_of_other_processes_are_reached_from_every_stage(schedule: Schedule):
    results = run_on(MeshConfig(pp=2, dp_shard=2, ep=2, schedule=schedule), compared, CFG, (4, 5), True)
    assert_all(results[::2])
    assert_all(results[1::2])


def test_pipelines_of_three_and_of_copies():
    ring = MeshConfig(pp=3, schedule="1f1b")
    assert_all(run_on(ring, compared, CFG, (1, 4)))
    results = run_on(MeshConfig(pp=2, dp_replicate=2, schedule="zero_bubble_v"), compared, CFG, (3,))
    assert_all(results[::2])
    assert_all(results[1::2])


def test_one_process_runs_its_micro_batches_one_after_the_other():
    assert_all([compared(Mesh.single(), CFG, (1, 3))])


@pytest.mark.quick
def test_only_the_carry_that_a_later_stage_reads_travels():
    model = fresh(CARRIED)
    names = []
    for layers in ((1, 1, 1, 2), (1, 2, 1, 1)):
        cfg = MeshConfig(pp=2, schedule="interleaved", layers_per_stage=layers)
        names.append(carried_names(model, cfg.layers_of_stages(5)))
    assert names == [[["toy_gate"], ["toy_gate"], ["toy_gate"]], [["toy_gate"], ["toy_gate"], []]]


def scored(mesh: Mesh, cfg: Qwen3MoEConfig) -> float:
    """Largest error of the losses of tokens in batches of two sizes."""
    model = fresh(cfg)
    pipeline = ModelPipeline(model, model, mesh, torch.float32)
    errors = [0.0]
    for given in ([*batches(5)], [*batches(2, 0, 2)]):
        wanted = [nll_T for _, nll_T in token_losses(model, given)]
        found = pipeline.run_forward([_to_score(model, batch) for batch in given])
        assert len(found) == (len(given) if mesh.cfg.num_stages - 1 in pipeline.stages else 0)
        errors += [rel_error(nll_T, expected) for nll_T, expected in zip(found, wanted, strict=False)]
    return max(errors)


def _to_score(model: Qwen3MoE, batch: Batch) -> MicroBatch:
    def losses(hidden_TD: Tensor) -> Tensor:
        return -model.logprob(hidden_TD, batch.columns["targets"]).double()

    return MicroBatch(batch.columns["tokens"], model.context(batch.packing), losses)


@pytest.mark.parametrize("schedule", ["1f1b", "zero_bubble_v"])
def test_losses_of_tokens_are_those_of_one_process(schedule: Schedule):
    for cfg in (CFG, CARRIED):
        assert max(run_on(MeshConfig(pp=2, schedule=schedule), scored, cfg)) < 1e-6


def written_down(stage: int, last: int, micro: int, x: Tensor | None, carry: dict[str, Tensor]) -> Any:
    """x with the stage's digit behind it."""
    y = (torch.tensor([float(micro)]) if x is None else x) * 10 + stage
    assert not y.requires_grad
    return {"passed": y} if stage == last else (y, {})


def passed(mesh: Mesh) -> list[int]:
    last = mesh.cfg.num_stages - 1
    stages = {stage: partial(written_down, stage, last) for stage in mesh.cfg.stages_of_process(mesh.pp.rank)}
    executor = PipelineExecutor(mesh, stages, [{"x": Travels((1,), torch.float32)}] * last)
    return [int(result["passed"]) for result in executor.run_forward(3)]


@pytest.mark.parametrize(
    ("cfg", "digits", "speaker"),
    [
        (MeshConfig(pp=3), "012", 2),
        (MeshConfig(pp=3, schedule="interleaved"), "012345", 2),
        (MeshConfig(pp=3, schedule="dualpipe_v"), "012345", 0),
    ],
)
def test_forward_passes_alone_hand_back_what_the_last_stage_returns(cfg: MeshConfig, digits: str, speaker: int):
    results = run_on(cfg, passed)
    assert results[speaker] == [int(f"{micro}{digits}") for micro in range(3)]
    assert [result for rank, result in enumerate(results) if rank != speaker] == [[], []]


def gradients_there(mesh: Mesh) -> list[tuple[int, int, bool]]:
    """(stage, micro-batch, whether the stage's experts had a gradient by then) for each end of an inputs' pass, in
    order; and one more entry per stage, of micro-batch -1, at the end.
    """
    seen: list[tuple[int, int, bool]] = []
    experts = {stage: GroupedExperts(1, 4, 4) for stage in mesh.cfg.stages_of_process(mesh.pp.rank)}
    for each in experts.values():
        for param in each.parameters():
            torch.nn.init.constant_(param, 0.1)

    def look(stage: int, micro: int) -> None:
        seen.append((stage, micro, any(param.grad is not None for param in experts[stage].parameters())))

    def run(stage: int, micro: int, x: Tensor | None, carry: dict[str, Tensor]) -> Any:
        x = torch.ones(3, 4, requires_grad=True) if x is None else x
        x.register_hook(lambda grad: look(stage, micro))
        y = experts[stage](x, torch.tensor([0, 3], dtype=torch.int32), torch.ones(3))
        return y.sum() if stage == mesh.cfg.num_stages - 1 else (y, {})

    boundaries = [{"x": Travels((3, 4), torch.float32)}] * (mesh.cfg.num_stages - 1)
    PipelineExecutor(mesh, {stage: partial(run, stage) for stage in experts}, boundaries).run(4)
    for stage in experts:
        look(stage, -1)
    return seen


def test_the_experts_gradients_wait_for_their_turn_where_a_schedule_takes_them_apart():
    for schedule, apart in (("zero_bubble_v", True), ("interleaved", False)):
        for seen in run_on(MeshConfig(pp=2, schedule=schedule), gradients_there):
            for stage in {stage for stage, _, _ in seen}:
                own = [(micro, there) for at, micro, there in seen if at == stage]
                assert own[0] == (0, not apart)
                assert own[-1] == (-1, True)


def in_three_parts(mesh: Mesh) -> list[tuple[str, int, int, int]]:
    """(direction, stage, micro-batch, part) in the order in which a process ran them."""
    ran: list[tuple[str, int, int, int]] = []

    def parts(stage: int, micro: int, x: Tensor | None, carry: dict[str, Tensor]) -> Any:
        x = torch.ones(1, requires_grad=True) if x is None else x
        for part in range(3):
            ran.append(("forward", stage, micro, part))
            x = x * 2
            x.register_hook(lambda grad, part=part: ran.append(("backward", stage, micro, part)))
            if part < 2:
                (x,) = yield [x]
        return x.sum() if stage == mesh.cfg.num_stages - 1 else (x, {})

    own = mesh.cfg.stages_of_process(mesh.pp.rank)
    boundaries = [{"x": Travels((1,), torch.float32)}] * (mesh.cfg.num_stages - 1)
    PipelineExecutor(mesh, {stage: partial(parts, stage) for stage in own}, boundaries).run(5)
    return ran


def test_the_passes_of_a_pair_take_turns_at_their_pauses():
    cfg = MeshConfig(pp=2, schedule="dualpipe_v")
    for rank, ran in enumerate(run_on(cfg, in_three_parts)):
        expected = []
        for step in pipeline_actions(cfg, rank, 5):
            names = {"forward": "forward", "backward": "backward", "inputs": "backward"}
            turns = [
                [(names[kind], stage, micro, part) for part in ((0, 1, 2) if kind == "forward" else (2, 1, 0))]
                for kind, stage, micro in parts_of(step)
                if kind in names
            ]
            expected += [each for turn in zip(*turns, strict=True) for each in turn]
        assert ran == expected


def wrong_shape(mesh: Mesh) -> str:
    stage = mesh.pp.rank
    executor = PipelineExecutor(mesh, {stage: partial(written_down, stage, 1)}, [{"x": Travels((2,), torch.float32)}])
    try:
        executor.run_forward(1) if stage == 0 else None
    except ValueError as error:
        return str(error)
    return ""


def test_an_output_that_is_not_what_was_declared_is_refused():
    assert run_on(MeshConfig(pp=2), wrong_shape)[0] == (
        "the input 'x' of stage 1, micro-batch 0, is [1] torch.float32, but was declared as [2] torch.float32"
    )


def test_stages_that_are_not_the_meshs_are_refused():
    with pytest.raises(ValueError, match=r"runs stages \[0\] with 0 boundaries between all; given \[1\] and 0"):
        PipelineExecutor(Mesh.single(), {1: partial(written_down, 1, 1)}, [])


def test_one_hardware_queue_is_refused_on_a_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    with pytest.raises(ValueError, match="unset it, or set it to 32"):
        Links(Mesh.single("cuda"), ring=False)


@pytest.mark.quick
def test_rounds_hold_every_pair_of_neighbours_once_and_each_process_at_most_once_a_round():
    for size in range(1, 9):
        for ring in (False, True):
            made = rounds(size, ring)
            for pairs in made:
                members = [place for pair in pairs for place in pair]
                assert len(members) == len(set(members))
            closing = {(0, size - 1)} if ring and size > 1 else set()
            assert {pair for pairs in made for pair in pairs} == {(at, at + 1) for at in range(size - 1)} | closing
            assert sum(map(len, made)) == len({pair for pairs in made for pair in pairs})
