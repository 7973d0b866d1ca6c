# SPDX-License-Identifier: Apache-2.0
"""The other selectors: evolution close to exact, freezing step by step, baselines, several widths."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_nets import NAMED
from select_cases import FEW, drawn, every_choice, few_evolution, freezing, mcunet, on_curve, small

from trainlet.autodiff.scheme import resolve, trainable_layers
from trainlet.errors import MismatchError, OverBudgetError, UsageError
from trainlet.select.baselines import bias_choice, last_choice, may_fit, published_choices
from trainlet.select.choose import find_selector
from trainlet.select.cuts import Selector, Step, gap
from trainlet.select.evolution import Settings, evolution
from trainlet.select.exact import exact
from trainlet.select.freeze import drop, freeze
from trainlet.select.limits import AnalyticLimit, PlannedLimit
from trainlet.select.methods import METHODS, best_over_bits, find_method
from trainlet.select.problem import RATIOS, Choice, Contributions, Frozen, Selection, Trained

KIB = 1024
DEPTHWISE, PROJECT = "block.depthwise", "block.project"
_GAINS = st.lists(st.integers(-8, 20).map(lambda g: g / 16), min_size=7, max_size=23)
_SELECTORS: dict[str, Selector] = {
    **METHODS,
    "evolution": few_evolution,
    "freeze": partial(freezing, max_drop=None),
    "freeze on": partial(freezing, max_drop=0.99),
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
    with pytest.raises(UsageError, match="choose one of exact, evolution, last, bias, published, freeze"):
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
    assert few_evolution(c, limit).choice.value >= 0.9 * exact(c, limit).choice.value


# --- freezing ---------------------------------------------------------------------------------------------------


def by_hand(biases: Mapping[int, float], weights: Mapping[str, tuple[float, ...]]) -> Contributions:
    """Contributions of the chain at all ratios that select something."""
    layers = tuple(trainable_layers(small("chain")))
    table = {(k, r): g for k, gains in weights.items() for r, g in zip(RATIOS[-len(gains) :], gains, strict=True)}
    return Contributions("chain", 8, layers, biases, table)


LEARNS = by_hand({0: 0.0, 1: 1.0, 2: 1.5, 3: 1.7}, {"stem": (0.9,), DEPTHWISE: (0.2,), PROJECT: (2.1,)})


def test_freezing_goes_from_the_least_harmful_on() -> None:
    """Accuracies of what is left: 0.90, 0.88, 0.79, 0.77, 0.72, 0.51, 0.41; the first that is not borne ends it."""
    wide = AnalyticLimit(small("chain"), 1 << 20)
    ends = {
        0.0: (3, {"stem", DEPTHWISE, PROJECT}),
        0.05: (3, {"stem", PROJECT}),
        0.12: (3, {PROJECT}),
        0.15: (2, {PROJECT}),
        0.2: (1, {PROJECT}),
        0.4: (1, set()),
        0.5: (0, set()),
    }
    for most, (depth, weights) in ends.items():
        told: list[Frozen] = []
        found = freezing(LEARNS, wide, most, tell=told.append)
        assert (found.choice.depth, set(found.choice.weights)) == (depth, weights)
        assert drop(found.course, found.course[-1].trained) <= most
        assert found.course == tuple(told)
        assert (found.course[0].part, found.course[-1].choice) == ("", found.choice)
    order = ["", f"weights of {DEPTHWISE}", "weights of stem", "biases of stem", f"biases of {DEPTHWISE}"]
    assert [f.part for f in told] == [*order, f"weights of {PROJECT}", f"biases of {PROJECT}"]
    assert [f.cost for f in told] == [wide.cost(f.choice) for f in told]


def test_without_a_drop_it_ends_where_it_fits() -> None:
    for most in (750, 600, 300, 200, 100):
        limit = AnalyticLimit(small("chain"), most)
        found = freezing(LEARNS, limit, None)
        assert found.cost <= most
        assert all(f.cost > most for f in found.course[:-1])


def test_what_is_left_is_trained_anew_each_time_and_never_twice() -> None:
    asked: list[Choice] = []
    found = freezing(LEARNS, AnalyticLimit(small("chain"), 1 << 20), 0.99, asked=asked)
    assert found.choice == Choice(0)
    assert found.evaluations == len(asked) == len({c.key for c in asked})
    trained = {c.key for c in asked}
    for before, after in itertools.pairwise(found.course):
        parts = [{k: r for k, r in before.choice.weights.items() if k != layer} for layer in before.choice.weights]
        assert all((before.choice.depth, 8, tuple(sorted(w.items()))) in trained for w in parts if w or parts == [{}])
        assert after.choice.key in trained


def test_losses_that_are_measured_decide() -> None:
    """The project's gain was measured as 2, but in fact training the stem is what counts."""
    c = by_hand({0: 0.0, 3: 1.0}, {"stem": (0.5,), DEPTHWISE: (0.1,), PROJECT: (2.0,)})

    def loss(choice: Choice) -> float:
        return 5.0 - 3.0 * ("stem" in choice.weights) - 0.1 * (PROJECT in choice.weights) - (choice.depth > 0)

    found = freezing(c, AnalyticLimit(small("chain"), 1 << 20), 0.15, loss=loss)
    assert set(found.choice.weights) == {"stem"}


def test_a_little_harm_that_saves_much_comes_first() -> None:
    """Both layers are worth the same; the stem's weights keep the image, the larger one."""
    c = by_hand({0: 0.0, 3: 1.0}, {"stem": (0.5,), DEPTHWISE: (0.5,), PROJECT: (2.0,)})
    limit = AnalyticLimit(small("chain"), 1 << 20)
    saved = {
        k: limit.cost(Choice(3, dict.fromkeys(("stem", DEPTHWISE, PROJECT), 1.0)))
        - limit.cost(Choice(3, dict.fromkeys({"stem", DEPTHWISE, PROJECT} - {k}, 1.0)))
        for k in ("stem", DEPTHWISE)
    }
    assert saved["stem"] > saved[DEPTHWISE]
    assert freezing(c, limit, 0.99).course[1].part == "weights of stem"


def test_what_was_not_measured_is_the_first_to_go() -> None:
    c = by_hand({0: 0.0, 1: 1.0, 2: 1.5}, {PROJECT: (2.1,)})
    found = freezing(c, AnalyticLimit(small("chain"), 1 << 20), 0.01)
    assert dict(found.course[0].choice.weights) == dict.fromkeys(("stem", DEPTHWISE, PROJECT), 1.0)
    assert found.course[0].choice.depth == 3, "accuracy is compared with that of training everything"
    assert found.course[1].part == "what was not measured (2 weights, 1 biases)"
    assert found.course[1].choice == Choice(2, {PROJECT: 1.0}, value=3.6)


def test_what_fits_but_has_fallen_too_far_is_refused_with_the_drop_that_is_enough() -> None:
    limit = AnalyticLimit(small("chain"), 220)
    asked: list[Choice] = []
    again: list[Choice] = []
    select = partial(freezing, loss=lambda choice: 1.2345 * (5 - choice.value))
    with pytest.raises(
        OverBudgetError,
        match=r"by 0\.1605 to 0\.7372 \(± 0\.0000 over seeds\), more than --max-drop 0\.1; give --max-drop 0\.1605 or",
    ):
        select(LEARNS, limit, 0.1, asked=asked)
    assert select(LEARNS, limit, 0.1605, asked=again).cost <= 220
    assert {c.key for c in asked} <= {c.key for c in again}, "the same way: nothing that was trained is lost"
    for few in (0, 0.05, 0.1604):
        with pytest.raises(OverBudgetError, match=r"give --max-drop 0\.1605 or"):
            select(LEARNS, limit, few)


def test_what_diverges_is_never_chosen() -> None:
    wide = AnalyticLimit(small("chain"), 1 << 20)

    def loss(choice: Choice) -> float:
        return math.inf if "stem" in choice.weights else 5 - choice.value

    for most in (None, 0.0):
        found = freezing(LEARNS, wide, most, loss=loss)
        assert set(found.choice.weights) == {DEPTHWISE, PROJECT}
    with pytest.raises(MismatchError, match="diverges with all that fits"):
        freezing(LEARNS, wide, None, loss=lambda choice: math.inf)


def test_what_the_limit_learns_begins_the_search_again_but_no_run() -> None:
    class Learns(AnalyticLimit):
        """Once it knows better, what it took for small enough is not."""

        def confirm(self, choice: Choice) -> bool:
            if self.cost(choice) > 300:
                self._most, self.revision = 300, self.revision + 1
            return self.cost(choice) <= 300

    asked: list[Choice] = []
    told: list[Frozen] = []
    found = freezing(LEARNS, Learns(small("chain"), 700), None, asked=asked, tell=told.append)
    assert found.cost <= 300
    assert len(asked) == len({c.key for c in asked})
    assert found.course == tuple(told), "each step is told once"
    with pytest.raises(OverBudgetError, match=r"give --max-drop (0\.\d+) or") as e:
        freezing(LEARNS, Learns(small("chain"), 700), 0.01)
    enough = float(str(e.value).split("give --max-drop ")[1].split()[0])
    assert freezing(LEARNS, Learns(small("chain"), 700), enough).cost <= 300, "that was said of what is known to fit"


@pytest.mark.parametrize("most", [-0.01, 1.0, 5, math.nan, math.inf])
def test_a_drop_that_is_none_is_refused(most: float) -> None:
    with pytest.raises(ValueError, match="a share of accuracy"):
        freezing(LEARNS, AnalyticLimit(small("chain"), 1 << 20), most)
    with pytest.raises(UsageError, match=r"--max-drop .* such as 0\.01 for one image of a hundred"):
        find_selector("freeze", most)


def test_of_several_widths_that_with_the_lowest_loss_is_taken() -> None:
    pair = [drawn(small("chain"), [0.5], bits) for bits in (8, 16)]

    def train(choices: Sequence[Choice], left: int) -> list[Trained]:
        return [Trained(2.0 if c.bits == 8 else 1.0, 0.5, 0.0) for c in choices]

    select = partial(freeze, train=train, max_drop=None, tell=lambda step: None)
    assert best_over_bits(select, pair, AnalyticLimit(small("chain"), 1 << 20)).choice.bits == 16


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
    assert best_over_bits(few_evolution, [eight, wide], limit).bound is None
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
