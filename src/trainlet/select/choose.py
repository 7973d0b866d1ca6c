# SPDX-License-Identifier: Apache-2.0
"""From contributions to a finished choice, and what the choice is worth: trained the same way as the published schemes,
the last layers, biases and the head alone.

Contributions are measured one at a time, and what they add up to is not what training all of them gives: biases do part
of the work of weights, and weights of each other's. So the best sum is not the end: the best choices of several depths
and the published schemes that fit are trained, and the one with the lowest held-out loss is taken."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import mean, stdev
from typing import Final

from trainlet.autodiff.scheme import UpdateScheme, trainable_layers
from trainlet.errors import MismatchError, OverBudgetError, UsageError
from trainlet.select.analyze import Analysis, Effort, Runner, analyze
from trainlet.select.baselines import bias_choice, last_choice, may_fit, published_choices
from trainlet.select.cuts import SearchLimit, Selector, Step
from trainlet.select.exact import exact
from trainlet.select.freeze import SHORTLIST, freeze
from trainlet.select.methods import FREEZE, best_over_bits, find_method
from trainlet.select.problem import Choice, Contributions, Frozen, Selection, Trained
from trainlet.select.report import Point
from trainlet.select.store import Result

NAME: Final = "selected"
SHARES: Final = (0.6, 0.8)
"""Of the limit: where a standard comparison selects too, so that it shows a curve."""
SEARCHES: Final = ("exact", "evolution")
"""Methods that look for the best sum."""
LAST: Final = (3, 6, 9, 12)  # layers of last:K in a standard comparison
BIASES: Final = (0.25, 0.5, 0.75)  # of all layers, of bias:K in a standard comparison


Rival = tuple[str, str, Choice]
"""Series, name and choice."""


@dataclass(frozen=True)
class Chosen:
    """A selection, what it was made from (an analysis for each width of a weight), the course of the search, the best
    sum that it found, and the finalists that were trained to decide; none where the best sum was taken as it was."""

    analyses: tuple[Analysis, ...]
    selection: Selection
    steps: tuple[Step, ...]
    best_sum: Selection
    finalists: tuple[Point, ...] = ()

    @property
    def contributions(self) -> Contributions:
        """Of the width that was chosen."""
        every = (a.contributions for a in self.analyses)
        return next(c for c in every if c.bits == self.selection.choice.bits)


SelectorOf = Callable[[Runner, Effort, int], Selector]
"""The selector for a runner, an effort and the first seed of its runs."""


def find_selector(method: str, max_drop: float | None) -> SelectorOf:
    """The selector of a name; ``max_drop``, a share of accuracy, is for the one that freezes. UsageError for an unknown
    name, or for a drop that it does not take."""
    if method == FREEZE:
        if max_drop is not None and not 0 <= max_drop < 1:
            raise UsageError(
                f"--max-drop {max_drop:g}: a share of accuracy, from 0 to below 1, such as 0.01 for one image of a "
                "hundred"
            )
        return partial(_freezing, max_drop)
    selector = find_method(method)
    if max_drop is not None:
        raise UsageError(f"--max-drop {max_drop:g}: for --method {FREEZE}; leave it out of {method}")
    return lambda runner, effort, seed: selector


def _freezing(max_drop: float | None, runner: Runner, effort: Effort, seed: int) -> Selector:
    layers = tuple(trainable_layers(runner.study.graph))
    seeds = range(seed, seed + effort.final_seeds)

    def train(choices: Sequence[Choice], left: int) -> list[Trained]:
        runner.clock.later, runner.clock.word = SHORTLIST * len(seeds) * left, "at most"
        runs = [(c.scheme(layers, FREEZE), s) for c in choices for s in seeds]
        return [_trained(mine) for mine in _in_groups(runner.train("freezing", runs, effort.final), len(seeds))]

    def tell(step: Frozen) -> None:
        runner.progress.line(
            f"{f'{step.part} frozen' if step.part else 'nothing frozen'}: accuracy {step.trained.accuracy:.4f} ± "
            f"{step.trained.spread:.4f}, loss {step.trained.loss:.4f}, {step.cost} bytes"
        )

    return partial(freeze, train=train, max_drop=max_drop, tell=tell)


def _trained(results: Sequence[Result]) -> Trained:
    """The means over seeds; as bad as can be where one of them diverged."""
    if any(r["problem"] for r in results):
        return Trained(math.inf, 0.0, 0.0)
    losses, accuracies = ([float(r[k]) for r in results] for k in ("loss", "accuracy"))
    return Trained(mean(losses), mean(accuracies), stdev(accuracies) if len(accuracies) > 1 else 0.0)


def _in_groups(results: Sequence[Result], size: int) -> list[Sequence[Result]]:
    return [results[i : i + size] for i in range(0, len(results), size)]


def choose(
    runner: Runner,
    effort: Effort,
    bits: Sequence[int],
    limit: SearchLimit,
    selector: Selector,
    seed: int,
    finalists: int | None = None,
) -> Chosen:
    """Analyzes and picks (see ``pick``). Raises what ``analyze`` and selectors raise: OverBudgetError where nothing
    fits."""
    if not _fits(limit, Choice(0)):
        raise limit.refusal(bits[0])
    analyses = tuple(analyze(runner, effort, b, seed, partial(_fits, limit)) for b in bits)
    return pick(runner, effort, analyses, limit, selector, seed, finalists)


def pick(
    runner: Runner,
    effort: Effort,
    analyses: tuple[Analysis, ...],
    limit: SearchLimit,
    selector: Selector,
    seed: int,
    finalists: int | None = None,
) -> Chosen:
    """What is selected from analyses that were made. The best choices of ``finalists`` depths are trained to decide:
    None for as many as the effort says, 1 for the best sum as it is, as with methods that look for none.
    OverBudgetError where nothing fits."""
    steps: list[Step] = []
    every = [a.contributions for a in analyses]
    runner.progress.line(f"selecting under {limit.most} bytes")
    selection = best_over_bits(selector, every, limit, seed=seed, progress=steps.append)
    if selection.method == "evolution":  # which cannot tell how far it is from the best
        selection = replace(selection, bound=best_over_bits(exact, every, limit).bound)
    chosen = Chosen(analyses, selection, tuple(steps), selection)
    count = effort.finalists if finalists is None else finalists
    if count <= 1 or selection.method not in SEARCHES:
        return chosen
    rivals = _finalists(chosen, limit, selector, seed, count)
    points = compare(runner, effort, rivals, limit, chosen.contributions.layers, seed)
    losses = [math.inf if p.loss is None else p.loss for p in points]
    if min(losses) == math.inf:
        raise MismatchError("training diverges with every finalist, the head alone too; give a smaller --lr")
    winner = rivals[losses.index(min(losses))][-1]
    if winner.key != selection.choice.key:
        selection = replace(selection, choice=winner, cost=limit.cost(winner), bound=None)
    return replace(chosen, selection=selection, finalists=tuple(points))


def _finalists(chosen: Chosen, limit: SearchLimit, selector: Selector, seed: int, count: int) -> list[Rival]:
    """The best sums of ``count`` depths, that of all depths first, the published schemes that fit, and the head."""
    depths = [m.depth for m in _analysis(chosen).measured if not m.layer and m.depth]
    others = [found for k in depths if (found := _at_depth(chosen, limit, selector, k, seed))]
    best = [chosen.selection, *sorted(others, key=lambda s: -s.choice.value)]
    sums = [("selected", f"depth {s.choice.depth}", s.choice) for s in best]
    published = published_choices(chosen.contributions, limit).items()
    fitting = [("published", name, c) for name, c in published if _fits(limit, c) and _confirmed(limit, c)]
    head = ("head", "head", Choice(0, bits=chosen.contributions.bits))
    return _first_of_equals([*_first_of_equals(sums)[:count], *fitting, head])


def _confirmed(limit: SearchLimit, choice: Choice) -> bool:
    with contextlib.suppress(OverBudgetError):
        return limit.confirm(choice)
    return False


def _analysis(chosen: Chosen) -> Analysis:
    return next(a for a in chosen.analyses if a.contributions is chosen.contributions)


def _at_depth(chosen: Chosen, limit: SearchLimit, selector: Selector, depth: int, seed: int) -> Selection | None:
    """What is selected where no other biases than those of the last ``depth`` layers may train; None for nothing."""
    c = chosen.contributions
    with contextlib.suppress(OverBudgetError):
        found = selector(replace(c, biases={depth: c.biases[depth]}), limit, seed=seed)
        return found if found.choice.depth else None
    return None


# --- what it is worth -------------------------------------------------------------------------------------------


def short_rivals(chosen: Chosen, limit: SearchLimit) -> list[Rival]:
    """The selection, the head alone, and biases: as many as the selection trains, and as many as fit; of freezing also
    what it began with."""
    c = chosen.contributions
    most = next((k for k in range(len(c.layers), 0, -1) if _fits(limit, bias_choice(c, k))), 0)
    depths = sorted({chosen.selection.choice.depth, most} - {0})
    biases = [("biases", f"bias:{k}", bias_choice(c, k)) for k in depths]
    begun = [("full", "nothing frozen", step.choice) for step in chosen.selection.course[:-1][:1]]
    return [("selected", NAME, chosen.selection.choice), ("head", "head", Choice(0)), *biases, *begun]


def _fits(limit: SearchLimit, choice: Choice) -> bool:
    return may_fit(limit, choice) and limit.fits(choice)


def long_rivals(
    runner: Runner,
    effort: Effort,
    chosen: Chosen,
    limit: SearchLimit,
    smaller: Callable[[int], SearchLimit],
    selector: Selector,
    seed: int,
    finalists: int | None = None,
) -> list[Rival]:
    """Those, what is picked under ``SHARES`` of the limit (``smaller`` makes one of so many bytes), the published
    schemes, last layers, biases and everything, whether or not they fit."""
    c, n = chosen.contributions, len(chosen.contributions.layers)
    found = short_rivals(chosen, limit)
    for share in SHARES:
        try:
            picked = pick(runner, effort, chosen.analyses, smaller(int(share * limit.most)), selector, seed, finalists)
        except OverBudgetError:
            continue
        found.append(("selected", f"{NAME} under {share:.0%}", picked.selection.choice))
    published = published_choices(c, limit)
    found += [("published", name, choice) for name, choice in published.items()]
    found += [("last layers", f"last:{k}", last_choice(c, k)) for k in LAST if k < n]
    found += [("biases", f"bias:{k}", bias_choice(c, k)) for share in BIASES if (k := round(share * n)) > 0]
    found.append(("full", "full", last_choice(c, n)))
    return _first_of_equals(found)


def _first_of_equals(rivals: Iterable[Rival]) -> list[Rival]:
    first: dict[object, Rival] = {}
    for rival in rivals:
        first.setdefault(rival[2].key, rival)
    return list(first.values())


def compare(
    runner: Runner, effort: Effort, rivals: Sequence[Rival], limit: SearchLimit, layers: tuple[str, ...], seed: int
) -> list[Point]:
    """Trains all of them, each with the learning rate that suits its kind, over the same images in the same order, and
    judges them by the held-out loss. A scheme that diverged has none."""
    seeds = range(seed, seed + effort.final_seeds)
    runs = [(choice.scheme(layers, name), s) for _, name, choice in rivals for s in seeds]
    runner.clock.later, runner.clock.word = 0, "about"
    groups = _in_groups(runner.train("comparing", runs, effort.final), len(seeds))
    points = []
    for (series, name, choice), mine in zip(rivals, groups, strict=True):
        problem = next((str(r["problem"]) for r in mine if r["problem"]), "")
        losses = () if problem else tuple(float(r["loss"]) for r in mine)
        accuracy = None if problem else sum(float(r["accuracy"]) for r in mine) / len(mine)
        loss = sum(losses) / len(losses) if losses else None
        points.append(Point(series, name, limit.cost(choice), loss, accuracy, losses, problem))
    return points


def final_scheme(chosen: Chosen, name: str = NAME) -> UpdateScheme:
    """The chosen scheme."""
    return chosen.selection.choice.scheme(chosen.contributions.layers, name)
