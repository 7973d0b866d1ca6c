# SPDX-License-Identifier: Apache-2.0
"""Streams: rows in their order, rings as short as they can be, and the bytes of the run layer by layer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from random_nets import NAMED, PLAIN, Case, Net, cases, full, named_case
from test_exact import difference

from trainlet.compiler import Compiled, Passes, compile_model
from trainlet.emit import emit
from trainlet.errors import UnsupportedError, UsageError
from trainlet.frontends import graph_file as irfile
from trainlet.ir import DepthFirst
from trainlet.ir.graph import Graph
from trainlet.ops import Window
from trainlet.passes.depth_first import Run, can_be_fed, runs_in_rows, wrap_runs
from trainlet.passes.rings import ring_rows
from trainlet.plan.arena import feeds, make_plan
from trainlet.verify import VerifyError, verify_depth_first, verify_plan

STEPS = 3


def planned(compiled: Compiled, graph: Graph) -> Compiled:
    """``compiled`` with another lowered graph of the same step."""
    plan = make_plan(graph)
    verify_plan(graph, plan)
    return replace(compiled, graph=graph, plan=plan, sources=emit(graph, plan, compiled.layout, compiled.model_hash))


def all_streamed(case: Case, by_rows: bool, over: bool = True) -> Compiled:
    """Every run of forward nodes that can be one stream is one, whether that pays or not."""
    flat = compile_model(case.model, case.scheme, passes=Passes(depth_first=False))
    nodes = flat.graph.nodes
    dense = next(i for i, n in enumerate(nodes) if n.op == "dense")
    stops = [i for i, n in enumerate(nodes[:dense]) if not runs_in_rows(flat.graph, n)]
    runs = [Run(a + 1, b, over) for a, b in zip([-1, *stops], [*stops, dense], strict=True) if b - a > 1]
    return planned(flat, wrap_runs(flat.graph, runs, by_rows and can_be_fed(flat.graph)))


# --- the same bytes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_rows", [True, False], ids=["rows", "image"])
@pytest.mark.parametrize("name", NAMED)
def test_streams_change_no_byte(name: str, by_rows: bool) -> None:
    case = replace(named_case(name, 12), flags=PLAIN)
    assert difference(case, all_streamed(case, by_rows), STEPS) == ""
    assert difference(case, compile_model(case.model, case.scheme, passes=Passes(by_rows=by_rows)), STEPS) == ""
    assert difference(case, compile_model(case.model, case.scheme, passes=Passes(depth_first=False)), STEPS) == ""


@given(case=cases())
@settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_streams_of_random_models_change_no_byte(case: Case) -> None:
    for by_rows in (True, False):
        assert difference(case, all_streamed(case, by_rows), STEPS) == ""


def tall(height: int, kernel: int, stride: int, dilation: int) -> Case:
    """A chain whose rows fit badly, with a residual around the kernel in question."""
    net = Net((height, 5, 3), seed=height * 100 + kernel * 10 + stride)
    x = net.conv("input", 8, (3, 3), stride=(2, 1), pads=(1, 1, 1, 1))
    y = net.same(x, kernel, depthwise=True)
    x = net.add(x, net.same(y, 1))
    pad = (kernel - 1) * dilation // 2
    x = net.conv(x, 8, (kernel, 1), stride=(stride, 1), pads=(pad, pad, 0, 0), dilation=(dilation, 1))
    x = net.conv(x, 5, (1, 1))
    graph = net.finish(x, 3)
    return Case(graph, full(net, 8, layers=[graph.nodes[-3].layer]), 1, (0.02, 0.5), PLAIN)


@pytest.mark.parametrize("height", [1, 3, 5, 31, 33])
@pytest.mark.parametrize(("kernel", "stride", "dilation"), [(7, 2, 1), (1, 3, 1), (3, 1, 2), (5, 3, 2), (2, 2, 1)])
def test_streams_at_odd_sizes(height: int, kernel: int, stride: int, dilation: int) -> None:
    case = tall(height, kernel, stride, dilation)
    for by_rows in (True, False):
        assert difference(case, all_streamed(case, by_rows), STEPS) == ""


# --- memory ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMED)
def test_a_stream_is_never_chosen_for_more_memory(name: str) -> None:
    case = named_case(name)
    bounds = [
        compile_model(case.model, case.scheme, passes=p).plan.lower_bound
        for p in (Passes(depth_first=False), Passes(by_rows=False), Passes())
    ]
    assert bounds == sorted(bounds, reverse=True)


def test_rings_hold_what_is_needed_and_no_more() -> None:
    """The window of the reader. What a residual adds lies in the middle of the window of the other way."""
    case = tall(31, 7, 2, 1)
    (node,) = all_streamed(case, by_rows=True).graph.find("depth_first")
    assert isinstance(node.attrs, DepthFirst)
    rings = dict(node.attrs.rings)
    assert rings["input"] == 3
    assert sorted(rings.values()) == [1, 1, 3, 7, 7]


def shortened(graph: Graph, *values: str) -> Graph:
    """The same graph with a row less in some rings of its only stream."""
    (node,) = graph.find("depth_first")
    a = node.attrs
    assert isinstance(a, DepthFirst)
    rings = tuple((v, r - (v in values)) for v, r in a.rings)
    return graph.with_nodes([replace(n, attrs=replace(a, rings=rings)) if n is node else n for n in graph.nodes])


def test_a_ring_that_is_a_row_short_is_caught() -> None:
    graph = all_streamed(tall(31, 7, 2, 1), by_rows=True).graph
    (node,) = graph.find("depth_first")
    assert isinstance(node.attrs, DepthFirst)
    long = [v for v, r in node.attrs.rings if r > 1]
    assert len(long) > 2
    for v in long:
        with pytest.raises(VerifyError, match="no longer in its ring"):
            verify_depth_first(shortened(graph, v))


def test_the_c_needs_every_row_of_its_rings() -> None:
    """The same fault in the C, where nothing checks: other bytes come out."""
    case = tall(31, 7, 2, 1)
    compiled = all_streamed(case, by_rows=True)
    depthwise = compiled.graph.flat().node("conv.1")
    short = shortened(compiled.graph, depthwise["x"])
    assert difference(case, planned(compiled, short), STEPS) != ""


def test_the_image_is_not_kept_when_it_comes_by_rows() -> None:
    case = tall(33, 3, 1, 1)
    rows, image = (compile_model(case.model, case.scheme, passes=Passes(by_rows=b)) for b in (True, False))
    assert feeds(rows.graph) is not None
    assert feeds(image.graph) is None
    assert rows.plan.sizes["input"] < 4 * 5 * 3 + 4
    assert image.plan.sizes["input"] >= 33 * 5 * 3


def test_windows() -> None:
    w = Window(7, 2, 3)
    assert [(w.first(y, 9), w.end(y, 9)) for y in range(5)] == [(0, 4), (0, 6), (1, 8), (3, 9), (5, 9)]


def test_rings_of_a_chain_without_an_image() -> None:
    case = tall(31, 3, 1, 1)
    graph = compile_model(case.model, case.scheme, passes=Passes(depth_first=False)).graph
    nodes = [n for n in graph.nodes if runs_in_rows(graph, n)]
    rows, fed = ring_rows(nodes, graph.values), ring_rows(nodes, graph.values, "input")
    assert rows == {k: v for k, v in fed.items() if k != "input"}


def test_a_graph_with_streams_has_no_file(tmp_path: Path) -> None:
    """Saving says so; a file that claims to hold one is refused like any unknown attribute, not with a traceback."""
    case = tall(9, 3, 1, 1)
    compiled = all_streamed(case, by_rows=True)
    with pytest.raises(UnsupportedError, match="no file form"):
        irfile.save(compiled.graph, tmp_path / "streamed.json")
    assert list(tmp_path.iterdir()) == []
    irfile.save(case.model, tmp_path / "model.json")
    text = (tmp_path / "model.json").read_text()
    (tmp_path / "model.json").write_text(text.replace('"class": "Conv2d"', '"class": "Stream"', 1))
    with pytest.raises(UsageError, match=r"attrs\.class"):
        irfile.load(tmp_path / "model.json")
