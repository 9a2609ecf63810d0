"""Context parallelism against one process: outputs, gradients of inputs and weights, whatever the documents."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pithwood.attention.base import LayerContext, Mixer, MixerConfig
from pithwood.attention.full import FullAttentionConfig
from pithwood.attention.moba import MoBAConfig
from pithwood.attention.window import SlidingWindowConfig
from pithwood.data.batches import Batch, cut_batch
from pithwood.models.recompute import recomputed
from pithwood.ops.dense_attention import dense_attention
from pithwood.ops.packing import Packing
from pithwood.ops.summarise import summarise
from pithwood.parallel.config import MeshConfig
from pithwood.parallel.context import (
    CHUNK_BYTES,
    CHUNKS,
    ContextGroup,
    attend_in_context,
    decisions_in_context,
    decisions_of_rows,
    from_zigzag,
    gather_block_means,
    halo,
    to_zigzag,
)
from pithwood.parallel.heads import heads_to_tokens, tokens_to_heads
from pithwood.parallel.mesh import Group, Mesh
from tests.attention.builders import SHAPE, context, hidden, make_mixer
from tests.numerics import assert_close
from tests.processes import run_on
from tests.toy_mixer import ToyRecurrenceConfig

GQA = replace(SHAPE, num_heads=8, num_kv_heads=4)
CROSSING = [21, 0, 1, 40, 13, 0, 5]
"""80 tokens: with 2 and with 4 processes documents cross boundaries, several lie on one, some are empty."""
MIXERS: dict[str, MixerConfig] = {
    "full": FullAttentionConfig(),
    "full, keys convolved": FullAttentionConfig(key_conv=3),
    "window": SlidingWindowConfig(window=7),
    "window of one": SlidingWindowConfig(window=1),
    "window beyond a process": SlidingWindowConfig(window=50, key_conv=5),
    "moba": MoBAConfig(block_size=6, top_k=3, key_conv=3),
    "moba per KV head": MoBAConfig(block_size=16, top_k=2, route_per="kv_group", mean_dtype="fp32"),
}


WAYS = ["heads", "heads in turn", "gather", "ring"]


def of_one(config: MixerConfig, lengths: list[int]) -> tuple[Tensor, dict[str, Tensor], dict[str, Any]]:
    """Output, gradients and decisions of one process."""
    mixer, x_TD = make_mixer(config, shape=GQA), hidden(sum(lengths)).requires_grad_()
    decisions: dict[str, Any] = {}
    y_TD = mixer(x_TD, context(Packing.from_lengths(lengths), probe=decisions)).y_TD
    y_TD.backward(hidden(len(y_TD), seed=99))
    grads = {name: param.grad for name, param in mixer.named_parameters()}
    assert x_TD.grad is not None
    return y_TD.detach(), {"x": x_TD.grad, **grads}, decisions


def spread(mesh: Mesh, whole: Packing, how: str) -> ContextGroup:
    """The context of a batch; "heads in turn" exchanges one KV head after another."""
    cp = ContextGroup.of(mesh.cp, whole, how.split()[0])  # type: ignore[arg-type]
    assert cp is not None
    return replace(cp, chunks=4) if "turn" in how else cp


def of_a_part(
    mesh: Mesh, config: MixerConfig, lengths: list[int], how: str, decisions: dict[str, Any] | None
) -> tuple[Tensor, dict[str, Tensor], dict[str, Any]]:
    """The same of this process's tokens."""
    whole = Packing.from_lengths(lengths)
    columns = {"x": hidden(sum(lengths)), "grad": hidden(sum(lengths), seed=99)}
    batch, _ = cut_batch(Batch(columns, whole), mesh.cp.rank, mesh.cp.size)
    cp = spread(mesh, whole, how)
    mixer, x_TD = make_mixer(config, shape=GQA), batch.columns["x"].clone().requires_grad_()
    probe: dict[str, Any] = {}
    replay = None if decisions is None else decisions_in_context(decisions, cp, GQA.num_kv_heads)
    y_TD = mixer(x_TD, context(batch.packing, cp=cp, replay=replay, probe=probe)).y_TD
    if "layers.0.blocks" in probe:
        assert len(probe["layers.0.blocks"].ids) == cp.selections(GQA.num_kv_heads).num_queries
    y_TD.backward(batch.columns["grad"])
    grads = {name: param.grad for name, param in mixer.named_parameters()}
    assert x_TD.grad is not None
    return y_TD.detach(), {"x": x_TD.grad, **grads}, probe


def assert_equals_one_process(size: int, config: MixerConfig, lengths: list[int], how: str, replay: bool) -> None:
    y_TD, grads, decisions = of_one(config, lengths)
    parts = run_on(MeshConfig(cp=size), of_a_part, config, lengths, how, decisions if replay else None)
    assert_close(torch.cat([y for y, _, _ in parts]), y_TD, 1e-5, "output")
    assert_close(torch.cat([found["x"] for _, found, _ in parts]), grads.pop("x"), 1e-5, "x")
    for name, grad in grads.items():
        assert_close(torch.stack([found[name] for _, found, _ in parts]).sum(0), grad, 1e-5, name)


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("name", MIXERS)
def test_two_processes_equal_one(name, how):
    assert_equals_one_process(2, MIXERS[name], CROSSING, how, replay=True)


@pytest.mark.parametrize(
    ("name", "how"), [("full, keys convolved", "gather"), ("window", "auto"), ("moba", "heads"), ("moba", "gather")]
)
def test_four_processes_equal_one(name, how):
    assert_equals_one_process(4, MIXERS[name], CROSSING, how, replay=True)


@pytest.mark.parametrize("name", ["full, keys convolved", "window", "moba"])
@pytest.mark.parametrize("lengths", [[80], [20, 20, 20, 20], [13, 27, 0, 40]])
def test_documents_of_any_kind_equal_one_process(name, lengths):
    assert_equals_one_process(2, MIXERS[name], lengths, "auto", replay=False)


@pytest.mark.parametrize(("size", "lengths"), [(2, CROSSING), (4, CROSSING), (4, [80])])
def test_a_recurrence_goes_on_across_processes(size, lengths):
    assert_equals_one_process(size, ToyRecurrenceConfig(), lengths, "auto", replay=False)


@pytest.mark.parametrize(("how", "dim"), [("heads", 1), ("heads in turn", 1), ("gather", 0)])
def test_blocks_are_chosen_as_by_one_process(how, dim):
    config = MIXERS["moba"]
    _, _, decisions = of_one(config, CROSSING)
    parts = run_on(MeshConfig(cp=2), of_a_part, config, CROSSING, how, None)
    found = torch.cat([probe["layers.0.blocks"].ids for _, _, probe in parts], dim)
    assert torch.equal(found, decisions["layers.0.blocks"].ids)


def changed_elsewhere(mesh: Mesh, config: MixerConfig, how: str) -> list[bool]:
    """Whether each token's output stays the same, bit for bit, when the document of tokens 22:62 is no number."""
    whole = Packing.from_lengths(CROSSING)
    batch, _ = cut_batch(Batch({"x": hidden(80)}, whole), mesh.cp.rank, mesh.cp.size)
    spoiled = hidden(80)
    spoiled[22:62] = float("nan")
    other, _ = cut_batch(Batch({"x": spoiled}, whole), mesh.cp.rank, mesh.cp.size)
    cp, mixer = spread(mesh, whole, how), make_mixer(config, shape=GQA)
    before, after = (mixer(part.columns["x"], context(batch.packing, cp=cp)).y_TD for part in (batch, other))
    return (before == after).all(-1).tolist()


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("name", ["full, keys convolved", "window", "moba"])
def test_nothing_of_other_documents_gets_through(name, how):
    first, second = run_on(MeshConfig(cp=2), changed_elsewhere, MIXERS[name], how)
    assert first + second == [True] * 22 + [False] * 40 + [True] * 18


class OneMixer(nn.Module):
    def __init__(self, mixer: Mixer) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x_TD: Tensor, ctx: LayerContext) -> tuple[Tensor, dict[str, Tensor]]:
        return self.mixer(x_TD, ctx).y_TD, {}


def computed_again(mesh: Mesh, config: MixerConfig, how: str) -> list[tuple[Tensor, ...]]:
    whole, found = Packing.from_lengths(CROSSING), []
    batch, _ = cut_batch(Batch({"x": hidden(80)}, whole), mesh.cp.rank, mesh.cp.size)
    ctx = context(batch.packing, cp=spread(mesh, whole, how))
    for again in (False, True):
        block, x_TD = OneMixer(make_mixer(config, shape=GQA)), batch.columns["x"].clone().requires_grad_()
        y_TD, _ = recomputed(block, x_TD, ctx) if again else block(x_TD, ctx)
        y_TD.square().sum().backward()
        assert x_TD.grad is not None
        found.append((y_TD.detach(), x_TD.grad, block.mixer.k_proj.weight.grad))
    return found


@pytest.mark.parametrize("how", WAYS)
def test_exchanges_are_repeated_where_a_block_is_computed_again(how):
    for kept, again in run_on(MeshConfig(cp=2), computed_again, MIXERS["moba"], how):
        for a, b in zip(again, kept, strict=True):
            assert torch.equal(a, b)


def neighbours(mesh: Mesh, rows: int) -> tuple[list[float], list[float]]:
    """Rows before this process's of the numbers 1 to 3 P, and the gradient if row i of them counts i + 1 times."""
    cp = ContextGroup.of(mesh.cp, Packing.from_lengths([3 * mesh.cp.size]))
    assert cp is not None
    x = (torch.arange(3.0) + cp.first + 1).requires_grad_()
    before = halo(cp, x, rows)
    before.backward(torch.arange(1.0, rows + 1))
    assert x.grad is not None
    return before.tolist(), x.grad.tolist()


def test_a_halo_holds_the_rows_before_and_sends_their_gradients_home():
    assert run_on(MeshConfig(cp=2), neighbours, 2) == [([0, 0], [0, 1, 2]), ([2, 3], [0, 0, 0])]
    reaching = run_on(MeshConfig(cp=3), neighbours, 5)
    assert [rows for rows, _ in reaching] == [[0, 0, 0, 0, 0], [0, 0, 1, 2, 3], [2, 3, 4, 5, 6]]
    # token 3 is the last row of the second process's halo and the second of the third's
    assert [grad for _, grad in reaching] == [[3, 4 + 1, 5 + 2], [3, 4, 5], [0, 0, 0]]


def heads_there_and_back(mesh: Mesh) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x_THK = (torch.arange(24.0).view(3, 4, 2) + 100 * mesh.cp.rank).requires_grad_()
    (whole,) = heads_to_tokens(mesh.cp, x_THK)
    back = tokens_to_heads(mesh.cp, 2 * whole)
    back.backward(x_THK.detach())
    assert x_THK.grad is not None
    return x_THK.detach(), whole.detach(), back.detach(), x_THK.grad


def test_heads_go_to_all_tokens_and_come_back():
    results = run_on(MeshConfig(cp=2), heads_there_and_back)
    tokens = torch.cat([x for x, _, _, _ in results])
    for rank, (x, whole, back, grad) in enumerate(results):
        assert torch.equal(whole, tokens[:, 2 * rank : 2 * rank + 2])
        assert torch.equal(back, 2 * x)
        assert torch.equal(grad, 2 * x)


def there_and_back(mesh: Mesh) -> tuple[list[float], list[float], list[float]]:
    x = (torch.arange(4.0) + 4 * mesh.cp.rank).requires_grad_()
    mixed = to_zigzag(mesh.cp, x)
    back = from_zigzag(mesh.cp, mixed)
    back.backward(torch.arange(4.0) + 4 * mesh.cp.rank)
    assert x.grad is not None
    return mixed.tolist(), back.tolist(), x.grad.tolist()


@pytest.mark.parametrize("size", [2, 3])
def test_a_zigzag_gives_every_process_early_and_late_tokens_and_comes_back(size):
    last = 4 * size - 2
    for rank, (mixed, back, grad) in enumerate(run_on(MeshConfig(cp=size), there_and_back)):
        assert mixed == [2 * rank, 2 * rank + 1, last - 2 * rank, last - 2 * rank + 1]
        assert back == grad == [4 * rank, 4 * rank + 1, 4 * rank + 2, 4 * rank + 3]


def means_of_blocks(mesh: Mesh, lengths: list[int], block_size: int) -> Tensor:
    whole = Packing.from_lengths(lengths)
    cp = ContextGroup.of(mesh.cp, whole, "gather")
    assert cp is not None
    part = hidden(whole.num_queries).view(-1, 3, 8)[cp.first : cp.first + cp.num_tokens]
    return gather_block_means(cp, part, block_size)


@pytest.mark.parametrize("lengths", [CROSSING, [80], [39, 41]])
def test_block_means_are_those_of_one_process(lengths):
    packing, block_size = Packing.from_lengths(lengths), 6
    expected = summarise(hidden(80).view(-1, 3, 8), packing, block_size)
    found = run_on(MeshConfig(cp=4), means_of_blocks, lengths, block_size)
    first_T = torch.arange(80) - packing.position_T % block_size
    straddling = {
        int(packing.unit_offsets(block_size)[packing.query_doc()[edge]] + packing.position_T[edge] // block_size)
        for edge in (20, 40, 60)
        if first_T[edge] != edge
    }
    alone = [unit for unit in range(len(expected)) if unit not in straddling]
    for means in found:
        assert_close(means, expected, 1e-6)
        assert torch.equal(means[alone], expected[alone])


def pair(rank: int) -> Group:
    """A group that could not exchange anything."""
    return Group((0, 1), rank)


@pytest.mark.quick
def test_documents_that_lie_on_one_process_need_nothing_from_elsewhere():
    for lengths, docs in (([20, 20, 20, 20], 2), ([13, 27, 0, 40], 4)):
        config, whole = MIXERS["moba"], Packing.from_lengths(lengths)
        y_TD, _, _ = of_one(config, lengths)
        for rank in (0, 1):
            batch, _ = cut_batch(Batch({"x": hidden(80)}, whole), rank, 2)
            cp = ContextGroup.of(pair(rank), whole)
            assert cp is not None
            assert (cp.exchange(3), cp.local.num_docs) == ("none", docs)
            part = make_mixer(config, shape=GQA)(batch.columns["x"], context(batch.packing, cp=cp)).y_TD
            assert torch.equal(part, y_TD[40 * rank : 40 * rank + 40])


@pytest.mark.quick
def test_a_part_keeps_the_documents_numbers_and_positions():
    batch, whole = cut_batch(Batch({"x": torch.arange(80)}, Packing.from_lengths(CROSSING)), 1, 2)
    assert batch.columns["x"].tolist() == list(range(40, 80))
    assert batch.packing.cu_q.tolist() == [0, 0, 0, 0, 22, 35, 35, 40]
    assert batch.packing.position_T.tolist() == [*range(18, 40), *range(13), *range(5)]
    assert batch.packing.self_attention
    assert whole.num_queries == 80


@pytest.mark.quick
def test_tokens_that_cannot_be_divided_are_refused():
    batch = Batch({"x": torch.arange(80)}, Packing.from_lengths(CROSSING))
    with pytest.raises(ValueError, match=r"80 tokens cannot be divided evenly over mesh\.cp=3"):
        cut_batch(batch, 0, 3)
    assert cut_batch(batch, 0, 1) == (batch, batch.packing)


@pytest.mark.quick
def test_heads_that_cannot_be_divided_are_gathered_or_refused():
    whole, group = Packing.from_lengths([81]), Group((0, 1, 2), 0)
    chosen = [ContextGroup.of(group, whole, how) for how in ("auto", "heads", "gather")]
    assert [cp.exchange(6) for cp in chosen if cp is not None] == ["heads", "heads", "gather"]
    assert [cp.exchange(4) for cp in chosen if cp is not None and cp.how != "heads"] == ["gather", "gather"]
    assert chosen[1] is not None
    with pytest.raises(ValueError, match=r"mesh\.cp=3 to divide num_kv_heads=4; set mesh\.context=auto"):
        chosen[1].exchange(4)


@pytest.mark.quick
def test_attention_in_both_directions_is_not_gathered():
    cp, q = ContextGroup.of(pair(0), Packing.from_lengths([8], causal=False), "gather"), torch.zeros(4, 2, 8)
    assert cp is not None
    with pytest.raises(ValueError, match=r"both directions needs mesh\.context=heads"):
        attend_in_context(cp, q, q, q, lambda q, k, v, packing: dense_attention(q, k, v, packing)[0])


@pytest.mark.quick
def test_heads_travel_in_groups_that_divide_a_processs_kv_heads():
    cp = ContextGroup.of(pair(0), Packing.from_lengths([80]))
    assert cp is not None
    assert [replace(cp, chunks=wanted).groups_of_heads(12, 100) for wanted in (1, 2, 4, 9)] == [1, 2, 3, 6]
    assert [cp.groups_of_heads(12, size) for size in (100, CHUNK_BYTES, 9 * CHUNK_BYTES)] == [1, 1, CHUNKS]


@pytest.mark.quick
def test_decisions_of_all_tokens_are_cut_to_rows_and_heads():
    _, _, decisions = of_one(MIXERS["moba"], CROSSING)
    decisions |= {"layers.0.experts": torch.arange(80)[:, None], "layers.0.step_counts": torch.arange(5)}
    heads = ContextGroup.of(pair(1), Packing.from_lengths(CROSSING), "heads")
    assert heads is not None
    gather = replace(heads, how="gather")
    ids, mine = decisions["layers.0.blocks"].ids, decisions_in_context(decisions, heads, 4)
    assert torch.equal(mine["layers.0.blocks"].ids, ids[:, 4:])
    assert torch.equal(decisions_in_context(decisions, gather, 4)["layers.0.blocks"].ids, ids[40:])
    assert mine["layers.0.experts"].flatten().tolist() == list(range(40, 80))
    assert mine["layers.0.step_counts"].tolist() == list(range(5))
    assert decisions_of_rows(decisions, 22, 40, 80)["layers.0.blocks"].count.shape == (40, 8)
