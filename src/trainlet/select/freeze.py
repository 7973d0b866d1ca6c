# SPDX-License-Identifier: Apache-2.0
"""Selection by freezing, as the authors of sparse update describe it: at first everything trains, then one layer after
another is frozen; what is left is trained anew each time, and freezing ends where accuracy has fallen too far."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, NoReturn

from trainlet.errors import MismatchError, OverBudgetError
from trainlet.select.cuts import (
    Cut,
    Option,
    Progress,
    SearchLimit,
    check,
    confirmed,
    depths,
    layers_within,
    make_choice,
    options,
    overrun,
    strongest,
)
from trainlet.select.problem import Choice, Contributions, Frozen, Selection, Trained

Train = Callable[[Sequence[Choice], int], list[Trained]]
"""Trains choices, and judges them; how many parts can still be frozen says how much is to come."""
Tell = Callable[[Frozen], None]
"""Hears of each part when it is frozen."""
SHORTLIST: Final = 3
"""Parts, of those that harm least by their contributions, that are frozen to see, before one is."""
_ROUNDING: Final = 1e-9  # shares of images, as floats


@dataclass
class _Freezing:
    """The run in progress. ``measured``: layer -> the largest ratio of it that was measured; ``cuts`` by depth;
    ``known``: what was trained, by key."""

    contributions: Contributions
    limit: SearchLimit
    train: Train
    max_drop: float | None
    tell: Tell
    measured: dict[str, float]
    cuts: dict[int, tuple[Cut, ...]] = field(default_factory=dict)
    known: dict[object, Trained] = field(default_factory=dict)
    told: set[object] = field(default_factory=set)

    # --- what a choice is

    def choice(self, depth: int, weights: dict[str, float]) -> Choice:
        return make_choice(self.contributions, depth, weights)

    def over(self, choice: Choice) -> int:
        """By how much it exceeds what its cuts allow; negative or 0 where they let it fit."""
        if choice.depth not in self.cuts:
            every: list[Option] = list(self.everything(choice.depth).weights.items())
            cuts = self.limit.cuts(choice.depth, self.contributions.bits, every)
            self.cuts[choice.depth] = strongest(cuts, every)
        return overrun(self.cuts[choice.depth], choice.weights)

    def fits(self, choice: Choice) -> bool:
        """Whether it fits; the limit itself is asked only where its cuts do not say no."""
        return self.over(choice) <= 0 and self.limit.fits(choice)

    def everything(self, depth: int) -> Choice:
        """All that can train in the last ``depth`` layers."""
        inside = layers_within(self.contributions, depth)
        return self.choice(depth, {layer: self.measured.get(layer, 1.0) for layer in inside})

    def parts(self, choice: Choice) -> Iterator[tuple[str, Choice]]:
        """Every part that can be frozen, and what is then left: a layer's weights, or the outermost biases, once no
        weights train there; at first all at once that was not measured, since it cannot fit or promises least."""
        known = {k: r for k, r in choice.weights.items() if k in self.measured}
        depth = min(choice.depth, depths(self.contributions)[-1])
        if (depth, len(known)) != (choice.depth, len(choice.weights)):
            biases, weights = choice.depth - depth, len(choice.weights) - len(known)
            yield f"what was not measured ({weights} weights, {biases} biases)", self.choice(depth, known)
            return
        for layer in choice.weights:
            rest = {k: r for k, r in choice.weights.items() if k != layer}
            yield f"weights of {layer}", self.choice(choice.depth, rest)
        shallower = self.shallower(choice)
        if not shallower:
            return
        layers = self.contributions.layers
        given_up = layers[len(layers) - choice.depth : len(layers) - shallower[-1]]
        if not any(layer in choice.weights for layer in given_up):
            yield f"biases of {', '.join(given_up)}", self.choice(shallower[-1], dict(choice.weights))

    def shallower(self, choice: Choice) -> list[int]:
        return [k for k in depths(self.contributions) if k < choice.depth]

    # --- steps

    def train_new(self, choices: Sequence[Choice]) -> None:
        new = {c.key: c for c in choices if c.key not in self.known}
        if new:
            left = max(len(c.weights) + len(self.shallower(c)) for c in new.values())
            self.known |= dict(zip(new, self.train(list(new.values()), left), strict=True))

    def step(self, part: str, choice: Choice) -> Frozen:
        """A step that is taken."""
        step = Frozen(part, choice, self.known[choice.key], self.limit.cost(choice))
        if choice.key not in self.told:  # a search that begins again repeats what it knows
            self.told.add(choice.key)
            self.tell(step)
        return step

    def begin(self) -> Frozen:
        """Everything trains."""
        choice = self.everything(self.limit.deepest)
        self.train_new([choice])
        return self.step("", choice)

    def following(self, course: Sequence[Frozen], within: bool) -> Frozen | None:
        """The next step: of the parts that harm least by their contributions the one that, frozen, harms least in fact,
        for each byte that it saves. None where nothing is left, or, ``within`` the drop, no such part keeps to it."""
        now = course[-1]
        over = self.over(now.choice)

        def harm(choice: Choice, lost: float) -> tuple[int, float]:
            if lost <= 0:
                return 0, lost
            saved = over - self.over(choice)
            return (1, lost / saved) if saved > 0 else (2, lost)

        found = sorted(self.parts(now.choice), key=lambda p: harm(p[1], now.choice.value - p[1].value))[:SHORTLIST]
        self.train_new([c for _, c in found])
        tried = [p for p in found if not within or self.bears(course, self.known[p[1].key])]
        if not tried:
            return None
        return self.step(*min(tried, key=lambda p: harm(p[1], _rise(now.trained.loss, self.known[p[1].key].loss))))

    def bears(self, course: Sequence[Frozen], trained: Trained) -> bool:
        """Whether accuracy has fallen by no more than the drop since its highest."""
        return self.max_drop is None or drop(course, trained) <= self.max_drop + _ROUNDING

    def search(self) -> Selection:
        """Freezes until it fits, whatever that costs, then on within the drop."""
        self.cuts.clear()  # the limit may have learned since
        course = [self.begin()]
        while not (self.fits(course[-1].choice) and math.isfinite(course[-1].trained.loss)):
            course.append(self.following(course, within=False) or self.refuse(course[-1].choice))
        if not self.bears(course, course[-1].trained) and self.limit.confirm(course[-1].choice):
            raise self.too_far(course)
        fit = len(course)
        while self.max_drop is not None and (step := self.following(course, within=True)):
            course.append(step)
            fit = len(course) if self.fits(step.choice) else fit
        choice = course[fit - 1].choice
        return Selection(choice, self.limit.cost(choice), "freeze", len(self.known), course=tuple(course[:fit]))

    # --- where it cannot end well

    def refuse(self, last: Choice) -> NoReturn:
        """Nothing is left to freeze."""
        if not self.fits(last):
            raise self.limit.refusal(self.contributions.bits)
        raise MismatchError("training diverges with all that fits, the head alone too; give a smaller --lr")

    def too_far(self, course: Sequence[Frozen]) -> OverBudgetError:
        fallen = drop(course, course[-1].trained)
        enough = math.ceil(fallen * 1e4 - _ROUNDING) / 1e4
        return OverBudgetError(
            f"{self.limit.graph.name}: frozen until it fits, accuracy falls by {fallen:.4f} to "
            f"{course[-1].trained.accuracy:.4f} (± {course[-1].trained.spread:.4f} over seeds), more than --max-drop "
            f"{self.max_drop:g}; give --max-drop {enough:g} or more memory: the runs are kept, and are not done again "
            "in the same --out"
        )


def drop(course: Sequence[Frozen], trained: Trained) -> float:
    """By how much the accuracy of what was trained is below the highest of the course, 0 to 1."""
    return max(0.0, max(f.trained.accuracy for f in course) - trained.accuracy)


def _rise(before: float, after: float) -> float:
    return 0.0 if before == after else after - before  # also of two that diverged


def freeze(
    contributions: Contributions,
    limit: SearchLimit,
    *,
    train: Train,
    max_drop: float | None,
    tell: Tell,
    seed: int = 0,
    progress: Progress | None = None,
) -> Selection:
    """The choice that is left, with its course. Everything trains first. Until it fits, parts are frozen whatever that
    costs; then on as long as accuracy stays within ``max_drop`` (0 to 1) of the highest on the way, with None no
    further. Contributions say which few parts are tried, ``train`` says what they are worth. OverBudgetError where not
    even the head alone fits, or where the first choice that fits has fallen further than ``max_drop``; MismatchError
    where all that fits diverges. ``seed`` and ``progress`` change nothing."""
    check(contributions, limit.graph)
    if max_drop is not None and not 0 <= max_drop < 1:
        raise ValueError(f"max_drop {max_drop}: a share of accuracy, from 0 to below 1")
    every = options(contributions, limit, depths(contributions)[-1], harmful=True)
    measured = {layer: rows[-1][0] for layer, rows in every.items()}
    found = confirmed(limit, _Freezing(contributions, limit, train, max_drop, tell, measured).search)
    return replace(found, course=tuple(replace(f, cost=limit.cost(f.choice)) for f in found.course))
