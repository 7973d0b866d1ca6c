# SPDX-License-Identifier: Apache-2.0
"""What every front end of quantized models shares: dead channels, the limits of import, and the new head."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from trainlet.attrs import Attrs, AvgPool
from trainlet.errors import UnsupportedError, UsageError
from trainlet.frontends.limits import check_free
from trainlet.ir.graph import Graph, GraphBuilder, Kind, Node, Value

DEAD_RATIO = 2.0**-16  # a channel whose scale is below this share of the layer's largest has no usable scale
MAX_BIAS = 1 << 30
MAX_CLASSES = 65535


def canonicalize_dead(
    w: NDArray[np.int8], b: NDArray[np.int32], scale: NDArray[np.float32]
) -> tuple[NDArray[np.int8], NDArray[np.int32], NDArray[np.float32], tuple[int, ...]]:
    """Gives dead output channels (s_w[o] < 2^-16 max(s_w)) zero weights, the layer's largest scale and a bias of the
    same real value, rounded. ``w`` has output channels first; ``scale`` is finite and > 0. Returns the new arrays (the
    given ones where nothing is dead) and the dead channels, ascending."""
    wide = scale.astype(np.float64)
    largest = wide.max()
    dead = np.flatnonzero(wide < DEAD_RATIO * largest)
    if not dead.size:
        return w, b, scale, ()
    w, b, scale = w.copy(), b.copy(), scale.copy()
    w[dead] = 0
    b[dead] = np.floor(b[dead] * wide[dead] / largest + 0.5).astype(np.int32)
    scale[dead] = np.float32(largest)
    return w, b, scale, tuple(int(o) for o in dead)


def check_sums(layer: str, b: NDArray[np.int32], fan_in: int) -> None:
    """Raises UnsupportedError where the 32-bit sums of a convolution could overflow; ``b`` after
    ``canonicalize_dead``, ``fan_in`` = C_in/groups kh kw."""
    worst = int(np.abs(b.astype(np.int64)).max())
    if worst > MAX_BIAS:
        raise UnsupportedError(
            f"{layer}: a bias of {worst} is above the limit of 2^30, so its 32-bit sums could overflow; "
            "quantize the model again with a larger weight scale for that channel"
        )
    if 127 * 255 * fan_in + MAX_BIAS >= 1 << 31:
        limit = ((1 << 31) - 1 - MAX_BIAS) // (127 * 255)
        raise UnsupportedError(
            f"{layer}: each output sums {fan_in} products, more than the {limit} that fit 32 bits; "
            "split the layer or use groups"
        )


def feature_pool(graph: Graph) -> Node:
    """The last global average pool: its output is what a classifier sees. UnsupportedError if there is none."""
    for node in reversed(graph.find("avg_pool")):
        a, x = node.attrs, graph.values[node.inputs[0]]
        assert isinstance(a, AvgPool)
        if a.kernel == x.shape[:2] and not any(a.pads):
            return node
    raise UnsupportedError(
        f"{graph.name}: no global average pool was found, and a new head is put behind one; "
        "use a model that ends in a global average pool and a classifier"
    )


def trunk(graph: Graph) -> tuple[Node, ...]:
    """The nodes that do not depend on the pooled features, and the pool itself: the model without its classifier."""
    pool = feature_pool(graph)
    behind = set(pool.outputs)
    kept = []
    for node in graph.nodes:
        if behind.isdisjoint(node.inputs):
            kept.append(node)
            continue
        behind.update(node.outputs)
    return tuple(kept)


def _own_head(graph: Graph, classes: int, features: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Weight and bias of the dense layer that the model has behind its pooled ``features``."""
    own = next((n for n in graph.find("dense") if n.inputs[0] == features), None)
    if own is None or not all(n in graph.data for n in own.inputs[1:]):
        raise UnsupportedError(
            f"{graph.name}: no trained dense layer follows its pooled features, so there is no head to keep; "
            "start with a new one"
        )
    weight, bias = (graph.data[n].astype(np.float32) for n in own.inputs[1:])
    if len(bias) != classes:
        raise UsageError(f"{own.layer}: it knows {len(bias)} classes, and {classes} are asked for; start a new one")
    return weight, bias


def attach_head(graph: Graph, classes: int, *, keep: bool = False) -> Graph:
    """Replaces what follows the global average pool by a dense f32 layer ``head`` with ``classes`` outputs (1..65535).

    ``head.weight`` [classes, C] has no data: a session draws it from its seed; ``head.bias`` starts at 0. With ``keep``
    both start from the dense layer that the model brings; UnsupportedError where it brings none, UsageError where that
    has another number of classes. The output is ``logits`` (classes,) f32."""
    if isinstance(classes, bool) or not isinstance(classes, int) or not 1 <= classes <= MAX_CLASSES:
        raise UsageError(f"head: {classes!r} classes; give a whole number from 1 to {MAX_CLASSES}")
    nodes = trunk(graph)
    features = feature_pool(graph).outputs[0]
    start, bias_start = _own_head(graph, classes, features) if keep else (None, np.zeros(classes, np.float32))
    base = replace(graph, outputs=(features,)).with_nodes(nodes)
    check_free(base, ("head.weight", "head.bias", "logits"))
    g = GraphBuilder(graph.name, base)
    g.nodes.extend(nodes)
    weight = g.add(Value("head.weight", (classes, base.values[features].size), "f32", Kind.STATE), start)
    bias = g.add(Value("head.bias", (classes,), "f32", Kind.STATE), bias_start)
    node = Node("dense", "head", "head", (features, weight, bias), ("logits",), Attrs())
    g.emit(node, Value("logits", (classes,), "f32"))
    return g.build(graph.stage, ("logits",))
