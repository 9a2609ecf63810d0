"""Full attention by ring: one process's results, what is computed, what travels, what is held, and when."""

from __future__ import annotations

import time
import weakref
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pithwood.attention.full import FullAttentionConfig
from pithwood.data.batches import Batch, cut_batch
from pithwood.ops import dense_attention
from pithwood.ops.packing import Packing
from pithwood.parallel.config import MeshConfig
from pithwood.parallel.context import ContextGroup, attend_in_context
from pithwood.parallel.mesh import Group, Mesh
from pithwood.parallel.ring import Round, document_spans
from tests.attention.builders import context, hidden, make_mixer
from tests.numerics import assert_close
from tests.parallel.test_context import GQA, OneMixer, recomputed
from tests.processes import run_on

LENGTHS = {
    "one document": [96],
    "packed, uneven": [21, 0, 1, 40, 13, 0, 21],
    "two that begin within chunks": [50, 46],
    "a long one between short ones": [3, 90, 2, 1],
    "some cross, some turns do not": [24, 30, 24, 18],
}


def inputs(heads: int = 6, kv_heads: int = 3, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """q, k, v and the gradient of o, of 96 tokens; values are narrower than keys."""
    generator = torch.Generator().manual_seed(3)
    shapes = (96, heads, 16), (96, kv_heads, 16), (96, kv_heads, 8), (96, heads, 8)
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def never(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    raise AssertionError("attention went another way")


def spread_attention(cp: ContextGroup, *tensors: Tensor) -> tuple[Tensor, ...]:
    """o and the gradients of q, k, v, of this process's tokens."""
    rows = slice(cp.first, cp.first + cp.num_tokens)
    *leaves, grad = (x[rows].clone() for x in tensors)
    for leaf in leaves:
        leaf.requires_grad_()
    o = attend_in_context(cp, *leaves, never, plain_scale=0.3)
    o.backward(grad)
    return o.detach(), *(leaf.grad for leaf in leaves)  # type: ignore[misc]


def of_a_part(mesh: Mesh, lengths: list[int], dtype: torch.dtype) -> tuple[Tensor, ...]:
    cp = ContextGroup.of(mesh.cp, Packing.from_lengths(lengths), "ring")
    assert cp is not None
    return spread_attention(cp, *inputs(dtype=dtype))


def of_one(lengths: list[int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    *leaves, grad = inputs(dtype=dtype)
    for leaf in leaves:
        leaf.requires_grad_()
    o, _ = dense_attention(*leaves, Packing.from_lengths(lengths), 0.3)
    o.backward(grad)
    return o.detach(), *(leaf.grad for leaf in leaves)  # type: ignore[misc]


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("name", LENGTHS)
def test_outputs_and_gradients_are_those_of_one_process(size, name):
    parts = run_on(MeshConfig(cp=size), of_a_part, LENGTHS[name], torch.float32)
    for what, *found, expected in zip("oqkv", *parts, of_one(LENGTHS[name]), strict=True):
        assert_close(torch.cat(found), expected, 1e-5, what)


def test_low_precision_is_rounded_once_beyond_its_parts():
    parts = run_on(MeshConfig(cp=4), of_a_part, [96], torch.bfloat16)
    exact = of_one([96], torch.float64)
    for what, *found, expected in zip("oqkv", *parts, exact, strict=True):
        assert_close(torch.cat(found), expected, 8e-3, what)


def mixed_again(mesh: Mesh, kv_heads: int) -> list[tuple[Tensor, ...]]:
    """Output, the input's and a weight's gradient of a mixer, kept, computed again in the backward pass, and without
    one."""
    whole, found = Packing.from_lengths(LENGTHS["packed, uneven"]), []
    batch, _ = cut_batch(Batch({"x": hidden(96)}, whole), mesh.cp.rank, mesh.cp.size)
    cp = ContextGroup.of(mesh.cp, whole)
    assert cp is not None
    assert cp.exchange(kv_heads) == "gather"
    assert cp.spans
    ctx = context(batch.packing, cp=cp)
    config, shape = FullAttentionConfig(key_conv=3), replace(GQA, num_heads=6, num_kv_heads=kv_heads)
    for again in (False, True):
        block, x_TD = OneMixer(make_mixer(config, shape=shape)), batch.columns["x"].clone().requires_grad_()
        y_TD, _ = recomputed(block, x_TD, ctx) if again else block(x_TD, ctx)
        y_TD.square().sum().backward()
        assert x_TD.grad is not None
        found.append((y_TD.detach(), x_TD.grad, block.mixer.k_proj.weight.grad))
    with torch.no_grad():
        found.append((OneMixer(make_mixer(config, shape=shape))(batch.columns["x"], ctx)[0],))
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_kv_heads_that_do_not_divide_go_by_ring_and_repeat_when_computed_again(size):
    x_TD = hidden(96).requires_grad_()
    mixer = make_mixer(FullAttentionConfig(key_conv=3), shape=replace(GQA, num_heads=6, num_kv_heads=3))
    y_TD = mixer(x_TD, context(Packing.from_lengths(LENGTHS["packed, uneven"]))).y_TD
    y_TD.square().sum().backward()
    parts = run_on(MeshConfig(cp=size), mixed_again, 3)
    for kept, again, evaluated in parts:
        assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))
        assert torch.equal(evaluated[0], kept[0])
    y, x, weight = zip(*(kept for kept, _, _ in parts), strict=True)
    assert_close(torch.cat(y), y_TD.detach(), 1e-5, "output")
    assert_close(torch.cat(x), x_TD.grad, 1e-5, "x")
    assert_close(torch.stack(weight).sum(0), mixer.k_proj.weight.grad, 1e-5, "k_proj")


def rounds(lengths: list[int], size: int) -> list[Round]:
    """Of every process."""
    whole = Packing.from_lengths(lengths)
    return [Round.of(whole, document_spans(whole, size), Group(tuple(range(size)), rank)) for rank in range(size)]


def pairs_seen(way: Round) -> int:
    """Pairs of a query and a key that a process computes."""
    own = sum(n * (n + 1) // 2 for n in way.own.cu_q.diff().tolist())
    return own + sum((turn.queries.stop - turn.queries.start) * turn.keys for turn in way.turns)


@pytest.mark.quick
@pytest.mark.parametrize("size", [2, 3, 4, 8])
@pytest.mark.parametrize("name", LENGTHS)
def test_every_pair_of_the_triangle_is_computed_and_no_other(size, name):
    assert sum(map(pairs_seen, rounds(LENGTHS[name], size))) == sum(n * (n + 1) // 2 for n in LENGTHS[name])


@pytest.mark.quick
def test_every_turn_is_the_same_work_on_every_process():
    for way in rounds([96], 4):
        assert [(turn.queries.stop - turn.queries.start) * turn.keys for turn in way.turns] == [2 * 12 * 12] * 3
        assert way.own.num_docs == 1


@pytest.mark.quick
def test_only_keys_of_documents_that_go_on_travel():
    # chunks of 24, of which the first process has those at both ends: the last document begins 18 tokens before its
    # late one, and nothing goes on from its early one
    first, second = rounds([24, 20, 10, 42], 2)
    assert [(turn.keys, turn.given) for turn in first.turns] == [(18, slice(0, 0))]
    assert [(turn.queries, turn.keys, turn.given) for turn in second.turns] == [(slice(0, 0), 0, slice(30, 48))]


@pytest.mark.quick
def test_turns_in_which_nobody_sees_anything_are_left_out():
    # chunks of 12: neighbours in the order of the tokens share documents, chunks farther apart do not
    assert [len(way.turns) for way in rounds([6, *[12] * 7, 6], 4)] == [2] * 4
    assert [len(way.turns) for way in rounds([96], 4)] == [3] * 4


@pytest.mark.quick
def test_tokens_without_two_halves_do_not_go_by_ring():
    whole, group = Packing.from_lengths([18]), Group((0, 1), 0)
    with pytest.raises(ValueError, match=r"even number of tokens on each process, not 18 / mesh\.cp=2 = 9"):
        ContextGroup.of(group, whole, "ring")
    cp = ContextGroup.of(group, whole)
    assert cp is not None
    assert not cp.spans


FORWARD_ROWS = 48
"""Keys of two processes of 24 tokens each; those of all others are 72."""
BACKWARD_ROWS = 72
"""And the gradients of one process's, on their way home."""


@dataclass(frozen=True)
class WatchedGroup(Group):
    """A group that notes when exchanges that run beside others begin and end, and what of theirs is held meanwhile."""

    notes: list[Any] = field(default_factory=list)
    arrivals: list[Any] = field(default_factory=list)
    allowed: list[int] = field(default_factory=list)
    """Rows that may be held in this pass (the last one counts). What the backend's threads are about to let go of is
    waited for where there are more."""

    def _held(self) -> int:
        return sum(len(rows) for rows in (ref() for ref in self.arrivals) if rows is not None)

    def all_to_all(self, out: Tensor, given: Tensor, *sizes: Any, wait: bool = True) -> Any:
        work = super().all_to_all(out, given, *sizes, wait=wait)
        if wait:
            return work
        self.arrivals.append(weakref.ref(out))
        patience = time.monotonic() + 5
        while self._held() > self.allowed[-1] and time.monotonic() < patience:
            time.sleep(0.01)
        self.notes.append(("begin", self._held()))
        return Watched(work, self.notes)


@dataclass
class Watched:
    work: Any
    notes: list[Any]

    def wait(self) -> None:
        self.notes.append(("arrived", 0))
        self.work.wait()


class Products(TorchDispatchMode):
    """Notes matrix products, the compute of attention, once in a row."""

    def __init__(self, notes: list[Any]) -> None:
        super().__init__()
        self.notes = notes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.bmm.default and (not self.notes or self.notes[-1][0] != "compute"):
            self.notes.append(("compute", 0))
        return func(*args, **(kwargs or {}))


def watched(mesh: Mesh) -> tuple[list[Any], list[Any]]:
    """What happens in a forward and in a backward pass over one document."""
    group = WatchedGroup(mesh.cp.ranks, mesh.cp.rank, mesh.cp.handle, allowed=[FORWARD_ROWS])
    cp = ContextGroup.of(group, Packing.from_lengths([96]), "ring")
    assert cp is not None
    rows = slice(cp.first, cp.first + cp.num_tokens)
    q, k, v, grad = (x[rows].clone() for x in inputs())
    q.requires_grad_()
    with Products(group.notes):
        o = attend_in_context(cp, q, k, v, never, plain_scale=0.3)
        forward = list(group.notes)
        group.notes.clear()
        group.allowed.append(BACKWARD_ROWS)
        o.backward(grad)
    return forward, list(group.notes)


def test_the_next_keys_are_on_their_way_before_these_are_worked_on():
    for forward, backward in run_on(MeshConfig(cp=4), watched):
        names = [name for name, _ in forward]
        assert names == ["begin", "compute", "arrived"] * 3 + ["compute"]
        names = [name for name, _ in backward]
        first = ["begin", "compute", "arrived"]
        # gradients of turn s leave when it is computed, and are waited for after turn s + 1
        second = ["begin", "compute", "begin", "arrived"]
        third = ["begin", "compute", "begin", "arrived", "arrived"]
        last = ["compute", "begin", "arrived", "arrived"]
        assert names == first + second + third + last


def test_keys_of_two_other_processes_are_held_at_most():
    for forward, backward in run_on(MeshConfig(cp=4), watched):
        assert max(rows for _, rows in forward) <= FORWARD_ROWS
        assert max(rows for _, rows in backward) <= BACKWARD_ROWS
