# SPDX-License-Identifier: Apache-2.0
"""A run of nodes that are made row by row, as one node; made by ``passes/depth_first.py``. What a row needs of the rows
before it is walked here, as the C walks it (csrc/kernels/depth_first.c)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from trainlet.ir import Bound, DepthFirst, Graph, Node, Value
from trainlet.ops.op import (
    LOWERED,
    NO_WEIGHTS,
    SAME_ROW,
    Emitter,
    Kernel,
    No,
    Overwrites,
    RuleError,
    Type,
    Window,
    always,
    anywhere,
    call,
    need,
    nothing_aside,
    operands,
    step_op,
)
from trainlet.ops.registry import OPS, runs_by_rows, scratch_bytes

MAX_SOURCES: Final = 2  # of a tl_stage: tensors that a row is made from


def depth_first_of(node: Node) -> DepthFirst:
    """The attributes of a run."""
    assert isinstance(node.attrs, DepthFirst)
    return node.attrs


def window(node: Node) -> Window:
    """The rows that a node which runs by rows needs of each of its maps. RuleError where it does not run by rows."""
    rows = OPS[node.op].rows
    if isinstance(rows, No):
        raise RuleError(f"{node.op!r} does not run by rows: {rows.why}")
    return rows(node.attrs)


def maps(node: Node, values: Mapping[str, Value]) -> tuple[str, ...]:
    """What of a node's operands has rows."""
    return tuple(v for v in node.inputs if len(values[v].shape) == 3)


# --- the order of rows ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RowMaker:
    """What makes the rows of ``output`` from those of ``reads``."""

    output: str
    reads: tuple[str, ...]
    window: Window


def row_makers(nodes: Sequence[Node], image: str | None = None) -> list[RowMaker]:
    """Those of a run; ``image`` names an input that is delivered row by row."""
    delivered = [RowMaker(image, (), SAME_ROW)] if image else []
    return [*delivered, *(RowMaker(n.output, n.inputs, window(n)) for n in nodes)]


def made_in_order(makers: Sequence[RowMaker], values: Mapping[str, Value]) -> Iterator[tuple[int, Sequence[int]]]:
    """The rows of a run in the order in which they are made: the maker's index, and how many rows of each output there
    are before. One row at a time is made, always by the last maker that has the rows it needs: every row is used up as
    far as possible before the next one before it is made, and that is what keeps the rings short."""
    index = {m.output: i for i, m in enumerate(makers)}
    inputs = [[index[v] for v in m.reads if v in index] for m in makers]
    heights = [values[m.output].shape[0] for m in makers]
    done = [0] * len(makers)

    def ready(i: int) -> bool:
        window = makers[i].window
        return done[i] < heights[i] and all(done[j] >= window.end(done[i], heights[j]) for j in inputs[i])

    while (i := next((i for i in reversed(range(len(makers))) if ready(i)), -1)) >= 0:
        yield i, done
        done[i] += 1


# --- the row of the table ---------------------------------------------------------------------------------------


def _rule_depth_first(node: Node, ins: Bound[Value]) -> tuple[Type, ...]:
    a = depth_first_of(node)
    need(len(a.nodes) > 0, "holds at least one node")
    known = dict(zip(node.inputs, ins.flat(), strict=True))
    values = {v.name: v for v in a.values}
    for inner in a.nodes:
        need(runs_by_rows(inner), f"{inner.op!r} does not run by rows")
        need(all(i in known for i in inner.inputs), f"{inner.name!r} reads operands of the run and what it has made")
        read = maps(inner, known)
        need(
            len(read) <= MAX_SOURCES, f"a row is made from at most {MAX_SOURCES} maps, and {inner.name!r} reads {read}"
        )
        (made,) = OPS[inner.op].rule(inner, inner.bind(known))
        y = values.get(inner.output)
        need(y is not None and (y.shape, y.dtype) == made, f"the run holds what {inner.name!r} makes, {made}")
        known[inner.output] = values[inner.output]
    rows = dict(a.rings)
    need(all(0 < r <= known[n].shape[0] for n, r in rows.items()), "a ring has at most as many rows as its value")
    need(all(o in values and o not in rows for o in node.outputs), "its outputs are made inside, and whole")
    return tuple((values[o].shape, values[o].dtype) for o in node.outputs)


def _macs_depth_first(node: Node, ins: Bound[Value]) -> int:
    a = depth_first_of(node)
    known = {**dict(zip(node.inputs, ins.flat(), strict=True)), **{v.name: v for v in a.values}}
    return sum(OPS[n.op].macs(n, n.bind(known)) for n in a.nodes)


def counter_bytes(node: Node) -> int:
    """Bytes at the begin of a run's scratch: how many rows there are, 16 bits for each node; a multiple of 4."""
    return (2 * len(depth_first_of(node).nodes) + 3) // 4 * 4


def _scratch(graph: Graph, node: Node) -> int:
    """The counters, and what serves the nodes one after the other; ``graph`` is flat."""
    return counter_bytes(node) + max((scratch_bytes(graph, n) + 3) // 4 * 4 for n in depth_first_of(node).nodes)


def emit_depth_first(e: Emitter, node: Node) -> str:
    return call("tl_depth_first_run", f"&{e.symbol(node.name)}", "c")


ROWS: Final = (
    step_op(
        name="depth_first",
        attrs=DepthFirst,
        operands=operands("read*"),
        stores=(),
        stages=LOWERED,
        rule=_rule_depth_first,
        data=No("its nodes have theirs"),
        macs=_macs_depth_first,
        rows=No("it is itself a run over all rows"),
        overwrites=Overwrites(("read",), False, always),
        exponent=No("it holds nodes of the forward pass"),
        refuses=False,
        loss=No("it makes none"),
        fusions=(),
        kernels=(Kernel("tl_depth_first_run", anywhere, NO_WEIGHTS, _scratch, nothing_aside, emit_depth_first),),
    ),
)
