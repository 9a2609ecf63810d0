"""Experts divided between processes: outputs, losses and raw gradients are those of one, however tokens travel."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pithwood.attention.base import Cost, LayerContext
from pithwood.losses import LossLedger
from pithwood.models.qwen3_moe import Block, Qwen3MoEConfig
from pithwood.models.recompute import recomputed
from pithwood.moe import MoEConfig, MoELayer
from pithwood.moe.layer import step_counts
from pithwood.ops.packing import Packing
from pithwood.ops.permute import owner_ids
from pithwood.ops.rope import Rope
from pithwood.parallel.config import MeshConfig
from pithwood.parallel.expert import ExpertExchange
from pithwood.parallel.mesh import Group, Mesh
from pithwood.run import Run
from pithwood.trainer import Trainer
from tests.moe.helpers import filled
from tests.numerics import assert_close
from tests.parallel.spread import Documents, assert_same, steps_on, tiny_run
from tests.processes import run_on

EXPERTS, SLOTS, WIDTH, DIM = 8, 3, 5, 12
BASE: dict[str, Any] = {"num_experts": EXPERTS, "top_k": SLOTS, "expert_dim": WIDTH}
DOCUMENTS = (9, 0, 4, 1, 18)
"""Of a micro-batch of 32 tokens."""
TWO, FOUR = MeshConfig(dp_shard=2, ep=2), MeshConfig(dp_shard=2, cp=2, ep=4)


def tokens_of(case: str, number: int, tokens: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """(x_TD, pull_TD, ids_Tk) of the whole micro-batch `number`."""
    generator = torch.Generator().manual_seed(number)
    x_TD, pull_TD = torch.randn(2, tokens, DIM, generator=generator).unbind()
    ids_Tk = torch.rand(tokens, EXPERTS, generator=generator).topk(SLOTS).indices
    if case == "some_none":
        ids_Tk[torch.rand(ids_Tk.shape, generator=generator) < 0.4] = -1
        ids_Tk[5] = -1
    if case == "one_expert":
        ids_Tk[:, 0], ids_Tk[:, 1:] = 6, -1
    if case == "one_process":
        ids_Tk = torch.rand(tokens, SLOTS, generator=generator).topk(SLOTS).indices
    if case == "nobody":
        ids_Tk.fill_(-1)
    return x_TD, pull_TD, ids_Tk


def cut_packing(whole: Packing, first: int, last: int) -> Packing:
    """The documents' parts among the tokens first:last, under the same numbers."""
    cu = (whole.cu_q.clamp(first, last) - first).to(torch.int32)
    return Packing(cu, cu, whole.max_q, whole.max_k, whole.position_T[first:last])


def run_layer(
    cfg: MoEConfig, mesh: Mesh, exchange: ExpertExchange | None, case: str, sizes: tuple[int, ...], again: bool
) -> dict[str, Tensor]:
    """Two micro-batches through a layer on this process's tokens, sizes[i] for the i-th process: outputs, losses, and
    what a step adds up over all processes.
    """
    whole = filled(MoELayer(cfg, DIM))
    layer = MoELayer(cfg, DIM, exchange)
    state = whole.state_dict()
    if exchange is not None:
        some = slice(exchange.first_expert, exchange.first_expert + exchange.experts_here)
        state |= {name: value[some] for name, value in state.items() if name.startswith("experts.")}
        layer.gate.tokens_group, layer.gate.cp_group = mesh.tokens, mesh.cp
        exchange.reset_step()
    layer.load_state_dict(state)
    layer.reset_step()
    ledger = LossLedger({"tokens": 2.0 * sum(sizes)})
    first = sum(sizes[: mesh.tokens.rank])
    mine = slice(first, first + sizes[mesh.tokens.rank])
    packing = Packing.from_lengths(DOCUMENTS)
    if mesh.tokens.size > 1:
        packing = cut_packing(packing, mine.start, mine.stop)
    found: dict[str, Tensor] = {}
    for number in range(2):
        x_TD, pull_TD, ids_Tk = tokens_of(case, number)
        x_TD = x_TD[mine].requires_grad_()
        replay = None if case == "live" else {"layers.0.experts": ids_Tk[mine]}
        ctx = LayerContext(packing, None, ledger=ledger, replay=replay)
        if again:
            out_TD, _ = recomputed(AsBlock(layer), x_TD, ctx)
        else:
            out_TD = layer(x_TD, ctx)
        (out_TD * pull_TD[mine]).sum().backward()
        assert x_TD.grad is not None
        found |= {f"out {number}": out_TD.detach(), f"x.grad {number}": x_TD.grad}
    for name, parameter in layer.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        (mesh.expert_shard if name.startswith("experts.") else mesh.shard).all_reduce(grad)
        mesh.replicate.all_reduce(grad)
        found[name] = grad
    for name, value in ledger.sums.items():
        mesh.tokens.all_reduce(value)
        found[name] = value
    found["counts"] = step_counts([layer])[0]
    return found


class AsBlock(nn.Module):
    """A layer in the form of a block."""

    def __init__(self, layer: MoELayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x_TD: Tensor, ctx: LayerContext) -> tuple[Tensor, dict[str, Tensor]]:
        return self.layer(x_TD, ctx), ctx.carry


def job(
    mesh: Mesh, cfg: MoEConfig, how: Any, case: str, sizes: tuple[int, ...], again: bool, room: float
) -> tuple[dict[str, Tensor], list[float]]:
    exchange = ExpertExchange(mesh.ep, cfg.num_experts, how, room=room, balanced=cfg.routing == "balanced")
    found = run_layer(cfg, mesh, exchange, case, sizes, again)
    fullness = exchange.fullness
    mesh.world.all_reduce(fullness, "max")
    return found, fullness.tolist()


def check_parity(
    mesh_cfg: MeshConfig,
    case: str,
    how: str = "exact",
    sizes: tuple[int, ...] | None = None,
    again: bool = False,
    room: float = 8.0,
    **fields: Any,
) -> None:
    """The mesh's result against one process's: tokens and experts laid end to end, sums as they are."""
    cfg, count = MoEConfig(**BASE, **fields), mesh_cfg.size
    sizes = sizes or (32 // count,) * count
    wants = run_layer(cfg, Mesh.single(), None, case, (sum(sizes),), again=False)
    results = run_on(mesh_cfg, job, cfg, how, case, sizes, again, room)
    assert max(results[0][1]) <= 1
    for name, want in wants.items():
        parts = [found[name] for found, _ in results]
        if name.startswith(("out ", "x.grad ")):
            value = torch.cat(parts)
        elif name.startswith("experts."):
            value = torch.cat(parts[: mesh_cfg.ep])
        else:
            assert all(torch.equal(part, parts[0]) for part in parts), name
            value = parts[0]
        assert value.shape == want.shape, name
        if want.dtype == torch.int64:
            assert torch.equal(value, want), name
        elif want.norm() == 0:
            assert value.norm() == 0, name
        else:
            assert_close(value, want, 1e-5, name)


HOWS = ["exact", "bounded"]


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("case", ["live", "some_none", "one_expert", "one_process", "nobody"])
def test_two_processes_equal_one(how: str, case: str) -> None:
    check_parity(TWO, case, how)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("mesh_cfg", [FOUR, MeshConfig(dp_shard=4, ep=2), MeshConfig(dp_replicate=2, dp_shard=2, ep=2)])
def test_four_processes_equal_one(how: str, mesh_cfg: MeshConfig) -> None:
    check_parity(mesh_cfg, "some_none", how, num_shared_experts=1, z_loss_coef=0.1)


@pytest.mark.parametrize("sizes", [(21, 11), (32, 0), (0, 32)])
def test_processes_may_hold_unequally_many_tokens(sizes: tuple[int, ...]) -> None:
    check_parity(TWO, "live", sizes=sizes)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("balance", ["micro_batch", "sequence", "global_batch"])
def test_balance_losses_see_the_loads_of_all_processes(how: str, balance: str) -> None:
    mesh_cfg = MeshConfig(cp=2, ep=2) if balance == "sequence" else TWO
    check_parity(mesh_cfg, "live", how, balance=balance, balance_coef=0.5)


@pytest.mark.parametrize("balance", ["micro_batch", "sequence", "global_batch"])
def test_recomputation_repeats_the_exchange_and_counts_nothing_twice(balance: str) -> None:
    mesh_cfg = MeshConfig(cp=2, ep=2)
    check_parity(mesh_cfg, "live", "bounded", again=True, num_shared_experts=1, balance=balance, balance_coef=0.5)


def exchanges(mesh: Mesh, run: Run) -> int:
    """Exchanges of rows with experts that a process takes part in during a step's passes."""
    trainer = Trainer(run, mesh.device, None, mesh)
    here = trainer.local(Documents(run).step(0, trainer.share))
    # not torch.profiler, which imports the compiler in every process
    with torch.autograd.profiler.profile() as profile:
        trainer.gradients(0, here)
    return sum(event.name == "c10d::alltoall_base_" for event in profile.function_events)


@pytest.mark.parametrize(
    ("recompute", "each"),
    [("block", 12), *(pytest.param(kind, 8, marks=pytest.mark.slow) for kind in ("none", "selective"))],
)
def test_a_recomputed_block_sends_its_tokens_once_more_and_no_results_back(recompute: str, each: int) -> None:
    cfg = MeshConfig(dp_shard=2, ep=2, exchange="exact")
    # sizes, ids, weights and tokens there, results back; gradients of weights, tokens and results: of three layers in
    # two micro-batches
    assert run_on(cfg, exchanges, tiny_run(mesh=cfg, recompute=recompute)) == [3 * 2 * each] * 2


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("fields", [{"save_rows": False}, {"chunk_recompute": False}, {"num_shared_experts": 2}])
def test_chunks_overlap_and_change_nothing(how: str, fields: dict[str, Any]) -> None:
    check_parity(TWO, "some_none", how, chunk_tokens=5, **fields)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("case", ["live", "nobody"])
@pytest.mark.parametrize("fields", [{}, {"save_rows": False}, {"chunk_recompute": False}])
def test_chunks_within_a_recomputed_block_change_nothing(how: str, case: str, fields: dict[str, Any]) -> None:
    check_parity(TWO, case, how, again=True, chunk_tokens=5, num_shared_experts=1, **fields)


def calls_of_experts(mesh: Mesh, again: bool) -> list[tuple[bool, bool]]:
    """Of the experts of this process: whether in the backward pass, and whether nobody reads the value."""
    layer = filled(MoELayer(MoEConfig(**BASE, chunk_tokens=5), DIM, ExpertExchange(mesh.ep, EXPERTS)))
    assert isinstance(layer, MoELayer)
    calls: list[tuple[bool, bool]] = []
    inside, going_back = layer.experts.forward, False

    def noted(*args: Any) -> Tensor:
        calls.append((going_back, args[-1]))
        return inside(*args)

    layer.experts.forward = noted  # type: ignore[method-assign]
    x_TD = tokens_of("live", 0)[0][mesh.rank * 16 : mesh.rank * 16 + 16].clone().requires_grad_()
    ctx = LayerContext(Packing.from_lengths([16]), None, ledger=LossLedger({"tokens": 32.0}))
    out_TD = recomputed(AsBlock(layer), x_TD, ctx)[0] if again else layer(x_TD, ctx)
    going_back = True
    out_TD.sum().backward()
    return calls


@pytest.mark.parametrize("again", [False, True])
def test_experts_of_chunks_that_arrive_go_forward_once_with_their_value_and_once_without(again: bool) -> None:
    # four chunks of 16 tokens
    assert run_on(TWO, calls_of_experts, again) == [[(False, False)] * 4 + [(True, True)] * 4] * 2


@pytest.mark.parametrize("how", HOWS)
def test_balanced_routing_numbers_tokens_over_all_processes(how: str) -> None:
    # with room for what balanced ids need and no more
    check_parity(FOUR, "live", how, routing="balanced", room=1.0)


def crowded(mesh: Mesh, cfg: MoEConfig, case: str) -> list[tuple[list[float], dict[str, Tensor]]]:
    """Steps with buffers that grow until one fits, each with how full they were."""
    exchange = ExpertExchange(mesh.ep, cfg.num_experts, "bounded", room=1.0)
    exchange.rooms = [0.1, 0.1]
    steps = []
    while not steps or max(steps[-1][0]) > 1:
        found = run_layer(cfg, mesh, exchange, case, (16, 16), again=False)
        full = exchange.fullness
        mesh.world.all_reduce(full, "max")
        steps.append((full.tolist(), found))
        exchange.grow(steps[-1][0])
    return steps


@pytest.mark.parametrize("case", ["some_none", "one_process"])
def test_a_step_that_does_not_fit_says_so_and_equals_one_process_with_larger_buffers(case: str) -> None:
    cfg = MoEConfig(**BASE, balance="global_batch", balance_coef=0.5)
    want = run_layer(cfg, Mesh.single(), None, case, (32,), again=False)
    first, second = run_on(TWO, crowded, cfg, case)
    assert [full for full, _ in first] == [full for full, _ in second]
    assert 2 <= len(first) <= 6
    for full, found in first[:-1]:
        assert max(full) > 1
        # tokens that had no room are missing, and nothing else is wrong: no row was written where it must not be
        assert all(torch.isfinite(value).all() for value in found.values())
    _, here = first[-1]
    _, there = second[-1]
    assert torch.equal(here["counts"], want["counts"])
    for name in ("out 0", "out 1", "x.grad 0", "x.grad 1", "experts.gate_up_proj", "experts.down_proj"):
        assert_close(torch.cat([here[name], there[name]]), want[name], 1e-5, name)
    assert_close(here["gate.weight"], want["gate.weight"], 1e-5)


def numbered(mesh: Mesh, how: Any, ids_Tk: Tensor) -> list[list[tuple[int, int]]]:
    """(token, slot) of the rows of each expert here, as they lie; tokens carry their numbers."""
    exchange = ExpertExchange(mesh.ep, EXPERTS, how)
    mine = slice(mesh.ep.rank * 8, mesh.ep.rank * 8 + 8)
    number_TD = torch.arange(16.0)[mine, None].expand(8, 4)
    arrived = exchange.dispatch(number_TD, ids_Tk[mine], torch.ones(8, SLOTS))
    plan, token_S = arrived.plan, arrived.x_SD[:, 0].long()
    ends = plan.offsets.tolist()
    pairs = [(int(token_S[pair // SLOTS]), pair % SLOTS) for pair in plan.pair_R[: ends[-1]].tolist()]
    return [pairs[ends[e] : ends[e + 1]] for e in range(exchange.experts_here)]


@pytest.mark.parametrize("how", HOWS)
def test_an_experts_rows_are_ordered_by_token_and_slot_of_all_processes(how: str) -> None:
    ids_Tk = tokens_of("some_none", 3, 16)[2]
    experts = [rows for found in run_on(TWO, numbered, how, ids_Tk) for rows in found]
    for expert, rows in enumerate(experts):
        assert rows == [tuple(pair) for pair in (ids_Tk == expert).nonzero().tolist()]


def traffic(mesh: Mesh, ids_Tk: Tensor) -> list[int]:
    exchange = ExpertExchange(mesh.ep, EXPERTS)
    mine = slice(mesh.ep.rank * 8, mesh.ep.rank * 8 + 8)
    handle = exchange.dispatch(torch.zeros(8, 4), ids_Tk[mine], torch.ones(8, SLOTS)).handle
    assert handle.given_sizes is not None
    return handle.given_sizes


def test_a_token_travels_once_to_each_process_of_its_experts() -> None:
    ids_Tk = torch.tensor([[0, 1, 2], [0, 7, 4], [5, 4, -1], [-1, -1, -1]]).repeat(4, 1)
    assert run_on(TWO, traffic, ids_Tk) == [[4, 4], [4, 4]]


def outside_a_step(mesh: Mesh) -> tuple[Tensor, list[float]]:
    """A pass without a ledger, by buffers that hold next to nothing."""
    exchange = ExpertExchange(mesh.ep, EXPERTS, "bounded")
    exchange.rooms = [0.1, 0.1]
    whole, layer = filled(MoELayer(MoEConfig(**BASE), DIM)), MoELayer(MoEConfig(**BASE, chunk_tokens=5), DIM, exchange)
    some = slice(exchange.first_expert, exchange.first_expert + exchange.experts_here)
    state = {name: value[some] if name.startswith("experts.") else value for name, value in whole.state_dict().items()}
    layer.load_state_dict(state)
    x_TD = tokens_of("live", 0)[0][mesh.rank * 16 : mesh.rank * 16 + 16]
    with torch.no_grad():
        out_TD = layer(x_TD, LayerContext(Packing.from_lengths([16]), None))
    return out_TD, exchange.fullness.tolist()


def test_passes_outside_a_step_are_exact() -> None:
    (here, full), (there, _) = run_on(TWO, outside_a_step)
    layer = filled(MoELayer(MoEConfig(**BASE), DIM))
    want = layer(tokens_of("live", 0)[0], LayerContext(Packing.from_lengths([32]), None))
    assert_close(torch.cat([here, there]), want, 1e-5)
    assert full == [0, 0]


@pytest.mark.parametrize("how", HOWS)
def test_a_group_of_one_changes_no_digit(how: Any) -> None:
    cfg = MoEConfig(**BASE, balance="micro_batch", balance_coef=0.1)
    exchange = ExpertExchange(Group.alone(), EXPERTS, how)
    wants = run_layer(cfg, Mesh.single(), None, "some_none", (32,), again=False)
    for name, value in run_layer(cfg, Mesh.single(), exchange, "some_none", (32,), again=False).items():
        assert torch.equal(value, wants[name]), name


@pytest.mark.quick
@pytest.mark.parametrize(("experts", "size", "k", "tokens"), [(128, 2, 8, 4096), (128, 8, 8, 1000), (64, 4, 6, 777)])
def test_room_is_what_even_spreading_needs(experts: int, size: int, k: int, tokens: int) -> None:
    group = Group(tuple(range(size)), 0)
    ids_Tk = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(0)).topk(k).indices
    most = max(int((owner_ids(ids_Tk, experts // size, size) == p).sum()) for p in range(size))
    exchange = ExpertExchange(group, experts, "bounded", room=1.1)
    assert 0.9 * most <= exchange.capacity(tokens, k) <= 1.15 * most + 1.1 * experts
    assert tokens * k <= exchange.max_rows(tokens, k, size * tokens) <= 1.1 * (tokens * k + experts) + 1
    # the numbers of other processes' tokens shift their ids: whichever they are, balanced ones fit
    balanced = ExpertExchange(group, experts, "bounded", balanced=True)
    for first in (0, 1, tokens, 3 * tokens + 5):
        ids_Tk = (torch.arange(first * k, (first + tokens) * k) % experts).view(tokens, k)
        for p in range(size):
            assert int((owner_ids(ids_Tk, experts // size, size) == p).sum()) <= balanced.capacity(tokens, k)


@pytest.mark.quick
def test_an_exchange_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mesh\.ep=3 must divide num_experts=8"):
        ExpertExchange(Group((0, 1, 2), 0), 8)
    with pytest.raises(ValueError, match=r"room=0\.5 must be at least 1"):
        ExpertExchange(Group.alone(), 8, room=0.5)


@pytest.mark.quick
def test_the_optimizer_sees_all_experts() -> None:
    layer = MoELayer(MoEConfig(**BASE), DIM, ExpertExchange(Group((0, 1), 1), EXPERTS))
    assert layer.experts.down_proj.shape == (EXPERTS // 2, DIM, WIDTH)
    assert layer.optimizer_shapes() == MoELayer(MoEConfig(**BASE), DIM).optimizer_shapes()


def block_pass(exchange: ExpertExchange | None, x_TD: Tensor) -> tuple[dict[str, Tensor], int]:
    """A block's output and gradients, and how often its shared experts ran."""
    moe = MoEConfig(EXPERTS, SLOTS, WIDTH, num_shared_experts=1)
    cfg = Qwen3MoEConfig(model_dim=DIM, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, moe=moe)
    block = filled(Block(cfg, 0))
    assert isinstance(block, Block)
    if exchange is not None:
        state = block.mlp.state_dict()
        some = slice(exchange.first_expert, exchange.first_expert + exchange.experts_here)
        block.mlp = MoELayer(moe, DIM, exchange)
        block.mlp.load_state_dict(
            {name: value[some] if name.startswith("experts.") else value for name, value in state.items()}
        )
    assert isinstance(block.mlp, MoELayer)
    assert block.mlp.shared_experts is not None
    runs: list[None] = []
    block.mlp.shared_experts.register_forward_hook(lambda *_: runs.append(None))
    packing = Packing.from_lengths([x_TD.shape[0] // 2] * 2) if exchange is None else Packing.from_lengths([16])
    x_TD.requires_grad_()
    out_TD, _ = block(x_TD, LayerContext(packing, Rope.from_positions(packing.position_T, 8, 1e4)))
    out_TD.square().sum().backward()
    assert x_TD.grad is not None
    grads = {name: parameter.grad for name, parameter in block.named_parameters() if parameter.grad is not None}
    return {"out": out_TD.detach(), "x.grad": x_TD.grad, **grads}, len(runs)


def block_job(mesh: Mesh) -> tuple[dict[str, Tensor], int]:
    exchange = ExpertExchange(mesh.ep, EXPERTS)
    found, runs = block_pass(exchange, tokens_of("live", 0)[0][mesh.rank * 16 : mesh.rank * 16 + 16].clone())
    for name, grad in found.items():
        if name not in ("out", "x.grad") and ".experts." not in name:
            mesh.shard.all_reduce(grad)
    return found, runs


def test_a_blocks_shared_experts_run_once_while_tokens_travel() -> None:
    wants, _ = block_pass(None, tokens_of("live", 0)[0].clone())
    (here, runs), (there, _) = run_on(TWO, block_job)
    assert runs == 1
    for name, want in wants.items():
        together = name in ("out", "x.grad") or ".experts." in name
        assert_close(torch.cat([here[name], there[name]]) if together else here[name], want, 1e-5, name)


@pytest.mark.quick
def test_cost_knows_what_an_exchange_takes() -> None:
    def cost(room: float | None, **fields: Any) -> Cost:
        group = Group((0, 1), 0)
        how: Any = "exact" if room is None else "bounded"
        exchange = ExpertExchange(group, EXPERTS, how, room=room or 1.0)
        return MoELayer(MoEConfig(**BASE, **fields), DIM, exchange).cost(1000)

    alone = MoELayer(MoEConfig(**BASE), DIM).cost(1000)
    assert cost(None).model_flops == alone.model_flops
    assert alone.saved_bytes <= cost(None).saved_bytes < 1.02 * alone.saved_bytes
    assert cost(1.5).saved_bytes > 1.3 * alone.saved_bytes
    assert cost(1.5).workspace_bytes > cost(1.0).workspace_bytes > alone.workspace_bytes
    # copies of a token for each process in place of its three rows
    arrived, rows = ExpertExchange(Group((0, 1), 0), EXPERTS, "bounded", room=1.0).room_for(1000, SLOTS)
    assert (arrived, rows) == (2 * 937, 3008)
    fewer = cost(1.0).saved_bytes - cost(1.0, save_rows=False).saved_bytes
    assert fewer == (rows - arrived) * DIM * 4
    assert cost(1.0, chunk_tokens=100).saved_bytes < cost(1.0, save_rows=False).saved_bytes


def crowded_steps(mesh: Mesh, run: Run) -> tuple[dict[str, Any], list[float]]:
    """Two steps of a trainer whose exchange has hardly any room to begin with."""
    trainer = Trainer(run, mesh.device, None, mesh)
    assert trainer.part is not None
    assert trainer.part.exchange is not None
    trainer.part.exchange.rooms = [0.1, 0.1]
    source, pieces = Documents(run), trainer.part.shards.pieces()
    for step in range(2):
        trainer.train_step(step, source.step(step, trainer.share))
    last = {name: (pieces[name].start, x.detach().reshape(-1).clone()) for name, x in trainer.parameters().items()}
    return {"last": last}, trainer.part.exchange.rooms


def test_a_trainer_repeats_steps_that_do_not_fit_and_applies_none_of_them() -> None:
    run = tiny_run(moe={"balance": "global_batch", "balance_coef": 0.01, "bias_update_rate": 0.01})
    want = steps_on(Mesh.single(), run, 2, "run")
    bounded = dataclasses.replace(TWO, exchange="bounded")
    results = run_on(bounded, crowded_steps, dataclasses.replace(run, mesh=bounded))
    assert_same([found for found, _ in results], want, "last")
    assert results[0][1] == results[1][1]
    assert min(results[0][1]) > 0.1
