"""Tokens on their way to the processes that hold their experts, and back.

A token travels once to each process that holds one of its experts, with all its expert ids and weights. That process
applies the weights and adds up the token's rows there, so that one row per (token, process) comes back, and the token's
own process adds those few. Rows lie in the order of (sender, token) when they arrive, which is that of all tokens: an
expert's rows are ordered by (token, slot) as in one process.

Two ways, one meaning. "exact" reads on the host how many rows go where. "bounded" reads nothing there: every pair of
processes exchanges `capacity` rows, and the experts' rows have a bound too. What does not fit is left out, and how full
the fullest buffer was is kept on the device (`fullness`): above 1 the values of the step are wrong, and whoever applies
them must look first, `grow` the buffers and do the step again.

Each way has two halves, so that other work can run while rows travel: `begin_dispatch(...)` then `.wait()`,
`begin_combine(...)` then `.wait()`. Backward passes go the other way through the same halves: rows leave where the
forward pass waited, and are waited for where it let them leave.

Legend: T packed tokens of this process, D model width, k experts per token, P processes, L experts of each, S arrived
tokens, R rows of the experts.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pithwood.ops.permute import (
    RowPlan,
    count_pairs,
    gather_ids,
    gather_rows,
    owner_ids,
    plan_rows,
    plan_slots,
    sum_rows,
)
from pithwood.ops.unread import unread_like
from pithwood.parallel.mesh import Group

How = Literal["exact", "bounded"]


class Arrived(NamedTuple):
    """Tokens of all processes that have experts here."""

    x_SD: Tensor
    """In the order of (process, token); rows that nobody sent hold anything."""
    weight_Sk: Tensor
    """The router's weights of all the token's experts, here or not."""
    plan: RowPlan
    """The place of each (arrived token, slot) among the rows of this process's experts, `max_rows` at most."""
    handle: Route
    """What the way back needs."""


@dataclass(frozen=True)
class Route:
    """How the rows of one dispatch lie on both ends."""

    plan: RowPlan
    """The place of each (token, process) among the rows that leave."""
    given_sizes: list[int] | None
    """Rows that go to each process, None for equally many."""
    out_sizes: list[int] | None
    """Rows that come from each process."""
    num_arrived: int


class ExpertExchange:
    """The exchange of a group of processes that divide a layer's experts; one object serves all layers of a model.

    group         who divides the experts: its i-th process holds experts i * L to (i + 1) * L - 1
    num_experts   of a layer, all processes together; the group's size divides them
    how           "exact" or "bounded"; with "bounded" all processes must bring equally many tokens
    balanced      that ids are (token * k + slot) mod num_experts, whose need of room is known beforehand
    room          bounded buffers hold this many times what tokens spread evenly over the experts need
    device        where tokens lie

    Every process of the group makes the same calls in the same order, backward passes and recomputations included.
    """

    def __init__(
        self,
        group: Group,
        num_experts: int,
        how: How = "exact",
        *,
        balanced: bool = False,
        room: float = 1.25,
        device: torch.device | str | None = None,
    ) -> None:
        if num_experts % group.size:
            raise ValueError(f"mesh.ep={group.size} must divide num_experts={num_experts}")
        if room < 1:
            raise ValueError(f"room={room} must be at least 1")
        self.group, self.num_experts, self.how = group, num_experts, how
        self.balanced = balanced
        self.experts_here = num_experts // group.size
        """L."""
        self.first_expert = group.rank * self.experts_here
        self.rooms = [1.0, 1.0] if balanced else [room, room]
        """Room of a pair of processes and of the experts' rows, relative to even spreading."""
        self.device = device
        self._most: dict[tuple[int, int], Tensor] = {}
        """Rows that were asked for at most, by place and room; usually one entry for each place."""

    @property
    def may_overflow(self) -> bool:
        """Whether a step may need more room than there is."""
        return self.how == "bounded" and not self.balanced

    def reset_step(self) -> None:
        """Forget how full buffers were; call before each optimizer step's first forward."""
        self._most.clear()

    @property
    def fullness(self) -> Tensor:
        """[2] fp64, of this process since `reset_step`: the fullest buffer between two processes, and the experts'
        rows, relative to their room; on the device. Its maximum over all processes decides (`grow`).
        """
        full = torch.zeros(2, dtype=torch.float64, device=self.device)
        for (place, room), most in self._most.items():
            # fp64 holds both counts exactly, so that one row too many is more than 1
            torch.maximum(full[place], most.max().to(torch.float64) / room, out=full[place])
        return full

    def grow(self, fullness: list[float]) -> None:
        """Make room for what a step needed; `fullness` is the maximum over all processes, above 1 in some place."""
        for place, full in enumerate(fullness):
            if full > 1:
                # a step whose tokens did not all travel tells less than the experts' rows need
                self.rooms[place] *= 1.1 * full

    def capacity(self, num_tokens: int, k: int) -> int:
        """Rows that each pair of processes exchanges when bounded, at most `num_tokens`."""
        return self._capacity(num_tokens, k, self.rooms[0])

    def max_rows(self, num_tokens: int, k: int, num_arrived: int) -> int:
        """Rows that the experts of one process have room for when bounded."""
        return self._max_rows(num_tokens, k, num_arrived, self.rooms[1])

    def room_for(self, num_tokens: int, k: int) -> tuple[int, int]:
        """Rows of memory that one dispatch of this process's tokens takes: for tokens that arrive, and for the experts'
        rows. Exact sizes are those of tokens spread evenly.
        """
        room = self.rooms if self.how == "bounded" else [1.0, 1.0]
        arrived = self.group.size * self._capacity(num_tokens, k, room[0])
        return arrived, self._max_rows(num_tokens, k, arrived, room[1])

    def begin_dispatch(self, x_TD: Tensor, ids_Tk: Tensor, weight_Tk: Tensor, exact: bool = False) -> Dispatching:
        """Send tokens to their experts; `.wait()` of what this returns gives those that arrive.

        x_TD        [T, D] any float, differentiable
        ids_Tk      [T, k] int, 0 <= id < num_experts, or -1 for none
        weight_Tk   [T, k] float, differentiable
        exact       take exact sizes whatever `how` says: outside a step nobody asks how full buffers were
        """
        size, here = self.group.size, self.experts_here
        num_tokens, k = ids_Tk.shape
        owner_Tm = owner_ids(ids_Tk, here, size)
        if exact or self.how == "exact":
            route, max_rows = self._exact_route(owner_Tm, ids_Tk)
        else:
            capacity = self.capacity(num_tokens, k)
            plan = plan_slots(owner_Tm, size, capacity)
            route = Route(plan, None, None, plan.num_rows)
            max_rows = self.max_rows(num_tokens, k, plan.num_rows)
            assert plan.count is not None
            self._note(0, plan.count, capacity)
        ids, *flights = (_Flight(self.group, route) for _ in range(3))
        ids.leave(gather_ids(ids_Tk, route.plan))
        # one row per (token, process) of either kind; what a process does not use of the weights gets no gradient there
        weight_Nk, x_ND = gather_rows(weight_Tk, route.plan), gather_rows(x_TD, route.plan)
        left = _Leave.apply(tuple(flights), weight_Nk, x_ND)
        return Dispatching(self, route, max_rows, ids, tuple(flights), left)

    def dispatch(self, x_TD: Tensor, ids_Tk: Tensor, weight_Tk: Tensor, exact: bool = False) -> Arrived:
        """Both halves of the way there."""
        return self.begin_dispatch(x_TD, ids_Tk, weight_Tk, exact).wait()

    def begin_combine(self, part_SD: Tensor, handle: Route, unread: bool = False) -> Combining:
        """Send back one row per arrived token: the sum over its experts here, weights applied.

        unread   nobody reads what comes back, whose graph alone is wanted: nothing travels but gradients later, and
                 zeros come. All processes say so, or none
        """
        back = replace(
            handle, given_sizes=handle.out_sizes, out_sizes=handle.given_sizes, num_arrived=handle.plan.num_rows
        )
        flights = (_Flight(self.group, back, unread),)
        return Combining(handle, flights, _Leave.apply(flights, part_SD), unread)

    def combine(self, part_SD: Tensor, handle: Route, residual_TD: Tensor | None = None) -> Tensor:
        """Both halves of the way back: [T, D], see `Combining.wait`."""
        return self.begin_combine(part_SD, handle).wait(residual_TD)

    def _capacity(self, num_tokens: int, k: int, room: float) -> int:
        if self.balanced:
            share = _balanced_share(self.num_experts, self.experts_here, k)
        else:
            # chance that none of a token's k distinct experts lies on a given process
            away = self.num_experts - self.experts_here
            share = 1 - math.prod(max(away - slot, 0) / (self.num_experts - slot) for slot in range(k))
        return max(1, min(num_tokens, math.ceil((num_tokens * share + self.num_experts) * room)))

    def _max_rows(self, num_tokens: int, k: int, num_arrived: int, room: float) -> int:
        return min(math.ceil((num_tokens * k + self.num_experts) * room), num_arrived * min(k, self.experts_here))

    def _exact_route(self, owner_Tm: Tensor, ids_Tk: Tensor) -> tuple[Route, int]:
        """Sizes of both ends, read on the host."""
        size = self.group.size
        plan = plan_rows(owner_Tm, size)
        pairs_P = count_pairs(ids_Tk.div(self.experts_here, rounding_mode="floor"), size)
        given = torch.stack([plan.offsets.diff().long(), pairs_P], 1)
        out = torch.empty_like(given)
        self.group.all_to_all(out, given, None, None)
        given_sizes, _, out_sizes, pairs = torch.cat([given, out], 1).t().tolist()
        sent = sum(given_sizes)
        plan = replace(plan, pair_R=plan.pair_R[:sent], token_R=plan.token_R[:sent])
        return Route(plan, given_sizes, out_sizes, sum(out_sizes)), sum(pairs)

    def _note(self, place: int, used: Tensor, room: int) -> None:
        key = place, max(room, 1)
        most = self._most.get(key)
        self._most[key] = used.clone() if most is None else torch.maximum(most, used, out=most)


@dataclass
class Dispatching:
    """Tokens on their way to their experts."""

    exchange: ExpertExchange
    route: Route
    max_rows: int
    ids: _Flight
    flights: tuple[_Flight, ...]
    """Of weights and tokens."""
    left: Tensor
    """By which this is part of a graph. Whoever cuts the graph here (`parallel.pipeline`) puts a leaf in its place."""

    def wait(self) -> Arrived:
        """What arrived, once it has; the experts' rows are planned while the tokens still travel."""
        exchange = self.exchange
        plan = plan_rows(self.ids.land(), exchange.experts_here, first=exchange.first_expert, max_rows=self.max_rows)
        if self.route.out_sizes is None:
            assert plan.count is not None
            exchange._note(1, plan.count.sum(dtype=torch.int32), self.max_rows)
        weight_Sk, x_SD = _Land.apply(self.left, self.flights)
        return Arrived(x_SD, weight_Sk, plan, self.route)


@dataclass
class Combining:
    """Sums over experts on their way to their tokens."""

    route: Route
    flights: tuple[_Flight]
    left: Tensor
    """As of `Dispatching`."""
    unread: bool = False
    """Whether nobody reads what comes back."""

    def wait(self, residual_TD: Tensor | None = None) -> Tensor:
        """[T, D]: each token's rows from all processes added up in fp32, plus the residual; rounded once."""
        (rows_ND,) = _Land.apply(self.left, self.flights)
        return sum_rows(rows_ND, self.route.plan, residual_TD, unread=self.unread)


@functools.cache
def _balanced_share(num_experts: int, experts_each: int, k: int) -> float:
    """The largest share of tokens that one process gets of, with ids (token * k + slot) mod num_experts."""
    period = num_experts // math.gcd(num_experts, k)
    ids = (torch.arange(period * k, device="cpu") % num_experts).view(period, k)
    size = num_experts // experts_each
    owner = owner_ids(ids, experts_each, size, impl="ref")
    return float(count_pairs(owner, size, impl="ref").max()) / period


class _Flight:
    """One exchange of rows, and the exchange of their gradients the other way."""

    def __init__(self, group: Group, route: Route, unread: bool = False) -> None:
        self.group, self.route, self.unread = group, route, unread
        self.num_given = 0
        self._work: Any = None
        self._held: tuple[Tensor, Tensor] | None = None
        """What travels and where it arrives: neither may be freed on the way."""

    def leave(self, rows_ND: Tensor) -> None:
        self.num_given = rows_ND.shape[0]
        if self.unread:
            self._held = rows_ND, unread_like(rows_ND, self.route.num_arrived, *rows_ND.shape[1:])
            return
        self._begin(rows_ND, self.route.num_arrived, self.route.out_sizes, self.route.given_sizes)

    def leave_back(self, grad_SD: Tensor) -> None:
        self._begin(grad_SD, self.num_given, self.route.given_sizes, self.route.out_sizes)

    def land(self) -> Tensor:
        """What arrives, once it has."""
        if self._work is not None:
            self._work.wait()
        assert self._held is not None, "rows were waited for twice, or before they left"
        _, out = self._held
        self._work = self._held = None
        return out

    def _begin(self, given: Tensor, num_out: int, out_sizes: list[int] | None, given_sizes: list[int] | None) -> None:
        given = given.contiguous()
        out = given.new_empty(num_out, *given.shape[1:])
        self._held = given, out
        self._work = self.group.all_to_all(out, given, out_sizes, given_sizes, wait=False)


class _Leave(torch.autograd.Function):
    """Rows that leave, one tensor per flight; returns an empty tensor, by which `_Land` follows in the graph. Backward:
    wait for the gradients.
    """

    @staticmethod
    def forward(ctx: Any, flights: tuple[_Flight, ...], *rows: Tensor) -> Tensor:  # type: ignore[override]
        ctx.flights = flights
        for flight, rows_ND in zip(flights, rows, strict=True):
            flight.leave(rows_ND)
        return rows[-1].new_empty(0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        return None, *(flight.land() for flight in ctx.flights)


class _Land(torch.autograd.Function):
    """Rows that have arrived, one tensor per flight. Backward: let the gradients leave."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, flights: tuple[_Flight, ...]) -> tuple[Tensor, ...]:  # type: ignore[override]
        ctx.flights = flights
        ctx.left_like = left.dtype, left.device
        return tuple(flight.land() for flight in flights)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor):  # type: ignore[override]
        for flight, grad in zip(ctx.flights, grads, strict=True):
            flight.leave_back(grad)
        dtype, device = ctx.left_like
        return torch.empty(0, dtype=dtype, device=device), None
