# SPDX-License-Identifier: Apache-2.0
"""The text of one call and of a function that holds calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from trainlet.emit.code import Lines, NodeLines, broken, comment, joined, plain
from trainlet.emit.emitter import Emitter
from trainlet.ir import Node
from trainlet.ops import OPS
from trainlet.ops.registry import kernel_of

_LOCALS: Final = (("a", "arena"), ("s", "state"))


def label(node: Node) -> str:
    """How lines, profiles and probes name a node: "layer: operator"."""
    return f"{comment(node.layer)}: {node.op}"


def statement(e: Emitter, node: Node) -> Lines:
    """The call of a node, in a block of its own: the views that a call is given live to the end of the block they stand
    in, and without one they would add up to kilobytes of stack."""
    text = kernel_of(node).call(e, node)
    text = f"{{ TL_TRY({text}); }}" if OPS[node.op].refuses else f"{{ {text}; }}"
    lines = (f"    /* {label(node)} */", *broken(text, "    ", "        "))
    return Lines(lines, (NodeLines(label(node), 1, len(lines), e.run is not None),))


def function(e: Emitter, head: str, nodes: Sequence[Node], end: str = "") -> Lines:
    """A function over a context ``c`` that runs ``nodes``, with the locals that they use; ``end`` is its last line."""
    e.used.clear()
    body = [statement(e, n) for n in nodes]
    local = [f"    uint8_t *const {v} = c->{f};" for v, f in _LOCALS if v in e.used]
    unused = [] if nodes else ["    (void)c;"]
    begin = Lines((head, "{", *unused, *local), ())
    return joined((begin, *body, plain(f"{end}}}")))
