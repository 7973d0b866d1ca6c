# SPDX-License-Identifier: Apache-2.0
"""The five parts of a step, in their order; each becomes one function of the emitted model."""

from __future__ import annotations

from dataclasses import dataclass

from trainlet.ir import Graph, Node
from trainlet.ops import OPS
from trainlet.plan.prefix import prefix_length


@dataclass(frozen=True, slots=True)
class Sections:
    """``prefix`` depends on the image and constants alone; ``forward`` goes on to what the model gives; ``gradient`` is
    all up to the last node that may refuse the step, and changes no state; ``head`` updates what trains in reals, even
    where the gradient is all zero; ``backward`` is the rest, in integers."""

    prefix: tuple[Node, ...]
    forward: tuple[Node, ...]
    gradient: tuple[Node, ...]
    head: tuple[Node, ...]
    backward: tuple[Node, ...]


def sections(graph: Graph) -> Sections:
    """The parts of a TRAIN or LOWERED graph, or of one for inference alone, which has the first two."""
    nodes = graph.nodes
    given = 1 + max(i for i, n in enumerate(nodes) if graph.outputs[0] in n.outputs)
    cut = min(prefix_length(graph), given - 1)
    refused = 1 + max((i for i, n in enumerate(nodes) if OPS[n.op].refuses), default=given - 1)
    rest = nodes[refused:]
    head = tuple(n for n in rest if not _in_integers(graph, n))
    return Sections(nodes[:cut], nodes[cut:given], nodes[given:refused], head, tuple(n for n in rest if n not in head))


def _in_integers(graph: Graph, node: Node) -> bool:
    """Whether a node behind the loss works on integer gradients."""
    return any(graph.values[v].exponent is not None for v in node.inputs)
