# SPDX-License-Identifier: Apache-2.0
"""The memory map of a training step as a picture: address against time, and what exists at the peak, by layer."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Final

from trainlet.emit import Compiled
from trainlet.emit.statement import label
from trainlet.ir import Graph
from trainlet.ops.roles import loss_of
from trainlet.plan.arena import Block, lifetimes, loads

KINDS: Final = {
    "forward": ("forward activation", "#7fb2d9"),
    "kept": ("kept for the backward pass", "#1f5f99"),
    "ring": ("rows of a depth-first run", "#9ad1b8"),
    "gradient": ("gradient", "#d98a4e"),
    "scratch": ("scratch", "#b9b9b9"),
}
_WIDTH, _HEIGHT, _LEFT, _TOP = 760, 380, 70, 34
_LISTED: Final = 8


@dataclass(frozen=True, slots=True)
class Buffer:
    """A buffer of the arena: where it lies (bytes), from which node to which it exists, what it is and whose layer."""

    name: str
    layer: str
    kind: str
    begin: int
    nbytes: int
    first: int
    last: int


def buffers(compiled: Compiled) -> list[Buffer]:
    """All buffers of a compiled model, in the order in which they begin."""
    graph, plan = compiled.graph, compiled.plan
    flat = graph.flat()
    layers = {o: n.layer for n in (*graph.nodes, *flat.nodes) for o in (*n.outputs, n.name)}
    loss = next((i for i, n in enumerate(graph.nodes) if n is loss_of(graph)), len(graph.nodes))
    made = []
    for b in lifetimes(graph):
        begin = (plan.scratch_offsets if b.scratch else plan.offsets)[b.name]
        kind = _kind(flat, b, loss)
        made.append(Buffer(b.name, layers.get(b.name, "input"), kind, begin, b.size, b.first, b.last))
    return sorted(made, key=lambda b: (b.first, b.begin))


def _kind(flat: Graph, b: Block, loss: int) -> str:
    if b.scratch:
        return "scratch"
    if flat.values[b.name].exponent is not None:
        return "gradient"
    if b.first < loss < b.last:
        return "kept"
    whole = flat.values[b.name].nbytes
    return "ring" if b.size < whole - 3 else "forward"


def memory_svg(compiled: Compiled) -> str:
    """The picture. Its width is time, one column for each node; a rectangle's tooltip says what it is."""
    graph = compiled.graph
    columns, height = len(graph.nodes) + 1, max(compiled.plan.arena_bytes, 1)
    made = buffers(compiled)
    peak = compiled.plan.peak

    def x(t: float) -> float:
        return round(_LEFT + (t + 1) * _WIDTH / columns, 2)

    def y(at: float) -> float:
        return round(_TOP + _HEIGHT * (1 - at / height), 2)

    parts = [
        f'<rect x="{x(b.first)}" y="{y(b.begin + b.nbytes)}" width="{round(x(b.last + 1) - x(b.first), 2)}" '
        f'height="{round(y(b.begin) - y(b.begin + b.nbytes), 2)}" fill="{KINDS[b.kind][1]}" stroke="#fff" '
        f'stroke-width="0.4"><title>{escape(f"{b.layer}: {b.name}, {b.nbytes} bytes")}</title></rect>'
        for b in made
    ]
    line = f'x1="{x(peak)}" x2="{x(peak)}" y1="{_TOP}" y2="{_TOP + _HEIGHT}"'
    parts.append(f'<line {line} stroke="#c00" stroke-dasharray="3 2"/>')
    for step in range(5):
        at = height * step / 4
        parts.append(
            f'<text x="{_LEFT - 8}" y="{y(at) + 4}" text-anchor="end">{at / 1024:.1f} KiB</text>'
            f'<line x1="{_LEFT - 4}" x2="{_LEFT}" y1="{y(at)}" y2="{y(at)}" stroke="#666"/>'
        )
    under, end = _TOP + _HEIGHT + 18, _LEFT + _WIDTH
    parts.append(f'<text x="{_LEFT}" y="{under}">start of the step</text>')
    parts.append(f'<text x="{end}" y="{under}" text-anchor="end">end, after {columns - 1} nodes</text>')
    parts += _legend()
    parts += _peak_list(graph, made, peak)
    title = f"arena of {graph.name}, scheme {compiled.scheme.name}: {compiled.plan.arena_bytes} bytes"
    text = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_LEFT + _WIDTH + 330} {_TOP + _HEIGHT + 52}" '
        f'font-family="sans-serif" font-size="12">\n<rect width="100%" height="100%" fill="#fff"/>\n'
        f'<text x="{_LEFT}" y="20" font-size="14">{escape(title)}</text>\n{text}\n</svg>\n'
    )


def _legend() -> list[str]:
    found, at = [], _LEFT
    for text, color in KINDS.values():
        y = _TOP + _HEIGHT + 30
        found.append(f'<rect x="{at}" y="{y}" width="12" height="12" fill="{color}"/>')
        found.append(f'<text x="{at + 17}" y="{y + 10}">{text}</text>')
        at += 40 + 7 * len(text)
    return found


def _peak_list(graph: Graph, made: list[Buffer], peak: int) -> list[str]:
    """The buffers that exist at the peak, the largest first."""
    alive = sorted((b for b in made if b.first <= peak <= b.last), key=lambda b: -b.nbytes)
    node = graph.nodes[peak] if 0 <= peak < len(graph.nodes) else None
    what = label(node) if node else "while the image is delivered"
    lines = [f"at the peak, {max(loads(graph))} bytes:", what, ""]
    lines += [f"{b.nbytes:>7}  {b.layer}{' (scratch)' if b.kind == 'scratch' else ''}" for b in alive[:_LISTED]]
    rest = alive[_LISTED:]
    lines += [f"{sum(b.nbytes for b in rest):>7}  {len(rest)} smaller ones"] if rest else []
    place = f'x="{_LEFT + _WIDTH + 14}" xml:space="preserve"'
    return [f'<text {place} y="{_TOP + 12 + 17 * i}">{escape(t)}</text>' for i, t in enumerate(lines)]
