# SPDX-License-Identifier: Apache-2.0
"""What all selectors share: a choice's value, linear bounds on its cost, progress, and the loop that ends with a choice
which is confirmed to fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from trainlet.autodiff.scheme import trainable_layers
from trainlet.errors import OverBudgetError, UsageError
from trainlet.ir.graph import Graph
from trainlet.select.problem import Choice, Contributions, Selection

Option = tuple[str, float]
"""The weights of a layer, and the share of its input channels."""


@dataclass(frozen=True)
class Cut:
    """A condition that every choice which fits meets: ``base`` and the ``costs`` of its weights add up to at most
    ``most``. Integers of any one unit; no cost is negative."""

    base: int
    costs: Mapping[Option, int]
    most: int

    def over(self, weights: Mapping[str, float]) -> int:
        """By how much the weights exceed it; negative or 0 where they meet it."""
        return self.base + sum(self.costs[o] for o in weights.items()) - self.most


class SearchLimit(Protocol):
    """A limit that a selector can search under. ``revision`` counts how often ``cuts`` or costs have changed;
    ``sound``: the cuts leave out no choice that fits."""

    graph: Graph
    revision: int
    sound: bool

    @property
    def most(self) -> int:
        """Bytes that there are."""

    @property
    def deepest(self) -> int:
        """How many last layers can train: all up to the first operator without a gradient."""

    def cost(self, choice: Choice) -> int:
        """Bytes of the choice."""

    def fits(self, choice: Choice) -> bool:
        """Whether the choice costs at most ``most``."""

    def confirm(self, choice: Choice) -> bool:
        """Whether the choice is known to fit by the best figure there is; takes longer than ``fits``."""

    def selectable(self, layer: str, ratio: float) -> bool:
        """Whether the ratio is at least one input channel."""

    def cuts(self, depth: int, bits: int, options: Iterable[Option]) -> tuple[Cut, ...]:
        """What every choice of this depth that fits meets; ``options``: of layers within it. Cuts are known for these
        options alone."""

    def refusal(self, bits: int) -> OverBudgetError:
        """The error where nothing fits, not even the head alone."""


@dataclass(frozen=True, slots=True)
class Step:
    """How far a search is: choices it has looked at, the best value that fits, and what no value can exceed."""

    evaluations: int
    best: float
    bound: float | None = None


Progress = Callable[[Step], None]


class Selector(Protocol):
    """Chooses what to train under a limit. OverBudgetError where not even the head alone fits."""

    def __call__(
        self, contributions: Contributions, limit: SearchLimit, *, seed: int = 0, progress: Progress | None = None
    ) -> Selection: ...


def silent(step: Step) -> None:
    """Shows nothing."""


# --- contributions ----------------------------------------------------------------------------------------------


def check(contributions: Contributions, graph: Graph) -> Contributions:
    """The same contributions, of this model and finite. UsageError naming what is wrong."""
    name, layers = contributions.model, contributions.layers
    if layers != tuple(trainable_layers(graph)):
        raise UsageError(
            f"contributions of {name}: measured with other layers than {graph.name} has; measure this model"
        )
    for (layer, ratio), gain in contributions.weights.items():
        if layer not in layers or not 0 < ratio <= 1:
            raise UsageError(f"contributions of {name}: {layer} at ratio {ratio:g} cannot train; remove that figure")
        _finite(name, f"{layer} at ratio {ratio:g}", gain)
    for depth, gain in contributions.biases.items():
        if not 0 <= depth <= len(layers):
            raise UsageError(f"contributions of {name}: {depth} biases, of {len(layers)} layers; remove that figure")
        _finite(name, f"the biases of the last {depth} layers", gain)
    if contributions.biases.get(0, 0.0) != 0.0:
        gain = contributions.biases[0]
        raise UsageError(f"contributions of {name}: no biases add {gain:g}, not 0; give gains over the head alone")
    return contributions


def _finite(model: str, what: str, gain: float) -> None:
    if not math.isfinite(gain):
        raise UsageError(f"contributions of {model}: {what}: {gain} is no gain; measure it again, with a smaller --lr")


def depths(contributions: Contributions) -> list[int]:
    """The depths with a known gain, ascending, 0 among them."""
    return sorted({0, *contributions.biases})


def layers_within(contributions: Contributions, depth: int) -> tuple[str, ...]:
    """The last ``depth`` layers."""
    return contributions.layers[len(contributions.layers) - depth :]


def options(
    contributions: Contributions, limit: SearchLimit, depth: int, *, harmful: bool = False
) -> dict[str, list[tuple[float, float]]]:
    """(ratio, gain) by layer, for the layers within ``depth`` that have any, by ascending ratio. Those that add nothing
    are left out unless ``harmful``."""
    found: dict[str, list[tuple[float, float]]] = {layer: [] for layer in layers_within(contributions, depth)}
    for (layer, ratio), gain in sorted(contributions.weights.items()):
        if layer in found and (harmful or gain > 0) and limit.selectable(layer, ratio):
            found[layer].append((ratio, gain))
    return {layer: rows for layer, rows in found.items() if rows}


def value_of(contributions: Contributions, depth: int, weights: Mapping[str, float]) -> float:
    """The sum of all that a choice's parts add; what was not measured counts nothing."""
    gains = (contributions.weights.get(o, 0.0) for o in weights.items())
    return math.fsum((contributions.biases.get(depth, 0.0), *gains))


def make_choice(contributions: Contributions, depth: int, weights: Mapping[str, float]) -> Choice:
    """The choice with its value, weights in the order of the model."""
    ordered = {layer: weights[layer] for layer in contributions.layers if layer in weights}
    return Choice(depth, ordered, contributions.bits, value_of(contributions, depth, ordered))


# --- cuts -------------------------------------------------------------------------------------------------------


def overrun(cuts: Iterable[Cut], weights: Mapping[str, float]) -> int:
    """By how much the weights exceed the cut that they exceed most; negative or 0 where they meet all."""
    return max(cut.over(weights) for cut in cuts)


def strongest(cuts: Sequence[Cut], options: Sequence[Option]) -> tuple[Cut, ...]:
    """The cuts, for these options, that no other one implies."""
    table = np.array([[c.base - c.most, *(c.costs[o] for o in options)] for c in cuts], np.int64)
    table, first = np.unique(table, axis=0, return_index=True)
    kept = [
        i for i, row in enumerate(table)
        if not np.any(np.all(np.delete(table, i, axis=0) >= row, axis=1))
    ]  # fmt: skip
    return tuple(replace(cuts[k], costs={o: cuts[k].costs[o] for o in options}) for k in first[kept])


def confirmed(limit: SearchLimit, search: Callable[[], Selection]) -> Selection:
    """What ``search`` finds, once the limit confirms it and has learned nothing new meanwhile."""
    while True:
        revision = limit.revision
        found = search()
        if limit.confirm(found.choice) and limit.revision == revision:
            return replace(found, cost=limit.cost(found.choice))
        if limit.revision == revision:
            raise RuntimeError(f"{found.method}: a choice that does not fit was not learned from")


def gap(selection: Selection) -> float | None:
    """The share of its bound by which a selection may fall short of the best one; None where no bound is known."""
    if selection.bound is None:
        return None
    short = selection.bound - selection.choice.value
    return 0.0 if short <= 0 else short / abs(selection.bound)
