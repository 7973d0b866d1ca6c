# SPDX-License-Identifier: Apache-2.0
"""The check of depth-first runs: every row that a node reads is still in its ring. It counts the rows of a run with
nothing but their numbers, and shares no code with what sized the rings."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from trainlet.ir import DepthFirst, Graph, Node, Value, dtype_bits
from trainlet.ops import OPS, No, window
from trainlet.verify.errors import check


@dataclass
class _Tensor:
    """Which row each slot holds; -1 for none."""

    height: int
    slots: list[int] = field(default_factory=list)
    made: int = 0

    def put(self) -> None:
        self.slots[self.made % len(self.slots)] = self.made
        self.made += 1


def verify_depth_first(graph: Graph) -> None:
    """Raises VerifyError naming the node that would read a row which has been overwritten, or that never runs."""
    for node in graph.nodes:
        if isinstance(node.attrs, DepthFirst):
            _verify(graph, node, node.attrs)


class _Shared:
    """The bytes of an input that the last output is written over: which row of the input each still holds."""

    def __init__(self, node: Node, run: DepthFirst, gone: Value) -> None:
        self.gone, self.last, self.lead = gone.name, run.nodes[-1], run.lead
        self.row = gone.size * dtype_bits(gone.dtype) // 8 // gone.shape[0]
        self.owner = np.repeat(np.arange(gone.shape[0]), self.row)
        y = {v.name: v for v in run.values}[self.last.output]
        self.out_row = y.size * dtype_bits(y.dtype) // 8 // y.shape[0]
        check(self.lead % 4 == 0 and self.lead >= 0, node, f"its lead is a multiple of 4, not {self.lead}")

    def write(self, y: int) -> None:
        """Row ``y`` of the output has been made."""
        begin = y * self.out_row - self.lead
        self.owner[max(begin, 0) : max(begin + self.out_row, 0)] = -1

    def lost(self, rows: list[int]) -> list[int]:
        """Those rows of the input of which bytes are gone."""
        return [r for r in rows if (self.owner[r * self.row : (r + 1) * self.row] != r).any()]

    def reads_itself(self, reader: Node) -> bool:
        """Whether ``reader`` may write over what it reads for the same row: element by element the very same bytes."""
        rule = OPS[reader.op].overwrites
        elementwise = not isinstance(rule, No) and rule.elementwise
        return reader is self.last and elementwise and self.lead == 0 and self.row == self.out_row


def _verify(graph: Graph, node: Node, run: DepthFirst) -> None:
    rows = dict(run.rings)
    made = {v.name: v for v in run.values}
    tensors = {name: _empty(v, rows) for name, v in made.items()}
    shared = _Shared(node, run, graph.values[node.overwrites]) if node.overwrites else None
    image = next((name for name in rows if name not in made), None)
    if image is not None:
        tensors[image] = _empty(graph.values[image], rows)
        for _ in range(tensors[image].height):
            tensors[image].put()
            _drain(run, tensors, shared)
    _drain(run, tensors, shared)
    for n in run.nodes:
        t = tensors[n.output]
        check(t.made == t.height, node, f"{n.name!r} makes all {t.height} rows of its output, not {t.made}")


def _empty(v: Value, rows: dict[str, int]) -> _Tensor:
    return _Tensor(v.shape[0], [-1] * rows.get(v.name, v.shape[0]))


def _drain(run: DepthFirst, tensors: dict[str, _Tensor], shared: _Shared | None) -> None:
    again = True
    while again:
        again = False
        for n in run.nodes[::-1]:
            if _advance(n, tensors, shared):
                again = True
                break


def _advance(node: Node, tensors: dict[str, _Tensor], shared: _Shared | None) -> bool:
    """Makes a row of the node's output if all rows that it reads have been made; whether it did."""
    out = tensors[node.output]
    if out.made == out.height:
        return False
    read = {v: _rows(node, tensors[v].height, out.made) for v in node.inputs if v in tensors}
    if any(tensors[v].made < _needs(node, tensors[v].height, out.made) for v in read):
        return False
    out.put()  # while a row is made, what it is made from has to be there
    for v, rows in read.items():
        gone = [r for r in rows if r not in tensors[v].slots]
        check(not gone, node, f"reads rows {gone} of {v!r}, which are no longer in its ring of {len(tensors[v].slots)}")
    if shared is not None:
        _overwrite(node, shared, out.made - 1)
    return True


def _overwrite(node: Node, shared: _Shared, y: int) -> None:
    """What the making of row ``y`` does to an input that is overwritten."""
    read = _rows(node, len(shared.owner) // shared.row, y) if shared.gone in node.inputs else []
    before = shared.lost(read)
    if node is shared.last:
        shared.write(y)
    lost = before if shared.reads_itself(node) else shared.lost(read)
    check(not lost, node, f"reads rows {lost} of {shared.gone!r}, which have been written over")


def _needs(node: Node, height: int, y: int) -> int:
    """How many rows of an input there are before output row ``y`` is made: all up to the last that it needs."""
    w = window(node)
    return min(max(y * w.stride - w.pad + w.size, 0), height)


def _rows(node: Node, height: int, y: int) -> list[int]:
    """The rows of an input that output row ``y`` is made from."""
    w = window(node)
    begin = y * w.stride - w.pad
    return [r for r in range(begin, begin + w.size) if 0 <= r < height]
