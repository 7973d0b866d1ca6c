# SPDX-License-Identifier: Apache-2.0
"""Another order of the same nodes, with a smaller peak of memory: updates as soon as their gradient exists, then exact
search on windows of neighboring nodes.

The functions of the emitted model keep their nodes: what depends on the image alone, the rest of the forward pass, what
may refuse the step, the head's update, everything else. Inside each of them a node moves wherever it still finds what
it reads, and no state is written before its last reader.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from trainlet.errors import UnsupportedError
from trainlet.ir import DepthFirst, Graph, Node
from trainlet.passes.inplace import overwritable
from trainlet.plan.arena import aligned, in_arena, node_scratch
from trainlet.plan.sections import sections
from trainlet.verify import verify_graph

WINDOW: Final = 10  # nodes whose orders are searched at once
_SWEEPS: Final = 6

Cost = tuple[int, int]
"""The largest load in bytes, and how late updates run: the sum of their places."""


def reorder(graph: Graph, *, overwrites: bool = True) -> Graph:
    """The nodes of a verified TRAIN or LOWERED graph in an order whose peak is no larger, usually smaller; always the
    same one for the same graph. ``overwrites``: the pass ``inplace`` follows, so a node that may write over an input
    which it reads last needs no memory of its own. ``make_plan`` gives the peak of the result as its lower bound,
    ``order_bound`` what no order can go below. Raises UnsupportedError for a graph that already has depth-first
    runs."""
    verify_graph(graph)
    moved = graph.with_nodes(n for s in _problems(graph, overwrites) for n in s.best())
    verify_graph(moved)
    return moved


def order_bound(graph: Graph, *, overwrites: bool = True) -> int:
    """Bytes that every order needs: the largest of ``node_bounds``."""
    return max(node_bounds(graph, overwrites=overwrites).values(), default=0)


def node_bounds(graph: Graph, *, overwrites: bool = True) -> dict[str, int]:
    """By node the bytes that have to exist while it runs, in any order: what nodes that it must come behind have made,
    and it, or nodes that must come behind it, still read."""
    return {n.name: bound for s in _problems(graph, overwrites) for n, bound in zip(s.nodes, s.bounds(), strict=True)}


def _problems(graph: Graph, overwrites: bool) -> list[_Section]:
    sections = _sections(graph)
    return [_Section(graph, s, [n for t in sections[k:] for n in t], overwrites) for k, s in enumerate(sections, 1)]


def _sections(graph: Graph) -> list[Sequence[Node]]:
    """Runs of nodes; nodes move only within their run. From what the model gives to the last node that may refuse the
    step each is one of its own, so that the same one speaks first."""
    if any(isinstance(n.attrs, DepthFirst) for n in graph.nodes):
        raise UnsupportedError(f"{graph.name}: nodes of depth-first runs are not reordered; run that pass last")
    s = sections(graph)
    return [s.prefix, s.forward[:-1], s.forward[-1:], *((n,) for n in s.gradient), s.head, s.backward]


@dataclass(frozen=True, slots=True)
class _Buffer:
    """A value of the arena: ``readers`` has a bit for each node of the section; ``later`` says that it is read behind
    the section too, or returned; ``made`` is the node that makes it, or -1."""

    size: int
    made: int
    readers: int
    later: bool


@dataclass(frozen=True, slots=True)
class _Task:
    """A node as the search sees it: indices of buffers, and (buffer, scratch) where it may write over one, which has
    the size of its output. ``update``: it changes parameters and makes nothing. ``before`` has a bit for each node that
    comes first."""

    reads: tuple[int, ...]
    makes: tuple[int, ...]
    made_bytes: int
    scratch: int
    update: bool
    over: tuple[tuple[int, int], ...]
    before: int


class _Section:
    """A run of nodes, numbered in their given order, and what they need."""

    def __init__(self, graph: Graph, nodes: Sequence[Node], behind: Sequence[Node], overwrites: bool) -> None:
        self.nodes = nodes
        self.all = (1 << len(nodes)) - 1
        made = {v: i for i, n in enumerate(nodes) for v in n.outputs}
        read: dict[str, int] = {}
        for i, n in enumerate(nodes):
            read.update({v: read.get(v, 0) | 1 << i for v in n.inputs})
        later = {v for n in behind for v in n.inputs} | set(graph.interface.made)
        not_yet = {v for n in behind for v in n.outputs}
        names = [v.name for v in graph.values.values() if in_arena(v) and v.name not in not_yet]
        self.buffers = [
            _Buffer(aligned(graph.values[v].nbytes), made.get(v, -1), read.get(v, 0), v in later) for v in names
        ]
        self.start = sum(b.size for b in self.buffers if b.made < 0 and (b.readers or b.later))
        index = {v: k for k, v in enumerate(names)}
        self.tasks = [
            _Task(
                reads=tuple(index[v] for v in dict.fromkeys(n.inputs) if v in index),
                makes=tuple(index[v] for v in n.outputs),
                made_bytes=sum(self.buffers[index[v]].size for v in n.outputs),
                scratch=node_scratch(graph, replace(n, overwrites="")),
                update=not n.outputs and bool(n.writes),
                over=tuple((index[v], b) for v, b in _over(graph, n, overwrites)),
                before=_before(n, 1 << i, made, read),
            )
            for i, n in enumerate(nodes)
        ]

    # -- loads ---------------------------------------------------------------------------------------------------

    def step(self, done: int, live: int, i: int) -> tuple[int, int]:
        """Bytes that exist while node ``i`` runs, and after it; ``done`` has run before, and left ``live`` bytes."""
        t = self.tasks[i]
        done |= 1 << i
        load = live + t.made_bytes + t.scratch
        for k, scratch in t.over:
            b = self.buffers[k]
            if not b.later and not b.readers & ~done:
                load = live + t.made_bytes - b.size + scratch
                break
        for k in t.reads:
            b = self.buffers[k]
            if not b.later and not b.readers & ~done:
                live -= b.size
        for k in t.makes:
            b = self.buffers[k]
            if b.later or b.readers:
                live += b.size
        return load, live

    def cost(self, order: Sequence[int], done: int = 0, live: int | None = None) -> Cost:
        """Of nodes that run behind ``done``; the default is the begin of the section."""
        now = self.start if live is None else live
        peak, late = 0, 0
        for at, i in enumerate(order):
            load, now = self.step(done, now, i)
            done |= 1 << i
            peak, late = max(peak, load), late + at * self.tasks[i].update
        return peak, late

    # -- search --------------------------------------------------------------------------------------------------

    def best(self) -> list[Node]:
        """The nodes in the best order that was found."""
        given = list(range(len(self.nodes)))
        return [self.nodes[i] for i in self._improved(min((given, self._eager()), key=self.cost))]

    def _ready(self, done: int, among: Iterable[int]) -> list[int]:
        """Which of these nodes can run next."""
        return [i for i in among if not done >> i & 1 and not self.tasks[i].before & ~done]

    def _eager(self) -> list[int]:
        """Whatever can run and frees most runs next: an update as soon as it has its gradient."""
        order: list[int] = []
        done, live = 0, self.start
        while done != self.all:
            steps = {i: self.step(done, live, i) for i in self._ready(done, range(len(self.tasks)))}
            chosen = min(steps, key=lambda i: (steps[i][1], steps[i][0], i))
            order.append(chosen)
            done, live = done | 1 << chosen, steps[chosen][1]
        return order

    def _improved(self, order: list[int]) -> list[int]:
        """Every window in the best order of its nodes, until no window changes any more."""
        if not order:
            return order
        searched: set[tuple[int, ...]] = set()  # windows that are in their best order, with what runs before them
        for _ in range(_SWEEPS):
            before = list(order)
            done, live = 0, self.start
            for at in range(max(1, len(order) - WINDOW + 1)):
                part = order[at : at + WINDOW]
                if (done, *part) not in searched:
                    order[at : at + WINDOW] = part = self._window(done, live, part)
                    searched.add((done, *part))
                _, live = self.step(done, live, order[at])
                done |= 1 << order[at]
            if order == before:
                break
        return order

    def _window(self, done: int, live: int, part: list[int]) -> list[int]:
        """The order of the nodes of ``part`` with the smallest peak and, of those, with the earliest updates; ``part``
        itself where it is one of them. ``done`` has run before, and left ``live`` bytes."""
        given = self.cost(part, done, live)
        (peak, _), _ = self._path(done, live, part, given[0], lambda cost: cost)
        found, order = self._path(done, live, part, peak, lambda cost: cost[::-1])
        return order if found < given else part

    def _path(
        self, done: int, live: int, part: list[int], limit: int, key: Callable[[Cost], Cost]
    ) -> tuple[Cost, list[int]]:
        """Cost and order of the best way to run ``part`` among those with no load above ``limit``, of which there is
        one: exactly the best in the first entry of ``key``. Dynamic programming over the sets of nodes that can have
        run."""
        reached: dict[int, tuple[Cost, int, tuple[int, ...]]] = {done: ((0, 0), live, ())}
        for at in range(len(part)):
            following: dict[int, tuple[Cost, int, tuple[int, ...]]] = {}
            for have, ((peak, late), now, order) in reached.items():
                for i in self._ready(have, part):
                    load, after = self.step(have, now, i)
                    cost = max(peak, load), late + at * self.tasks[i].update
                    known = following.get(have | 1 << i)
                    if load <= limit and (known is None or key(cost) < key(known[0])):
                        following[have | 1 << i] = cost, after, (*order, i)
            reached = following
        ((best, _, order),) = reached.values()
        return best, list(order)

    # -- bound ---------------------------------------------------------------------------------------------------

    def bounds(self) -> Iterator[int]:
        """For each node what exists while it runs, whatever the order."""
        above = [0] * len(self.tasks)
        for i, t in enumerate(self.tasks):  # the given order is one of those that are allowed
            above[i] = t.before
            for j in range(i):
                above[i] |= above[j] if t.before >> j & 1 else 0
        below = [sum(1 << j for j in range(len(above)) if above[j] >> i & 1) for i in range(len(above))]
        for i, t in enumerate(self.tasks):
            me = 1 << i
            alive = sum(
                b.size for b in self.buffers
                if (b.made < 0 or above[i] >> b.made & 1) and (b.later or b.readers & (below[i] | me))
            )  # fmt: skip
            over = [
                scratch - self.buffers[k].size
                for k, scratch in t.over
                if not self.buffers[k].later and not self.buffers[k].readers & below[i]
            ]
            yield alive + t.made_bytes + min((t.scratch, *over))


def _before(node: Node, me: int, made: Mapping[str, int], read: Mapping[str, int]) -> int:
    """Bits of what ``node``, whose own bit is ``me``, has to come behind: makers of what it reads, and the other
    readers of what it writes over."""
    found = 0
    for v in node.inputs:
        found |= 1 << made[v] if v in made else 0
    for v in (*node.writes, node.overwrites):
        found |= read.get(v, 0) & ~me
    return found


def _over(graph: Graph, node: Node, overwrites: bool) -> list[tuple[str, int]]:
    """What the node writes over, or may once the pass ``inplace`` has run, and its scratch then."""
    may = (node.overwrites,) if node.overwrites else overwritable(graph, node) if overwrites else ()
    may = tuple(v for v in may if node.inputs.count(v) == 1 and v not in graph.interface.made)
    return [(v, node_scratch(graph, replace(node, overwrites=v))) for v in may]
