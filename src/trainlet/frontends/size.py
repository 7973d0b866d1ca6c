# SPDX-License-Identifier: Apache-2.0
"""The same model for images of another size."""

from __future__ import annotations

from dataclasses import replace

from trainlet.errors import UnsupportedError, UsageError
from trainlet.frontends.limits import MAX_SIDE, check_limits
from trainlet.ir import Graph, Node, Value
from trainlet.ops import OPS, AvgPool, RuleError
from trainlet.ops.pool import is_global
from trainlet.verify import verify_graph


def at_size(graph: Graph, height: int, width: int) -> Graph:
    """``graph`` (FLOAT or INT8) for images of height x width pixels. Convolutions stay as they are, a global pool pools
    whatever arrives. UsageError, naming the layer, where the image is too small or too large for it."""
    image = graph.image
    if min(height, width) < 1:
        raise UsageError(f"--size {height}x{width}: an image has at least one pixel; give sizes from 1 on")
    if max(height, width) > MAX_SIDE:
        raise UsageError(f"--size {height}x{width}: at most {MAX_SIDE} are possible; give a smaller size")
    values = {**graph.values, image.name: replace(image, shape=(height, width, image.shape[2]))}
    nodes = []
    for node in graph.nodes:
        node = _pooling_all(graph, node, values)
        try:
            types = OPS[node.op].rule(node, node.bind(values))
        except RuleError as e:
            raise UsageError(f"--size {height}x{width}: {node.layer}: {e}; give a larger size") from None
        values |= {v: replace(values[v], shape=shape) for v, (shape, _) in zip(node.outputs, types, strict=True)}
        nodes.append(node)
    sized = replace(graph, values=values, nodes=tuple(nodes))
    try:
        verify_graph(sized)
        check_limits(sized)
    except UnsupportedError as e:
        raise UsageError(f"--size {height}x{width}: {e}; give a smaller size") from None
    return sized


def _pooling_all(graph: Graph, node: Node, values: dict[str, Value]) -> Node:
    """A global pool, made to fit what it gets now."""
    a = node.attrs
    if not isinstance(a, AvgPool) or not is_global(node, graph.values[node["x"]]):
        return node
    h, w, _ = values[node["x"]].shape
    return replace(node, attrs=replace(a, kernel=(h, w)))
