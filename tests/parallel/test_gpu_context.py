"""Context parallelism on two GPUs in bf16: mixers against one GPU, over documents that cross from one to the other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pithwood.attention.base import LayerContext, MixerConfig, MixerShape
from pithwood.attention.full import FullAttentionConfig
from pithwood.attention.moba import MoBAConfig
from pithwood.attention.window import SlidingWindowConfig
from pithwood.data.batches import Batch, cut_batch
from pithwood.ops.packing import Packing
from pithwood.ops.rope import Rope
from pithwood.parallel.config import MeshConfig
from pithwood.parallel.context import ContextGroup, decisions_in_context
from pithwood.parallel.mesh import Mesh
from tests.attention.builders import hidden, make_mixer
from tests.numerics import assert_close
from tests.processes import run_on

pytestmark = pytest.mark.multi_gpu

SHAPE = MixerShape(
    model_dim=256, num_heads=16, num_kv_heads=4, head_dim=64, layer=0, num_layers=2, norm_eps=1e-6, qk_norm=True
)
CROSSING = [700, 0, 1, 2500, 895]
"""4096 tokens; the second process begins within the fourth document."""
MIXERS: dict[str, MixerConfig] = {
    "full": FullAttentionConfig(),
    "full, keys convolved": FullAttentionConfig(key_conv=3),
    "window": SlidingWindowConfig(window=200),
    "moba": MoBAConfig(block_size=128, top_k=3, key_conv=3),
    "moba in small blocks": MoBAConfig(block_size=32, top_k=4),
}
WAYS = ["heads", "heads in turn", "gather", "ring"]
Result = tuple[Tensor, dict[str, Tensor], dict[str, Any]]


def run(
    device: torch.device, config: MixerConfig, batch: Batch, cp: ContextGroup | None, replay: dict[str, Any] | None
) -> Result:
    """Output, gradients and decisions, on the CPU."""
    batch, mixer = batch.to(device), make_mixer(config, shape=SHAPE).to(device)
    with torch.no_grad():
        for param in mixer.parameters():
            if param.dim() == 2 and param.shape[1] == SHAPE.model_dim:
                param /= SHAPE.model_dim**0.5
    rope = Rope.from_positions(batch.packing.position_T, SHAPE.head_dim, 10_000.0)
    x_TD = batch.columns["x"].bfloat16().requires_grad_()
    probe: dict[str, Any] = {}
    y_TD = mixer(x_TD, LayerContext(batch.packing, rope, cp=cp, replay=replay, probe=probe)).y_TD
    y_TD.backward(batch.columns["grad"].bfloat16())
    assert x_TD.grad is not None
    grads = {name: param.grad.float().cpu() for name, param in mixer.named_parameters()}
    return y_TD.detach().float().cpu(), {"x": x_TD.grad.float().cpu(), **grads}, probe


def whole_batch() -> Batch:
    columns = {"x": hidden(4096, width=256), "grad": hidden(4096, seed=99, width=256)}
    return Batch(columns, Packing.from_lengths(CROSSING))


def spread(mesh: Mesh, whole: Packing, how: str) -> ContextGroup:
    """The context of a batch; "heads in turn" exchanges one KV head after another."""
    cp = ContextGroup.of(mesh.cp, whole, how.split()[0])  # type: ignore[arg-type]
    assert cp is not None
    return replace(cp, chunks=4 if "turn" in how else 1).to(mesh.device)


def compared(mesh: Mesh, config: MixerConfig, how: str) -> tuple[Result, Result | None]:
    """What this process makes of its part, and on the first one what it makes of all of it alone."""
    one = run(mesh.device, config, whole_batch(), None, None)
    batch, whole = cut_batch(whole_batch(), mesh.cp.rank, mesh.cp.size)
    cp = spread(mesh, whole, how)
    y_TD, grads, _ = run(mesh.device, config, batch, cp, decisions_in_context(one[2], cp, SHAPE.num_kv_heads))
    return (y_TD, grads, {}), (one[0], one[1], {}) if mesh.is_first else None


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("name", MIXERS)
def test_two_gpus_equal_one(name, how):
    (first, one), (second, _) = run_on(MeshConfig(cp=2), compared, MIXERS[name], how, device="cuda")
    assert one is not None
    y_TD, grads, _ = one
    assert_close(torch.cat([first[0], second[0]]), y_TD, 1e-2, "output")
    assert_close(torch.cat([first[1]["x"], second[1]["x"]]), grads.pop("x"), 2e-2, "x")
    for part, grad in grads.items():
        assert_close(first[1][part] + second[1][part], grad, 2e-2, part)


def ring_and_heads(mesh: Mesh, lengths: list[int]) -> list[Result]:
    """Of this process's part, by ring and by heads."""
    batch = Batch(whole_batch().columns, Packing.from_lengths(lengths))
    batch, whole = cut_batch(batch, mesh.cp.rank, mesh.cp.size)
    return [run(mesh.device, FullAttentionConfig(), batch, spread(mesh, whole, how), None) for how in ("ring", "heads")]


@pytest.mark.parametrize("lengths", [[4096], CROSSING], ids=["one document", "packed"])
def test_a_ring_gives_what_heads_give(lengths):
    for (y_TD, grads, _), (other_TD, others, _) in run_on(MeshConfig(cp=2), ring_and_heads, lengths, device="cuda"):
        assert_close(y_TD, other_TD, 1e-2, "output")
        assert_close(grads["x"], others["x"], 2e-2, "x")


def without_waiting(mesh: Mesh, config: MixerConfig, how: str) -> None:
    """Fails if a second pass waits for the device anywhere."""
    batch, whole = cut_batch(whole_batch(), mesh.cp.rank, mesh.cp.size)
    cp, batch = spread(mesh, whole, how), batch.to(mesh.device)
    mixer = make_mixer(config, shape=SHAPE).to(mesh.device)
    rope = Rope.from_positions(batch.packing.position_T, SHAPE.head_dim, 10_000.0)
    for turn in range(2):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if turn else "default")
        try:
            x_TD = batch.columns["x"].bfloat16().requires_grad_()
            y_TD = mixer(x_TD, LayerContext(batch.packing, rope, cp=cp)).y_TD
            y_TD.backward(batch.columns["grad"].bfloat16())
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("name", MIXERS)
def test_the_host_waits_for_nothing(name, how):
    run_on(MeshConfig(cp=2), without_waiting, MIXERS[name], how, device="cuda")
