# SPDX-License-Identifier: Apache-2.0
"""How much stack a program can need at most, from the call graphs that GCC writes (-fcallgraph-info=su)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from trainlet.errors import UnsupportedError

_NODE: Final = re.compile(r'^node: \{ title: "([^"]*)" label: "[^"]*?(\d+) bytes \((\w[^)]*)\)', re.MULTILINE)
_EDGE: Final = re.compile(r'^edge: \{ sourcename: "([^"]*)" targetname: "([^"]*)"', re.MULTILINE)
_INDIRECT: Final = "__indirect_call"
HELPER_BYTES: Final = 64
"""Charged for a function of the compiler's own library, of which GCC tells nothing."""


def stack_bound(graphs: Iterable[str], root: str, indirect: Iterable[str]) -> int:
    """Bytes, a multiple of 8, on the deepest path from ``root``. ``indirect`` names the functions, without their file,
    that calls through pointers reach. UnsupportedError for a recursion or a frame whose size is not fixed."""
    frames: dict[str, int] = {}
    calls: dict[str, set[str]] = {}
    for text in graphs:
        for name, size, kind in _NODE.findall(text):
            if kind != "static":
                raise UnsupportedError(f"{name}: its stack frame is {kind}; give its arrays a fixed size")
            frames[name] = int(size)
        for source, to in _EDGE.findall(text):
            calls.setdefault(source, set()).add(to)
    reached = set(indirect)
    calls[_INDIRECT] = {name for name in frames if name.rsplit(":", 1)[-1] in reached}
    deep: dict[str, int] = {}

    def depth(name: str, above: tuple[str, ...]) -> int:
        if name in above:
            raise UnsupportedError(f"{name} calls itself: no bound on the stack")
        if name not in deep:
            own = 0 if name == _INDIRECT else frames.get(name, HELPER_BYTES)
            deep[name] = own + max((depth(n, (*above, name)) for n in calls.get(name, ())), default=0)
        return deep[name]

    return (depth(root, ()) + 7) // 8 * 8
