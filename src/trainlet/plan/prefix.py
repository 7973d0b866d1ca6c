# SPDX-License-Identifier: Apache-2.0
"""The frozen prefix: what of a step depends on the image and on constants alone."""

from __future__ import annotations

from trainlet.ir import Graph, Kind


def prefix_length(graph: Graph) -> int:
    """How many leading nodes depend on the image and on constants alone."""
    for i, n in enumerate(graph.nodes):
        touched = [graph.values[v] for v in (*n.inputs, *n.writes)]
        if any(v.kind is Kind.STATE or (v.kind is Kind.INPUT and v.name not in graph.inputs) for v in touched):
            return i
    return len(graph.nodes)


def prefix_values(graph: Graph) -> tuple[str, ...]:
    """What the frozen prefix leaves in the arena for the rest, in the order it was made; () without a prefix."""
    length = prefix_length(graph)
    made = [name for n in graph.nodes[:length] for name in n.outputs]
    read = {name for n in graph.nodes[length:] for name in n.inputs}
    return tuple(v for v in (*graph.inputs[:1], *made) if v in read) if length else ()
