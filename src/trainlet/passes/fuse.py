# SPDX-License-Identifier: Apache-2.0
"""TRAIN -> LOWERED: sums and what rounds them become one node, so that no 32-bit gradient tensor exists.

A rounding stays where it is; only the tensor between two nodes goes away.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from trainlet.attrs import Conv2dDw, Conv2dDx, FusedDb, FusedDw, FusedDx, RoundGrad, SgdBias, SgdWeight
from trainlet.ir.graph import Graph, Node, Stage
from trainlet.verify import verify_graph
from trainlet.verify.graph import REFUSES


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
    """Fuses every sum with the one node that reads it. ``graph`` is a verified TRAIN graph of integers, or a LOWERED
    one that still has such pairs. The fused node runs in the place of the sum, so that a gradient is read for the last
    time as early as it was, or else in that of its reader. A pair stays two nodes where the schedule lets it be in
    neither: where a weight changes between the two."""
    nodes = list(graph.nodes)
    for first in graph.nodes:
        readers = graph.consumers(first.outputs[0]) if first.outputs else ()
        rule = _PAIRS.get((first.op, readers[0].op)) if len(readers) == 1 else None
        if rule is not None:
            nodes = _merged(nodes, first, readers[0], rule(first, readers[0]))
    lowered = graph.with_nodes(nodes, stage=Stage.LOWERED)
    verify_graph(lowered)
    return lowered


def _merged(nodes: list[Node], first: Node, second: Node, both: Node) -> list[Node]:
    """``nodes`` with ``both`` in the place of ``first`` or ``second``, if it may be in one of them."""
    i, j = nodes.index(first), nodes.index(second)
    between = nodes[i + 1 : j]
    if _may_run_before(both, between):
        return [*nodes[:i], both, *between, *nodes[j + 1 :]]
    if _may_run_behind(both, between):
        return [*nodes[:i], *between, both, *nodes[j + 1 :]]
    return nodes


def _may_run_before(node: Node, others: Sequence[Node]) -> bool:
    """Whether ``node`` reads nothing that the others make, changes no state that they read, and changes none before
    one of them that may refuse the step."""
    made = {v for n in others for v in n.outputs}
    read = {v for n in others for v in n.inputs}
    refusal = any(n.op in REFUSES for n in others)
    return made.isdisjoint(node.inputs) and read.isdisjoint(node.writes) and not (node.writes and refusal)


def _may_run_behind(node: Node, others: Sequence[Node]) -> bool:
    """Whether the others change no state that ``node`` reads; what it makes they do not read."""
    return {v for n in others for v in n.writes}.isdisjoint(node.inputs)
