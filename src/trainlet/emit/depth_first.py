# SPDX-License-Identifier: Apache-2.0
"""The C of a stream: a function for each node, which makes one row, and the table that csrc/kernels/stream.c walks."""

from __future__ import annotations

from trainlet.attrs import Stream
from trainlet.emit.emitter import Emitter
from trainlet.emit.statement import function, statement
from trainlet.ir.graph import Node
from trainlet.rows import window

WHOLE = -1  # input of a stage: a tensor that is there from the start
FED = -2  # input of a stage: the image, delivered row by row


def stream_text(e: Emitter, node: Node) -> str:
    """Functions and tables of the stream ``node``."""
    a = node.attrs
    assert isinstance(a, Stream)
    maker = {n.outputs[0]: i for i, n in enumerate(a.nodes)}
    fed = {v: FED for v in dict(a.rings) if v not in maker}
    functions, rows = "", []
    e.stream = node
    for n in a.nodes:
        name = e.symbol(f"row.{n.name}")
        functions += function(f"static void {name}(tl_context *c, int32_t y)", statement(e, n)) + "\n"
        reads = [v for v in n.inputs if len(e.value(v).shape) == 3]
        sources = [maker.get(v, fed.get(v, WHOLE)) for v in reads]
        first, second = (*sources, WHOLE)[:2]
        w = window(n)
        height, in_height = e.value(n.outputs[0]).shape[0], e.value(n.inputs[0]).shape[0]
        rows.append(f"    {{{name}, {first}, {second}, {height}, {in_height}, {w.size}, {w.stride}, {w.pad}}},\n")
    e.stream = None
    stages = e.symbol(f"{node.name}.stages")
    at = e.plan.scratch_offsets[node.name]
    return (
        f"{functions}static const tl_stage {stages}[] = {{\n{''.join(rows)}}};\n"
        f"static const tl_stream {e.symbol(node.name)} = {{{stages}, {len(a.nodes)}, {at}u}};\n\n"
    )
