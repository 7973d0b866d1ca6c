# SPDX-License-Identifier: Apache-2.0
"""From contributions to a finished choice, and what the choice is worth: trained the same way as the published schemes,
the last layers, biases and the head alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from trainlet.errors import OverBudgetError, UsageError
from trainlet.scheme import UpdateScheme
from trainlet.select.analyze import Analysis, Effort, Runner, analyze
from trainlet.select.baselines import bias_choice, last_choice, may_fit, published_choices
from trainlet.select.cuts import SearchLimit, Selector, Step
from trainlet.select.exact import exact
from trainlet.select.freeze import freeze
from trainlet.select.methods import best_over_bits, find_method
from trainlet.select.problem import Choice, Contributions, Selection
from trainlet.select.report import Point

NAME: Final = "selected"
SHARES: Final = (0.6, 0.8)
"""Of the limit: where a standard comparison selects too, so that it shows a curve."""
LAST: Final = (3, 6, 9, 12)  # layers of last:K in a standard comparison
BIASES: Final = (0.25, 0.5, 0.75)  # of all layers, of bias:K in a standard comparison


@dataclass(frozen=True)
class Chosen:
    """A selection, what it was made from (an analysis for each width of a weight), and the course of the search."""

    analyses: tuple[Analysis, ...]
    selection: Selection
    steps: tuple[Step, ...]

    @property
    def contributions(self) -> Contributions:
        """Of the width that was chosen."""
        every = (a.contributions for a in self.analyses)
        return next(c for c in every if c.bits == self.selection.choice.bits)


def find_selector(method: str, max_drop: float | None) -> Selector:
    """The selector of a name; ``max_drop``, in loss, is for the one that freezes. UsageError for an unknown name, or
    for a drop that it does not take."""
    selector = find_method(method)
    if max_drop is None:
        return selector
    if selector is not freeze or not max_drop >= 0:
        raise UsageError(f"--max-drop {max_drop:g}: a loss of 0 or more, for --method freeze; leave it out of {method}")
    return partial(freeze, max_drop=max_drop)


def choose(
    runner: Runner, effort: Effort, bits: Sequence[int], limit: SearchLimit, selector: Selector, seed: int
) -> Chosen:
    """Analyzes and selects. Raises what ``analyze`` and selectors raise: OverBudgetError where nothing fits."""

    def feasible(choice: Choice) -> bool:
        return may_fit(limit, choice) and limit.fits(choice)

    if not feasible(Choice(0)):
        raise limit.refusal(bits[0])
    analyses = tuple(analyze(runner, effort, b, seed, feasible) for b in bits)
    steps: list[Step] = []
    every = [a.contributions for a in analyses]
    runner.progress.line("selecting under the limit")
    selection = best_over_bits(selector, every, limit, seed=seed, progress=steps.append)
    return Chosen(analyses, selection, tuple(steps))


# --- what it is worth -------------------------------------------------------------------------------------------

Rival = tuple[str, str, Choice]
"""Series, name and choice."""


def short_rivals(chosen: Chosen, limit: SearchLimit) -> list[Rival]:
    """The selection, the head alone, and biases: as many as the selection trains, and as many as fit."""
    c = chosen.contributions
    most = next((k for k in range(len(c.layers), 0, -1) if _fits(limit, bias_choice(c, k))), 0)
    depths = sorted({chosen.selection.choice.depth, most} - {0})
    biases = [("biases", f"bias:{k}", bias_choice(c, k)) for k in depths]
    return [("selected", NAME, chosen.selection.choice), ("head", "head", Choice(0)), *biases]


def _fits(limit: SearchLimit, choice: Choice) -> bool:
    return may_fit(limit, choice) and limit.fits(choice)


def long_rivals(
    chosen: Chosen, limit: SearchLimit, smaller: Callable[[int], SearchLimit], selector: Selector = exact
) -> list[Rival]:
    """Those, what is selected under ``SHARES`` of the limit (``smaller`` makes one of so many bytes), the published
    schemes, last layers, biases and everything, whether or not they fit."""
    c, n = chosen.contributions, len(chosen.contributions.layers)
    found = short_rivals(chosen, limit)
    for share in SHARES:
        try:
            selection = selector(c, smaller(int(share * limit.most)))
        except OverBudgetError:
            continue
        found.append(("selected", f"{NAME} under {share:.0%}", selection.choice))
    published = published_choices(c, limit)
    found += [("published", name, choice) for name, choice in published.items()]
    found += [("last layers", f"last:{k}", last_choice(c, k)) for k in LAST if k < n]
    found += [("biases", f"bias:{k}", bias_choice(c, k)) for share in BIASES if (k := round(share * n)) > 0]
    found.append(("full", "full", last_choice(c, n)))
    first: dict[object, Rival] = {}
    for rival in found:
        first.setdefault(_trained(rival[2]), rival)
    return list(first.values())


def _trained(choice: Choice) -> tuple[int, tuple[tuple[str, float], ...], int]:
    """What is the same for equal schemes."""
    return choice.depth, tuple(sorted(choice.weights.items())), choice.bits if choice.weights else 8


def compare(
    runner: Runner, effort: Effort, rivals: Sequence[Rival], limit: SearchLimit, layers: tuple[str, ...], seed: int
) -> list[Point]:
    """Trains all of them, each with the learning rate that suits its kind, over the same images in the same order, and
    judges them by the held-out loss. A scheme that diverged has none."""
    seeds = range(seed, seed + effort.final_seeds)
    runs = [(choice.scheme(layers, name), s) for _, name, choice in rivals for s in seeds]
    runner.clock.later = 0
    results = runner.train("comparing", runs, effort.final)
    points = []
    for i, (series, name, choice) in enumerate(rivals):
        mine = results[i * len(seeds) : (i + 1) * len(seeds)]
        problem = next((str(r["problem"]) for r in mine if r["problem"]), "")
        losses = () if problem else tuple(float(r["loss"]) for r in mine)
        accuracy = None if problem else sum(float(r["accuracy"]) for r in mine) / len(mine)
        loss = sum(losses) / len(losses) if losses else None
        points.append(Point(series, name, limit.cost(choice), loss, accuracy, losses, problem))
    return points


def final_scheme(chosen: Chosen, name: str = NAME) -> UpdateScheme:
    """The chosen scheme."""
    return chosen.selection.choice.scheme(chosen.contributions.layers, name)
