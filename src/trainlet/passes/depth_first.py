# SPDX-License-Identifier: Apache-2.0
"""Turns runs of forward nodes into depth-first runs, so that wide activations exist a few rows at a time.

A tensor between two nodes of a run is a ring of rows; what is read behind the run is whole. Every row is computed
once, by the same kernels, so no byte changes. Which nodes go together is a search over all ways to cut the forward pass
into runs: the smallest peak of memory first (not below what the backward pass needs anyway), then the least work, for
kernels that are called row by row pack their weights again for each row.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from trainlet.ir import DepthFirst, Graph, Node, Operands
from trainlet.ops.depth_first import MAX_SOURCES, maps
from trainlet.ops.registry import runs_by_rows
from trainlet.ops.roles import head_of
from trainlet.passes.rings import overwriting_lead, ring_rows
from trainlet.plan.arena import aligned, in_arena, loads, node_scratch, rows_bytes
from trainlet.plan.prefix import prefix_length
from trainlet.verify import verify_depth_first, verify_graph


@dataclass(frozen=True, slots=True)
class Run:
    """The nodes first .. end - 1 as one; bytes that exist while they run, and how much more work they are than alone.
    ``over``: the last one's output goes over an input."""

    first: int
    end: int
    over: bool = False
    nbytes: int = 0
    work: int = 0


def depth_first(graph: Graph, by_rows: bool) -> Graph:
    """Wraps nodes of the forward pass into runs where that lowers the peak. ``by_rows``: the image is delivered row
    by row and never exists whole, unless it is kept for the backward pass; otherwise it lies in the arena."""
    by_rows = by_rows and can_be_fed(graph)
    search = _Search(graph, by_rows)
    # a run that begins before what it overwrites makes that larger while it waits, which the search does not see
    tries = [wrap_runs(graph, search.best(over), by_rows) for over in (False, True)]
    return min(tries, key=lambda g: max(loads(g)))


def wrap_runs(graph: Graph, runs: Iterable[Run], by_rows: bool) -> Graph:
    """Makes a node of each run of several nodes; ``by_rows`` also of the one from 0 on."""
    nodes = list(graph.nodes)
    for run in sorted(runs, key=lambda r: -r.first):
        image = graph.inputs[0] if by_rows and run.first == 0 else None
        if run.end - run.first > 1 or image:
            nodes[run.first : run.end] = [_wrap(graph, run, image)]
    wrapped = graph.with_nodes(nodes)
    verify_graph(wrapped)
    verify_depth_first(wrapped)
    return wrapped


def _overwritten(graph: Graph, first: int, end: int, image: str | None) -> str:
    """The input of a run over which its last output may go: the largest that nothing reads later; or ""."""
    inner, values = graph.nodes[first:end], graph.values
    y = inner[-1].output
    later = {v for n in graph.nodes[end:] for v in n.inputs} | {*graph.interface.made}
    if end - first == 1 or y not in later or values[y].dtype != "s8":
        return ""
    kept = later | {image} | {v for n in inner for v in n.outputs}
    fit = [v for n in inner for v in n.inputs if in_arena(values[v]) and v not in kept]
    return max(fit, key=lambda v: values[v].nbytes, default="")


def _wrap(graph: Graph, run: Run, image: str | None) -> Node:
    """The node that runs the nodes of ``run`` depth first."""
    inner = graph.nodes[run.first : run.end]
    made = [n.output for n in inner]
    within = {n.name for n in inner}
    later = {v for n in graph.nodes if n.name not in within for v in n.inputs} | set(graph.interface.made)
    outputs = tuple(v for v in made if v in later)
    inputs = tuple(dict.fromkeys(v for n in inner for v in n.inputs if v not in made))
    rows = ring_rows(inner, graph.values, image)
    rings = tuple((v, r) for v, r in rows.items() if v not in outputs)
    gone = _overwritten(graph, run.first, run.end, image) if run.over else ""
    lead = overwriting_lead(inner, graph.values, gone) if gone else 0
    inner = tuple(replace(n, overwrites="") for n in inner)
    attrs = DepthFirst(inner, tuple(graph.values[v] for v in made), rings, lead)
    layers = inner[0].layer if len(inner) == 1 else f"{inner[0].layer} to {inner[-1].layer}"
    name, read = f"{inner[0].name}.depth_first", Operands(read=inputs)
    return Node("depth_first", name, layers, read, outputs, attrs, overwrites=gone, kernel="tl_depth_first_run")


class _Search:
    """Over all ways to cut the nodes 0 .. end - 1 of a graph into runs."""

    def __init__(self, graph: Graph, by_rows: bool) -> None:
        self.graph, self.by_rows = graph, by_rows
        self.end = _forward_end(graph)
        nodes = graph.nodes
        self.sizes = {v.name: aligned(v.nbytes) for v in graph.values.values() if in_arena(v)}
        self.first = {v: i for i, n in enumerate(nodes) for v in n.outputs}
        self.last = {v: i for i, n in enumerate(nodes) for v in n.inputs} | dict.fromkeys(
            graph.interface.made, len(nodes)
        )
        self.image_end = max(i for i, n in enumerate(nodes) if graph.inputs[0] in n.inputs) + 1
        cut = prefix_length(graph)
        self.cut = cut if not by_rows or cut >= self.image_end else 0  # a prefix that only keeps what was fed is none
        self.by_row = [runs_in_rows(graph, n) for n in nodes[: self.end]]
        self.scratch = [node_scratch(graph, n) for n in nodes[: self.end]]
        self.rings = self._rings()

    def _rings(self) -> dict[str, int]:
        """Bytes of each value as a ring; it depends only on what reads it."""
        inner = [n for n, can in zip(self.graph.nodes, self.by_row, strict=False) if can]
        image = self.graph.inputs[0] if self.by_rows else None
        rows = ring_rows(inner, self.graph.values, image)
        return {v: aligned(rows_bytes(self.graph.values[v], r)) for v, r in rows.items()}

    def best(self, over: bool) -> list[Run]:
        """The runs that make up the forward pass, in order; ``over``: they may write over their inputs."""
        runs = [[r for first in range(end) if (r := self._run(first, end))] for end in range(1, self.end + 1)]
        floor = max(loads(self.graph)[self.end + 1 :])
        limit = _smallest_peak(runs)
        if over and limit > floor:
            runs = [[self._overwriting(r, floor, limit) for r in ending] for ending in runs]
            limit = max(floor, _smallest_peak(runs))
        limit = max(floor, limit)
        work: list[tuple[int, Run | None]] = [(0, None)]
        for ending in runs:
            fits = [(work[r.first][0] + r.work, r) for r in ending if r.nbytes <= limit and work[r.first][0] >= 0]
            work.append(min(fits, key=lambda f: f[0], default=(-1, None)))
        found: list[Run] = []
        at = self.end
        while (run := work[at][1]) is not None:
            found.append(run)
            at = run.first
        return found[::-1]

    def _run(self, first: int, end: int) -> Run | None:
        """The nodes first .. end - 1 as one run; None where they cannot be."""
        whole_image = first > 0 or not self.by_rows
        if (end - first > 1 or not whole_image) and not all(self.by_row[first:end]):
            return None
        if first < self.cut < end or (not whole_image and end < self.image_end):
            return None
        nbytes = max(self.scratch[first:end])
        if end - first == 1 and self.graph.nodes[first].overwrites:
            nbytes -= self.sizes[self.graph.nodes[first].overwrites]
        for v, size in self.sizes.items():
            made, used = self.first.get(v, -1), self.last.get(v, -1)
            if made >= end or used < first:
                continue
            image = made < 0 and not whole_image
            nbytes += self.rings[v] if (first <= made and used < end) or image else size
        return Run(first, end, False, nbytes, self._work(first, end) if end - first > 1 else 0)

    def _overwriting(self, run: Run, floor: float, limit: float) -> Run:
        """The run as one that writes over its input, where that may bring it from above ``floor`` to below
        ``limit``."""
        image = self.graph.inputs[0] if self.by_rows and run.first == 0 else None
        gone = _overwritten(self.graph, run.first, run.end, image)
        y = self.graph.nodes[run.end - 1].output
        if not gone or run.nbytes <= floor or run.nbytes - min(self.sizes[gone], self.sizes[y]) >= limit:
            return run
        lead = overwriting_lead(self.graph.nodes[run.first : run.end], self.graph.values, gone)
        both = max(lead + self.sizes[gone], self.sizes[y])
        return replace(run, over=True, nbytes=run.nbytes - self.sizes[gone] - self.sizes[y] + both)

    def _work(self, first: int, end: int) -> int:
        """Bytes of weights that are packed, row after row."""
        values = self.graph.values
        weighty = [n for n in self.graph.nodes[first:end] if "weight" in n.operands]
        return end - first + sum(values[n["weight"]].size * values[n.output].shape[0] for n in weighty)


def _smallest_peak(runs: Sequence[Sequence[Run]]) -> float:
    """The smallest peak of a way to cut all nodes into runs; ``runs`` by where they end."""
    peaks: list[float] = [0]
    for ending in runs:
        peaks.append(min((max(peaks[r.first], r.nbytes) for r in ending), default=math.inf))
    return peaks[-1]


def _forward_end(graph: Graph) -> int:
    """How many leading nodes may be cut into runs: all up to the head."""
    return graph.nodes.index(head_of(graph))


def can_be_fed(graph: Graph) -> bool:
    """Whether all that reads the image can run as its rows come, with all that lies between."""
    last = max(i for i, n in enumerate(graph.nodes) if graph.inputs[0] in n.inputs)
    return all(runs_in_rows(graph, n) for n in graph.nodes[: last + 1])


def runs_in_rows(graph: Graph, node: Node) -> bool:
    """Whether the rows of a node's output can be made one by one. Packed bits can only where each row begins at a
    byte, and the C takes rows of a few maps only."""
    if not runs_by_rows(node) or len(maps(node, graph.values)) > MAX_SOURCES:
        return False
    y = graph.values[node.output]
    return y.dtype != "b1" or y.size // y.shape[0] % 8 == 0
