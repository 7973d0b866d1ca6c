# SPDX-License-Identifier: Apache-2.0
"""Exact selection: for each bias depth a knapsack with one choice of ratio per layer.

Dynamic programming over each cut of the limit gives, for the layers that are still open and the bytes that are left,
what these layers can add at most; the smallest over the cuts bounds a partial choice. A best-first walk over partial
choices of all depths then meets whole choices in the order of their value: the first one that fits is the best. Where
the limit is a sum there is one cut, its bound is exact, and the walk goes straight to the best choice.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from typing import Final

import numpy as np
from numpy.typing import NDArray

from trainlet.select.cuts import (
    Cut,
    Progress,
    SearchLimit,
    Step,
    check,
    confirmed,
    depths,
    make_choice,
    options,
    silent,
    strongest,
    value_of,
)
from trainlet.select.problem import Choice, Contributions, Selection

EVALUATIONS: Final = 200
"""Choices that are tried with the limit itself before the search ends with a gap."""
VISITS: Final = 200_000
"""Partial choices that are looked at before it does."""
_CELLS: Final = 1 << 14  # of a table; where bytes do not fit, costs are rounded down, which keeps the bound a bound
_DIGITS: Final = 10  # values that differ by less are the same: sums in another order

Chain = tuple[tuple[str, float], "Chain"] | None


class _Table:
    """Of one cut: what the layers from ``i`` on add at most with so many units left."""

    def __init__(self, cut: Cut, layers: list[tuple[str, list[tuple[float, float]]]]) -> None:
        self.room = cut.most - cut.base
        self.costs = [[cut.costs[layer, ratio] for ratio, _ in rows] for layer, rows in layers]
        exact = math.gcd(*(c for row in self.costs for c in row)) or 1
        self.unit = exact if self.room // exact < _CELLS else -(-self.room // _CELLS)
        rows = [np.zeros(max(self.room, 0) // self.unit + 1)]
        for (_, gains), costs in zip(reversed(layers), reversed(self.costs), strict=True):
            rows.append(_with_layer(rows[-1], [g for _, g in gains], [c // self.unit for c in costs]))
        self.rows = rows[::-1]

    def bound(self, layer: int, room: int) -> float:
        """What the layers from ``layer`` on add at most within ``room``."""
        return float(self.rows[layer][room // self.unit])


def _with_layer(after: NDArray[np.float64], gains: list[float], costs: list[int]) -> NDArray[np.float64]:
    best = after.copy()
    for gain, cost in zip(gains, costs, strict=True):
        if cost < len(after):
            np.maximum(best[cost:], after[: len(after) - cost] + gain, out=best[cost:])
    return best


class _Depth:
    """The knapsack of one bias depth; the costliest layers are decided first."""

    def __init__(self, contributions: Contributions, limit: SearchLimit, depth: int, spare: int) -> None:
        self.depth = depth
        self.gain = contributions.biases.get(depth, 0.0)
        found = options(contributions, limit, depth)
        every = [(layer, ratio) for layer, rows in found.items() for ratio, _ in rows]
        cuts = strongest(limit.cuts(depth, contributions.bits, every), every)
        most = {layer: max(cuts[0].costs[layer, ratio] for ratio, _ in rows) for layer, rows in found.items()}
        self.layers = sorted(found.items(), key=lambda item: -most[item[0]])
        self.tables = [_Table(replace(c, most=c.most - spare), self.layers) for c in cuts]
        self.rooms = tuple(t.room for t in self.tables)

    def bound(self, layer: int, value: float, rooms: tuple[int, ...]) -> float:
        """The value that no choice behind this partial one exceeds."""
        rest = min(t.bound(layer, room) for t, room in zip(self.tables, rooms, strict=True))
        return round(value + rest, _DIGITS)

    def following(self, layer: int, rooms: tuple[int, ...]) -> Iterator[tuple[float, float, tuple[int, ...]]]:
        """(ratio, gain, rooms left) of each way to go on; ratio 0 freezes the layer."""
        yield 0.0, 0.0, rooms
        for i, (ratio, gain) in enumerate(self.layers[layer][1]):
            left = tuple(r - t.costs[layer][i] for t, r in zip(self.tables, rooms, strict=True))
            if min(left) >= 0:
                yield ratio, gain, left


@dataclass(frozen=True, slots=True)
class _Part:
    """A partial choice: the layers before ``layer`` are decided. ``knapsack`` is None until its depth is opened."""

    depth: int
    knapsack: _Depth | None
    layer: int
    value: float
    rooms: tuple[int, ...]
    chosen: Chain


class _Walk:
    """Whole choices in descending order of value, as far as the cuts let them fit with ``spare`` bytes to spare."""

    def __init__(self, contributions: Contributions, limit: SearchLimit, spare: int = 0) -> None:
        self.contributions, self.limit, self.spare = contributions, limit, spare
        self.visits = 0
        self._heap: list[tuple[float, int, int, int, _Part]] = []
        self._order = count()
        for depth in depths(contributions):
            gains = (max(g for _, g in rows) for rows in options(contributions, limit, depth).values())
            bound = round(math.fsum((contributions.biases.get(depth, 0.0), *gains)), _DIGITS)
            self._push(bound, _Part(depth, None, 0, 0.0, (), None))

    @property
    def bound(self) -> float:
        """No choice that is still to come has a higher value."""
        return -self._heap[0][0] if self._heap else -math.inf

    def _push(self, bound: float, part: _Part) -> None:
        """Of equal bounds the one with the most decided layers comes first, then the one with the most room."""
        room = min(part.rooms, default=0)
        heapq.heappush(self._heap, (-bound, -part.layer, -room, next(self._order), part))

    def open(self, depth: int) -> _Part | None:
        """The empty choice of a depth; None where not even that fits."""
        knapsack = _Depth(self.contributions, self.limit, depth, self.spare)
        return _Part(depth, knapsack, 0, knapsack.gain, knapsack.rooms, None) if min(knapsack.rooms) >= 0 else None

    def grown(self, part: _Part) -> Iterator[tuple[float, _Part]]:
        """The next layer decided in every way that fits, each with its bound."""
        k = part.knapsack
        assert k is not None
        name = k.layers[part.layer][0]
        for ratio, gain, rooms in k.following(part.layer, part.rooms):
            chosen = ((name, ratio), part.chosen) if ratio else part.chosen
            value = part.value + gain
            grown = _Part(part.depth, k, part.layer + 1, value, rooms, chosen)
            yield k.bound(grown.layer, value, rooms), grown

    def choice(self, part: _Part) -> Choice:
        """A choice with all layers decided."""
        return make_choice(self.contributions, part.depth, dict(_links(part.chosen)))

    def choices(self) -> Iterator[Choice]:
        """Ends where there are no more, or after ``VISITS``; then ``bound`` is above minus infinity."""
        while self._heap and self.visits < VISITS:
            self.visits += 1
            part = heapq.heappop(self._heap)[-1]
            if part.knapsack is None:
                opened = self.open(part.depth)
                if opened and opened.knapsack:
                    self._push(opened.knapsack.bound(0, opened.value, opened.rooms), opened)
            elif part.layer == len(part.knapsack.layers):
                yield self.choice(part)
            else:
                for bound, grown in self.grown(part):
                    self._push(bound, grown)

    def dives(self) -> list[Choice]:
        """For each depth the choice that always goes on by the highest bound, the best first."""
        found = []
        for depth in depths(self.contributions):
            part = self.open(depth)
            while part and part.knapsack and part.layer < len(part.knapsack.layers):
                part = max(self.grown(part), key=lambda g: (g[0], min(g[1].rooms)))[1]
            found += [self.choice(part)] if part else []
        return sorted(found, key=lambda c: -c.value)


def _links(chain: Chain) -> Iterator[tuple[str, float]]:
    while chain:
        option, chain = chain
        yield option


# --- the selector -----------------------------------------------------------------------------------------------


def exact(
    contributions: Contributions,
    limit: SearchLimit,
    *,
    seed: int = 0,
    progress: Progress | None = None,
    evaluations: int = EVALUATIONS,
) -> Selection:
    """The choice with the highest value that fits; only what adds something trains. ``bound`` is its value, unless the
    search ended after ``evaluations`` tries or ``VISITS`` partial choices: then it is what no choice can exceed, and
    the choice the best that was found. Where cuts are estimates there is none.
    OverBudgetError where not even the head alone fits. ``seed`` changes nothing."""
    check(contributions, limit.graph)
    found = confirmed(limit, lambda: _search(contributions, limit, evaluations, progress or silent))
    return found if limit.sound else replace(found, bound=None)


def _search(contributions: Contributions, limit: SearchLimit, evaluations: int, progress: Progress) -> Selection:
    walk = _Walk(contributions, limit)
    tried, excess = 0, limit.most
    for choice in walk.choices():
        tried += 1
        if limit.fits(choice):
            progress(Step(tried, choice.value, choice.value))
            return Selection(choice, limit.cost(choice), "exact", tried, choice.value)
        progress(Step(tried, -math.inf, choice.value))
        excess = min(excess, limit.cost(choice) - limit.most)
        if tried >= evaluations:
            return _incumbent(contributions, limit, tried, excess, choice.value)
    if walk.bound > -math.inf:
        return _incumbent(contributions, limit, tried, excess if tried else 0, walk.bound)
    raise limit.refusal(contributions.bits)


def _incumbent(contributions: Contributions, limit: SearchLimit, tried: int, spare: int, bound: float) -> Selection:
    """A good choice that fits, by asking the cuts for so many bytes to ``spare``, and for more until one does."""
    best = Choice(0, bits=contributions.bits)
    while candidates := _Walk(contributions, limit, spare).dives():
        tried += 1
        best = candidates[0]
        if limit.fits(best):
            return Selection(best, limit.cost(best), "exact", tried, bound)
        spare += max(1 + limit.most // 128, limit.cost(best) - limit.most)
    head = replace(best, depth=0, weights={}, value=value_of(contributions, 0, {}))
    if not limit.fits(head):
        raise limit.refusal(contributions.bits)
    return Selection(head, limit.cost(head), "exact", tried + 1, bound)
