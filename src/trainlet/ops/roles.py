# SPDX-License-Identifier: Apache-2.0
"""The parts that nodes play in a graph, by what their rows say."""

from __future__ import annotations

from trainlet.ir import Graph, Node
from trainlet.ops.op import Exponent, No
from trainlet.ops.registry import OPS


def heads(graph: Graph) -> list[Node]:
    """Nodes whose parameters train in every step, in order."""
    return [n for n in graph.nodes if any(p.always for p in OPS[n.op].params)]


def head_of(graph: Graph) -> Node:
    """The one head of a graph that has one."""
    (head,) = heads(graph)
    return head


def loss_of(graph: Graph) -> Node | None:
    """The node that makes the loss; None where there is no training step."""
    return next((n for n in graph.nodes if not isinstance(OPS[n.op].loss, No)), None)


def trains(node: Node, operand: str) -> bool:
    """Whether a scheme may train that parameter of a node."""
    return any(p.operand == operand and not p.always for p in OPS[node.op].params)


def is_trainable(node: Node) -> bool:
    """Whether a scheme may name the node's layer."""
    return any(not p.always for p in OPS[node.op].params)


def enters(node: Node) -> bool:
    """Whether gradients enter the integers here: it sets the anchor of all exponents, and may refuse the step."""
    row = OPS[node.op]
    return row.refuses and row.exponent is Exponent.OWN
