# SPDX-License-Identifier: Apache-2.0
"""Memory plan: from the lifetimes of a schedule to offsets in one arena. Returns data only.

Best fit over several orders, each improved by moving what ends highest to its front; the smallest arena wins. The lower
bound is the largest sum of what lives at once: no plan of this schedule can be smaller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from trainlet.ir import DepthFirst, Graph, Kind, Node, Value
from trainlet.ops.registry import scratch_bytes
from trainlet.plan.place import Place, Pool, place_of

ALIGNMENT = 4


@dataclass(frozen=True)
class MemoryPlan:
    """``places`` of what lies in the arena and the ``sizes`` of their blocks, in bytes, by value; scratch by node.
    ``lower_bound`` is what lives at once at the worst node, ``peak`` that node's index."""

    places: Mapping[str, Place]
    sizes: Mapping[str, int]
    scratch_offsets: Mapping[str, int]
    scratch_sizes: Mapping[str, int]
    arena_bytes: int
    lower_bound: int
    peak: int

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Bytes from the start of the arena, by value."""
        return {name: p.offset for name, p in self.places.items()}


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


# --- lifetimes --------------------------------------------------------------------------------------------------


def node_scratch(graph: Graph, node: Node) -> int:
    """Scratch of a node in bytes; ``graph`` is flat."""
    return aligned(scratch_bytes(graph, node))


def in_arena(v: Value) -> bool:
    """Whether a value lies in the arena: activations and the image; label and lr are arguments."""
    return v.kind is Kind.ACTIVATION or (v.kind is Kind.INPUT and len(v.shape) == 3)


def rows_bytes(v: Value, rows: int) -> int:
    """Bytes of so many rows of a tensor (H, W, C)."""
    return v.nbytes // v.shape[0] * rows


def lifetimes(graph: Graph) -> list[Block]:
    """All buffers of the arena. Inputs exist from node -1, outputs of the graph to the end; the rings of a run while
    it runs, and where it reads the image row by row also while that is delivered."""
    first = {name: i for i, n in enumerate(graph.nodes) for name in n.outputs}
    last = dict(first)
    for i, n in enumerate(graph.nodes):
        last.update(dict.fromkeys(n.inputs, i))
    last.update(dict.fromkeys(graph.interface.made, len(graph.nodes)))
    runs = [(i, n.attrs) for i, n in enumerate(graph.nodes) if isinstance(n.attrs, DepthFirst)]
    rings = {v: (i, rows) for i, s in runs for v, rows in s.rings}
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
        chain[_overwriting(n)] = chain[n.overwrites] - (n.attrs.lead if isinstance(n.attrs, DepthFirst) else 0)
    return [{v: at - min(c.values()) for v, at in c.items()} for c in found]


def _overwriting(node: Node) -> str:
    """The output that takes the memory of an input: of a depth-first run what its last node makes."""
    return node.attrs.nodes[-1].output if isinstance(node.attrs, DepthFirst) else node.output


def _begin(graph: Graph, i: int) -> int:
    """When node ``i`` begins: with the first row of the image if it takes that row by row; -1 is before all nodes."""
    return -1 if i >= 0 and feeds(graph) is graph.nodes[i] else i


def feeds(graph: Graph) -> Node | None:
    """The depth-first run that the image is delivered to, row by row; None where the image lies in the arena."""
    first = graph.nodes[0] if graph.nodes else None
    a = first.attrs if first else None
    return first if isinstance(a, DepthFirst) and graph.inputs[0] in dict(a.rings) else None


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
    """Plans the arena of a LOWERED graph whose kernels have been chosen."""
    blocks = lifetimes(graph)
    load = loads(graph)
    bound = max(load)
    best = place(blocks, bound)
    offsets = {b.name: at for b, at in best if not b.scratch}
    buffers = {name: name for name in offsets}
    sizes = {b.name: b.size for b, _ in best if not b.scratch}
    for chain in chains(graph):
        first = next(iter(chain))
        at = offsets[first]
        buffers |= dict.fromkeys(chain, first)
        offsets |= {v: at + inside for v, inside in chain.items()}
        sizes |= {v: aligned(graph.values[v].nbytes) for v in chain}
    rings = {v: rows for n in graph.nodes if isinstance(n.attrs, DepthFirst) for v, rows in n.attrs.rings}
    values = graph.flat().values
    return MemoryPlan(
        places={v: place_of(values[v], Pool.ARENA, buffers[v], at, rings.get(v)) for v, at in offsets.items()},
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
