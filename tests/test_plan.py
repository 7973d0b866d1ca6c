# SPDX-License-Identifier: Apache-2.0
"""The memory planner: buffers that live at once never share a byte, and the arena is close to the least possible."""

from __future__ import annotations

from itertools import pairwise, permutations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_nets import NAMED, Case, cases, named_case

from trainlet.autodiff import scheme
from trainlet.autodiff.walk import differentiate
from trainlet.frontends import attach_head, load_checkpoint
from trainlet.ir.graph import Graph
from trainlet.passes.choose_kernels import choose_kernels
from trainlet.passes.fuse import fuse
from trainlet.plan.arena import ALIGNMENT, Block, MemoryPlan, best_fit, largest_alive, lifetimes, make_plan, place
from trainlet.toolchain.targets import HOST
from trainlet.verify import verify_plan

MODELS = ("mbv2-w0.35", "mcunet-5fps", "proxyless-w0.3")
NEAR = 1.02  # how far a published net's arena may lie above its lower bound
FACTOR = 1.1  # how far the plan of a few blocks may lie above the best plan there is


def _overlaps(blocks: list[Block], offsets: list[int]) -> list[tuple[str, str]]:
    """Pairs that exist at one node and share a byte, by sets of nodes and of bytes."""
    wrong = []
    for i, (a, at) in enumerate(zip(blocks, offsets, strict=True)):
        for b, bt in list(zip(blocks, offsets, strict=True))[:i]:
            nodes = set(range(a.first, a.last + 1)) & set(range(b.first, b.last + 1))
            if nodes and set(range(at, at + a.size)) & set(range(bt, bt + b.size)):
                wrong.append((a.name, b.name))
    return wrong


def _size(blocks: list[Block], offsets: list[int]) -> int:
    return max(at + b.size for b, at in zip(blocks, offsets, strict=True))


def _bound(blocks: list[Block]) -> int:
    return max(sum(b.size for b in blocks if b.first <= t <= b.last) for t in range(max(b.last for b in blocks) + 1))


@st.composite
def _blocks(draw: st.DrawFn, most: int) -> list[Block]:
    row = st.tuples(st.integers(1, 40), st.integers(0, 12), st.integers(0, 6))
    rows = draw(st.lists(row, min_size=1, max_size=most))
    return [Block(f"b{i}", 4 * size, first, first + length) for i, (size, first, length) in enumerate(rows)]


@given(blocks=_blocks(25))
@settings(max_examples=200)
def test_best_fit_never_overlaps(blocks: list[Block]) -> None:
    offsets = best_fit(blocks)
    assert min(offsets) >= 0
    assert _overlaps(blocks, offsets) == []
    assert _bound(blocks) <= _size(blocks, offsets) <= sum(b.size for b in blocks)


def _exact(blocks: list[Block]) -> int:
    """The smallest arena there is. Some best plan is bottom-left: each block, in some order, lies at 0 or on top of one
    that lives with it; so lowest fit over all orders finds it."""
    return min(_size(list(order), _lowest(order)) for order in permutations(blocks))


def _lowest(blocks: tuple[Block, ...]) -> list[int]:
    offsets: list[int] = []
    for b in blocks:
        placed = zip(blocks, offsets, strict=False)
        busy = [(at, at + o.size) for o, at in placed if o.first <= b.last and b.first <= o.last]
        tries = sorted({0, *(end for _, end in busy)})
        offsets.append(next(t for t in tries if all(t >= end or t + b.size <= begin for begin, end in busy)))
    return offsets


@given(blocks=_blocks(6))
@settings(max_examples=60)
def test_small_plans_against_all_plans(blocks: list[Block]) -> None:
    """The planner's plan is at most FACTOR times the best plan there is."""
    best, bound = _exact(blocks), _bound(blocks)
    placed = place(blocks, bound)
    offsets = {b.name: at for b, at in placed}
    assert _overlaps(blocks, [offsets[b.name] for b in blocks]) == []
    assert bound <= best <= max(at + b.size for b, at in placed) <= FACTOR * best


@given(blocks=_blocks(25))
@settings(max_examples=50)
def test_more_rounds_are_never_worse(blocks: list[Block]) -> None:
    by_size = sorted(blocks, key=lambda b: (-b.size, b.first, b.name))
    placed = place(blocks, _bound(blocks))
    assert max(at + b.size for b, at in placed) <= _size(by_size, best_fit(by_size))


# --- plans of graphs ----------------------------------------------------------------------------------------


def _check(graph: Graph, plan: MemoryPlan) -> None:
    blocks = lifetimes(graph)
    at = {**{(n, False): o for n, o in plan.offsets.items()}, **{(n, True): o for n, o in plan.scratch_offsets.items()}}
    offsets = [at[b.name, b.scratch] for b in blocks]
    assert len(at) == len(blocks)
    assert all(o % ALIGNMENT == 0 and o >= 0 for o in offsets)
    alive = [[i for i, b in enumerate(blocks) if b.first <= t <= b.last] for t in range(-1, len(graph.nodes) + 1)]
    for now in alive:  # nothing that lives now shares a byte: sorted by offset, each ends before the next begins
        ends = sorted((offsets[i], offsets[i] + blocks[i].size) for i in now)
        assert all(a[1] <= b[0] for a, b in pairwise(ends))
    assert plan.lower_bound == max(sum(blocks[i].size for i in now) for now in alive)
    assert plan.lower_bound <= plan.arena_bytes == max(o + b.size for b, o in zip(blocks, offsets, strict=True))


def _lowered(case: Case) -> Graph:
    return choose_kernels(fuse(differentiate(case.model, case.scheme)), HOST)


@given(case=cases())
@settings(max_examples=40)
def test_plans_of_random_models(case: Case) -> None:
    graph = _lowered(case)
    plan = make_plan(graph)
    verify_plan(graph, plan)
    _check(graph, plan)


@pytest.mark.parametrize("name", NAMED)
def test_plans_of_named_models(name: str) -> None:
    graph = _lowered(named_case(name))
    plan = make_plan(graph)
    _check(graph, plan)
    assert make_plan(graph) == plan
    alive = largest_alive(graph, plan, 1000)
    assert sum(size for _, size in alive) == plan.lower_bound
    assert [s for _, s in alive] == sorted((s for _, s in alive), reverse=True)


def _values_read(graph: Graph) -> dict[str, tuple[int, int]]:
    """First and last node that touches each value, worked out from the nodes alone."""
    touched: dict[str, list[int]] = {}
    for i, n in enumerate(graph.nodes):
        for name in (*n.inputs, *n.outputs):
            touched.setdefault(name, []).append(i)
    return {name: (min(t), max(t)) for name, t in touched.items()}


def test_a_value_lives_from_its_maker_to_its_last_reader() -> None:
    graph = _lowered(named_case("shared_later"))
    touched = _values_read(graph)
    for b in lifetimes(graph):
        if b.scratch:
            assert b.first == b.last == [n.name for n in graph.nodes].index(b.name)
        elif b.name in graph.inputs:
            assert (b.first, b.last) == (-1, touched[b.name][1])
        elif b.name in graph.interface.made:
            assert (b.first, b.last) == (touched[b.name][0], len(graph.nodes))
        else:
            assert (b.first, b.last) == touched[b.name]


@pytest.mark.parametrize("model", MODELS)
def test_arenas_of_published_nets(assets: Path, model: str) -> None:
    net = attach_head(load_checkpoint(assets / "models" / f"{model}.pkl"), 10)
    names = scheme.published_names(net)
    assert len(names) == 5
    rows = []
    for name in names:
        graph = choose_kernels(fuse(differentiate(net, scheme.resolve(name, net, 8))), HOST)
        plan = make_plan(graph)
        verify_plan(graph, plan)
        rows.append((name, plan.arena_bytes, plan.lower_bound))
    for name, arena, bound in rows:
        print(f"{model} {name}: arena {arena} bytes, lower bound {bound}, {100 * (arena / bound - 1):.2f} % above")
    assert all(bound <= arena <= NEAR * bound for _, arena, bound in rows), rows
    assert np.diff([bound for _, _, bound in rows]).min() >= 0  # a larger scheme needs no less
