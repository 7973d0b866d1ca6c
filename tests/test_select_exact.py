# SPDX-License-Identifier: Apache-2.0
"""Exact selection and its limits: the published figures, brute force, sound bounds, and never a choice that does not
fit."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_nets import Case, cases
from select_cases import SMALL, drawn, every_choice, mcunet, on_curve, small

from trainlet.autodiff.scheme import UpdateScheme, extra_memory_bytes, published_names, resolve, trainable_layers
from trainlet.compiler import ALL, Passes, compile_model, plan_model
from trainlet.errors import OverBudgetError, ToolMissingError, UsageError
from trainlet.frontends import attach_head, load_checkpoint
from trainlet.ir.graph import Graph
from trainlet.select import exact as exact_module
from trainlet.select.baselines import published_choices
from trainlet.select.cuts import Cut, Option, Step, gap, options, overrun, strongest
from trainlet.select.exact import exact
from trainlet.select.limits import AnalyticLimit, Linked, PlannedLimit
from trainlet.select.problem import RATIOS, Choice, Contributions, Selection
from trainlet.toolchain.chip import build_device
from trainlet.toolchain.find import find_arm_gcc
from trainlet.toolchain.targets import TARGETS, with_limits

KIB = 1024
M7 = TARGETS["stm32f746"]


def head_of(graph: Graph, bits: int = 8) -> Contributions:
    """Contributions of a model where nothing but the head was measured."""
    return Contributions(graph.name, bits, tuple(trainable_layers(graph)), {}, {})


# --- the published figures --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kib", "value"), [(100, 38.2), (125, 46.0), (150, 51.4)])
def test_the_values_of_a_brute_force_over_the_curve(kib: int, value: float) -> None:
    found = exact(on_curve(mcunet(), 22), AnalyticLimit(mcunet(), kib * KIB))
    assert found.choice.value == pytest.approx(value) == found.bound
    assert found.cost == extra_memory_bytes(mcunet(), found.choice.scheme(tuple(trainable_layers(mcunet())), "x"))
    assert found.cost <= kib * KIB


def test_the_published_scheme_is_one_of_the_best() -> None:
    c = on_curve(mcunet(), 22)
    limit = AnalyticLimit(mcunet(), 100 * KIB)
    published = published_choices(c, limit)["99kb"]
    assert limit.fits(published)
    assert published.value == pytest.approx(38.2) == pytest.approx(exact(c, limit).choice.value)


def test_no_published_scheme_is_better_at_its_own_size() -> None:
    """As "148kb" is bettered by 2.7 and "124kb" by 3.1, those are not optimal."""
    c = on_curve(mcunet(), 20, 21, 22, 23, 24)
    better = {}
    for name, choice in published_choices(c, AnalyticLimit(mcunet(), 1)).items():
        limit = AnalyticLimit(mcunet(), AnalyticLimit(mcunet(), 1).cost(choice))
        better[name] = exact(c, limit).choice.value - choice.value
    assert set(better) == set(published_names(mcunet()))
    assert min(better.values()) > -1e-9
    assert better["99kb"] < 0.5 < better["124kb"]


def test_a_table_of_the_wrong_sign_is_noticed() -> None:
    """Losses that training adds instead of takes away: nothing would train."""
    c = on_curve(mcunet(), 22)
    wrong = replace(c, weights={o: -g for o, g in c.weights.items()})
    found = exact(wrong, AnalyticLimit(mcunet(), 100 * KIB))
    assert found.choice.value == 0 != pytest.approx(38.2)
    assert not found.choice.weights


# --- brute force ------------------------------------------------------------------------------------------------


@cache
def costs(name: str, bits: int) -> dict[tuple[int, frozenset[Option]], int]:
    """SRAM of all choices for a small model, each planned."""
    limit = PlannedLimit(small(name), None, 1 << 20)
    return {_same(c): limit.cost(c) for c in every_choice(drawn(small(name), [1.0], bits), limit)}


def _same(choice: Choice) -> tuple[int, frozenset[Option]]:
    return choice.depth, frozenset(choice.weights.items())


def best_by_force(contributions: Contributions, limit: AnalyticLimit | PlannedLimit, name: str) -> float:
    """The highest value of a choice that costs no more than the limit has."""

    def cost(choice: Choice) -> int:
        if isinstance(limit, AnalyticLimit):
            return extra_memory_bytes(limit.graph, choice.scheme(limit.layers, "x"))
        return costs(name, contributions.bits)[_same(choice)]

    return max(c.value for c in every_choice(contributions, limit) if cost(c) <= limit.most)


def check_best(found: Selection, contributions: Contributions, limit: AnalyticLimit | PlannedLimit, name: str) -> None:
    """The choice fits and no other one that fits is worth more."""
    fresh = type(limit)(limit.graph, most=limit.most)
    assert fresh.cost(found.choice) == found.cost <= limit.most
    assert found.choice.value == pytest.approx(best_by_force(contributions, fresh, name))
    assert found.bound == pytest.approx(found.choice.value)
    assert all(contributions.weights[o] > 0 for o in found.choice.weights.items())


_GAINS = st.lists(st.integers(-8, 20).map(lambda g: g / 16), min_size=7, max_size=23)


@settings(max_examples=40)
@given(st.sampled_from((*SMALL, "shared_later")), _GAINS, st.sampled_from((8, 12, 16)), st.floats(0, 1.1))
def test_brute_force_agrees_under_the_formula(name: str, gains: list[float], bits: int, share: float) -> None:
    c = drawn(small(name), gains, bits)
    room = AnalyticLimit(small(name), 1)
    least, most = room.cost(Choice(0)), room.cost(Choice(len(c.layers), dict.fromkeys(c.layers, 1.0), bits))
    limit = AnalyticLimit(small(name), int(least + share * (most - least)))
    check_best(exact(c, limit), c, limit, name)


@settings(max_examples=10)
@given(st.sampled_from(("chain", "twice", "dilated_groups")), _GAINS, st.floats(0, 1.05))
def test_brute_force_agrees_under_the_plan(name: str, gains: list[float], share: float) -> None:
    c = drawn(small(name), gains, 12)
    every = costs(name, 12).values()
    limit = PlannedLimit(small(name), None, int(min(every) + share * (max(every) - min(every))))
    check_best(exact(c, limit), c, limit, name)


class OneTooMany(AnalyticLimit):
    """A planted fault: one byte more than there is."""

    def fits(self, choice: Choice) -> bool:
        return self.cost(choice) <= self.most + 1

    confirm = fits

    def cuts(self, depth: int, bits: int, options: Iterable[Option]) -> tuple[Cut, ...]:
        return tuple(replace(c, most=c.most + 8) for c in super().cuts(depth, bits, options))


class Unsound(PlannedLimit):
    """A planted fault: cuts that ask for more than choices cost."""

    def cuts(self, depth: int, bits: int, options: Iterable[Option]) -> tuple[Cut, ...]:
        return tuple(replace(c, base=c.base + 40) for c in super().cuts(depth, bits, options))


def test_planted_limits_are_caught() -> None:
    c = drawn(small("chain"), [0.5, 0.25, 1.0, 0.125, 0.75])
    wide = exact(c, AnalyticLimit(small("chain"), 700))
    tight = AnalyticLimit(small("chain"), wide.cost - 1)
    check_best(exact(c, tight), c, tight, "chain")
    found = exact(c, OneTooMany(small("chain"), wide.cost - 1))
    with pytest.raises(AssertionError):
        check_best(found, c, tight, "chain")
    cost = exact(c, PlannedLimit(small("chain"), None, 1100)).cost
    good, bad = (kind(small("chain"), None, cost) for kind in (PlannedLimit, Unsound))
    check_best(exact(c, good), c, good, "chain")
    with pytest.raises(AssertionError):
        check_best(exact(c, bad), c, good, "chain")


@cache
def whole_chip() -> PlannedLimit:
    """One for all tests: what it has analyzed once it knows."""
    return PlannedLimit(mcunet(), None, 320 * KIB)


# --- the bounds of the plan -------------------------------------------------------------------------------------


def over_and_short(limit: PlannedLimit, c: Contributions, choice: Choice) -> tuple[int, int]:
    """(by how much the cuts say it is too large, by how much it is)."""
    every = [(k, r) for k, rows in options(c, limit, choice.depth, harmful=True).items() for r, _ in rows]
    said = overrun(limit.cuts(choice.depth, c.bits, every), choice.weights)
    return said, limit.cost(choice) - limit.most


@pytest.mark.parametrize("passes", [ALL, Passes(inplace=False), Passes(reorder=False), Passes(depth_first=False)])
@pytest.mark.parametrize("name", ["chain", "add_is_first"])
def test_no_choice_costs_less_than_its_cuts_say(name: str, passes: Passes) -> None:
    limit = PlannedLimit(small(name), None, 100, passes)
    c = drawn(small(name), [1.0], 16)
    every = list(every_choice(c, limit))
    pairs = [over_and_short(limit, c, x) for x in random.Random(name).sample(every, min(25, len(every)))]
    assert all(said <= short for said, short in pairs)
    assert any(said >= 0 for said, _ in pairs)


@settings(max_examples=40)
@given(cases(), st.data())
def test_no_choice_of_any_model_costs_less_than_its_cuts_say(case: Case, data: st.DataObject) -> None:
    limit = PlannedLimit(case.model, None, 100)
    bits = data.draw(st.sampled_from((8, 12, 16)))
    depth = data.draw(st.integers(0, limit.deepest))
    weights = {
        layer: data.draw(st.sampled_from(ratios))
        for layer in limit.layers[len(limit.layers) - depth :]
        if (ratios := [r for r in RATIOS if limit.selectable(layer, r)]) and data.draw(st.booleans())
    }
    cuts = limit.cuts(depth, bits, weights.items())
    assert overrun(cuts, weights) <= limit.cost(Choice(depth, weights, bits)) - limit.most


def test_the_cuts_are_close_for_a_published_model() -> None:
    """So few plans are needed."""
    limit = whole_chip()
    c = drawn(mcunet(), [1.0])
    rng = random.Random(5)
    for share in (0.2, 0.5, 1.0):
        within = c.layers[-22:]
        weights = {layer: rng.choice(RATIOS) for layer in rng.sample(within, int(share * 22))}
        said = overrun(limit.cuts(22, 8, weights.items()), weights)
        short = limit.cost(Choice(22, weights)) - limit.most
        assert short - 0.03 * limit.cost(Choice(22, weights)) <= said <= short


def test_only_the_strongest_cuts_are_kept() -> None:
    a, b = ("a", 1.0), ("b", 0.5)
    cuts = [Cut(5, {a: 2, b: 2}, 9), Cut(6, {a: 2, b: 2}, 10), Cut(5, {a: 2, b: 3}, 9), Cut(7, {a: 0, b: 0}, 9)]
    assert set(map(repr, strongest(cuts, [a, b]))) == set(map(repr, cuts[2:]))
    assert overrun(cuts, {"a": 1.0, "b": 0.5}) == 1


# --- the plan ---------------------------------------------------------------------------------------------------


def test_a_plan_costs_what_the_compiler_says() -> None:
    limit = PlannedLimit(small("chain"), None, 4096)
    with pytest.raises(UsageError, match="a limit of 0 bytes: give at least 1"):
        limit.narrowed(0)
    weights = {"stem": 0.5, "block.project": 1.0}
    compiled = compile_model(small("chain"), UpdateScheme("x", limit.layers, weights, 12))
    assert limit.planned(Choice(3, weights, 12)) == (compiled.plan.arena_bytes, compiled.state_bytes)
    assert limit.cost(Choice(3, weights, 12)) == compiled.plan.arena_bytes + compiled.state_bytes
    assert limit.plans == 1
    assert limit.cost(Choice(1, bits=16)) == limit.cost(Choice(1, bits=8)), "bits are those of weights"
    assert limit.plans == 2


def test_more_memory_is_never_worth_less_for_a_published_model() -> None:
    c = on_curve(mcunet(), 22)
    values = []
    for kib in (64, 128):
        found = exact(c, whole_chip().narrowed(kib * KIB))
        p = plan_model(mcunet(), found.choice.scheme(c.layers, "x"))
        assert p.plan.arena_bytes + p.layout.nbytes == found.cost <= kib * KIB
        assert found.evaluations < 10
        values.append(found.choice.value)
    assert values == sorted(values)
    assert values[0] > 0


class FakeLink(PlannedLimit):
    """Linked programs that have ``beside(choice)`` bytes more than their plan."""

    def __init__(self, most: int, flash: int = 0) -> None:
        super().__init__(small("chain"), M7, most)
        self.flash = flash

    def beside(self, choice: Choice) -> int:
        return 100 + 8 * choice.depth + 20 * len(choice.weights)

    def link(self, choice: Choice) -> Linked:
        key = choice.key
        self._linked[key] = Linked(sum(self.planned(choice)) + self.beside(choice), self.flash)
        return self._linked[key]


@settings(max_examples=15)
@given(_GAINS, st.integers(1100, 2000))
def test_what_is_linked_fits(gains: list[float], most: int) -> None:
    c = drawn(small("chain"), gains)
    limit = FakeLink(most)
    found = exact(c, limit)
    assert found.cost == sum(limit.planned(found.choice)) + limit.beside(found.choice) <= most
    assert 100 <= limit.overhead <= 100 + 8 * 3 + 20 * 3
    better = [x for x in every_choice(c, limit) if x.value > found.choice.value + 1e-9]
    assert all(sum(limit.planned(x)) + limit.overhead > most for x in better), "none was left out"


def test_a_limit_that_does_not_learn_is_no_endless_loop() -> None:
    class Liar(FakeLink):
        def confirm(self, choice: Choice) -> bool:
            return False

    with pytest.raises(RuntimeError, match="was not learned from"):
        exact(drawn(small("chain"), [1.0]), Liar(2000))


def test_a_floor_that_a_plan_undercuts_falls() -> None:
    limit = PlannedLimit(small("chain"), None, 1200)
    arena = limit.planned(Choice(3))[0]
    limit.cuts(3, 8, ())
    limit._floors[3] = arena + 4
    limit._planned.clear()
    assert limit.planned(Choice(3))[0] == arena == limit._floors[3]
    assert limit.revision == 1


def test_a_search_that_has_learned_begins_anew() -> None:
    class Learning(PlannedLimit):
        searches = 0

        def confirm(self, choice: Choice) -> bool:
            self.searches += 1
            self.revision += self.searches < 3
            return True

    limit = Learning(small("chain"), None, 1200)
    exact(drawn(small("chain"), [1.0]), limit)
    assert limit.searches == 3


def test_flash_that_is_too_small_is_named() -> None:
    with pytest.raises(OverBudgetError, match="1048577 bytes of flash are needed, 1048576 are there on stm32f746"):
        exact(drawn(small("chain"), [1.0]), FakeLink(4000, flash=(1 << 20) + 1))


# --- nothing fits -----------------------------------------------------------------------------------------------


def test_the_refusal_names_tensors_and_what_would_help() -> None:
    limit = PlannedLimit(small("chain"), None, 300)
    need = limit.cost(Choice(0))
    with pytest.raises(OverBudgetError) as e:
        exact(drawn(small("chain"), [1.0]), limit)
    text = str(e.value)
    assert f"takes {need} bytes of SRAM" in text
    assert "the limit is 300" in text
    assert "of block.depthwise (" in text or "of stem (" in text
    assert "lower resolution" in text
    enough = PlannedLimit(small("chain"), None, need)
    assert exact(head_of(small("chain")), enough).choice == Choice(0)
    with pytest.raises(OverBudgetError, match="give at least 6"):
        exact(drawn(small("chain"), [1.0]), AnalyticLimit(small("chain"), 5))
    assert exact(head_of(small("chain")), AnalyticLimit(small("chain"), 6)).choice.depth == 0


# --- a search that ends early -----------------------------------------------------------------------------------


class Looser(PlannedLimit):
    """Cuts that promise far more than plans hold, as far as the head."""

    def cuts(self, depth: int, bits: int, options: Iterable[Option]) -> tuple[Cut, ...]:
        return tuple(replace(c, base=c.base - 300 * (depth > 0)) for c in super().cuts(depth, bits, options))


def test_a_search_that_ends_early_reports_its_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    c = drawn(small("chain"), [0.5, 0.25, 1.0, 0.7])
    best = exact(c, PlannedLimit(small("chain"), None, 1000))
    steps: list[Step] = []
    whole = exact(c, Looser(small("chain"), None, 1000), progress=steps.append)
    assert whole.choice.value == pytest.approx(best.choice.value)
    assert whole.evaluations > 20
    assert steps[-1].evaluations == whole.evaluations
    early = exact(c, Looser(small("chain"), None, 1000), evaluations=3)
    assert early.bound is not None
    assert early.choice.value <= best.choice.value <= early.bound
    assert 0 < (gap(early) or 0) < 1
    assert early.cost <= 1000
    monkeypatch.setattr(exact_module, "VISITS", 5)
    short = exact(c, PlannedLimit(small("chain"), None, 1000))
    assert short.bound is not None
    assert short.choice.value <= best.choice.value <= short.bound
    assert short.cost <= 1000


# --- contributions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": ("stem",)}, "other layers than"),
        ({"weights": {("stem", 1.0): float("nan")}}, "stem at ratio 1: nan is no gain"),
        ({"weights": {("stem", 1.5): 1.0}}, "stem at ratio 1.5 cannot train"),
        ({"weights": {("nowhere", 0.5): 1.0}}, "nowhere at ratio 0.5 cannot train"),
        ({"biases": {4: 1.0}}, "4 biases, of 3 layers"),
        ({"biases": {0: 0.5}}, "no biases add 0.5, not 0"),
        ({"biases": {1: float("inf")}}, "the biases of the last 1 layers: inf"),
    ],
)
def test_wrong_contributions_are_refused(change: dict[str, object], message: str) -> None:
    c = replace(drawn(small("chain"), [1.0]), **change)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=message):
        exact(c, AnalyticLimit(small("chain"), 500))


def test_ratios_without_a_channel_are_left_out() -> None:
    """The stem has 3 input channels: an eighth and a fourth of them are none."""
    limit = AnalyticLimit(small("chain"), 1 << 20)
    assert [limit.selectable("stem", r) for r in RATIOS] == [False, False, True, True]
    c = drawn(small("chain"), [1.0])
    only = replace(c, biases={3: 0.0}, weights={("stem", 0.125): 9.0, ("block.project", 0.25): 1.0})
    assert dict(exact(only, limit).choice.weights) == {"block.project": 0.25}


# --- the chip ---------------------------------------------------------------------------------------------------


def test_a_published_model_on_a_chip(assets: Path) -> None:
    """The selection links into exactly the memory that was named, and is better than the published scheme that fits."""
    try:
        find_arm_gcc()
    except ToolMissingError as e:
        pytest.skip(str(e))
    graph = attach_head(load_checkpoint(assets / "models" / "mcunet-5fps.pkl"), 10)
    chip = with_limits(M7, 100 * KIB)
    limit = PlannedLimit(graph, chip)
    found = exact(on_curve(graph, 22), limit)
    scheme = found.choice.scheme(limit.layers, "selected")
    firmware = build_device(compile_model(graph, scheme), chip)
    assert firmware.static_bytes + firmware.stack_bytes == found.cost <= chip.sram_bytes
    assert found.choice.weights
    published = compile_model(graph, resolve("49kb", graph))
    assert published.plan.arena_bytes + published.state_bytes + limit.overhead <= chip.sram_bytes
    assert found.choice.value > 1.4 * published_choices(on_curve(graph, 20), limit)["49kb"].value
