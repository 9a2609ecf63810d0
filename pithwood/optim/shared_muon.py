"""Muon where matrices are cut between processes, or held by several: gathered to an owner each, stretches sent back.

Momentum, decay and step are taken where the stretches lie, so the owner gets what is to be orthogonalised and returns
what came out, both in Newton-Schulz's dtype: the result is that of one process. While one round's matrices are
orthogonalised, the next round's are on their way to their owners and the last round's on their way back.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from pithwood.optim.layout import Place
from pithwood.optim.muon import (
    MuonRule,
    MuonSlice,
    chunk_slices,
    draw_momentum,
    draw_momentum_fused,
    matrices_per_chunk,
    move_weights,
    orthogonalize,
    orthogonalize_fast,
    update_chunk,
    update_scale,
    uses_kernels,
)
from pithwood.optim.offload import Residence, in_place
from pithwood.optim.owners import ROUND_SHARE, Round, Stack, plan_rounds, replicas_share, share_out
from pithwood.parallel.mesh import Mesh


class SharedMuon:
    """The plan for one set of parameters, and its execution.

    stacks    the parameters' matrices, the same in all processes of a pipeline stage and in the same order
    ns_dtype  in which matrices travel
    """

    def __init__(self, mesh: Mesh, place: Place, stacks: Sequence[Stack], ns_dtype: torch.dtype) -> None:
        self.mesh, self.place = mesh, place
        self.stacks = {stack.name: stack for stack in stacks}
        device = mesh.device
        self.alone, shared = share_out(stacks, place, lambda rows, cols: replicas_share(rows, cols, device))
        self.rounds = plan_rounds(
            shared, place, lambda rows, cols: max(1, matrices_per_chunk(rows, cols, ns_dtype, device) // ROUND_SHARE)
        )

    def start(
        self,
        flats: Mapping[str, MuonSlice],
        rule: MuonRule,
        *,
        residence: Residence = in_place,
        impl: Literal["torch", "triton"] | None = None,
    ) -> Callable[[], None]:
        """Take the step of all stacks; returns what finishes it, to be called by all processes: other work may run
        before, under the last results' way back.

        flats  by name, the flat stretch of the parameter that this process holds, and `first`, its first element
        impl   as of `muon_update`
        """
        if not flats:
            return lambda: None
        fused = uses_kernels(next(iter(flats.values())).param, impl)
        alone = [
            _shaped(_stretch(flats[name], own.start * size, own.stop * size), (-1, stack.rows, stack.cols))
            for name, stack in self.stacks.items()
            if (own := self.alone[name]) and (size := stack.rows * stack.cols)
        ]
        jobs = _interleave(self.rounds, chunk_slices(alone, rule.ns_dtype))
        slices = [
            [_stretch(flats[matrix.name], holding.start, holding.stop) for matrix, holding in job.everything]
            if isinstance(job, Round)
            else job
            for job in jobs
        ]
        under_way: list[Iterator[None]] = []
        for index, momenta in enumerate(residence([[item.momentum for item in items] for items in slices])):
            job = jobs[index]
            if isinstance(job, Round):
                newest = self._travel(job, slices[index], momenta, rule, fused)
                next(newest)
                under_way = [newest, *_advanced(under_way)]
            else:
                update_chunk(job, momenta, rule, fused)

        def finish() -> None:
            left = under_way
            while left:
                left = _advanced(left)

        return finish

    def _travel(
        self, job: Round, items: list[MuonSlice], momenta: list[Tensor], rule: MuonRule, fused: bool
    ) -> Iterator[None]:
        """One round; pauses wherever something is on its way."""
        shard, dtype, device = self.mesh.shard, rule.ns_dtype, self.mesh.device
        sent = torch.empty(sum(job.sent_sizes), dtype=dtype, device=device)
        _draw(job, self.place.replica, items, momenta, rule, fused, sent)
        arrived = torch.empty(sum(job.arriving_sizes), dtype=dtype, device=device)
        work = shard.all_to_all(*_as_bytes(arrived, sent, job.arriving_sizes, job.sent_sizes), wait=False)
        yield
        _wait(work)
        results = _orthogonalized(job, arrived, rule, fused)
        returned = torch.empty(job.width, dtype=dtype, device=device)
        mine = returned[: sum(job.returned_sizes)]
        work = shard.all_to_all(*_as_bytes(mine, results, job.returned_sizes, job.leaving_sizes), wait=False)
        yield
        _wait(work)
        if self.place.replicas > 1:
            of_all = torch.empty(self.place.replicas * job.width, dtype=dtype, device=device)
            work = self.mesh.replicate.all_gather(of_all.view(torch.uint8), returned.view(torch.uint8), wait=False)
            yield
            _wait(work)
            returned = of_all
        left = iter(items)
        for replica, parts in enumerate(job.parts):
            at = replica * job.width
            for matrix, holding in parts:
                item = next(left)
                move_weights(
                    item, returned[at : at + holding.size], update_scale(matrix.rows, matrix.cols), rule, fused
                )
                at += holding.size


def _draw(
    job: Round, replica: int, items: list[MuonSlice], momenta: list[Tensor], rule: MuonRule, fused: bool, sent: Tensor
) -> None:
    """Draw the momenta of all parts towards their gradients; what owners of this replica need goes to `sent`."""
    goes = [job.sends[i] if r == replica else False for r, parts in enumerate(job.parts) for i in range(len(parts))]
    at = 0
    for item, held, is_sent in zip(items, momenta, goes, strict=True):
        size = item.param.numel()
        target = sent[at : at + size] if is_sent else None
        at += size if is_sent else 0
        if fused:
            from pithwood.optim.kernels_triton import norm_parts

            update = item.param.new_empty(size, dtype=rule.ns_dtype) if target is None else target
            squares = item.param.new_empty(1, norm_parts(size))
            draw_momentum_fused(_shaped(item, (1, 1, -1)), held.view(1, 1, -1), rule, update.view(1, 1, -1), squares)
            continue
        update = draw_momentum(item, held, rule)
        if target is not None:
            target.copy_(update)


def _orthogonalized(job: Round, arrived: Tensor, rule: MuonRule, fused: bool) -> Tensor:
    """The stretches of the owned matrices' results, in the order in which they leave."""
    if not job.owned:
        return arrived.new_empty(0)
    rows, cols = job.owned[0].rows, job.owned[0].cols
    places = [number * rows * cols + holding.start - job.owned[number].start for number, holding in job.arriving]
    sizes = [holding.size for _, holding in job.arriving]
    if places == list(itertools.accumulate(sizes, initial=0))[:-1]:
        flat = arrived
    else:
        flat = torch.empty_like(arrived)
        targets = [flat[place : place + size] for place, size in zip(places, sizes, strict=True)]
        torch._foreach_copy_(targets, list(arrived.split(sizes)))
    update_MRC = flat.view(len(job.owned), rows, cols)
    if fused:
        ortho_MRC = orthogonalize_fast(update_MRC, rule.ns_steps)
    else:
        ortho_MRC = orthogonalize(update_MRC, rule.ns_steps, rule.ns_dtype)
    flat = ortho_MRC.contiguous().view(-1)
    starts = [number * rows * cols + holding.start - job.owned[number].start for number, holding in job.leaving]
    return torch.cat(
        [flat[start : start + holding.size] for start, (_, holding) in zip(starts, job.leaving, strict=True)]
    )


def _stretch(flat: MuonSlice, start: int, stop: int) -> MuonSlice:
    """Elements start:stop of the parameter out of the flat stretch that this process has of it."""
    cut = slice(start - flat.first, stop - flat.first)
    return replace(
        flat,
        param=flat.param[cut],
        grad=flat.grad[cut],
        momentum=flat.momentum[cut],
        copy=None if flat.copy is None else flat.copy[cut],
        first=start,
    )


def _shaped(item: MuonSlice, shape: tuple[int, int, int]) -> MuonSlice:
    return replace(
        item,
        param=item.param.view(shape),
        grad=item.grad.view(shape),
        momentum=item.momentum.view(shape),
        copy=None if item.copy is None else item.copy.view(shape),
    )


def _interleave(rounds: list[Round], chunks: list[list[MuonSlice]]) -> list[Round | list[MuonSlice]]:
    """Each round, then its share of the chunks that need nobody, under which it travels."""
    jobs: list[Round | list[MuonSlice]] = []
    for number, job in enumerate(rounds):
        share = chunks[len(chunks) * number // len(rounds) : len(chunks) * (number + 1) // len(rounds)]
        jobs += [job, *share]
    return jobs if rounds else [*chunks]


def _advanced(under_way: list[Iterator[None]]) -> list[Iterator[None]]:
    """Those that go on after one more stage each; the newest comes first, so all processes exchange in one order."""
    ended = object()
    return [travel for travel in under_way if next(travel, ended) is not ended]


def _as_bytes(
    out: Tensor, given: Tensor, out_sizes: list[int], given_sizes: list[int]
) -> tuple[Tensor, Tensor, list[int], list[int]]:
    """For an exchange that asks no transport for bf16."""
    width = out.element_size()
    return (
        out.view(torch.uint8),
        given.view(torch.uint8),
        [size * width for size in out_sizes],
        [size * width for size in given_sizes],
    )


def _wait(work: Any) -> None:
    if work is not None:
        work.wait()
