# SPDX-License-Identifier: Apache-2.0
"""What every front end shares: where a model's features are, and the new head."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trainlet.errors import UnsupportedError, UsageError
from trainlet.frontends.limits import check_free
from trainlet.ir import Attrs, Graph, GraphBuilder, Kind, Node, Operands, Value
from trainlet.ops.pool import is_global
from trainlet.ops.roles import heads

MAX_CLASSES = 65535


def features(graph: Graph) -> str:
    """What a classifier sees: the input of the dense layers that the model ends in, else the output of its last global
    average pool. UnsupportedError where it has neither."""
    found = heads(graph)
    last = graph.producer(graph.outputs[0])
    if last is not None and last in found:
        return _below(graph, last, found)
    for node in reversed(graph.nodes):
        if "x" in node.operands and is_global(node, graph.values[node["x"]]):
            return node.output
    raise UnsupportedError(
        f"{graph.name}: it ends in no dense layer and has no global average pool, and a new head takes the place "
        "of the one or is put behind the other; use a model with a classifier"
    )


def _below(graph: Graph, node: Node, dense: list[Node]) -> str:
    """The input of the first of the dense layers of which ``node`` is the last."""
    below = graph.producer(node["x"])
    return _below(graph, below, dense) if below is not None and below in dense else node["x"]


def trunk(graph: Graph) -> tuple[Node, ...]:
    """The nodes that do not depend on the features: the model without its classifier."""
    behind = {features(graph)}
    kept = []
    for node in graph.nodes:
        if behind.isdisjoint(node.inputs):
            kept.append(node)
            continue
        behind.update(node.outputs)
    return tuple(kept)


def _own_head(graph: Graph, classes: int, x: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Weight and bias of the dense layer that the model has behind its features ``x``."""
    own = next((n for n in heads(graph) if n["x"] == x), None)
    if own is None or not all(own[o] in graph.data for o in ("weight", "bias")):
        raise UnsupportedError(
            f"{graph.name}: no trained dense layer follows its features, so there is no head to keep; "
            "start with a new one"
        )
    weight, bias = (graph.data[own[o]].astype(np.float32) for o in ("weight", "bias"))
    if len(bias) != classes:
        raise UsageError(f"{own.layer}: it knows {len(bias)} classes, and {classes} are asked for; start a new one")
    return weight, bias


def attach_head(graph: Graph, classes: int, *, keep: bool = False) -> Graph:
    """Replaces what follows the features by a dense f32 layer ``head`` with ``classes`` outputs (1..65535).

    ``head.weight`` [classes, n] has no data: a session draws it from its seed; ``head.bias`` starts at 0. With ``keep``
    both start from the dense layer that the model brings; UnsupportedError where it brings none, UsageError where that
    has another number of classes. The output is ``logits`` (classes,) f32."""
    if isinstance(classes, bool) or not isinstance(classes, int) or not 1 <= classes <= MAX_CLASSES:
        raise UsageError(f"head: {classes!r} classes; give a whole number from 1 to {MAX_CLASSES}")
    nodes = trunk(graph)
    x = features(graph)
    start, bias_start = _own_head(graph, classes, x) if keep else (None, np.zeros(classes, np.float32))
    base = graph.with_interface(outputs=(x,)).with_nodes(nodes)
    check_free(base, ("head.weight", "head.bias", "logits"))
    g = GraphBuilder(graph.name, base)
    g.nodes.extend(nodes)
    size = base.values[x].size
    fan_in = size if start is None else None
    weight = g.add(Value("head.weight", (classes, size), "f32", Kind.STATE, fan_in=fan_in), start)
    bias = g.add(Value("head.bias", (classes,), "f32", Kind.STATE), bias_start)
    node = Node("dense", "head", "head", Operands(x=x, weight=weight, bias=bias), ("logits",), Attrs())
    g.emit(node, Value("logits", (classes,), "f32"))
    return g.build(graph.stage, ("logits",))
