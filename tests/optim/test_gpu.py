"""The same step on a GPU: no host sync, the CPU's result, torch's Muon within bf16, and memory within its bounds."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pithwood.ops.gram import FEWEST_TILES, symmetric_pays
from pithwood.ops.master import in_dtype, keep_copies
from pithwood.ops.norms import tensor_norms
from pithwood.optim import muon
from pithwood.optim.adamw import AdamWSlice, adamw_update
from pithwood.optim.config import AdamWConfig, MuonConfig
from pithwood.optim.groups import ParamRole
from pithwood.optim.muon import QUINTIC, MuonRule, MuonSlice, muon_update, orthogonalize, orthogonalize_scaled
from pithwood.optim.offload import HostState
from pithwood.optim.optimizer import Optimizer
from pithwood.optim.schedule import WarmupStableDecay
from tests.numerics import assert_close, rel_error
from tests.optim.helpers import GATE_UP, NORM, ROLES, assert_same_bits, copies, make_params, set_grads

pytestmark = pytest.mark.gpu


CONFIGS = {
    "muon": MuonConfig(ema_decay=0.9),
    "adamw": AdamWConfig(ema_decay=0.9),
    "muon_bf16": MuonConfig(momentum_dtype="bf16", adam_state_dtype="bf16"),
    "adamw_bf16": AdamWConfig(adam_state_dtype="bf16"),
    "muon_host": MuonConfig(offload_state=True),
    "adamw_host": AdamWConfig(offload_state=True, adam_state_dtype="bf16"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_step_never_waits_for_the_device(kind):
    params = make_params("cuda")
    keep_copies([params[GATE_UP], params["head.weight"]], torch.bfloat16)
    optimizer = Optimizer(CONFIGS[kind], params, ROLES, 4)
    set_grads(params, 0)
    optimizer.step(0)
    for step, bad in ((1, False), (2, True)):
        set_grads(params, step)
        if bad:
            params[NORM].grad[0] = float("nan")
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            metrics = optimizer.step(step)
            optimizer.zero_grad()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert metrics["skipped"].item() == float(bad)


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_a_gpu_takes_the_cpus_steps(kind):
    schedule = WarmupStableDecay(2, 2)
    cfg = (
        MuonConfig(lr=0.02, ns_dtype="fp32", ema_decay=0.9, schedule=schedule)
        if kind == "muon"
        else AdamWConfig(lr=0.02, ema_decay=0.9, schedule=schedule)
    )
    params = {device: make_params(device) for device in ("cpu", "cuda")}
    optimizers = {device: Optimizer(cfg, params[device], ROLES, 5) for device in params}
    for step in range(5):
        for device, optimizer in optimizers.items():
            set_grads(params[device], step)
            optimizer.step(step)
    for name, start in make_params().items():
        moved = params["cuda"][name].detach().cpu() - start
        assert_close(moved, params["cpu"][name].detach() - start, tol=1e-4, what=name)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_non_finite_step_leaves_every_bit_alone(kind):
    params = make_params("cuda")
    optimizer = Optimizer(CONFIGS[kind], params, ROLES, 5)
    for bad_first in (True, False):
        if not bad_first:
            set_grads(params, 0)
            optimizer.step(0)
        weights, state = copies(params), copies(optimizer.state_dict())
        for name in params:
            set_grads(params, 1)
            params[name].grad.view(-1)[1] = float("nan")
            optimizer.step(1)
        assert_same_bits(params, weights)
        after = dict(optimizer.state_dict())
        assert after.pop("consecutive_skips").item() == len(params)
        state.pop("consecutive_skips")
        assert_same_bits(after, state)


MATRICES = [(768, 2048), (2048, 768), (512, 2048), (2048, 2048), (520, 776)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(seed))


def exact_update(update: Tensor) -> Tensor:
    """One matrix after five rounds in fp64."""
    a, b, c = QUINTIC
    x = update.double() / update.double().norm()
    x = x.T if x.shape[0] > x.shape[1] else x
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if update.shape[0] > update.shape[1] else x


@pytest.mark.parametrize("shape", MATRICES)
def test_scaled_rounds_are_nearer_to_fp64_than_rounds_in_torchs_order(shape):
    tiles = math.ceil(min(shape) / 128)
    update = normal(1 + FEWEST_TILES * 2 // (tiles * (tiles + 1)), *shape).bfloat16()
    assert symmetric_pays(update)
    inverse_M = 1 / update.float().norm(dim=(1, 2))
    exact = torch.stack([exact_update(x) for x in update[:2]])
    fast, plain = orthogonalize_scaled(update.clone(), inverse_M, 5), orthogonalize(update, 5, torch.bfloat16)
    # measured where nothing else rounds: 0.75 to 0.97 of the error of torch's order
    assert rel_error(fast[:2], exact) < 1.1 * rel_error(plain[:2], exact)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shape", MATRICES)
def test_five_steps_of_muon_are_those_of_torch_within_bf16(shape, symmetric, monkeypatch):
    monkeypatch.setattr("pithwood.ops.gram.FEWEST_TILES", 1 if symmetric else 1 << 30)
    weight, grads = normal(*shape, seed=9), [normal(*shape, seed=seed) for seed in range(5)]
    theirs = torch.nn.Parameter(weight.clone())
    reference = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    ours = torch.nn.Parameter(weight.clone())
    optimizer = Optimizer(MuonConfig(lr=0.02, clip_norm=None), {"w": ours}, {"w": ParamRole("matrix")}, 5)
    mean, exact = torch.zeros(shape, device="cuda", dtype=torch.float64), weight.double()
    for step, grad in enumerate(grads):
        theirs.grad, ours.grad = grad.clone(), grad.clone()
        reference.step()
        optimizer.step(step)
        mean = 0.95 * mean + 0.05 * grad.double()
        scale = 0.02 * 0.2 * math.sqrt(max(shape))
        exact = (1 - 0.002) * exact - scale * exact_update(0.05 * grad.double() + 0.95 * mean)
    start = weight.double() * (1 - 0.002) ** 5
    error, allowed = (rel_error(x.double() - start, exact - start) for x in (ours, theirs))
    assert error < 1.1 * allowed
    assert_close(ours.double() - start, theirs.double() - start, tol=2e-2)


def test_the_norm_of_large_and_small_gradients():
    grads = [normal(3_000_001), normal(2048, seed=1), normal(1 << 21, seed=2).bfloat16(), normal(2000, 3000, seed=3).T]
    assert_close(tensor_norms(grads), torch.stack([grad.double().norm() for grad in grads]), tol=1e-6)
    grads[0][77] = float("nan")
    assert tensor_norms(grads).isnan().tolist() == [True, False, False, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_by_the_kernel_is_adamw_by_torch(dtype):
    results = []
    for impl in ("torch", "triton"):
        param, grad, avg, sq = (normal(1_500_003, seed=seed) for seed in range(4))
        count, copy = torch.full((), 3.0, device="cuda"), torch.zeros(1_500_003, device="cuda", dtype=torch.bfloat16)
        item = AdamWSlice(param.clone(), grad, avg.to(dtype), sq.square().to(dtype), count, 0.1, 0.2, copy, (5, -6))
        one, yes = torch.ones((), device="cuda"), torch.ones((), device="cuda", dtype=torch.bool)
        adamw_update([item], betas=(0.9, 0.999), eps=1e-8, grad_scale=one, ok=yes, impl=impl)
        assert torch.equal(copy, item.param.bfloat16())
        results.append((item.param - param, item.exp_avg, item.exp_avg_sq))
    for name, fast, plain in zip(("update", "exp_avg", "exp_avg_sq"), *reversed(results), strict=True):
        assert_close(fast, plain, tol=1e-5 if fast.dtype == torch.float32 else 1e-3, what=name)


@pytest.mark.parametrize("kind", CONFIGS)
def test_kept_copies_are_what_the_weights_are(kind):
    params = make_params("cuda")
    kept = [params[GATE_UP], params["head.weight"]]
    keep_copies(kept, torch.bfloat16)
    memory = [param.kept_copy[0] for param in kept]
    optimizer = Optimizer(CONFIGS[kind], params, ROLES, 4)
    for step in range(3):
        version = params[GATE_UP]._version
        set_grads(params, step)
        optimizer.step(step)
        assert params[GATE_UP]._version > version
        for param, copy in zip(kept, memory, strict=True):
            assert in_dtype(param, torch.bfloat16) is copy
            assert torch.equal(copy, param.detach().bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_momentum_on_the_host_makes_the_same_step_bit_for_bit(dtype, monkeypatch):
    monkeypatch.setattr(muon, "GPU_CHUNK_BYTES", 40 << 20)
    results = []
    for away in (False, True):
        host = HostState(torch.device("cuda", torch.cuda.current_device()))
        items = []
        for number, count in enumerate((9, 1, 5, 20)):
            param, grad = (normal(count, 512, 1024, seed=seed) for seed in (number, 10 + number))
            momentum = host.zeros_like(param, dtype) if away else torch.zeros_like(param, dtype=dtype)
            items.append(MuonSlice(param, grad, momentum, 0.1, 0.1, None, (number, 1)))
        one, yes = torch.ones((), device="cuda"), torch.ones((), device="cuda", dtype=torch.bool)
        for _ in range(3):
            for item in items:
                item.grad.add_(1e-3)
            options = {"residence": host} if away else {}
            muon_update(items, MuonRule(0.9, True, 5, torch.bfloat16, one, yes), **options)
        host.settle()
        found = {f"p{i}": item.param.cpu() for i, item in enumerate(items)}
        results.append(found | {f"m{i}": item.momentum.cpu() for i, item in enumerate(items)})
    assert_same_bits(*results)


def test_a_resumed_optimizer_repeats_the_unbroken_one_on_the_host_too():
    for kind in ("muon_bf16", "muon_host"):
        params = make_params("cuda")
        unbroken = Optimizer(CONFIGS[kind], params, ROLES, 6, seed=3)
        for step in range(3):
            set_grads(params, step)
            unbroken.step(step)
        weights, saved = copies(params), copies(unbroken.state_dict())
        again = {name: torch.nn.Parameter(value.clone()) for name, value in weights.items()}
        resumed = Optimizer(CONFIGS[kind], again, ROLES, 6, seed=3)
        resumed.load_state_dict(saved)
        for step in range(3, 6):
            for optimizer in (unbroken, resumed):
                set_grads(optimizer.params, step)
                optimizer.step(step)
        assert_same_bits(again, params)
        assert_same_bits(resumed.state_dict(), unbroken.state_dict())


@pytest.mark.parametrize("away", [False, True])
def test_temporaries_stay_within_their_bound(away):
    count = 512
    param, grad = normal(count, 768, 2048), normal(count, 768, 2048, seed=1)
    host = HostState(param.device)
    momentum = host.zeros_like(param, torch.float32) if away else torch.zeros_like(param)
    one, yes = torch.ones((), device="cuda"), torch.ones((), device="cuda", dtype=torch.bool)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    options = {"residence": host} if away else {}
    rule = MuonRule(0.9, True, 5, torch.bfloat16, one, yes)
    muon_update([MuonSlice(param, grad, momentum, 0.1, 0.1)], rule, **options)
    torch.cuda.synchronize()
    most = 2.9e9 if away else 1.05 * muon.GPU_CHUNK_BYTES
    assert torch.cuda.max_memory_allocated() - before < most
