# SPDX-License-Identifier: Apache-2.0
"""How much stack a program can need at most, from the call graphs that GCC writes (-fcallgraph-info=su), and how much
it gets."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final

from trainlet.errors import UnsupportedError

_NODE: Final = re.compile(r'^node: \{ title: "([^"]*)" label: "[^"]*?(\d+) bytes \((\w[^)]*)\)', re.MULTILINE)
_EDGE: Final = re.compile(r'^edge: \{ sourcename: "([^"]*)" targetname: "([^"]*)"', re.MULTILINE)
_SPLIT: Final = re.compile(r'^split: \{ title: "([^"]*)" bytes: (\d+) \}', re.MULTILINE)
_ASSEMBLY: Final = re.compile(r"(\w[\w.]*):$|\t@ args = \d+, pretend = ([1-9]\d*),")
INDIRECT: Final = "__indirect_call"
"""What a call through a pointer calls, in a call graph."""
HELPER_BYTES: Final = 64
"""Charged for a function of the compiler's own library, of which it tells nothing."""
INTERRUPT_BYTES: Final = 256
"""Of every stack, beyond what the deepest calls need: for one interrupt at a time. Its frame, with the FPU's registers
and aligned, takes up to 112 bytes; the rest is its handler's, and that by which another main is deeper than ours."""


def stack_reserve(graphs: Iterable[str], root: str, indirect: Mapping[str, str], helper_bytes: int) -> int:
    """Bytes of stack that a program gets, the same in every command: ``stack_bound`` and room for an interrupt."""
    return stack_bound(graphs, root, indirect, helper_bytes) + INTERRUPT_BYTES


def stack_bound(graphs: Iterable[str], root: str, indirect: Mapping[str, str], helper_bytes: int = HELPER_BYTES) -> int:
    """Bytes, a multiple of 8, on the deepest path from ``root``. ``indirect``: what calls through pointers reach, from
    patterns of callers to patterns of callees, both without their file; the first that fits a caller counts. A function
    that no graph has is charged ``helper_bytes``.
    UnsupportedError for a recursion or a frame whose size is not fixed."""
    frames: dict[str, int] = {}
    calls: dict[str, set[str]] = {}
    for text in graphs:
        split = {name: int(size) for name, size in _SPLIT.findall(text)}
        for name, size, kind in _NODE.findall(text):
            if kind != "static":
                raise UnsupportedError(f"{name}: its stack frame is {kind}; give its arrays a fixed size")
            frames[name] = int(size) + split.get(_bare(name), 0)
        for source, to in _EDGE.findall(text):
            calls.setdefault(source, set()).add(to)
    for source in [s for s, reached in calls.items() if INDIRECT in reached]:
        pattern = next((to for caller, to in indirect.items() if re.fullmatch(caller, _bare(source))), "")
        calls[source] |= {name for name in frames if re.fullmatch(pattern, _bare(name))}
    deep: dict[str, int] = {}

    def depth(name: str, above: tuple[str, ...]) -> int:
        if name in above:
            raise UnsupportedError(f"{name} calls itself: no bound on the stack")
        if name not in deep:
            own = 0 if name == INDIRECT else frames.get(name, helper_bytes)
            deep[name] = own + max((depth(n, (*above, name)) for n in calls.get(name, ())), default=0)
        return deep[name]

    return (depth(root, ()) + 7) // 8 * 8


def split_arguments(assembly: str) -> str:
    """Lines for a call graph, from GCC's assembler text of the same file: the bytes in which a function puts together
    an argument that came half in registers, half on the stack. GCC's own figure leaves them out."""
    name, found = "", []
    for m in filter(None, map(_ASSEMBLY.match, assembly.splitlines())):
        name = m[1] or name
        found += [f'split: {{ title: "{name}" bytes: {m[2]} }}\n'] if m[2] else []
    return "".join(found)


def _bare(name: str) -> str:
    return name.rsplit(":", 1)[-1]
