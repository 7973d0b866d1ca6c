# SPDX-License-Identifier: Apache-2.0
"""The other selectors: evolution close to exact, freezing step by step, baselines, several widths."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_nets import NAMED
from select_cases import drawn, every_choice, mcunet, on_curve, small

from trainlet.autodiff.scheme import resolve, trainable_layers
from trainlet.errors import OverBudgetError, UsageError
from trainlet.select.baselines import bias_choice, last_choice, may_fit, published_choices
from trainlet.select.cuts import Selector, Step, gap
from trainlet.select.evolution import Settings, evolution
from trainlet.select.exact import exact
from trainlet.select.freeze import freeze
from trainlet.select.limits import AnalyticLimit, PlannedLimit
from trainlet.select.methods import METHODS, best_over_bits, find_method
from trainlet.select.problem import RATIOS, Choice, Contributions, Selection

KIB = 1024
FEW = Settings(population=24, generations=20, parents=8)
_GAINS = st.lists(st.integers(-8, 20).map(lambda g: g / 16), min_size=7, max_size=23)
_SELECTORS: dict[str, Selector] = {
    **METHODS,
    "evolution": partial(evolution, settings=FEW),
    "freeze by harm": partial(freeze, per_byte=False),
    "freeze on": partial(freeze, max_drop=0.5),
}


# --- all of them ------------------------------------------------------------------------------------------------


@settings(max_examples=12)
@given(st.sampled_from(sorted(_SELECTORS)), _GAINS, st.integers(0, 60))
def test_whatever_is_chosen_fits(method: str, gains: list[float], more: int) -> None:
    """Under the formula and under the plan, and no method beats the exact one."""
    graph = small("chain")
    c = drawn(graph, gains)
    for limit in (AnalyticLimit(graph, 24 + 10 * more), PlannedLimit(graph, None, 872 + 10 * more)):
        found = _SELECTORS[method](c, limit, seed=3)
        fresh = type(limit)(graph, most=limit.most)
        assert fresh.cost(found.choice) == found.cost <= limit.most
        assert found.choice.value == pytest.approx(_value(c, found.choice))
        assert found.choice.value <= exact(c, limit).choice.value + 1e-9


def _value(c: Contributions, choice: Choice) -> float:
    return c.biases[choice.depth] + sum(c.weights[o] for o in choice.weights.items())


@pytest.mark.parametrize("method", sorted(_SELECTORS))
def test_where_nothing_fits_all_say_so(method: str) -> None:
    with pytest.raises(OverBudgetError, match="training the head alone takes"):
        _SELECTORS[method](drawn(small("chain"), [1.0]), PlannedLimit(small("chain"), None, 300))
    with pytest.raises(UsageError, match="other layers than"):
        _SELECTORS[method](drawn(small("twice"), [1.0]), AnalyticLimit(small("chain"), 300))


def test_an_unknown_method_is_refused() -> None:
    assert find_method("exact") is exact
    with pytest.raises(UsageError, match="choose one of exact, evolution, freeze, last, bias, published"):
        find_method("best")


# --- evolution --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kib", [100, 150])
def test_evolution_is_close_to_exact(kib: int) -> None:
    c = on_curve(mcunet(), 20, 21, 22, 24)
    limit = AnalyticLimit(mcunet(), kib * KIB)
    best = exact(c, limit)
    for seed in range(3):
        found = evolution(c, limit, seed=seed, bound=best.bound)
        assert found.bound == best.bound
        assert gap(found) == pytest.approx(1 - found.choice.value / best.choice.value, abs=1e-9)
        assert (gap(found) or 0) < 0.02, "within two percent"


def test_a_search_that_hardly_begins_is_noticed() -> None:
    """What the test above would say of a few random genomes."""
    c = on_curve(mcunet(), 20, 21, 22, 24)
    limit = AnalyticLimit(mcunet(), 100 * KIB)
    poor = evolution(c, limit, settings=Settings(population=8, generations=1, parents=4), bound=exact(c, limit).bound)
    assert (gap(poor) or 0) > 0.02


def test_a_seed_gives_the_same_choice() -> None:
    c = drawn(small("chain"), [0.5, 0.25, 1.0, 0.7, 0.1])
    limit = AnalyticLimit(small("chain"), 400)
    steps: list[Step] = []
    found = [evolution(c, limit, seed=7, settings=FEW, progress=steps.append) for _ in range(2)]
    assert found[0] == found[1]
    assert len(steps) == 2 * FEW.generations
    assert [s.best for s in steps[:20]] == sorted(s.best for s in steps[:20])
    assert steps[19].best == found[0].choice.value


def test_evolution_under_the_plan() -> None:
    """A plan that is above the cuts' promise is dropped, and the next ones keep a distance."""
    c = drawn(small("chain"), [0.5, 0.25, 1.0, 0.7, 0.1])
    limit = PlannedLimit(small("chain"), None, 1050)
    assert evolution(c, limit, settings=FEW).choice.value >= 0.9 * exact(c, limit).choice.value


# --- freezing ---------------------------------------------------------------------------------------------------


def by_hand(biases: Mapping[int, float], weights: Mapping[str, tuple[float, ...]]) -> Contributions:
    """Contributions of the chain at all ratios that select something."""
    layers = tuple(trainable_layers(small("chain")))
    table = {(k, r): g for k, gains in weights.items() for r, g in zip(RATIOS[-len(gains) :], gains, strict=True)}
    return Contributions("chain", 8, layers, biases, table)


def test_freezing_goes_from_the_least_harmful_on() -> None:
    c = by_hand({0: 0.0, 1: 1.0, 2: 1.5, 3: 1.7}, {"stem": (0.5, 0.9), "block.project": (2.0, 2.1)})
    wide = AnalyticLimit(small("chain"), 1 << 20)
    steps: list[Step] = []
    drops = {
        0.0: (3, {"stem": 1.0, "block.project": 1.0}),
        0.15: (3, {"stem": 1.0, "block.project": 0.5}),
        0.6: (3, {"stem": 0.5, "block.project": 0.5}),
        1.1: (3, {"block.project": 0.5}),
        1.3: (2, {"block.project": 0.5}),
    }
    for drop, (depth, weights) in drops.items():
        found = freeze(c, wide, max_drop=drop, progress=steps.append)
        assert (found.choice.depth, dict(found.choice.weights)) == (depth, weights)
        assert found.choice.value >= 4.7 - drop - 1e-9
    steps.clear()
    assert freeze(c, wide, max_drop=100.0, progress=steps.append).choice == Choice(0)
    assert [s.best for s in steps] == pytest.approx([4.6, 4.2, 3.7, 3.5, 3.0, 1.0, 0.0])


def test_what_does_harm_is_frozen_even_where_it_fits() -> None:
    c = by_hand({0: 0.0, 1: 1.0, 2: 1.5, 3: 1.7}, {"stem": (0.5, -0.9), "block.project": (-2.0, -2.1)})
    found = freeze(c, AnalyticLimit(small("chain"), 1 << 20))
    assert (found.choice.depth, dict(found.choice.weights)) == (3, {"stem": 0.5})


def test_the_limit_comes_before_the_drop() -> None:
    c = by_hand({0: 0.0, 1: 1.0, 2: 1.5, 3: 1.7}, {"stem": (0.5, 0.9), "block.project": (2.0, 2.1)})
    limit = AnalyticLimit(small("chain"), 200)
    found = freeze(c, limit)
    assert found.cost <= 200
    assert found.choice.value < 4.7


def test_by_byte_a_little_harm_that_saves_much_is_better() -> None:
    c = on_curve(mcunet(), 18, 20, 22, 24)
    limit = AnalyticLimit(mcunet(), 100 * KIB)
    by_byte, plain = (freeze(c, limit, per_byte=b).choice.value for b in (True, False))
    assert plain < by_byte <= exact(c, limit).choice.value


def test_losses_that_are_measured_decide() -> None:
    """The project's gain was measured as 2, but in fact training the stem is what counts."""
    c = by_hand({0: 0.0, 3: 1.0}, {"stem": (0.5,), "block.project": (2.0,)})
    asked: list[Choice] = []

    def loss(choice: Choice) -> float:
        asked.append(choice)
        return 5.0 - 3.0 * ("stem" in choice.weights) - 0.1 * ("block.project" in choice.weights) - (choice.depth > 0)

    wide = AnalyticLimit(small("chain"), 1 << 20)
    both = freeze(c, wide, max_drop=0.2, evaluate=loss)
    assert dict(both.choice.weights) == {"stem": 1.0}
    assert both.evaluations == len(asked)
    assert dict(freeze(c, wide, max_drop=0.6).choice.weights) == {"block.project": 1.0}
    with pytest.raises(ValueError, match="a loss of 0 or more"):
        freeze(c, wide, max_drop=math.nan)


# --- baselines --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kib", [20, 50, 99, 130, 300, 1500])
def test_baselines_are_the_largest_that_fit(kib: int) -> None:
    limit = AnalyticLimit(mcunet(), kib * KIB)
    c = on_curve(mcunet(), 22)
    n = len(c.layers)
    for method, word in (("last", last_choice), ("bias", bias_choice)):
        fit = [k for k in range(1, n + 1) if limit.cost(word(c, k)) <= limit.most]
        assert METHODS[method](c, limit).choice.depth == max(fit, default=0)
    assert METHODS["last"](c, limit).choice.scheme(c.layers, "x").weights == (
        resolve(f"last:{k}", mcunet()).weights if (k := METHODS["last"](c, limit).choice.depth) else {}
    )


def test_the_best_published_scheme_that_fits() -> None:
    c = on_curve(mcunet(), 22)
    for kib, name in ((76, "74kb"), (100, "99kb"), (200, "148kb")):
        limit = AnalyticLimit(mcunet(), kib * KIB)
        found = METHODS["published"](c, limit)
        assert found.choice == published_choices(c, limit)[name]
        assert found.choice.scheme(c.layers, name) == resolve(name, mcunet())
    assert METHODS["published"](c, AnalyticLimit(mcunet(), 30 * KIB)).choice == Choice(0)
    assert METHODS["published"](drawn(small("chain"), [1.0]), AnalyticLimit(small("chain"), 4000)).choice == Choice(0)


def test_baselines_stop_at_what_has_no_gradient() -> None:
    """The first layer lies before a pool that gradients do not pass."""
    _, graph = NAMED["pool_in_prefix"]()
    limit = PlannedLimit(graph, None, 1 << 20)
    c = drawn(graph, [1.0], first=1)
    assert limit.deepest == len(c.layers) - 1 == 2
    assert METHODS["last"](c, limit).choice.depth == 2
    assert exact(c, limit).choice.depth == 2


def test_cuts_alone_refuse_what_is_far_too_large() -> None:
    c = drawn(small("chain"), [1.0])
    limit = PlannedLimit(small("chain"), None, 900)
    limit.cost(Choice(3))
    planned = limit.plans
    refused = [x for x in every_choice(c, limit) if x.depth == 3 and not may_fit(limit, x)]
    assert len(refused) > 10
    assert limit.plans == planned


# --- several widths ---------------------------------------------------------------------------------------------


def test_fewer_channels_with_more_bits_may_win() -> None:
    graph = small("chain")
    limit = AnalyticLimit(graph, 520)
    eight = drawn(graph, [0.1])
    wide = Contributions(eight.model, 16, eight.layers, eight.biases, {o: 4 * g for o, g in eight.weights.items()})
    found = best_over_bits(exact, [eight, wide], limit)
    each = [exact(c, limit) for c in (eight, wide)]
    assert found.choice == each[1].choice
    assert found.choice.bits == 16
    assert found.evaluations == sum(s.evaluations for s in each)
    assert found.bound == max(s.bound or 0 for s in each)
    assert best_over_bits(exact, [wide, eight], limit).choice == found.choice
    assert best_over_bits(partial(evolution, settings=FEW), [eight, wide], limit).bound is None
    assert best_over_bits(exact, [eight], limit) == each[0]


def test_of_equal_values_the_smaller_one() -> None:
    graph = small("chain")
    pair = [drawn(graph, [0.5], bits) for bits in (16, 8)]
    assert best_over_bits(exact, pair, AnalyticLimit(graph, 1 << 20)).choice.bits == 8


def test_where_no_width_fits_the_error_says_so() -> None:
    with pytest.raises(OverBudgetError, match="training the head alone"):
        best_over_bits(exact, [drawn(small("chain"), [1.0], b) for b in (8, 16)], AnalyticLimit(small("chain"), 3))
    with pytest.raises(ValueError, match="at least one width"):
        best_over_bits(exact, [], AnalyticLimit(small("chain"), 3))


def test_gaps() -> None:
    assert gap(Selection(Choice(1, value=3.0), 1, "x", 1)) is None
    assert gap(Selection(Choice(1, value=3.0), 1, "x", 1, 4.0)) == 0.25
    assert gap(Selection(Choice(1, value=3.0), 1, "x", 1, 3.0)) == 0
