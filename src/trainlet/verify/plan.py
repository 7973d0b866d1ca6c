# SPDX-License-Identifier: Apache-2.0
"""The check of a memory plan. It shares no code with the planner: it works out the lifetimes anew and compares every
pair of buffers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from trainlet.ir import DepthFirst, Graph, Kind, Value, dtype_bits
from trainlet.verify.errors import check, fail, node_label

ALIGNMENT = 4


class Plan(Protocol):
    """What ``verify_plan`` needs to see of a memory plan; figures are bytes, offsets count from the arena's start."""

    @property
    def offsets(self) -> Mapping[str, int]:
        """Where each value of the arena begins."""

    @property
    def sizes(self) -> Mapping[str, int]:
        """Bytes reserved for it."""

    @property
    def scratch_offsets(self) -> Mapping[str, int]:
        """Where the scratch of a node begins; nodes without scratch are left out."""

    @property
    def scratch_sizes(self) -> Mapping[str, int]:
        """Bytes reserved for it."""

    @property
    def arena_bytes(self) -> int:
        """Size of the arena."""

    @property
    def lower_bound(self) -> int:
        """No plan for this schedule can be smaller."""


@dataclass(frozen=True, slots=True)
class _Block:
    label: str
    begin: int
    end: int
    need: int  # bytes that it cannot do without; the plan may reserve a few more
    first: int  # index of the node before which it exists; -1: from the start
    last: int  # index of the last node during which it exists


def verify_plan(graph: Graph, plan: Plan) -> None:
    """Checks that no two buffers that live at the same time share a byte, and that all lie inside the arena.

    In the arena are the activations, the image (inputs of rank 3) and each node's scratch. A value lives from the node
    that makes it to its last reader, the image from before the first node, outputs of the graph to the end.
    Raises VerifyError that names both buffers and a node at which both exist."""
    blocks = [*_value_blocks(graph, plan), *_scratch_blocks(graph, plan)]
    for b in blocks:
        check(b.begin % ALIGNMENT == 0, b.label, f"its offset is a multiple of {ALIGNMENT}, not {b.begin}")
        inside = b.begin >= 0 and b.end <= plan.arena_bytes
        check(inside, b.label, f"bytes {b.begin}..{b.end} lie inside the arena of {plan.arena_bytes} bytes")
    _check_overlaps(graph, blocks)
    peak = _peak(graph, blocks)
    check(
        plan.lower_bound <= plan.arena_bytes,
        graph,
        f"the arena, {plan.arena_bytes} bytes, is at least its lower bound, {plan.lower_bound} bytes",
    )
    check(
        plan.lower_bound >= peak,
        graph,
        f"the lower bound is at least the {peak} bytes that live at once, not {plan.lower_bound}",
    )


def _in_arena(v: Value) -> bool:
    """Activations and images lie in the arena. Label and lr are arguments."""
    return v.kind is Kind.ACTIVATION or (v.kind is Kind.INPUT and len(v.shape) == 3)


def _rings(graph: Graph) -> dict[str, tuple[int, int, Value]]:
    """What exists by rows only: the index of its run, the bytes of its ring, the value."""
    found = {}
    for i, node in enumerate(graph.nodes):
        if not isinstance(node.attrs, DepthFirst):
            continue
        known = {**graph.values, **{v.name: v for v in node.attrs.values}}
        for name, rows in node.attrs.rings:
            v = known[name]
            found[name] = i, -(-v.size * dtype_bits(v.dtype) // v.shape[0] // 8) * rows, v
    return found


def _fed(graph: Graph) -> bool:
    """Whether the first node begins with the image's first row."""
    return any(name in graph.inputs and i == 0 for name, (i, _, _) in _rings(graph).items())


def _value_blocks(graph: Graph, plan: Plan) -> list[_Block]:
    begins = [-1 if i == 0 and _fed(graph) else i for i in range(len(graph.nodes))]
    first = {name: begins[i] for i, node in enumerate(graph.nodes) for name in node.outputs}
    last = {name: i for i, node in enumerate(graph.nodes) for name in (*node.inputs, *node.outputs)}
    last |= {name: len(graph.nodes) for name in graph.interface.made}
    for i, node in enumerate(graph.nodes):
        if node.overwrites:
            run = node.attrs if isinstance(node.attrs, DepthFirst) else None
            made = run.nodes[-1].output if run else node.output
            here, there = plan.offsets.get(made, -1), plan.offsets.get(node.overwrites, -2)
            before = run.lead if run else 0
            check(here == there - before, node, f"writes {before} bytes before {node.overwrites!r}, the overwritten")
            last[node.overwrites] = i if run else i - 1  # from node i on the bytes are the output's
    rings = _rings(graph)
    whole = [(v, v.nbytes, first.get(v.name, -1), last.get(v.name, -1)) for v in graph.values.values() if _in_arena(v)]
    lives = [row for row in whole if row[0].name not in rings]
    lives += [(v, nbytes, begins[i], i) for i, nbytes, v in rings.values()]
    known = {row[0].name for row in lives}
    for name in (*plan.offsets, *plan.sizes):
        check(name in known, f"value {name!r}", "the plan places only what lies in the arena")
    blocks = []
    for v, nbytes, begin, end in lives:
        check(v.name in plan.offsets and v.name in plan.sizes, v, "has a place in the plan")
        size, at = plan.sizes[v.name], plan.offsets[v.name]
        check(size >= nbytes, v, f"has room for its {nbytes} bytes, not {size}")
        blocks.append(_Block(f"value {v.name!r}", at, at + size, nbytes, begin, end))
    return blocks


def _scratch_blocks(graph: Graph, plan: Plan) -> list[_Block]:
    index = {node.name: i for i, node in enumerate(graph.nodes)}
    blocks = []
    for name in {**plan.scratch_offsets, **plan.scratch_sizes}:
        label = f"scratch of node {name!r}"
        check(name in index, label, "belongs to a node of the graph")
        check(name in plan.scratch_offsets and name in plan.scratch_sizes, label, "has an offset and a size")
        begin, size = plan.scratch_offsets[name], plan.scratch_sizes[name]
        check(size >= 0, label, f"its size is not negative, as {size} is")
        since = -1 if index[name] == 0 and _fed(graph) else index[name]
        blocks.append(_Block(label, begin, begin + size, size, since, index[name]))
    return blocks


def _by_rows_over(graph: Graph) -> set[frozenset[str]]:
    """Pairs of values that share bytes row by row: what that does is the business of verify_depth_first."""
    runs = [n for n in graph.nodes if n.overwrites and isinstance(n.attrs, DepthFirst)]
    return {frozenset(f"value {v!r}" for v in (n.overwrites, n.outputs[-1])) for n in runs}


def _check_overlaps(graph: Graph, blocks: Sequence[_Block]) -> None:
    pairs = _by_rows_over(graph)
    for i, a in enumerate(blocks):
        for b in blocks[:i]:
            at = max(a.first, b.first)
            shared = min(a.end, b.end) - max(a.begin, b.begin)
            if at > min(a.last, b.last) or shared <= 0 or frozenset((a.label, b.label)) in pairs:
                continue
            where = node_label(graph.nodes[at]) if 0 <= at < len(graph.nodes) else "the start"
            raise fail(f"{a.label} and {b.label}", f"both exist at {where} and share {shared} bytes of the arena")


def _peak(graph: Graph, blocks: Sequence[_Block]) -> int:
    """At least so many bytes live at once; of two values that share bytes the smaller one is left out."""
    pairs = _by_rows_over(graph)
    smaller = {min((b for b in blocks if b.label in pair), key=lambda b: b.need).label for pair in pairs}
    times = range(-1, len(graph.nodes) + 1)
    return max(sum(b.need for b in blocks if b.first <= t <= b.last and b.label not in smaller) for t in times)
