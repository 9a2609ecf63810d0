"""Which part of a mixture each sample comes from: an exactly proportioned schedule that is computed, not drawn.

Time is cut into periods of at most 32,768 places. How many samples of each part lie before a period is closed form;
inside a period the parts take turns by earliest deadline first, and the turns of a period are computed once. So any
place, however far out, costs a look-up, and no place depends on what was asked before.

Legend: n places asked for, P places of a period.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pithwood.data.order import distinct

LONGEST_PERIOD = 1 << 15
"""Places of the longest period; a part must have at least one of them."""


class Interleave:
    """Turns of the parts of a mixture, fewer than one sample away from the shares at every place.

    That holds for shares whose common denominator is at most 32,768 (weights of up to four decimals, say). Others are
    met exactly in the long run, fewer than two samples away at any place.
    """

    def __init__(self, shares: Sequence[Fraction]) -> None:
        """shares: at least one, all >= 0, their sum 1; those above 0 at least 1/32768. See `exact_shares`."""
        assert sum(shares) == 1
        assert all(share == 0 or share * LONGEST_PERIOD >= 1 for share in shares)
        self.shares = tuple(shares)
        common = math.lcm(*(share.denominator for share in shares))
        self.period = common if common <= LONGEST_PERIOD else LONGEST_PERIOD
        """P: places of a period."""
        self._kept: tuple[int, tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]] | None = None

    def turns(self, places: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The part [n] int64 whose turn these places [n] int64 >= 0 are, and how many turns it had before [n] int64."""
        if len(self.shares) == 1:
            return np.zeros_like(places), places
        number = places // self.period
        parts, turns = np.empty_like(places), np.empty_like(places)
        for period in distinct(number):
            chosen = number == period
            before, part_P, turn_P = self._period(period)
            inside = places[chosen] - period * self.period
            parts[chosen] = part_P[inside]
            turns[chosen] = before[parts[chosen]] + turn_P[inside]
        return parts, turns

    def counts(self, num_places: int) -> list[int]:
        """How many of the first num_places places each part has."""
        if len(self.shares) == 1:
            return [num_places]
        period, rest = divmod(num_places, self.period)
        before, part_P, _ = self._period(period)
        return (before + np.bincount(part_P[:rest], minlength=len(before))).tolist()

    def most(self, num_places: int) -> list[int]:
        """A bound on each part's turns among any num_places consecutive places."""
        # Two ends, each fewer than two samples off.
        return [min(num_places, math.ceil(num_places * share) + 3) if share else 0 for share in self.shares]

    def _period(self, period: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Turns of each part before a period, and the period's own parts [P] and turns [P]; the last one is kept."""
        if self._kept is None or self._kept[0] != period:
            before, after = self._before(period), self._before(period + 1)
            counts = tuple(b - a for a, b in zip(before, after, strict=True))
            self._kept = period, (np.array(before, dtype=np.int64), *_period_turns(counts))
        return self._kept[1]

    def _before(self, period: int) -> list[int]:
        """Turns of each part before a period: differences of rounded cumulative shares, so that they add up.

        They never fall from one period to the next, because no share is below one sample a period.
        """
        counts: list[int] = []
        total, last = Fraction(0), 0
        for share in self.shares:
            total += share
            reached = math.floor(total * (period * self.period))
            counts.append(reached - last)
            last = reached
        return counts


def exact_shares(weights: Mapping[str, float], where: str) -> tuple[Fraction, ...]:
    """The weights of parts as shares of their sum, read as the decimal numbers they are written as (0.1 is a tenth).

    where   the config path that the weights stand under, for messages
    raises  ValueError for weights that are negative or not finite, all zero, or below one sample in 32,768
    """
    for name, weight in weights.items():
        if not math.isfinite(weight) or weight < 0:
            raise ValueError(f"{where}: the weight of {name!r} is {weight}; give a finite number of 0 or more")
    exact = {name: Fraction(str(weight)) for name, weight in weights.items()}
    total = sum(exact.values(), Fraction(0))
    if total == 0:
        raise ValueError(f"{where}: all weights are 0; give at least one part a weight above 0")
    for name, part in exact.items():
        if 0 < part * LONGEST_PERIOD < total:
            raise ValueError(
                f"{where}: the weight {weights[name]} of {name!r} is {float(part / total):.2g} of all samples; "
                f"the least share is one sample in {LONGEST_PERIOD}: raise it, or leave the part out"
            )
    return tuple(part / total for part in exact.values())


@lru_cache(maxsize=16)
def _period_turns(counts: tuple[int, ...]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Part [P] whose turn each place of a period is, and how many turns of the period it had before [P].

    The turn t of a part with c of P places is due in [floor(t P / c), ceil((t + 1) P / c) - 1]; whoever keeps to that
    is always less than one turn away from its share, and earliest deadline first does. Steiner and Yeomans 1993,
    "Level schedules for mixed-model, just-in-time processes", theorem 1; Tijdeman 1980, "The chairman assignment
    problem". O(P log parts), once per period with other counts.
    """
    size = sum(counts)
    part_P, turn_P = np.empty(size, dtype=np.int64), np.empty(size, dtype=np.int64)
    released: list[list[int]] = [[] for _ in range(size + 1)]
    released[0] = [part for part, count in enumerate(counts) if count]
    done = [0] * len(counts)
    ready: list[tuple[int, int]] = []
    for place in range(size):
        for part in released[place]:
            heapq.heappush(ready, (-(-(done[part] + 1) * size // counts[part]), part))
        _, part = heapq.heappop(ready)
        part_P[place], turn_P[place] = part, done[part]
        done[part] += 1
        if done[part] < counts[part]:
            released[max(place + 1, done[part] * size // counts[part])].append(part)
    part_P.flags.writeable = turn_P.flags.writeable = False
    return part_P, turn_P
