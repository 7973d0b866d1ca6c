# SPDX-License-Identifier: Apache-2.0
"""Nodes that write over an input: the same bytes in less memory, and what must not be overwritten is not."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from random_nets import NAMED, PLAIN, Case, Net, cases, full, named_case
from test_exact import difference

from trainlet.autodiff.scheme import UpdateScheme
from trainlet.compiler import Passes, compile_model
from trainlet.ir.graph import Graph
from trainlet.plan.arena import loads, make_plan
from trainlet.verify import VerifyError, verify_graph, verify_plan

STEPS = 3
ALONE = Passes(depth_first=False)
OFF = Passes(inplace=False, depth_first=False)


def block(height: int = 9, width: int = 7, kernel: int = 3, channels: int = 20, *, dilated: bool = False) -> Case:
    """Two wide depthwise layers; biases train, so that gradients go through both."""
    net = Net((height, width, 3), seed=kernel, name="block")
    x = net.conv("input", channels, (1, 1), activation=True)
    y = net.same(x, kernel, depthwise=True, activation=True)
    if dilated:
        y = net.conv(y, channels, (3, 3), dilation=(2, 2), pads=(2, 2, 2, 2), groups=channels)
    y = net.add(x, net.same(y, 1))
    return Case(net.finish(y, 3), UpdateScheme("biases", tuple(net.layers), {}, 8), 1, (0.02, 0.5), PLAIN)


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (31, 3), (5, 33)])
@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
@pytest.mark.parametrize("dilated", [False, True])
def test_depthwise_over_its_input_gives_the_same_bytes(size: tuple[int, int], kernel: int, dilated: bool) -> None:
    case = block(*size, kernel, dilated=dilated)
    compiled = compile_model(case.model, case.scheme, passes=ALONE)
    over = [n.op for n in compiled.graph.nodes if n.overwrites]
    assert over.count("conv2d_dx_round") == 1 + dilated
    assert difference(case, compiled, STEPS) == ""


@pytest.mark.parametrize("name", NAMED)
def test_on_and_off_give_the_same_bytes(name: str) -> None:
    case = replace(named_case(name, 12), flags=PLAIN)
    for passes in (ALONE, OFF):
        assert difference(case, compile_model(case.model, case.scheme, passes=passes), STEPS) == ""


@given(case=cases())
@settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_random_models_give_the_same_bytes(case: Case) -> None:
    assert difference(case, compile_model(case.model, case.scheme, passes=ALONE), STEPS) == ""


def test_two_wide_tensors_become_one() -> None:
    case = block(16, 16)
    on, off = (compile_model(case.model, case.scheme, passes=p) for p in (ALONE, OFF))
    at = {n.name: load for n, load in zip(on.graph.nodes, loads(on.graph)[1:], strict=False)}
    before = {n.name: load for n, load in zip(off.graph.nodes, loads(off.graph)[1:], strict=False)}
    (dx,) = (n for n in on.graph.find("conv2d_dx_round") if n.overwrites)
    assert before[dx.name] - at[dx.name] == 16 * 16 * 20 - 3 * 16 * 16  # a tensor, less three rows of a block


def overwriting(graph: Graph, op: str, which: int = 0) -> Graph:
    """``graph`` with the first node of ``op`` that does not yet overwrite made to overwrite an input."""
    node = next(n for n in graph.find(op) if not n.overwrites)
    changed = replace(node, overwrites=node.inputs[which])
    return graph.with_nodes([changed if n is node else n for n in graph.nodes])


def test_what_is_read_later_is_not_overwritten() -> None:
    """A layer whose weights train reads the gradient after its input gradient has been made."""
    case = block()
    trained = replace(case, scheme=full(_net_of(case), 8))
    compiled = compile_model(trained.model, trained.scheme, passes=ALONE)
    assert not any(n.overwrites for n in compiled.graph.find("conv2d_dx_round"))
    with pytest.raises(VerifyError, match="still reads it"):
        verify_graph(overwriting(compiled.graph, "conv2d_dx_round"))


def _net_of(case: Case) -> Net:
    net = Net((1, 1, 1))
    net.layers = [n.layer for n in case.model.find("conv2d")]
    return net


def test_a_convolution_over_pixels_of_others_is_refused() -> None:
    net = Net((5, 5, 4), seed=2, name="plain")
    graph = net.finish(net.conv(net.conv("input", 4), 4, (3, 3), pads=(1, 1, 1, 1)), 3)
    lowered = compile_model(graph, UpdateScheme("head"), passes=OFF).graph
    node = lowered.node("conv.1")
    wrong = lowered.with_nodes([replace(n, overwrites=n.inputs[0]) if n is node else n for n in lowered.nodes])
    with pytest.raises(VerifyError, match="may write over x, where its attributes let it"):
        verify_graph(wrong)


def test_a_plan_that_moves_the_output_is_refused() -> None:
    case = block()
    graph = compile_model(case.model, case.scheme, passes=ALONE).graph
    plan = make_plan(graph)
    verify_plan(graph, plan)
    node = next(n for n in graph.nodes if n.overwrites)
    place = plan.places[node.output]
    moved = replace(plan, places={**plan.places, node.output: replace(place, offset=place.offset + 4)})
    with pytest.raises(VerifyError, match="the overwritten"):
        verify_plan(graph, moved)
