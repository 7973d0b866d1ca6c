# SPDX-License-Identifier: Apache-2.0
"""A fact of a row that is wrong is caught, whichever fact it is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import registry_checks as checks
from graphs import int8_chain
from ops.family import graph_with, in_reals, trained
from random_nets import Case, Net
from test_exact import difference

from trainlet.autodiff.scheme import resolve
from trainlet.autodiff.walk import differentiate
from trainlet.compiler import Passes, compile_model, plan_model
from trainlet.errors import TrainletError
from trainlet.ir import DepthFirst, Graph, Stage
from trainlet.ops import OPS, No, Window
from trainlet.ops.op import Kernel, Move, Overwrites
from trainlet.passes.fuse import fuse
from trainlet.verify import VerifyError, verify_graph

NONE = No("planted: the fact is gone")


def case() -> Case:
    """Every kind of layer: a convolution, an overlapping maximum, a depthwise one, an addition."""
    net = Net((9, 7, 3), 4)
    x = net.conv(net.input, 4, (3, 3), activation=True)
    x = net.max_pool(x, (3, 3), (1, 1), (1, 1, 1, 1))
    return trained(net, net.add(x, net.same(x, 3, depthwise=True, activation=True)), ratio=0.5)


def plant(monkeypatch: pytest.MonkeyPatch, op: str, **facts: Any) -> None:
    """The row with other facts."""
    monkeypatch.setitem(OPS, op, replace(OPS[op], **facts))


@pytest.mark.parametrize("op", ["max_pool", "conv2d", "max_pool_winners"])
def test_rows_forgotten(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = graph_with(case(), op)
    plant(monkeypatch, op, rows=lambda attrs: Window(1, 1, 0))
    assert [f for n in graph.find(op) for f in checks.wrong_rows(graph, n)]


@pytest.mark.parametrize(
    ("op", "facts", "rule"),
    [
        ("max_pool_dx", {"exponent": OPS["enter_grad"].exponent}, "its own exponent slot"),
        ("add", {"overwrites": NONE}, "cannot write over"),
        ("add", {"stages": (Stage.FLOAT, Stage.INT8)}, "belongs to stage"),
        ("dense_sgd", {"refuses": True}, "may refuse the step"),
        ("add", {"rows": NONE}, "does not run by rows"),
    ],
    ids=["exponent", "overwrites", "stages", "refuses", "no rows"],
)
def test_verification_sees(op: str, facts: dict[str, Any], rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = _graph_for(op, facts)
    verify_graph(made)
    plant(monkeypatch, op, **facts)
    with pytest.raises(VerifyError, match=rule):
        verify_graph(made)


def _graph_for(op: str, facts: dict[str, Any]) -> Graph:
    if "overwrites" in facts:
        return plan_model(_fit(op).model, _fit(op).scheme, passes=Passes(depth_first=False)).graph
    if "rows" in facts:
        return plan_model(_fit(op).model, _fit(op).scheme).graph
    if "refuses" in facts:
        graph = differentiate(int8_chain(), resolve("full", int8_chain()))
        (sgd,) = graph.find("dense_sgd")
        updates = [n for n in graph.nodes if n.writes and n is not sgd]
        rest = [n for n in graph.nodes if n is not sgd]
        at = rest.index(updates[-1])
        return graph.with_nodes([*rest[: at + 1], sgd, *rest[at + 1 :]])
    return graph_with(case(), op) if op != "add" else differentiate(case().model, case().scheme)


def _fit(op: str) -> Case:
    net = Net((33, 33, 3), 4)
    x = net.conv(net.input, 16, (3, 3), activation=True)
    if op == "add":
        y = net.same(x, 1)
        net.layers = []
        return trained(net, net.conv(net.add(x, y), 4, (3, 3), stride=(4, 4)))
    return trained(net, net.same(net.add(net.same(x), x), 1, activation=True))


def test_a_gradient_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that says less than it should: the maximum hands its gradient on as it is, or an addition half of it."""
    plant(monkeypatch, "add", vjp=lambda tape, node, g: tape.reach(node, "a", Move(g)))
    assert _wrong(case())


def test_a_parameter_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, "conv2d", params=OPS["conv2d"].params[:1])
    with pytest.raises((TrainletError, ValueError)):
        differentiate(case().model, case().scheme)


def _wrong(c: Case) -> list[str]:
    try:
        return checks.wrong_gradients(c)
    except TrainletError as e:
        return [str(e)]


def test_a_fusion_of_any_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of a maximum pool are no convolution's: a fusion that pairs them by the operators' names is refused."""
    (dx,) = OPS["conv2d_dx"].fusions
    plant(monkeypatch, "max_pool_dx", fusions=(dx,))
    with pytest.raises((TrainletError, AssertionError)):
        fuse(differentiate(case().model, case().scheme))


def _with_kernel(op: str, name: str, **facts: Any) -> tuple[Kernel, ...]:
    kernels = OPS[op].kernels
    assert not isinstance(kernels, No)
    return tuple(replace(k, **facts) if k.name == name else k for k in kernels)


def test_a_kernel_where_it_must_not_apply(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, "conv2d", kernels=_with_kernel("conv2d", "tl_depthwise_s8", applies=lambda *_: True))
    net = Net((5, 5, 4), 4)
    general = trained(net, net.conv(net.input, 4, (3, 3)))
    assert difference(general, compile_model(general.model, general.scheme), steps=1)


def test_scratch_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    from trainlet.ops.registry import KERNELS

    small = replace(KERNELS["tl_conv2d_s8.packed"], scratch=lambda graph, node: 4)
    graph = plan_model(_fit("add").model, _fit("add").scheme).graph.flat()
    monkeypatch.setitem(KERNELS, small.name, small)
    assert [f for n in graph.nodes for f in checks.wrong_scratch(graph, n)]


def test_a_third_map_in_a_depth_first_run() -> None:
    """C makes a row from two maps at most; a node with three is refused and nothing is dropped."""
    graph = plan_model(_fit("add").model, _fit("add").scheme).graph
    (run,) = (n for n in graph.nodes if isinstance(n.attrs, DepthFirst) and any(i.op == "add" for i in n.attrs.nodes))
    add = next(i for i in run.attrs.nodes if i.op == "add")
    with pytest.MonkeyPatch.context() as m:
        m.setitem(OPS, "add", replace(OPS["add"], operands=OPS["conv2d"].operands[:0] + _three()))
        third = add.reading(c=add["a"])
        nodes = tuple(third if i is add else i for i in run.attrs.nodes)
        changed = replace(run, attrs=replace(run.attrs, nodes=nodes))
        with pytest.raises(VerifyError, match="at most 2 maps"):
            verify_graph(graph.with_nodes([changed if n is run else n for n in graph.nodes]))


def _three() -> tuple[Any, ...]:
    from trainlet.ops.op import operands

    return operands("a", "b", "c")


def test_the_model_of_these_tests_is_sound() -> None:
    assert checks.wrong_gradients(case()) == []
    assert in_reals(case().model).stage is Stage.FLOAT
    assert isinstance(OPS["mask_grad"].overwrites, Overwrites)
