# SPDX-License-Identifier: Apache-2.0
"""What selections are compared with: the schemes published for the model, and the last K layers or their biases."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import chain
from typing import Final

from trainlet.autodiff.scheme import published_names, resolve
from trainlet.select.cuts import (
    Progress,
    SearchLimit,
    Selector,
    Step,
    check,
    confirmed,
    layers_within,
    make_choice,
    overrun,
    silent,
)
from trainlet.select.problem import Choice, Contributions, Selection


def last_choice(contributions: Contributions, depth: int) -> Choice:
    """``last:K``: biases and all weights of the last K layers."""
    return make_choice(contributions, depth, dict.fromkeys(layers_within(contributions, depth), 1.0))


def bias_choice(contributions: Contributions, depth: int) -> Choice:
    """``bias:K``: biases of the last K layers."""
    return make_choice(contributions, depth, {})


def published_choices(contributions: Contributions, limit: SearchLimit) -> dict[str, Choice]:
    """The schemes published for this model, by name; none for another model."""
    found = {}
    for name in published_names(limit.graph):
        scheme = resolve(name, limit.graph, contributions.bits)
        found[name] = make_choice(contributions, len(scheme.biases), dict(scheme.weights))
    return found


def _all_last(contributions: Contributions, limit: SearchLimit) -> Iterator[Choice]:
    return (last_choice(contributions, k) for k in range(limit.deepest, 0, -1))


def _all_bias(contributions: Contributions, limit: SearchLimit) -> Iterator[Choice]:
    return (bias_choice(contributions, k) for k in range(limit.deepest, 0, -1))


def _all_published(contributions: Contributions, limit: SearchLimit) -> Iterator[Choice]:
    return iter(sorted(published_choices(contributions, limit).values(), key=lambda c: -c.value))


_CHOICES: Final = {"last": _all_last, "bias": _all_bias, "published": _all_published}


def may_fit(limit: SearchLimit, choice: Choice) -> bool:
    """Whether the cuts of the limit let the choice fit; much cheaper than asking the limit."""
    return overrun(limit.cuts(choice.depth, choice.bits, choice.weights.items()), choice.weights) <= 0


def baseline(
    method: str,
    contributions: Contributions,
    limit: SearchLimit,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> Selection:
    """The largest of the choices of ``method`` that fits: of "last" and "bias" the one with the most layers, of
    "published" the one with the highest value; the head alone where none does. OverBudgetError where not even that
    fits. The value counts what was measured. ``seed`` changes nothing."""
    check(contributions, limit.graph)
    return confirmed(limit, lambda: _largest(method, contributions, limit, progress or silent))


def _largest(method: str, contributions: Contributions, limit: SearchLimit, progress: Progress) -> Selection:
    choices = chain(_CHOICES[method](contributions, limit), [make_choice(contributions, 0, {})])
    for tried, choice in enumerate(choices, 1):
        if may_fit(limit, choice) and limit.fits(choice):
            progress(Step(tried, choice.value))
            return Selection(choice, limit.cost(choice), method, tried)
    raise limit.refusal(contributions.bits)


BASELINES: Final[dict[str, Selector]] = {name: partial(baseline, name) for name in _CHOICES}
"""Baselines as selectors, by method."""
