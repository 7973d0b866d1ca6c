# SPDX-License-Identifier: Apache-2.0
"""TRAIN -> LOWERED: sums and what rounds them become one node, so that no 32-bit gradient tensor exists.

A rounding stays where it is; only the tensor between two nodes goes away.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from trainlet.ir import Graph, Node, Stage
from trainlet.ops import Conv2dDw, Conv2dDx, FusedDb, FusedDw, FusedDx, RoundGrad, SgdBias, SgdWeight
from trainlet.verify import verify_graph


def _dx(sums: Node, rounding: Node) -> Node:
    assert isinstance(sums.attrs, Conv2dDx)
    assert isinstance(rounding.attrs, RoundGrad)
    inputs = (*sums.inputs, *rounding.inputs[2:])  # after (acc, w_scale)
    attrs = FusedDx(sums.attrs, rounding.attrs)
    return Node("conv2d_dx_round", rounding.name, rounding.layer, inputs, rounding.outputs, attrs, rounding.writes)


def _dw(sums: Node, sgd: Node) -> Node:
    assert isinstance(sums.attrs, Conv2dDw)
    assert isinstance(sgd.attrs, SgdWeight)
    inputs = (*sums.inputs, *sgd.inputs[1:])
    return Node("conv2d_dw_sgd", sgd.name, sgd.layer, inputs, (), FusedDw(sums.attrs, sgd.attrs), sgd.writes)


def _db(sums: Node, sgd: Node) -> Node:
    assert isinstance(sgd.attrs, SgdBias)
    inputs = (*sums.inputs, *sgd.inputs[1:])
    return Node("conv2d_db_sgd", sgd.name, sgd.layer, inputs, (), FusedDb(sgd.attrs), sgd.writes)


_PAIRS: Mapping[tuple[str, str], Callable[[Node, Node], Node]] = {
    ("conv2d_dx", "round_grad"): _dx,
    ("conv2d_dw", "sgd_weight"): _dw,
    ("conv2d_db", "sgd_bias"): _db,
}


def fuse(graph: Graph) -> Graph:
    """Fuses every sum with the one node that reads it; ``graph`` is a verified TRAIN graph of integers."""
    merged: dict[str, Node] = {}
    gone: set[str] = set()
    for node in graph.nodes:
        readers = graph.consumers(node.outputs[0]) if node.outputs else ()
        rule = _PAIRS.get((node.op, readers[0].op)) if len(readers) == 1 else None
        if rule is None:
            continue
        merged[readers[0].name] = rule(node, readers[0])
        gone.add(node.name)
    nodes = [merged.get(n.name, n) for n in graph.nodes if n.name not in gone]
    lowered = graph.with_nodes(nodes, stage=Stage.LOWERED)
    verify_graph(lowered)
    return lowered
