# SPDX-License-Identifier: Apache-2.0
"""Selection by freezing: from everything that can train, one part at a time is frozen, the least harmful first, until
the limit is met, and on while the loss bears it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

from trainlet.select.cuts import (
    Cut,
    Option,
    Progress,
    SearchLimit,
    Step,
    check,
    confirmed,
    depths,
    layers_within,
    make_choice,
    options,
    overrun,
    silent,
    strongest,
)
from trainlet.select.problem import Choice, Contributions, Selection

Evaluate = Callable[[Choice], float]
"""The held-out loss after training a choice."""
SHORTLIST: Final = 3
"""Parts, of those that cost least by their contributions, that are tried one by one where losses can be measured."""


@dataclass
class _Freezing:
    """The run in progress; ``cuts`` by depth."""

    contributions: Contributions
    limit: SearchLimit
    evaluate: Evaluate | None
    options: dict[str, list[tuple[float, float]]]
    cuts: dict[int, tuple[Cut, ...]] = field(default_factory=dict)
    evaluations: int = 0

    def start(self) -> Choice:
        """Everything that was measured trains."""
        return self._choice(depths(self.contributions)[-1], {k: rows[-1][0] for k, rows in self.options.items()})

    def _choice(self, depth: int, weights: dict[str, float]) -> Choice:
        return make_choice(self.contributions, depth, weights)

    def over(self, choice: Choice) -> int:
        """By how much it exceeds what its cuts allow; negative or 0 where they let it fit."""
        if choice.depth not in self.cuts:
            inside = layers_within(self.contributions, choice.depth)
            every: list[Option] = [(k, r) for k, rows in self.options.items() if k in inside for r, _ in rows]
            cuts = self.limit.cuts(choice.depth, self.contributions.bits, every)
            self.cuts[choice.depth] = strongest(cuts, every)
        return overrun(self.cuts[choice.depth], choice.weights)

    def fits(self, choice: Choice) -> bool:
        """Whether it fits; the limit itself is asked only where its cuts do not say no."""
        return self.over(choice) <= 0 and self.limit.fits(choice)

    def following(self, choice: Choice) -> Iterator[Choice]:
        """Every way to freeze one part: a layer's weights to the next smaller ratio, or the outermost biases, once no
        weights train there."""
        for layer, ratio in choice.weights.items():
            smaller = [r for r, _ in self.options[layer] if r < ratio]
            rest = {k: r for k, r in choice.weights.items() if k != layer}
            yield self._choice(choice.depth, rest | ({layer: smaller[-1]} if smaller else {}))
        shallower = [k for k in depths(self.contributions) if k < choice.depth]
        if not shallower:
            return
        layers = self.contributions.layers
        given_up = layers[len(layers) - choice.depth : len(layers) - shallower[-1]]
        if not any(layer in choice.weights for layer in given_up):
            yield self._choice(shallower[-1], dict(choice.weights))

    def loss(self, choice: Choice) -> float:
        """What is to be kept low: the measured loss, or minus the sum of contributions."""
        self.evaluations += 1
        return self.evaluate(choice) if self.evaluate else -choice.value

    def least_harmful(self, choice: Choice, loss: float, per_byte: bool) -> tuple[Choice, float] | None:
        """The next choice and its loss; None where nothing trains any more."""
        over = self.over(choice)

        def harm(frozen: Choice, lost: float) -> tuple[bool, float, float]:
            if lost <= 0 or not per_byte:
                return lost > 0, lost, lost
            saved = over - self.over(frozen)
            return True, lost / saved if saved > 0 else math.inf, lost

        found = sorted(self.following(choice), key=lambda c: harm(c, choice.value - c.value))
        tried = [(c, self.loss(c)) for c in (found[:SHORTLIST] if self.evaluate else found)]
        return min(tried, key=lambda t: harm(t[0], t[1] - loss), default=None)


def freeze(
    contributions: Contributions,
    limit: SearchLimit,
    *,
    seed: int = 0,
    progress: Progress | None = None,
    max_drop: float = 0.0,
    per_byte: bool = True,
    evaluate: Evaluate | None = None,
) -> Selection:
    """The choice that is left. Until the limit is met, the next part is the one that costs least, ``per_byte`` that it
    saves or by itself, and freezing goes on whatever it costs; from then on it is the least harmful one, as long as the
    loss stays within ``max_drop`` of the lowest so far. With ``evaluate``, which may be asked twice for a choice, the
    losses of the best few are measured at each step, else they are sums of contributions. OverBudgetError where not
    even the head alone fits. ``seed`` changes nothing."""
    check(contributions, limit.graph)
    if not (math.isfinite(max_drop) and max_drop >= 0):
        raise ValueError(f"max_drop {max_drop}: a loss of 0 or more")
    every = options(contributions, limit, depths(contributions)[-1], harmful=True)

    def search() -> Selection:
        return _freeze(_Freezing(contributions, limit, evaluate, every), progress or silent, max_drop, per_byte)

    return confirmed(limit, search)


def _freeze(f: _Freezing, progress: Progress, max_drop: float, per_byte: bool) -> Selection:
    choice = f.start()
    loss = lowest = f.loss(choice)
    fit = choice if f.fits(choice) else None
    while following := f.least_harmful(choice, loss, per_byte and fit is None):
        lowest = min(lowest, following[1])
        if fit and following[1] > lowest + max_drop:
            break
        choice, loss = following
        fit = choice if f.fits(choice) else fit
        progress(Step(f.evaluations, choice.value))
    if fit is None:
        raise f.limit.refusal(f.contributions.bits)
    return Selection(fit, f.limit.cost(fit), "freeze", f.evaluations)
