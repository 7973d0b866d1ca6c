# SPDX-License-Identifier: Apache-2.0
"""Other orders of a step: never a larger peak, the smallest there is where all orders can be tried, and the same bytes
in whatever order nodes may run."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from graphs import float_chain, int8_chain, train_tail
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_nets import NAMED, Case, Net, cases, full, named_case

from trainlet.autodiff import scheme, walk
from trainlet.autodiff.scheme import UpdateScheme
from trainlet.errors import TrainletError, UnsupportedError
from trainlet.frontends import attach_head, load_checkpoint
from trainlet.ir.graph import Array, Graph, Node, Stage
from trainlet.passes import fuse as passes_fuse
from trainlet.passes.choose_kernels import choose_kernels
from trainlet.passes.depth_first import depth_first
from trainlet.passes.inplace import inplace
from trainlet.passes.reorder import WINDOW, order_bound, reorder
from trainlet.plan.arena import loads, make_plan
from trainlet.plan.prefix import prefix_length
from trainlet.reference import initial_state, train_step
from trainlet.toolchain.targets import HOST
from trainlet.verify import VerifyError, verify_graph

MODELS = ("mbv2-w0.35", "mcunet-5fps", "proxyless-w0.3")
SECONDS = 1.5
CASES = settings(max_examples=10, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


def differentiate(model: Graph, chosen: UpdateScheme) -> Graph:
    """The TRAIN graph, its nodes with kernels, so that they have scratch."""
    return choose_kernels(walk.differentiate(model, chosen), HOST)


def fuse(graph: Graph) -> Graph:
    return choose_kernels(passes_fuse.fuse(graph), HOST)


def train_of(case: Case) -> Graph:
    return differentiate(case.model, case.scheme)


def unfused(train: Graph) -> Graph:
    return train.with_nodes(train.nodes, stage=Stage.LOWERED)


def dense_at(graph: Graph) -> int:
    return max(i for i, n in enumerate(graph.nodes) if n.op == "dense")


def backward_at(graph: Graph) -> int:
    """Where the nodes behind the head's update begin."""
    return 1 + max(i for i, n in enumerate(graph.nodes) if n.op == "dense_sgd")


def parts(graph: Graph) -> tuple[int, int, int]:
    """The largest loads of the frozen prefix, of the rest of the forward pass, and behind that."""
    load = loads(graph)[1:]
    cut, dense = min(prefix_length(graph), dense_at(graph) + 1), dense_at(graph) + 1
    return max(load[:cut], default=0), max(load[cut:dense], default=0), max(load[dense:])


# --- an independent view of what may run when -----------------------------------------------------------------


def may_follow(graph: Graph, done: list[Node], node: Node) -> bool:
    """Whether ``node`` may run behind ``done`` and before all other nodes: what it reads is made, and what it writes is
    read no more."""
    waiting = [n for n in graph.nodes if n not in done and n is not node]
    ready = not any(v in n.outputs for v in node.inputs for n in waiting)
    return ready and not any(v in n.inputs for v in node.writes for n in waiting)


def orders(graph: Graph, first: int) -> Iterator[list[Node]]:
    """All orders of the nodes from ``first`` on."""

    def extend(done: list[Node]) -> Iterator[list[Node]]:
        if len(done) == len(graph.nodes):
            yield done
        for n in graph.nodes[first:]:
            if n not in done and may_follow(graph, done, n):
                yield from extend([*done, n])

    yield from extend(list(graph.nodes[:first]))


def shuffled(graph: Graph, seed: int) -> Graph:
    """Some order of the nodes behind the head's update."""
    rng = np.random.default_rng(seed)
    done = list(graph.nodes[: backward_at(graph)])
    while len(done) < len(graph.nodes):
        can = [n for n in graph.nodes if n not in done and may_follow(graph, done, n)]
        done.append(can[int(rng.integers(len(can)))])
    return graph.with_nodes(done)


# --- the order itself -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMED)
def test_nodes_move_and_nothing_else_changes(name: str) -> None:
    train = train_of(named_case(name))
    for graph in (train, unfused(train), fuse(train)):
        moved = reorder(graph)
        assert moved.stage is graph.stage
        assert sorted(n.name for n in moved.nodes) == sorted(n.name for n in graph.nodes)
        assert {n.name: n for n in moved.nodes} == {n.name: n for n in graph.nodes}
        assert dict(moved.values) == dict(graph.values)
        assert reorder(graph).nodes == moved.nodes
        assert reorder(moved).nodes == moved.nodes
        cut, dense = prefix_length(graph), dense_at(graph)
        assert prefix_length(moved) == cut
        assert {n.name for n in moved.nodes[:cut]} == {n.name for n in graph.nodes[:cut]}
        assert dense_at(moved) == dense
        late = [n.op for n in moved.nodes[dense + 1 :]]
        assert late.index("dense_sgd") == 1 + max(late.index(op) for op in ("check_lr", "softmax_xent", "enter_grad"))


@pytest.mark.parametrize("name", NAMED)
def test_updates_run_as_soon_as_they_can(name: str) -> None:
    """None changes places with the node in front of it, unless that still reads its weight or it would need more."""
    train = train_of(named_case(name))
    for graph in (reorder(unfused(train), overwrites=False), reorder(fuse(train), overwrites=False)):
        nodes, load = list(graph.nodes), loads(graph)[1:]
        for i in range(backward_at(graph) + 1, len(nodes)):
            before, node = nodes[i - 1 : i + 1]
            if node.outputs or not before.outputs or not may_follow(graph, nodes[: i - 1], node):
                continue
            swapped = graph.with_nodes([*nodes[: i - 1], node, before, *nodes[i + 1 :]])
            assert max(loads(swapped)[i : i + 2]) > max(load[i - 1 : i + 1])


@pytest.mark.parametrize("make", [float_chain, int8_chain])
def test_a_model_and_a_step_in_reals_are_reordered_too(make: object) -> None:
    model = make()  # type: ignore[operator]
    step = reorder(differentiate(model, scheme.resolve("full", model)))
    assert step.nodes != differentiate(model, scheme.resolve("full", model)).nodes
    lowered = choose_kernels(replace(int8_chain(), stage=Stage.LOWERED), HOST)
    assert reorder(lowered).nodes == lowered.nodes


def test_streams_come_later() -> None:
    case = named_case("shared_later")
    with pytest.raises(UnsupportedError, match="run that pass last"):
        reorder(depth_first(fuse(train_of(case)), by_rows=True))


# --- memory ---------------------------------------------------------------------------------------------------


def check_peaks(graph: Graph) -> None:
    """No part of the step needs more than before, with and without the pass that overwrites; the bound holds."""
    plain = reorder(graph, overwrites=False)
    assert all(a <= b for a, b in zip(parts(plain), parts(graph), strict=True))
    assert order_bound(graph, overwrites=False) <= max(loads(plain)) <= max(loads(graph))
    assert order_bound(graph, overwrites=False) == order_bound(plain, overwrites=False)
    moved, given = inplace(reorder(graph)), inplace(graph)
    assert max(loads(moved)) <= max(loads(given))
    assert order_bound(graph) <= max(loads(moved))


@pytest.mark.parametrize("name", NAMED)
def test_no_part_needs_more(name: str) -> None:
    train = train_of(named_case(name, 12))
    check_peaks(unfused(train))
    check_peaks(fuse(train))


@given(case=cases(), seed=st.integers(0, 100))
@CASES
def test_no_part_of_random_models_needs_more(case: Case, seed: int) -> None:
    train = train_of(case)
    for graph in (unfused(train), fuse(train), shuffled(fuse(train), seed)):
        check_peaks(graph)


def small(layers: int, kernel: int) -> Graph:
    """A step with some freedom, few enough nodes to try all orders of its backward pass."""
    net = Net((6, 5, 4), layers)
    x = net.conv(net.input, 7, (kernel, kernel), activation=True)
    for _ in range(layers - 1):
        x = net.same(x, kernel, depthwise=True, activation=True)
    model = net.finish(x, 3)
    return differentiate(model, full(net, 12, 0.5))


@pytest.mark.parametrize(("layers", "kernel", "fused"), [(1, 3, False), (2, 1, True), (2, 3, True)])
def test_the_peak_is_the_smallest_of_all_orders(layers: int, kernel: int, fused: bool) -> None:
    train = small(layers, kernel)
    graph = fuse(train) if fused else unfused(train)
    first = backward_at(graph)
    every = [graph.with_nodes(o) for o in orders(graph, first)]
    assert 2 < len(every) < 5000
    assert len(graph.nodes) - first <= WINDOW
    smallest = min(parts(g)[2] for g in every)
    assert parts(reorder(graph, overwrites=False))[2] == smallest
    assert smallest < max(parts(g)[2] for g in every)
    smallest = min(parts(inplace(g))[2] for g in every)
    assert parts(inplace(reorder(graph)))[2] == smallest


def test_a_search_that_forgets_scratch_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above with a planted fault: the cost of a node without its scratch."""
    monkeypatch.setattr(sys.modules["trainlet.passes.reorder"], "node_scratch", lambda graph, node: 0)
    with pytest.raises(AssertionError):
        test_the_peak_is_the_smallest_of_all_orders(2, 3, True)


@pytest.mark.parametrize("model", MODELS)
def test_published_nets_reach_the_bound(assets: Path, model: str) -> None:
    """The fused step needs no more than before in any part; behind the forward pass no order needs less."""
    net = attach_head(load_checkpoint(assets / "models" / f"{model}.pkl"), 10)
    for name in scheme.published_names(net):
        fused = fuse(differentiate(net, scheme.resolve(name, net, 8)))
        start = time.process_time()
        moved = reorder(fused)
        assert time.process_time() - start < SECONDS
        before, after = parts(inplace(fused)), parts(inplace(moved))
        assert all(a <= b for a, b in zip(after, before, strict=True))
        assert after[2] == backward_bound(fused)


@pytest.mark.parametrize("model", MODELS)
def test_published_nets_that_are_not_fused(assets: Path, model: str) -> None:
    """What eager updates save where every gradient is a tensor; and that it does not matter when the fused step is
    reordered."""
    net = attach_head(load_checkpoint(assets / "models" / f"{model}.pkl"), 10)
    train = differentiate(net, scheme.resolve(scheme.published_names(net)[-1], net, 8))
    moved = reorder(unfused(train), overwrites=False)
    assert 3 * parts(moved)[2] < parts(unfused(train))[2]
    assert parts(inplace(reorder(fuse(moved))))[2] == parts(inplace(reorder(fuse(train))))[2]


def backward_bound(graph: Graph) -> int:
    """``order_bound`` of what comes behind the forward pass, whose own peak would hide it."""
    problems = sys.modules["trainlet.passes.reorder"]._problems(graph, True)
    return max(b for p in problems[2:] for b in p.bounds())


# --- what may not move ----------------------------------------------------------------------------------------


def _moved(graph: Graph, first: Node, then: Node) -> Graph:
    """``first`` in front of ``then``."""
    nodes = [n for n in graph.nodes if n is not first]
    nodes.insert(nodes.index(then), first)
    return graph.with_nodes(nodes)


@pytest.mark.parametrize("name", ["shared_later", "dead_channels", "wide"])
def test_an_update_before_a_gradient_that_reads_the_weight_is_refused(name: str) -> None:
    """Of every trained layer with an input gradient, fused and not, whatever else its place allows."""
    train = train_of(named_case(name))
    tried = 0
    for graph in (reorder(unfused(train)), reorder(fuse(train))):
        for update in (*graph.find("sgd_weight"), *graph.find("conv2d_dw_sgd")):
            reader = [n for n in graph.consumers(update.writes[0]) if n.op != "conv2d"]
            if not reader:
                continue
            sums = graph.producer(update.get("dw") or update.get("db") or "")
            moved = _moved(graph, update, reader[0])
            if update.op == "sgd_weight" and sums is not None:
                moved = _moved(moved, sums, update)
            with pytest.raises(VerifyError, match=rf"reads '{update.stores['weight'][0]}' before it is written"):
                verify_graph(moved)
            tried += 1
    assert tried >= 2


def test_a_write_before_a_refusal_is_refused() -> None:
    graph = reorder(fuse(train_of(named_case("shared_later"))))
    (head,) = graph.find("dense_sgd")
    for op in ("check_lr", "softmax_xent", "enter_grad"):
        (late,) = graph.find(op)
        nodes = [n for n in graph.nodes if n is not late]
        nodes.insert(nodes.index(head) + 1, late)
        with pytest.raises(VerifyError):
            verify_graph(graph.with_nodes(nodes))


def test_a_search_that_forgets_states_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: nothing keeps an update behind the gradient that reads its weight. The pass checks what it made."""
    module = sys.modules["trainlet.passes.reorder"]
    monkeypatch.setattr(module, "_before", lambda n, me, made, read: sum(1 << made[v] for v in {*n.inputs} & {*made}))
    with pytest.raises(VerifyError, match="before it is written"):
        reorder(fuse(train_of(named_case("shared_later"))))


# --- fusion in any order --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMED)
def test_updates_are_fused_in_the_place_of_their_sums(name: str) -> None:
    train = train_of(named_case(name))
    fused = fuse(train)
    assert not any(fused.find(op) for op in ("conv2d_dx", "conv2d_dw", "conv2d_db", "sgd_weight", "sgd_bias"))
    gone = ("sgd_weight", "sgd_bias", "round_grad")
    places = {n.name: i for i, n in enumerate(n for n in train.nodes if n.op not in gone)}
    updates = [n for n in train.nodes if n.op in ("sgd_weight", "sgd_bias")]
    by_sum = sorted(updates, key=lambda n: places[(n.get("dw") or n["db"]).removesuffix(".y")])
    assert [n.name for n in fused.nodes if n.op in ("conv2d_dw_sgd", "conv2d_db_sgd")] == [n.name for n in by_sum]


def test_a_pair_around_a_changed_weight_stays_two_nodes() -> None:
    """Sums, then the update of their weight, then the rounding, which waits for another gradient: one node for both
    could run neither where the sums are made nor where they are rounded."""
    case = named_case("shared_later")
    train = train_of(case)
    early = [train.node(n) for n in ("conv.1.dx", "conv.1.dw", "conv.1.weight_sgd")]
    nodes = [n for n in train.nodes if n not in early]
    at = nodes.index(train.node("conv.2.dx"))
    graph = train.with_nodes([*nodes[:at], *early, *nodes[at:]])
    verify_graph(graph)
    lowered = fuse(graph)
    assert [n.name for n in lowered.find("conv2d_dx")] == ["conv.1.dx"]
    assert [n.name for n in lowered.find("round_grad")] == ["conv.1.round"]
    assert bytes_after(lowered, case) == bytes_after(train, case)


def test_a_pair_is_fused_behind_what_reads_its_weight() -> None:
    """The sums of a weight's gradient are made before the input gradient that reads the weight; the fused update
    changes it only then."""
    case = named_case("shared_later")
    train = train_of(case)
    moved = _moved(train, train.node("conv.1.dw"), train.node("conv.1.dx"))
    names = [n.name for n in fuse(moved).nodes]
    assert names.index("conv.1.weight_sgd") > names.index("conv.1.round")
    assert bytes_after(fuse(moved), case) == bytes_after(train, case)


def bytes_after(graph: Graph, case: Case, steps: int = 2) -> list[Array | str]:
    """Everything that the reference leaves behind."""
    state = initial_state(graph, case.seed)
    rng = np.random.default_rng(case.seed)
    found: list[Array | str] = []
    for t in range(steps):
        x = rng.integers(-128, 128, graph.values["input"].shape).astype(np.int8)
        try:
            result = train_step(graph, state, x, int(rng.integers(case.classes)), case.lrs[t % len(case.lrs)])
            found += [result.logits.tobytes().hex(), repr((result.loss, result.prediction, result.saturated))]
        except TrainletError as error:
            found.append(type(error).__name__)
    return [*found, *(f"{n} {a.dtype} {a.tobytes().hex()}" for n, a in sorted(state.arrays.items()))]


@given(case=cases(), seed=st.integers(0, 1000))
@CASES
def test_whatever_may_run_first_may_run_first(case: Case, seed: int) -> None:
    """Any order of gradients and updates that the rules allow, fused or not, gives the same bytes."""
    train = train_of(case)
    want = bytes_after(train, case)
    other = shuffled(train, seed)
    assert other.nodes[: dense_at(train)] == train.nodes[: dense_at(train)]
    for graph in (other, fuse(other), shuffled(fuse(train), seed), reorder(train), reorder(fuse(other))):
        verify_graph(graph)
        assert bytes_after(graph, case) == want


def test_a_gradient_with_the_new_weights_gives_other_bytes() -> None:
    """Why the order matters: the fault that the verifier refuses is one."""
    case = named_case("shared_later")
    train = train_of(case)
    classical = bytes_after(train, case)
    update = next(n for n in train.find("sgd_weight") if len(train.consumers(n.writes[0])) > 1)
    sums = train.producer(update.get("dw") or update.get("db") or "")
    assert sums is not None
    reader = next(n for n in train.consumers(update.writes[0]) if n.op == "conv2d_dx")
    assert bytes_after(_moved(_moved(train, update, reader), sums, update), case) != classical


def test_train_tail_is_reordered() -> None:
    """A graph that autodiff did not write."""
    graph = choose_kernels(train_tail(), HOST)
    moved = reorder(graph)
    ops = [n.op for n in moved.nodes]
    assert ops.index("sgd_bias") == ops.index("conv2d_db") + 1
    assert ops.index("sgd_weight") == ops.index("conv2d_dw") + 1
    assert make_plan(moved).lower_bound <= make_plan(graph).lower_bound
