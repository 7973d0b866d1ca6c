# SPDX-License-Identifier: Apache-2.0
"""Selectors by name, and the best selection over several widths of a trained weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from trainlet.errors import OverBudgetError, UsageError
from trainlet.select.baselines import BASELINES
from trainlet.select.cuts import Progress, SearchLimit, Selector
from trainlet.select.evolution import evolution
from trainlet.select.exact import exact
from trainlet.select.problem import Contributions, Selection

METHODS: Final[dict[str, Selector]] = {"exact": exact, "evolution": evolution, **BASELINES}
"""What chooses by contributions alone, by name."""
FREEZE: Final = "freeze"
"""The method that trains while it chooses."""


def find_method(name: str) -> Selector:
    """The selector of that name; UsageError lists the names, that of freezing too."""
    if name not in METHODS:
        raise UsageError(f"--method {name!r}: unknown; choose one of {', '.join((*METHODS, FREEZE))}")
    return METHODS[name]


def best_over_bits(
    select: Selector,
    contributions: Sequence[Contributions],
    limit: SearchLimit,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> Selection:
    """The selection with the highest value, or where the selector trains the lowest loss, over contributions that were
    measured with different bits; of equals the one that costs less. ``evaluations`` and ``bound`` are those of all.
    OverBudgetError where none fits."""
    if not contributions:
        raise ValueError("contributions of at least one width are needed")
    found: list[Selection] = []
    refusal: OverBudgetError | None = None
    for c in contributions:
        try:
            found.append(select(c, limit, seed=seed, progress=progress))
        except OverBudgetError as e:
            refusal = e
    if not found:
        assert refusal is not None
        raise refusal
    best = min(found, key=lambda s: (s.trained.loss if s.trained else -s.choice.value, s.cost))
    bounds = [s.bound for s in found if s.bound is not None]
    whole = len(bounds) == len(contributions)
    return replace(
        best,
        evaluations=sum(s.evaluations for s in found),
        bound=max(bounds) if whole else None,
    )
