"""The layer: against a dense loop and transformers' modules, in bf16, with replay, and what it tells its users."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pithwood.attention.base import Cost
from pithwood.moe import DenseMLP, MoEConfig, MoELayer
from tests.moe.helpers import context, dense_moe, dispatched, filled, make_layer
from tests.numerics import assert_close


@pytest.mark.quick
@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize(("num_experts", "top_k"), [(6, 2), (1, 1), (4, 4)])
def test_forward_and_all_gradients_agree_with_a_dense_loop(num_experts: int, top_k: int, shared: int) -> None:
    layer = make_layer(num_experts=num_experts, top_k=top_k, expert_dim=5, scale=1.5, num_shared_experts=shared)
    x_TD = torch.randn(11, 12, dtype=torch.float64, requires_grad=True)
    actual = layer(x_TD, context([11]))
    score = (x_TD @ layer.gate.weight.t()).softmax(-1)
    value, ids = score.topk(top_k)
    weight = 1.5 * value / value.sum(-1, keepdim=True)
    expected = dense_moe(x_TD, ids, weight, layer.experts.gate_up_proj, layer.experts.down_proj)
    if layer.shared_experts is not None:
        mlp = layer.shared_experts
        hidden = F.silu(x_TD @ mlp.gate_proj.weight.t()) * (x_TD @ mlp.up_proj.weight.t())
        expected = expected + hidden @ mlp.down_proj.weight.t()
    assert_close(actual, expected)
    inputs = (x_TD, *layer.parameters())
    pull = torch.randn(11, 12, dtype=torch.float64)
    grads = torch.autograd.grad((actual * pull).sum(), inputs)
    wants = torch.autograd.grad((expected * pull).sum(), inputs)
    for grad, want in zip(grads, wants, strict=True):
        if num_experts == 1 and want.shape == layer.gate.weight.shape:
            assert grad.abs().max() < 1e-12
            continue
        assert_close(grad, want)


def compare_with(theirs: torch.nn.Module, layer: MoELayer) -> None:
    """Load their state into the layer by name and compare output and every gradient in fp32."""
    filled(theirs)
    layer.load_state_dict(theirs.state_dict())
    x = torch.randn(30, 32, generator=torch.Generator().manual_seed(3))
    ours_in, theirs_in = x.clone().requires_grad_(), x.clone().requires_grad_()
    ours_out, theirs_out = layer(ours_in, context([30])), theirs(theirs_in[None])[0]
    assert_close(ours_out, theirs_out)
    pull = torch.randn(30, 32, generator=torch.Generator().manual_seed(4))
    (ours_out * pull).sum().backward()
    (theirs_out * pull).sum().backward()
    assert ours_in.grad is not None
    assert theirs_in.grad is not None
    assert_close(ours_in.grad, theirs_in.grad)
    their_grads = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    assert their_grads.keys() == dict(layer.named_parameters()).keys()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None
        assert_close(parameter.grad, their_grads[name], what=name)


@pytest.mark.parametrize("renormalize", [True, False])
def test_qwen3_moe_block_of_transformers(renormalize: bool) -> None:
    qwen = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe", reason="needs transformers")
    config = qwen.Qwen3MoeConfig(
        hidden_size=32, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=16, norm_topk_prob=renormalize
    )
    theirs = qwen.Qwen3MoeSparseMoeBlock(config)
    compare_with(theirs, MoELayer(MoEConfig(8, 3, 16, renormalize=renormalize), 32))


def test_deepseek_v3_moe_of_transformers() -> None:
    deepseek = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3", reason="needs transformers")
    config = deepseek.DeepseekV3Config(
        hidden_size=32,
        n_routed_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=16,
        n_group=4,
        topk_group=2,
        n_shared_experts=2,
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
    )
    theirs = deepseek.DeepseekV3MoE(config)
    theirs.gate.e_score_correction_bias.copy_(torch.linspace(-0.2, 0.2, 8))
    cfg = MoEConfig(
        8,
        3,
        16,
        score="sigmoid",
        scale=2.5,
        num_groups=4,
        groups_per_token=2,
        group_score="top2_sum",
        num_shared_experts=2,
        bias_update_rate=1e-3,
    )
    compare_with(theirs, MoELayer(cfg, 32))


def test_an_empty_batch_goes_through() -> None:
    layer = make_layer(num_experts=4, top_k=2, expert_dim=4, balance="sequence", balance_coef=0.1, z_loss_coef=0.1)
    out = layer(torch.zeros(0, 12, dtype=torch.float64), context([0], tokens=5))
    assert out.shape == (0, 12)
    out.sum().backward()
    assert all(p.grad is not None and p.grad.eq(0).all() for p in layer.parameters())


def test_replay_gives_the_same_output_and_gradients() -> None:
    layer = make_layer(num_experts=6, top_k=2, expert_dim=5)
    x_TD = torch.randn(11, 12, dtype=torch.float64)
    probe: dict[str, Any] = {}
    out = layer(x_TD, context([11], probe=probe))
    again = layer(x_TD, context([11], replay=probe))
    assert torch.equal(out, again)
    parameters = list(layer.parameters())
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), parameters) for y in (out, again)), strict=True):
        assert torch.equal(a, b)


def test_bf16_activations_use_fp32_weights_and_give_fp32_gradients() -> None:
    layer = make_layer(32, num_experts=6, top_k=2, expert_dim=16, num_shared_experts=1, dtype=torch.float32)
    exact = make_layer(32, num_experts=6, top_k=2, expert_dim=16, num_shared_experts=1, dtype=torch.float64)
    x_TD = torch.randn(40, 32).bfloat16()
    probe: dict[str, Any] = {}
    expected = exact(x_TD.double(), context([40], probe=probe))
    out = layer(x_TD, context([40], replay=probe))
    assert out.dtype == torch.bfloat16
    assert_close(out, expected)
    pull = torch.randn(40, 32).bfloat16()
    grads = torch.autograd.grad((out * pull).sum(), list(layer.parameters()))
    wants = torch.autograd.grad((expected * pull.double()).sum(), list(exact.parameters()))
    for (name, _), grad, want in zip(layer.named_parameters(), grads, wants, strict=True):
        assert grad.dtype == torch.float32
        assert_close(grad, want, 2e-2, name)


def test_the_same_input_gives_the_same_bits() -> None:
    layer = make_layer(num_experts=6, top_k=3, expert_dim=5, dtype=torch.float32)
    x_TD = torch.randn(50, 12)
    runs = []
    for _ in range(2):
        out = layer(x_TD, context([50]))
        runs.append((out, *torch.autograd.grad(out.square().sum(), list(layer.parameters()))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_construction_draws_no_random_numbers_and_obeys_the_meta_device() -> None:
    state = torch.get_rng_state()
    MoELayer(MoEConfig(4, 2, 8, num_shared_experts=1), 16)
    DenseMLP(16, 8)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.device("meta"):
        layer = MoELayer(MoEConfig(4, 2, 8, num_shared_experts=1, bias_update_rate=1e-3), 16)
    assert all(t.is_meta for t in (*layer.parameters(), *layer.buffers()))


def test_names_shapes_and_the_optimizer_view() -> None:
    layer = MoELayer(MoEConfig(4, 2, 8, num_shared_experts=2, shared_dim=3, bias_update_rate=1e-3), 16)
    shapes = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
    assert shapes == {
        "gate.weight": (4, 16),
        "gate.e_score_correction_bias": (4,),
        "experts.gate_up_proj": (4, 16, 16),
        "experts.down_proj": (4, 16, 8),
        "shared_experts.gate_proj.weight": (6, 16),
        "shared_experts.up_proj.weight": (6, 16),
        "shared_experts.down_proj.weight": (16, 6),
    }
    views = layer.optimizer_shapes()
    assert views == {"gate.weight": None, "experts.gate_up_proj": (8, 8, 16), "experts.down_proj": (4, 16, 8)}
    weight = layer.experts.gate_up_proj
    # Matrix 2e of the view is expert e's gate and 2e + 1 its up projection.
    assert torch.equal(weight.view(views["experts.gate_up_proj"])[3], weight[1, 8:])  # type: ignore[arg-type]


def test_cost_counts_active_experts_and_the_router() -> None:
    layer = MoELayer(MoEConfig(16, 2, 8, num_shared_experts=1, shared_dim=4), 32)
    expected = 10 * (2 * 32 * 16 + 2 * 6 * 32 * 8 + 6 * 32 * 4)
    assert layer.cost(10).model_flops == expected
    assert layer.cost(10).executed_flops == expected
    # the router's logits, and per pair the id, the weights and the places, stay wide
    fixed = 10 * 4 * 16 + 20 * 28
    wide, narrow = layer.cost(10), layer.cost(10, element_size=2)
    assert narrow.saved_bytes - fixed == (wide.saved_bytes - fixed) / 2
    assert narrow.workspace_bytes == wide.workspace_bytes / 2


def test_cost_knows_the_ways_to_save_memory() -> None:
    def cost(**fields: Any) -> Cost:
        return MoELayer(MoEConfig(16, 2, 8, **fields), 32).cost(100)

    plain = cost()
    assert plain.saved_bytes - cost(save_rows=False).saved_bytes == 100 * 2 * 32 * 4
    layer = MoELayer(MoEConfig(16, 2, 8), 32)
    layer.save_rows = False
    assert layer.cost(100) == cost(save_rows=False)
    assert cost(chunk_tokens=100) == plain
    kept = cost(chunk_tokens=10, chunk_recompute=False)
    assert kept.saved_bytes == plain.saved_bytes
    assert kept.workspace_bytes == plain.workspace_bytes / 10
    again = cost(chunk_tokens=10)
    assert plain.saved_bytes - again.saved_bytes == 100 * 2 * (32 + 2 * 8) * 4
    assert kept.workspace_bytes < again.workspace_bytes < plain.workspace_bytes / 4


def test_routing_and_experts_compile_as_one_graph_each() -> None:
    fields: dict[str, Any] = {"balance": "sequence", "balance_coef": 0.1, "z_loss_coef": 0.1, "score": "sigmoid"}
    layer = make_layer(num_experts=4, top_k=2, expert_dim=8, dtype=torch.float32, **fields)
    x_TD = torch.randn(10, 12)
    ids_Tk, weight_Tk, _ = layer.route(x_TD, context([4, 6], tokens=10))
    counts_E = layer.counts_E.clone()
    layer.reset_step()
    route = torch.compile(layer.route, fullgraph=True, backend="aot_eager")
    compiled_ids, compiled_weight, x_TD = route(x_TD, context([4, 6], tokens=10))
    assert torch.equal(compiled_ids, ids_Tk)
    assert_close(compiled_weight, weight_Tk)
    assert torch.equal(layer.counts_E, counts_E)
    rows_RD, weight_R, plan = dispatched(x_TD, ids_Tk, weight_Tk, 4)
    experts = torch.compile(layer.experts, fullgraph=True, backend="aot_eager")
    compiled, eager = experts(rows_RD, plan.offsets, weight_R), layer.experts(rows_RD, plan.offsets, weight_R)
    assert_close(compiled, eager)
    inputs = (x_TD, *layer.experts.parameters())
    grads, wants = (torch.autograd.grad(out.square().sum(), inputs, retain_graph=True) for out in (compiled, eager))
    for grad, want in zip(grads, wants, strict=True):
        assert_close(grad, want)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_agrees_with_cpu_when_ids_are_replayed(dtype: torch.dtype) -> None:
    fields: dict[str, Any] = {"balance": "sequence", "balance_coef": 0.1, "z_loss_coef": 0.1, "num_shared_experts": 1}
    layer = make_layer(32, num_experts=6, top_k=2, expert_dim=16, dtype=torch.float32, **fields)
    ids = torch.randint(-1, 5, (40, 2), generator=torch.Generator().manual_seed(5))  # expert 5 stays empty
    x_TD, pull = torch.randn(40, 32).to(dtype), torch.randn(40, 32).to(dtype)
    results = []
    for device in ("cpu", "cuda"):
        layer.to(device)
        ctx = context([15, 25], tokens=40, replay={"layers.0.experts": ids.to(device)})
        ctx.packing = ctx.packing.to(device)
        layer.zero_grad()
        out = layer(x_TD.to(device), ctx)
        # kernels add gradients of fp32 weights to .grad, where torch.autograd.grad does not look
        (out * pull.to(device)).sum().backward()
        results.append((out, *(param.grad.clone() for param in layer.parameters())))
    tol = 2e-2 if dtype == torch.bfloat16 else 1e-3  # TF32 may be on
    for on_cpu, on_cuda in zip(*results, strict=True):
        assert_close(on_cuda, on_cpu, tol)
