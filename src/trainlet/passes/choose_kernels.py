# SPDX-License-Identifier: Apache-2.0
"""Chooses the C that runs each node: the first kernel of its operator's row that applies to the node and the target.
Scratch, the form of weights and whether it may write over an input follow from that name."""

from __future__ import annotations

from dataclasses import replace

from trainlet.errors import UnsupportedError
from trainlet.ir import Graph, Node
from trainlet.ops.op import Core
from trainlet.ops.registry import choose_kernel


def choose_kernels(graph: Graph, target: Core) -> Graph:
    """The nodes of a LOWERED graph with their kernels. UnsupportedError naming the layer where none applies."""
    return graph.with_nodes(replace(n, kernel=_chosen(graph, n, target)) for n in graph.nodes)


def _chosen(graph: Graph, node: Node, target: Core) -> str:
    kernel = choose_kernel(graph, node, target)
    if kernel is None:
        raise UnsupportedError(f"{node.layer}: no kernel for {node.op!r} on {target.core}; choose another target")
    return kernel.name
