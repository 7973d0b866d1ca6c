# SPDX-License-Identifier: Apache-2.0
"""The C of a depth-first run: a function for each node, which makes one row, and the table that
csrc/kernels/depth_first.c walks."""

from __future__ import annotations

from trainlet.emit.code import Lines, joined, plain
from trainlet.emit.emitter import Emitter
from trainlet.emit.statement import function
from trainlet.ir import Node
from trainlet.ops.depth_first import MAX_SOURCES, depth_first_of, maps, window

WHOLE = "TL_WHOLE"  # input of a stage: a tensor that is there from the start
FED = "TL_FED"  # input of a stage: the image, delivered row by row


def run_text(e: Emitter, run: Node) -> Lines:
    """Functions and tables of the depth-first run. ValueError where a node reads more maps than a stage has room for;
    no verified graph has one."""
    a = depth_first_of(run)
    maker = {n.output: str(i) for i, n in enumerate(a.nodes)}
    fed = {v: FED for v in dict(a.rings) if v not in maker}
    functions: list[Lines] = []
    rows = ""
    e.run = run
    for n in a.nodes:
        name = e.symbol(f"row.{n.name}")
        functions += [function(e, f"static void {name}(tl_context *c, int32_t y)", (n,)), plain("\n")]
        read = maps(n, e.graph.values)
        if len(read) > MAX_SOURCES:
            raise ValueError(f"{n.name}: makes a row from {len(read)} maps, and a stage has {MAX_SOURCES} sources")
        sources = [maker.get(v, fed.get(v, WHOLE)) for v in read]
        first, second = (*sources, *[WHOLE] * MAX_SOURCES)[:MAX_SOURCES]
        w = window(n)
        height, in_height = e.value(n.output).shape[0], e.value(read[0]).shape[0]
        rows += f"    {{{name}, {first}, {second}, {height}, {in_height}, {w.size}, {w.stride}, {w.pad}}},\n"
    e.run = None
    stages = e.symbol(f"{run.name}.stages")
    at = e.plan.scratch_offsets[run.name]
    tables = (
        f"static const tl_stage {stages}[] = {{\n{rows}}};\n"
        f"static const tl_depth_first {e.symbol(run.name)} = {{{stages}, {len(a.nodes)}, {at}u}};\n\n"
    )
    return joined((*functions, plain(tables)))
