# SPDX-License-Identifier: Apache-2.0
"""Which rows of its inputs a row of an operator's output needs, and the order in which the rows of a stream are made.

A stream makes one row at a time, always of its last node that has the rows it needs: every row is used up as far as
possible before the next one before it is made, and that is what keeps the rings short. The C does the same
(csrc/kernels/stream.c).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from trainlet.attrs import Attrs, Conv2d
from trainlet.ir.graph import Node, Value


@dataclass(frozen=True, slots=True)
class Window:
    """Row y of the output needs the rows y * stride - pad .. + size - 1 of the input, as far as there are such."""

    size: int = 1
    stride: int = 1
    pad: int = 0

    def first(self, y: int, height: int) -> int:
        """The first row of the input, of ``height`` rows, that output rows from ``y`` on need."""
        return min(max(y * self.stride - self.pad, 0), height)

    def end(self, y: int, height: int) -> int:
        """Past the last row of the input that output row ``y`` needs."""
        return min(max(y * self.stride - self.pad + self.size, 0), height)


def window(node: Node) -> Window:
    """The rows that a node which runs by rows needs of each of its activations."""
    a = node.attrs
    if not isinstance(a, Conv2d):
        return Window()
    return Window((a.kernel[0] - 1) * a.dilation[0] + 1, a.stride[0], a.pads[0])


def made_in_order(nodes: Sequence[Node], values: Mapping[str, Value]) -> Iterator[tuple[int, Sequence[int]]]:
    """The rows of a stream in the order in which they are made: the node's index, and how many rows of each node's
    output there are before."""
    maker = {n.outputs[0]: i for i, n in enumerate(nodes)}
    inputs = [[maker[v] for v in n.inputs if v in maker] for n in nodes]
    heights = [values[n.outputs[0]].shape[0] for n in nodes]
    windows = [window(n) for n in nodes]
    done = [0] * len(nodes)

    def ready(i: int) -> bool:
        return done[i] < heights[i] and all(done[j] >= windows[i].end(done[i], heights[j]) for j in inputs[i])

    while (i := next((i for i in reversed(range(len(nodes))) if ready(i)), -1)) >= 0:
        yield i, done
        done[i] += 1


def ring_rows(nodes: Sequence[Node], values: Mapping[str, Value], image: str | None = None) -> dict[str, int]:
    """How many rows each value made by ``nodes``, run as a stream, needs to have at most: from the oldest that is still
    needed to the one that is being made. ``image`` names an input that is delivered row by row."""
    if image is not None:
        nodes = [Node("input", image, image, (), (image,), Attrs()), *nodes]
    heights = [values[n.outputs[0]].shape[0] for n in nodes]
    windows = [window(n) for n in nodes]
    readers = [[i for i, n in enumerate(nodes) if made.outputs[0] in n.inputs] for made in nodes]
    rows = [0] * len(nodes)
    for i, done in made_in_order(nodes, values):
        needed = (windows[r].first(done[r], heights[i]) for r in readers[i] if done[r] < heights[r])
        rows[i] = max(rows[i], done[i] + 1 - min(needed, default=done[i]))
    return {n.outputs[0]: max(r, 1) for n, r in zip(nodes, rows, strict=True)}


def overwriting_lead(nodes: Sequence[Node], values: Mapping[str, Value], gone: str) -> int:
    """How many bytes before the whole input ``gone`` of a stream its last output has to begin, so that each of its rows
    is written where no row is needed any more. A multiple of 4."""
    readers = [i for i, n in enumerate(nodes) if gone in n.inputs]
    last = len(nodes) - 1
    height, windows = values[gone].shape[0], [window(n) for n in nodes]
    heights = [values[n.outputs[0]].shape[0] for n in nodes]
    bytes_in, bytes_out = (values[v].nbytes // values[v].shape[0] for v in (gone, nodes[last].outputs[0]))
    same = nodes[last].op == "add" and last in readers and bytes_in == bytes_out

    def lead(reads_itself: bool) -> int:
        most = 0
        for i, done in made_in_order(nodes, values):
            if i != last:
                continue
            now = [done[r] + (r == last and not reads_itself) for r in readers]
            waiting = [windows[r].first(y, height) for r, y in zip(readers, now, strict=True) if y < heights[r]]
            most = max(most, (done[last] + 1) * bytes_out - min(waiting, default=height) * bytes_in)
        return (most + 3) // 4 * 4

    # an addition may write over the very elements that it reads
    return lead(True) if not same or lead(False) > 0 else 0
