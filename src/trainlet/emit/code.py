# SPDX-License-Identifier: Apache-2.0
"""Text of C: names, comments, lines that break between arguments, and the nodes that lines belong to."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

WIDTH: Final = 116
_OPEN, _CLOSE = "({[", ")}]"


def c_name(name: str) -> str:
    """``name`` as a C identifier; tl_ is the kernels' own."""
    ident = re.sub(r"\W", "_", name, flags=re.ASCII)
    return ident if ident[:1].isalpha() and not f"{ident}_".startswith("tl_") else f"m_{ident}"


def comment(text: str) -> str:
    """``text`` so that it neither ends nor opens a comment and stays on its line."""
    printable = "".join(c if c.isprintable() else " " for c in text)
    return printable.replace("*/", "* /").replace("/*", "/ *")


# --- lines that break between arguments -------------------------------------------------------------------------


def broken(text: str, first: str, rest: str) -> list[str]:
    """``text`` in lines of at most WIDTH characters, broken between the arguments of the outermost call; an argument
    that is longer is broken between its own."""
    lines, line = [], first
    for piece in _pieces(text, WIDTH - len(rest)):
        if len(line) + len(piece.rstrip()) > WIDTH and line.strip():
            lines.append(line.rstrip())
            line = rest
        line += piece
    return [*lines, line.rstrip()]


def wrapped(text: str, indent: str = "    ", width: int = WIDTH + 2) -> str:
    """Words in lines of at most ``width`` characters, as ``textwrap.fill`` breaks them, which takes as long for the
    weights of a model as the rest of the compiler."""
    lines, begin, room = [], 0, width - len(indent)
    while len(text) - begin > room:
        end = text.rfind(" ", begin, begin + room + 1)
        lines.append(text[begin:end])
        begin = end + 1
    return "\n".join(indent + line for line in (*lines, text[begin:]))


def _pieces(text: str, room: int, depth: int = 1) -> Iterator[str]:
    """``text`` cut behind the commas at a depth of brackets, and deeper where a piece is longer than ``room``."""
    for piece in _cut(text, depth):
        if len(piece.rstrip()) <= room or not any(c in piece for c in _OPEN):
            yield piece
        else:
            yield from _pieces(piece, room, depth + 1) if depth < _depth(text) else (piece,)


def _cut(text: str, depth: int) -> Iterator[str]:
    at, begin = 0, 0
    for i, c in enumerate(text):
        at += (c in _OPEN) - (c in _CLOSE)
        if c == "," and at == depth and text[i + 1 : i + 2] == " ":
            yield text[begin : i + 2]
            begin = i + 2
    yield text[begin:]


def _depth(text: str) -> int:
    most = at = 0
    for c in text:
        at += (c in _OPEN) - (c in _CLOSE)
        most = max(most, at)
    return most


# --- lines and nodes --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NodeLines:
    """Lines ``first`` .. ``last`` of NAME.c, counted from 1, that run the node ``label``, "layer: operator"; ``by_row``
    where they make one row of its output, y."""

    label: str
    first: int
    last: int
    by_row: bool


@dataclass(frozen=True, slots=True)
class Lines:
    """Lines of C; ``nodes`` counts from the first of them."""

    text: tuple[str, ...]
    nodes: tuple[NodeLines, ...]


def plain(text: str) -> Lines:
    """Lines that belong to no node."""
    return Lines(tuple(text.splitlines()), ())


def joined(parts: Iterable[Lines]) -> Lines:
    """All lines, one part behind the other."""
    text: list[str] = []
    nodes: list[NodeLines] = []
    for part in parts:
        at = len(text)
        nodes += [NodeLines(n.label, n.first + at, n.last + at, n.by_row) for n in part.nodes]
        text += part.text
    return Lines(tuple(text), tuple(nodes))
