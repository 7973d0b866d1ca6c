# SPDX-License-Identifier: Apache-2.0
"""Lets nodes write over an input that nothing reads later: additions, masks, and depthwise convolutions with their
input gradients, whose kernels keep the few rows that are still needed aside. Two wide tensors become one.
"""

from __future__ import annotations

from dataclasses import replace

from trainlet.ir import Graph, Kind, Node
from trainlet.ops import registry, sums_biases
from trainlet.verify import verify_graph


def inplace(graph: Graph) -> Graph:
    """Marks the nodes of a LOWERED graph that overwrite an input. Bias updates that read a gradient which its layer's
    depthwise input gradient could overwrite move in front of that: they touch nothing that it reads."""
    graph = graph.with_nodes(_biases_first(graph))
    nodes: list[Node] = []
    for i, node in enumerate(graph.nodes):
        gone = next((v for v in overwritable(graph, node) if _dies(graph, v, i)), "")
        nodes.append(replace(node, overwrites=gone))
    done = graph.with_nodes(nodes)
    verify_graph(done)
    return done


def overwritable(graph: Graph, node: Node) -> tuple[str, ...]:
    """The inputs that the node's kernel may write over: activations of the output's shape and type."""
    if len(node.outputs) != 1:
        return ()
    y = graph.values[node.output]
    ins = [graph.values[v] for v in registry.overwritable(node)]
    return tuple(v.name for v in ins if v.kind is Kind.ACTIVATION and (v.shape, v.dtype) == (y.shape, y.dtype))


def _dies(graph: Graph, value: str, at: int) -> bool:
    """Whether node ``at`` reads ``value`` once, and nothing reads it later."""
    later = [n for n in graph.nodes[at + 1 :] if value in n.inputs]
    return not later and graph.nodes[at].inputs.count(value) == 1 and value not in graph.interface.made


def _biases_first(graph: Graph) -> list[Node]:
    nodes = list(graph.nodes)
    for node in graph.nodes:
        if "g" not in node.operands or node["g"] not in overwritable(graph, node):
            continue
        at = nodes.index(node)
        later = [n for n in nodes[at + 1 :] if node["g"] in n.inputs]
        if all(sums_biases(n) and not n.outputs for n in later):
            nodes = [*nodes[:at], *later, node, *(n for n in nodes[at + 1 :] if n not in later)]
    return nodes
