# SPDX-License-Identifier: Apache-2.0
"""The text form of a graph: stable, one line per value that a node does not make and one per node. For reading, for
golden files and for diffs; ``irfile`` is what loads again.

    %conv.5.y : s8[64,64,48] q(0.0235, -128) = conv2d(x=%x, weight=@conv.5.weight, ...) {kernel=(3, 3)}  # blocks.1

``%`` marks inputs and activations, ``@`` constants, ``$`` states. Attributes at their default are left out. A comment
that reads ``# conv.5 of blocks.1`` names node and layer, one that reads ``# conv.5`` both.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import fields

from trainlet.ir.graph import Array, Attrs, Graph, Kind, Node, Operands, Value

_SIGIL = {Kind.INPUT: "%", Kind.ACTIVATION: "%", Kind.CONST: "@", Kind.STATE: "$"}


def to_text(graph: Graph) -> str:
    """The text of ``graph``, ending in a newline. Equal graphs give equal text; data shows as a hash of its bytes."""
    return "\n".join(_lines(graph)) + "\n"


def _lines(graph: Graph) -> Iterator[str]:
    yield f"graph {graph.name} {graph.stage.value}"
    face = graph.interface
    roles = (("input", face.inputs), ("target", face.targets), ("rate", (face.rate,) if face.rate else ()))
    for role, names in roles:
        yield from (f"{role} {_typed(graph.values[name])}" for name in names)
    for kind in (Kind.CONST, Kind.STATE):
        for v in graph.values.values():
            if v.kind is kind:
                data = graph.data.get(v.name)
                yield f"{kind.value} {_typed(v)}" + ("" if data is None else f" = {digest(data)}")
    for node in graph.nodes:
        yield _node(graph, node)
    losses = f" loss {', '.join(_ref(graph, name) for name in face.losses)}" if face.losses else ""
    yield f"return {', '.join(_ref(graph, name) for name in face.outputs)}{losses}"


def digest(data: Array) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of the array's little-endian bytes."""
    raw = data.astype(data.dtype.newbyteorder("<"), copy=False).tobytes()
    return hashlib.sha256(raw).hexdigest()[:16]


def _ref(graph: Graph, name: str) -> str:
    v = graph.values.get(name)
    return f"?{name}" if v is None else _SIGIL[v.kind] + name  # a graph that is not valid can be printed too


def _typed(v: Value) -> str:
    text = f"{_SIGIL[v.kind]}{v.name} : {v.dtype}[{','.join(map(str, v.shape))}]"
    if v.q is not None:
        text += f" q({float(v.q.scale)!r}, {v.q.zero})"
    if v.exponent is not None:
        text += f" e{v.exponent}"
    if v.fan_in is not None:
        text += f" random({v.fan_in})"
    return text


def _node(graph: Graph, node: Node) -> str:
    made = ", ".join(_typed(graph.values[n]) if n in graph.values else f"?{n}" for n in node.outputs)
    text = f"{made} = " if made else ""
    text += f"{node.op}({_named(graph, node.operands)})"
    if node.stores:
        text += f" -> {_named(graph, node.stores)}"
    if node.overwrites:
        text += f" over {_ref(graph, node.overwrites)}"
    if node.kernel:
        text += f" by {node.kernel}"
    attrs = _attrs(node.attrs)
    if attrs:
        text += f" {{{attrs}}}"
    return f"{text}  # {node.name}" + ("" if node.name == node.layer else f" of {node.layer}")


def _named(graph: Graph, operands: Operands) -> str:
    return ", ".join(f"{k}={'+'.join(_ref(graph, v) for v in values)}" for k, values in operands.items())


def _attrs(attrs: Attrs) -> str:
    shown = ((f, getattr(attrs, f.name)) for f in fields(attrs))
    return ", ".join(f"{f.name}={_literal(value)}" for f, value in shown if value != f.default)


def _literal(value: object) -> str:
    if isinstance(value, Attrs):
        return f"{type(value).__name__}({_attrs(value)})"
    if isinstance(value, tuple):
        return f"({', '.join(map(_literal, value))}{',' * (len(value) == 1)})"
    if isinstance(value, float):
        return repr(float(value))  # a numpy scalar prints as the number that it is
    return value if isinstance(value, str) else repr(value)
