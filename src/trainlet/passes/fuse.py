# SPDX-License-Identifier: Apache-2.0
"""TRAIN -> LOWERED: sums and what rounds them become one node, so that no 32-bit gradient tensor exists.

A rounding stays where it is; only the tensor between two nodes goes away.
"""

from __future__ import annotations

from collections.abc import Sequence

from trainlet.ir import Graph, Node, Stage
from trainlet.ops import OPS
from trainlet.ops.op import Fusion
from trainlet.verify import verify_graph


def fuse(graph: Graph) -> Graph:
    """Fuses every sum with the one node that reads it. ``graph`` is a verified TRAIN graph of integers, or a LOWERED
    one that still has such pairs. The fused node runs in the place of the sum, so that a gradient is read for the last
    time as early as it was, or else in that of its reader. A pair stays two nodes where the schedule lets it be in
    neither: where a weight changes between the two."""
    nodes = list(graph.nodes)
    for first in graph.nodes:
        readers = graph.consumers(first.outputs[0]) if len(first.outputs) == 1 else ()
        rule = _fusion(graph, first, readers[0]) if len(readers) == 1 else None
        if rule is not None:
            nodes = _merged(nodes, first, readers[0], rule.make(first, readers[0]))
    lowered = graph.with_nodes(nodes, stage=Stage.LOWERED)
    verify_graph(lowered)
    return lowered


def _fusion(graph: Graph, first: Node, reader: Node) -> Fusion | None:
    """How the two become one, if ``reader`` reads what ``first`` makes there and nowhere else."""
    made = first.output
    if made in graph.interface.made or reader.inputs.count(made) != 1:
        return None
    rules = OPS[first.op].fusions
    return next((f for f in rules if f.into == reader.op and reader.all(f.operand) == (made,)), None)


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
    refusal = any(OPS[n.op].refuses for n in others)
    return made.isdisjoint(node.inputs) and read.isdisjoint(node.writes) and not (node.writes and refusal)


def _may_run_behind(node: Node, others: Sequence[Node]) -> bool:
    """Whether the others change no state that ``node`` reads; what it makes they do not read."""
    return {v for n in others for v in n.writes}.isdisjoint(node.inputs)
