# SPDX-License-Identifier: Apache-2.0
"""The text of one call and of a function that holds calls."""

from __future__ import annotations

import re
import textwrap
from typing import Final

from trainlet.emit.emitter import Emitter, comment
from trainlet.emit.rules import EMIT
from trainlet.ir.graph import Node

REFUSES: Final = frozenset({"check_lr", "softmax_xent", "enter_grad"})
"""Operators whose call may end the step with a status."""

_LOCALS: Final = (("a", "arena"), ("s", "state"))


def statement(e: Emitter, node: Node) -> str:
    """The call of a node, in a block of its own: the views that a call is given live to the end of the block they stand
    in, and without one they would add up to kilobytes of stack."""
    text = EMIT[node.op](e, node)
    text = f"{{ TL_TRY({text}); }}" if node.op in REFUSES else f"{{ {text}; }}"
    body = textwrap.fill(
        text, 116, initial_indent="    ", subsequent_indent="        ", break_long_words=False, break_on_hyphens=False
    )
    return f"    /* {comment(node.layer)}: {node.op} */\n{body}\n"


def function(head: str, lines: str) -> str:
    """A function over a context ``c``, with the locals that its lines use."""
    local = "".join(f"    uint8_t *const {v} = c->{f};\n" for v, f in _LOCALS if re.search(rf"\b{v}( \+|,)", lines))
    unused = "" if re.search(r"\bc(->|\))", lines + local) else "    (void)c;\n"
    return f"{head}\n{{\n{unused}{local}{lines}}}\n"
