# SPDX-License-Identifier: Apache-2.0
"""Memory plan: from the lifetimes of a schedule to offsets in one arena. Returns data only.

Best fit over several orders, each improved by moving what ends highest to its front; the smallest arena wins. The lower
bound is the largest sum of what lives at once: no plan of this schedule can be smaller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from trainlet import scratch
from trainlet.ir import Graph, Kind, Node, Value
from trainlet.ops import Conv2d, FusedDw, FusedDx, conv_out_hw

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


def _up(n: int) -> int:
    return (n + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


# --- scratch of a node ----------------------------------------------------------------------------------------


def geometry(graph: Graph, node: Node) -> tuple[Conv2d, tuple[int, int, int], tuple[int, int, int]]:
    """(conv, (H, W, C) of its input, (H, W, C) of its output) of a forward, input gradient or weight gradient node.
    That of a weight gradient is the layer's, though only some channels of its input are kept."""
    a = node.attrs
    v = graph.values
    if isinstance(a, FusedDx):
        h, w = a.dx.in_hw
        shape = v[node.inputs[1]].shape
        return a.dx.conv, (h, w, shape[3] * a.dx.conv.groups), (*conv_out_hw(a.dx.conv, h, w), shape[0])
    if isinstance(a, FusedDw):
        layer = next(n for n in graph.find("conv2d") if node.writes[0] in n.inputs)
        return geometry(graph, layer)
    assert isinstance(a, Conv2d)
    x, y = v[node.inputs[0]].shape, v[node.outputs[0]].shape
    return a, (x[0], x[1], x[2]), (y[0], y[1], y[2])


def _conv(graph: Graph, node: Node) -> int:
    a, x, y = geometry(graph, node)
    table = _DEPTHWISE if a.depthwise else _GENERAL
    return table[node.op](*x, *y, *a.kernel, a.groups, _kept(node))


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


# --- lifetimes --------------------------------------------------------------------------------------------------


def in_arena(v: Value) -> bool:
    """Whether a value lies in the arena: activations and the image; label and lr are arguments."""
    return v.kind is Kind.ACTIVATION or (v.kind is Kind.INPUT and len(v.shape) == 3)


def lifetimes(graph: Graph) -> list[Block]:
    """All buffers of the arena. Inputs exist from node -1, outputs of the graph to the end."""
    first = {name: i for i, n in enumerate(graph.nodes) for name in n.outputs}
    last = dict(first)
    for i, n in enumerate(graph.nodes):
        last.update(dict.fromkeys(n.inputs, i))
    last.update(dict.fromkeys(graph.outputs, len(graph.nodes)))
    blocks = [
        Block(v.name, _up(v.nbytes), first.get(v.name, -1), last.get(v.name, -1))
        for v in graph.values.values()
        if in_arena(v)
    ]
    for i, n in enumerate(graph.nodes):
        size = SCRATCH[n.op](graph, n) if n.op in SCRATCH else 0
        if size:
            blocks.append(Block(n.name, _up(size), i, i, scratch=True))
    return blocks


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
    load = [sum(b.size for b in blocks if b.first <= t <= b.last) for t in range(-1, len(graph.nodes) + 1)]
    bound = max(load)
    best = place(blocks, bound)
    return MemoryPlan(
        offsets={b.name: at for b, at in best if not b.scratch},
        sizes={b.name: b.size for b, _ in best if not b.scratch},
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
