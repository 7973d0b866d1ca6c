# SPDX-License-Identifier: Apache-2.0
"""Memory plan: from the lifetimes of a schedule to offsets in one arena. Returns data only.

Best fit over several orders, each improved by moving what ends highest to its front; the smallest arena wins. The lower
bound is the largest sum of what lives at once: no plan of this schedule can be smaller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from trainlet import scratch
from trainlet.attrs import Conv2d, Conv2dDw, Conv2dDx, FusedDw, FusedDx, SgdWeight, Stream
from trainlet.ir.graph import Graph, Kind, Node, Value
from trainlet.ops import conv_out_hw

ALIGNMENT = 4


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes from the start of the arena. ``offsets`` and ``sizes`` by value, scratch by node; ``lower_bound`` is what
    lives at once at the worst node, ``peak`` that node's index."""

    offsets: Mapping[str, int]
    sizes: Mapping[str, int]
    scratch_offsets: Mapping[str, int]
    scratch_sizes: Mapping[str, int]
    arena_bytes: int
    lower_bound: int
    peak: int


@dataclass(frozen=True, slots=True)
class Block:
    """A buffer and the nodes at which it exists: ``first`` to ``last``, both included."""

    name: str
    size: int
    first: int
    last: int
    scratch: bool = False


def aligned(n: int) -> int:
    """``n`` bytes, rounded up to whole words."""
    return (n + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


# --- scratch of a node ----------------------------------------------------------------------------------------


def geometry(graph: Graph, node: Node) -> tuple[Conv2d, tuple[int, int, int], tuple[int, int, int]]:
    """(conv, (H, W, C) of its input, (H, W, C) of its output) of a forward, input gradient or weight gradient node.
    That of a weight gradient is the layer's, though only some channels of its input are kept."""
    a = node.attrs
    v = graph.values
    dx = a.dx if isinstance(a, FusedDx) else a
    if isinstance(dx, Conv2dDx):
        h, w = dx.in_hw
        shape = v[node.inputs[1]].shape
        return dx.conv, (h, w, shape[3] * dx.conv.groups), (*conv_out_hw(dx.conv, h, w), shape[0])
    if isinstance(a, Conv2dDw):
        return geometry(graph, weight_update(graph, node))
    if isinstance(a, FusedDw | SgdWeight):
        layer = next(n for n in graph.find("conv2d") if node.writes[0] in n.inputs)
        return geometry(graph, layer)
    assert isinstance(a, Conv2d)
    x, y = v[node.inputs[0]].shape, v[node.outputs[0]].shape
    return a, (x[0], x[1], x[2]), (y[0], y[1], y[2])


def weight_update(graph: Graph, node: Node) -> Node:
    """The update that a weight gradient is for; it knows the layer, and which channels are kept."""
    return next(n for n in graph.consumers(node.outputs[0]) if n.op == "sgd_weight")


def _conv(graph: Graph, node: Node) -> int:
    a, x, y = geometry(graph, node)
    if ready_weights(graph, node):
        return scratch.conv2d_packed_scratch(*x, *y, *a.kernel, a.groups, 0)
    table = _DEPTHWISE if a.depthwise else _GENERAL
    ring = scratch.depthwise_ring(x[1], (a.kernel[0] - 1) * a.dilation[0] + 1) if node.overwrites else 0
    return table[node.op](*x, *y, *a.kernel, a.groups, _kept(node)) + ring


def ready_weights(graph: Graph, node: Node) -> bool:
    """Whether the weights lie in flash as the general forward kernel takes them: where nothing else reads them."""
    general = node.op == "conv2d" and isinstance(node.attrs, Conv2d) and not node.attrs.depthwise
    return general and len(node.inputs) == 4 and len(graph.consumers(node.inputs[1])) == 1


def _kept(node: Node) -> int:
    return node.attrs.dw.kept if isinstance(node.attrs, FusedDw) else 0


_GENERAL: Mapping[str, Callable[..., int]] = {
    "conv2d": scratch.conv2d_scratch,
    "conv2d_dx_round": scratch.conv2d_dx_scratch,
    "conv2d_dw_sgd": scratch.conv2d_dw_scratch,
}
_DEPTHWISE: Mapping[str, Callable[..., int]] = {
    "conv2d": scratch.depthwise_scratch,
    "conv2d_dx_round": scratch.depthwise_dx_scratch,
    "conv2d_dw_sgd": scratch.depthwise_dw_scratch,
}


def _channels(graph: Graph, node: Node) -> int:
    return 4 * graph.values[node.inputs[0]].shape[-1]


SCRATCH: Mapping[str, Callable[[Graph, Node], int]] = {
    "conv2d": _conv,
    "conv2d_dx_round": _conv,
    "conv2d_dw_sgd": _conv,
    "conv2d_db_sgd": _channels,
    "avg_pool": _channels,
}
"""Scratch in bytes of the operators that need some; the figures are the kernels' own (csrc/kernels/tl.h)."""


def stream_counters(node: Node) -> int:
    """Bytes at the beginning of a stream's scratch: how many rows there are, 16 bits for each node."""
    assert isinstance(node.attrs, Stream)
    return aligned(2 * len(node.attrs.nodes))


def node_scratch(graph: Graph, node: Node) -> int:
    """Scratch of a node in bytes. That of a stream holds its counters and serves its nodes one after the other;
    ``graph`` is flat."""
    if isinstance(node.attrs, Stream):
        return stream_counters(node) + max(node_scratch(graph, n) for n in node.attrs.nodes)
    return aligned(SCRATCH[node.op](graph, node)) if node.op in SCRATCH else 0


# --- lifetimes --------------------------------------------------------------------------------------------------


def in_arena(v: Value) -> bool:
    """Whether a value lies in the arena: activations and the image; label and lr are arguments."""
    return v.kind is Kind.ACTIVATION or (v.kind is Kind.INPUT and len(v.shape) == 3)


def rows_bytes(v: Value, rows: int) -> int:
    """Bytes of so many rows of a tensor (H, W, C)."""
    return v.nbytes // v.shape[0] * rows


def lifetimes(graph: Graph) -> list[Block]:
    """All buffers of the arena. Inputs exist from node -1, outputs of the graph to the end; the rings of a stream while
    it runs, and where it reads the image row by row also while that is delivered."""
    first = {name: i for i, n in enumerate(graph.nodes) for name in n.outputs}
    last = dict(first)
    for i, n in enumerate(graph.nodes):
        last.update(dict.fromkeys(n.inputs, i))
    last.update(dict.fromkeys(graph.outputs, len(graph.nodes)))
    streams = [(i, n.attrs) for i, n in enumerate(graph.nodes) if isinstance(n.attrs, Stream)]
    rings = {v: (i, rows) for i, s in streams for v, rows in s.rings}
    flat = graph.flat()
    merged = {v: chain for chain in chains(graph) for v in chain}
    blocks = []
    for v in flat.values.values():
        if v.name in rings:
            i, rows = rings[v.name]
            blocks.append(Block(v.name, aligned(rows_bytes(v, rows)), _begin(graph, i), i))
        elif v.name in merged and v.name == next(iter(merged[v.name])):
            chain = merged[v.name]
            size = max(at + aligned(graph.values[name].nbytes) for name, at in chain.items())
            begin = min(_begin(graph, first.get(name, -1)) for name in chain)
            blocks.append(Block(v.name, size, begin, max(last[name] for name in chain)))
        elif in_arena(v) and v.name not in merged:
            blocks.append(Block(v.name, aligned(v.nbytes), _begin(graph, first.get(v.name, -1)), last.get(v.name, -1)))
    for i, n in enumerate(graph.nodes):
        size = node_scratch(flat, n)
        if size:
            blocks.append(Block(n.name, size, _begin(graph, i), i, scratch=True))
    return blocks


def chains(graph: Graph) -> list[dict[str, int]]:
    """Values that share a buffer since nodes write over their inputs, from the first to the last, and where in it each
    begins."""
    found: list[dict[str, int]] = []
    for n in graph.nodes:
        if not n.overwrites:
            continue
        chain = next((c for c in found if n.overwrites in c), None)
        if chain is None:
            found.append(chain := {n.overwrites: 0})
        chain[_overwriting(n)] = chain[n.overwrites] - (n.attrs.lead if isinstance(n.attrs, Stream) else 0)
    return [{v: at - min(c.values()) for v, at in c.items()} for c in found]


def _overwriting(node: Node) -> str:
    """The output that takes the memory of an input: of a stream what its last node makes."""
    return node.attrs.nodes[-1].outputs[0] if isinstance(node.attrs, Stream) else node.outputs[0]


def _begin(graph: Graph, i: int) -> int:
    """When node ``i`` begins: with the first row of the image if it takes that row by row; -1 is before all nodes."""
    return -1 if i >= 0 and feeds(graph) is graph.nodes[i] else i


def feeds(graph: Graph) -> Node | None:
    """The stream that the image is delivered to, row by row; None where the image lies in the arena."""
    first = graph.nodes[0] if graph.nodes else None
    a = first.attrs if first else None
    return first if isinstance(a, Stream) and graph.inputs[0] in dict(a.rings) else None


def loads(graph: Graph) -> list[int]:
    """Bytes that exist at once, before the first node, at each node and after the last."""
    blocks = lifetimes(graph)
    return [sum(b.size for b in blocks if b.first <= t <= b.last) for t in range(-1, len(graph.nodes) + 1)]


# --- placement --------------------------------------------------------------------------------------------------


def best_fit(blocks: Iterable[Block]) -> list[int]:
    """Places the blocks one after the other, each into the smallest gap that holds it. Returns their offsets."""
    placed: list[tuple[int, Block]] = []
    offsets = []
    for b in blocks:
        busy = sorted((at, at + o.size) for at, o in placed if o.first <= b.last and b.first <= o.last)
        at = _gap(busy, b.size)
        placed.append((at, b))
        offsets.append(at)
    return offsets


def _gap(busy: list[tuple[int, int]], size: int) -> int:
    best, best_size, end = -1, -1, 0
    for begin, stop in busy:
        room = begin - end
        if room >= size and (best < 0 or room < best_size):
            best, best_size = end, room
        end = max(end, stop)
    return best if best >= 0 else end


_ORDERS: tuple[Callable[[Block], tuple[int, ...]], ...] = (
    lambda b: (-b.size, b.first),
    lambda b: (b.first, -b.size),
    lambda b: (-(b.last - b.first), -b.size),
    lambda b: (-b.size * (b.last - b.first + 1), b.first),
    lambda b: (-b.last, -b.size),
)


_ROUNDS = 20


def place(blocks: Iterable[Block], bound: int) -> list[tuple[Block, int]]:
    """The blocks with their offsets, in the smallest arena that was found; the search ends where ``bound`` is reached.

    From each order on, the block that ends highest is placed first in the next round: it is the one that found no gap,
    and what comes later is smaller or shorter and finds one more easily."""
    best: list[tuple[Block, int]] = []
    best_size = -1
    by_name = sorted(blocks, key=lambda b: (b.name, b.scratch))
    for key in _ORDERS:
        order = sorted(by_name, key=key)
        for _ in range(_ROUNDS):
            offsets = best_fit(order)
            ends = [at + b.size for b, at in zip(order, offsets, strict=True)]
            size = max(ends, default=0)
            if best_size < 0 or size < best_size:
                best, best_size = list(zip(order, offsets, strict=True)), size
            if best_size <= bound:
                return best
            order.insert(0, order.pop(ends.index(size)))
    return best


def make_plan(graph: Graph) -> MemoryPlan:
    """Plans the arena of a LOWERED graph (or of any graph whose operators' scratch is known)."""
    blocks = lifetimes(graph)
    load = loads(graph)
    bound = max(load)
    best = place(blocks, bound)
    offsets = {b.name: at for b, at in best if not b.scratch}
    sizes = {b.name: b.size for b, _ in best if not b.scratch}
    for chain in chains(graph):
        at = offsets[next(iter(chain))]
        offsets |= {v: at + inside for v, inside in chain.items()}
        sizes |= {v: aligned(graph.values[v].nbytes) for v in chain}
    return MemoryPlan(
        offsets=offsets,
        sizes=sizes,
        scratch_offsets={b.name: at for b, at in best if b.scratch},
        scratch_sizes={b.name: b.size for b, _ in best if b.scratch},
        arena_bytes=max((at + b.size for b, at in best), default=0),
        lower_bound=bound,
        peak=load.index(bound) - 1,
    )


def largest_alive(graph: Graph, plan: MemoryPlan, count: int = 5) -> list[tuple[str, int]]:
    """The largest buffers that exist at the peak: what stands in the way of a smaller arena."""
    alive = [b for b in lifetimes(graph) if b.first <= plan.peak <= b.last]
    alive.sort(key=lambda b: (-b.size, b.name))
    return [(f"scratch of {b.name}" if b.scratch else b.name, b.size) for b in alive[:count]]
