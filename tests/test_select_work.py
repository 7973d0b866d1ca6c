# SPDX-License-Identifier: Apache-2.0
"""A limit of instructions: estimates are near what an emulated step executes, and what is chosen is under the limit."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
from select_cases import drawn, few_evolution, freezing, small

from trainlet.autodiff.scheme import trainable_layers
from trainlet.errors import OverBudgetError, UsageError
from trainlet.select.cuts import Selector
from trainlet.select.exact import exact
from trainlet.select.limits import PlannedLimit
from trainlet.select.methods import METHODS, best_over_bits
from trainlet.select.problem import Choice, Contributions
from trainlet.select.work import StepWork
from trainlet.toolchain.targets import TARGETS, parse_count

M7 = TARGETS["stm32f746"]
ROOM = 320 * 1024
CASES = ("chain", "add_with_activation")
SELECTORS: dict[str, Selector] = {**METHODS, "evolution": few_evolution, "freeze": partial(freezing, max_drop=None)}

pytestmark = pytest.mark.usefixtures("tools")


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[PlannedLimit, Contributions]:
    graph = small(request.param)
    return PlannedLimit(graph, M7, ROOM, instructions=1 << 40), drawn(graph, [0.5, 0.3, 0.7, 0.2, 0.9])


def work_of(limit: PlannedLimit) -> StepWork:
    assert limit.work is not None
    return limit.work


def some_choices(limit: PlannedLimit) -> list[Choice]:
    """The head, biases, all, and halves."""
    layers = tuple(trainable_layers(limit.graph))
    found = [Choice(k) for k in range(limit.deepest + 1)]
    inside = layers[len(layers) - limit.deepest :]
    return [*found, *(Choice(limit.deepest, dict.fromkeys(inside, r)) for r in (0.5, 1.0))]


def test_estimates_are_near_what_runs(case: tuple[PlannedLimit, Contributions]) -> None:
    limit, _ = case
    work = work_of(limit)
    choices = [c for c in some_choices(limit) if all(limit.selectable(*o) for o in c.weights.items())]
    measured = {c.key: work.measured(c) for c in choices}
    for c in choices:
        assert work.estimate(c) == pytest.approx(measured[c.key], rel=0.1), c
    assert work.biases(0) < work.biases(limit.deepest) < work.estimate(choices[-1])


@pytest.mark.parametrize("selector", [exact, few_evolution], ids=["exact", "evolution"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
def test_what_is_chosen_executes_no_more(
    case: tuple[PlannedLimit, Contributions], selector: Selector, share: float
) -> None:
    limit, c = case
    work = work_of(limit)
    free = selector(c, limit).choice
    low, high = work.measured(Choice(0)), work.measured(free)
    work.most = round(low + share * (high - low))
    found = selector(c, limit).choice
    assert work.measured(found) <= work.most
    assert 0 <= found.value < free.value


def test_an_estimate_that_is_too_low_is_learned_from(case: tuple[PlannedLimit, Contributions]) -> None:
    limit, c = case
    work = work_of(limit)
    work.short[8] = too_low = -100_000
    work.most = (work.measured(Choice(0)) + work.measured(Choice(limit.deepest))) // 2
    found = exact(c, limit).choice
    assert work.measured(found) <= work.most
    assert work.short[8] > too_low


@pytest.mark.parametrize("method", ["exact", "evolution", "freeze"])
@pytest.mark.parametrize("short", [0, -100_000])
def test_the_head_alone_may_be_too_much(case: tuple[PlannedLimit, Contributions], method: str, short: int) -> None:
    """With ``short`` the estimate lets it through, and its run does not."""
    limit, c = case
    work = work_of(limit)
    work.short[8] = short
    work.most = min(work.measured(Choice(0)), work.biases(0)) - 1
    nothing = replace(c, biases={0: 0.0}, weights={})
    with pytest.raises(OverBudgetError, match=rf"estimated as \d+, and the limit is {work.most}"):
        SELECTORS[method](nothing, limit)


def test_widths_have_estimates_of_their_own(case: tuple[PlannedLimit, Contributions]) -> None:
    limit, c = case
    work = work_of(limit)
    layers = tuple(trainable_layers(limit.graph))
    for bits in (12, 16):
        choice = Choice(limit.deepest, dict.fromkeys(layers[len(layers) - limit.deepest :], 1.0), bits)
        assert work.estimate(choice) == pytest.approx(work.measured(choice), rel=0.02)
    work.most = work.measured(Choice(limit.deepest))
    both = [c, replace(c, bits=16)]
    found = [best_over_bits(exact, order, limit).choice for order in (both, both[::-1])]
    assert found[0].value == found[1].value


def test_a_bound_is_claimed_only_where_cuts_are_sound(case: tuple[PlannedLimit, Contributions]) -> None:
    limit, c = case
    assert exact(c, limit).bound is None
    assert exact(c, PlannedLimit(limit.graph, M7, ROOM)).bound is not None


def test_without_a_target_there_is_nothing_to_count_on() -> None:
    with pytest.raises(ValueError, match="no limit of instructions"):
        PlannedLimit(small("chain"), None, 4096, instructions=1000)


def test_counts() -> None:
    assert [parse_count(t, "--x") for t in ("120M", "5 k", "7", "1G")] == [120_000_000, 5000, 7, 1_000_000_000]
    for text in ("", "0", "-3M", "1.5M", "M", "3MB", "1001G"):
        with pytest.raises(UsageError, match="--x"):
            parse_count(text, "--x")
