# SPDX-License-Identifier: Apache-2.0
"""What a family of operators brings for the tests drawn from the registry: a strategy of small models with all of its
operators in them, or in their training steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from hypothesis import strategies as st
from random_nets import Case, Net, full

from trainlet.autodiff.walk import differentiate
from trainlet.compiler import plan_model
from trainlet.ir import Array, DepthFirst, Graph, Node, Operands, Stage, Value
from trainlet.ops import OPS
from trainlet.passes.fuse import fuse

SIDES = (1, 3, 5, 31, 33)
sides = st.sampled_from(SIDES)
seeds = st.integers(0, 2**16)
pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


@dataclass(frozen=True)
class Family:
    """``models`` draws cases whose model or step holds every one of ``operators``."""

    models: st.SearchStrategy[Case]
    operators: tuple[str, ...]


@st.composite
def nets(draw: st.DrawFn, channels: int = 3) -> Net:
    """The begin of a model: an image of odd sides and the first convolution, which has as many outputs as the image."""
    return Net((draw(sides), draw(sides), channels), draw(seeds))


def trained(net: Net, x: str, ratio: float = 1.0, bits: int = 12) -> Case:
    """The model that ends in ``x``, a global pool and a head of 4 classes, with all of its layers trained."""
    return Case(net.finish(x, 4), full(net, bits, ratio))


def _whole(case: Case) -> Graph:
    return plan_model(case.model, case.scheme).graph


_GRAPHS: dict[Stage, Callable[[Case], Graph]] = {
    Stage.INT8: lambda case: case.model,
    Stage.TRAIN: lambda case: differentiate(case.model, case.scheme),
    Stage.LOWERED: lambda case: fuse(differentiate(case.model, case.scheme)),
}


def graph_with(case: Case, op: str) -> Graph:
    """The case's graph of the first stage that admits the operator."""
    row = OPS[op]
    if row.attrs is DepthFirst:
        return _whole(case)
    return next(make(case) for stage, make in _GRAPHS.items() if stage in row.stages)


def in_reals(model: Graph) -> Graph:
    """A model in integers as the model in reals that it stands for, with the same layers."""
    data: dict[str, Array] = dict(model.data)
    for node in model.nodes:
        if "scale" not in node.operands:
            continue
        x = model.values[node["x"]].q
        assert x is not None
        scale = model.data[node["scale"]].astype(np.float64)
        weight, bias = model.data[node["weight"]], model.data[node["bias"]]
        data[node["weight"]] = (weight * scale.reshape(-1, *[1] * (weight.ndim - 1))).astype(np.float32)
        data[node["bias"]] = (bias * scale * x.scale).astype(np.float32)
    values = {k: _real(v) for k, v in model.values.items()}
    return replace(model, values=values, data=data).with_nodes(
        [_node_in_reals(model, n) for n in model.nodes], stage=Stage.FLOAT
    )


def _real(v: Value) -> Value:
    return replace(v, dtype="f32", q=None)


def _node_in_reals(model: Graph, node: Node) -> Node:
    attrs, y = node.attrs, model.values[node.output].q
    operands = Operands(**{k: v for k, v in node.operands.items() if k != "scale"})
    if not hasattr(attrs, "clamp"):
        return replace(node, operands=operands)
    assert y is not None
    bounds = tuple((c - y.zero) * y.scale for c in attrs.clamp)
    clamp = (max(bounds[0], 0.0), bounds[1]) if attrs.activation else None
    return replace(node, operands=operands, attrs=replace(attrs, clamp=clamp))
