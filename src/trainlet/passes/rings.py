# SPDX-License-Identifier: Apache-2.0
"""How many rows of each value a depth-first run needs at once, and how far its output must lie before an input that it
is written over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from trainlet.ir import Node, Value
from trainlet.ops import OPS, No
from trainlet.ops.depth_first import made_in_order, row_makers


def ring_rows(nodes: Sequence[Node], values: Mapping[str, Value], image: str | None = None) -> dict[str, int]:
    """How many rows each value made by ``nodes``, run depth first, needs to have at most: from the oldest that is still
    needed to the one that is being made. ``image`` names an input that is delivered row by row."""
    makers = row_makers(nodes, image)
    heights = [values[m.output].shape[0] for m in makers]
    readers = [[i for i, m in enumerate(makers) if made.output in m.reads] for made in makers]
    rows = [0] * len(makers)
    for i, done in made_in_order(makers, values):
        needed = (makers[r].window.first(done[r], heights[i]) for r in readers[i] if done[r] < heights[r])
        rows[i] = max(rows[i], done[i] + 1 - min(needed, default=done[i]))
    return {m.output: max(r, 1) for m, r in zip(makers, rows, strict=True)}


def overwriting_lead(nodes: Sequence[Node], values: Mapping[str, Value], gone: str) -> int:
    """How many bytes before the whole input ``gone`` of a run its last output has to begin, so that each of its rows
    is written where no row is needed any more. A multiple of 4."""
    makers = row_makers(nodes)
    readers = [i for i, m in enumerate(makers) if gone in m.reads]
    last, height = len(nodes) - 1, values[gone].shape[0]
    heights = [values[m.output].shape[0] for m in makers]
    bytes_in, bytes_out = (values[v].nbytes // values[v].shape[0] for v in (gone, nodes[last].output))
    same = _elementwise(nodes[last]) and last in readers and bytes_in == bytes_out

    def lead(reads_itself: bool) -> int:
        most = 0
        for i, done in made_in_order(makers, values):
            if i != last:
                continue
            now = [done[r] + (r == last and not reads_itself) for r in readers]
            rows = zip(readers, now, strict=True)
            waiting = [makers[r].window.first(y, height) for r, y in rows if y < heights[r]]
            most = max(most, (done[last] + 1) * bytes_out - min(waiting, default=height) * bytes_in)
        return (most + 3) // 4 * 4

    # what works element by element may write over the very elements that it reads
    return lead(True) if not same or lead(False) > 0 else 0


def _elementwise(node: Node) -> bool:
    rule = OPS[node.op].overwrites
    return not isinstance(rule, No) and rule.elementwise
