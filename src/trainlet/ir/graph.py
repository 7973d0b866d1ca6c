# SPDX-License-Identifier: Apache-2.0
"""The graph: an ordered tuple of nodes over named values, and nothing that can change.

The order of ``Graph.nodes`` *is* the schedule: reordering is a permutation and a lifetime is a pair of
indices. Tensors are NHWC with batch 1, so an activation has shape (H, W, C); weights are OHWI (depthwise:
C, kh, kw, 1).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from trainlet.attrs import Attrs, Stream
from trainlet.ops import dtype_bits

Array = NDArray[np.generic]
Image = NDArray[np.int8]


class Stage(StrEnum):
    """What a graph may contain; ``verify_graph`` checks it against the operator table."""

    FLOAT = "float"
    INT8 = "int8"
    TRAIN = "train"
    LOWERED = "lowered"


class Kind(StrEnum):
    """Where a value lives."""

    INPUT = "input"  # given by the caller at each call
    CONST = "const"  # flash; its data is in ``Graph.data``
    STATE = "state"  # SRAM that outlives a step; ``Graph.data`` holds its initial value, if it has one
    ACTIVATION = "activation"  # made by a node, lives in the arena


@dataclass(frozen=True, slots=True)
class QParams:
    """Affine int8 quantisation of a whole tensor: real = scale * (q - zero)."""

    scale: float
    zero: int


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor. ``exponent`` is the slot of the run-time exponent table of an int8 gradient (or of the int32
    sum made from one): its real value is r * 2**exponent_table[slot]."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: Kind = Kind.ACTIVATION
    q: QParams | None = None
    exponent: int | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in memory; 1-bit and 4-bit tensors are packed."""
        return (self.size * dtype_bits(self.dtype) + 7) // 8


@dataclass(frozen=True, slots=True)
class Node:
    """One operator. ``layer`` is the name of the model's layer it comes from, shown in every message;
    ``writes`` names the state buffers that it updates in place; ``overwrites`` an input whose memory its output takes,
    or nothing."""

    op: str
    name: str
    layer: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attrs: Attrs
    writes: tuple[str, ...] = ()
    overwrites: str = ""


@dataclass(frozen=True)
class Graph:
    """An immutable program. ``data`` holds the arrays of constants and the initial values of states."""

    name: str
    stage: Stage
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    values: Mapping[str, Value]
    nodes: tuple[Node, ...]
    data: Mapping[str, Array] = field(repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", MappingProxyType(dict(self.values)))
        object.__setattr__(self, "data", MappingProxyType(dict(self.data)))

    def producer(self, value: str) -> Node | None:
        """The node that makes ``value``, or None for inputs, constants and states."""
        return next((n for n in self.nodes if value in n.outputs), None)

    def consumers(self, value: str) -> tuple[Node, ...]:
        """The nodes that read ``value``, in the order of the schedule."""
        return tuple(n for n in self.nodes if value in n.inputs)

    def find(self, op: str) -> tuple[Node, ...]:
        """All nodes of one operator, in order."""
        return tuple(n for n in self.nodes if n.op == op)

    def node(self, name: str) -> Node:
        """The node of that name; KeyError if there is none."""
        for n in self.nodes:
            if n.name == name:
                return n
        raise KeyError(name)

    def states(self) -> tuple[Value, ...]:
        """All state values, in the order they were added."""
        return tuple(v for v in self.values.values() if v.kind is Kind.STATE)

    def flat(self) -> Graph:
        """The same program with the nodes of its streams one after the other."""
        streams = [n.attrs for n in self.nodes if isinstance(n.attrs, Stream)]
        if not streams:
            return self
        nodes = [inner for n in self.nodes for inner in (n.attrs.nodes if isinstance(n.attrs, Stream) else (n,))]
        values = {**{v.name: v for s in streams for v in s.values}, **self.values}
        return replace(self, nodes=tuple(nodes), values=values)

    def with_nodes(self, nodes: Iterable[Node], *, stage: Stage | None = None) -> Graph:
        """The same graph with another list of nodes; values that nothing names any more are dropped."""
        nodes = tuple(nodes)
        used = {*self.inputs, *self.outputs}
        for n in nodes:
            used.update(n.inputs, n.outputs, n.writes)
        values = {k: v for k, v in self.values.items() if k in used}
        data = {k: v for k, v in self.data.items() if k in used}
        return replace(self, nodes=nodes, values=values, data=data, stage=stage or self.stage)

    def __str__(self) -> str:
        from trainlet.ir.text import to_text

        return to_text(self)


class GraphBuilder:
    """Collects values and nodes in order; ``build`` freezes them. Used by front ends and by autodiff."""

    def __init__(self, name: str, base: Graph | None = None) -> None:
        self.name = name
        self.values: dict[str, Value] = dict(base.values) if base else {}
        self.data: dict[str, Array] = dict(base.data) if base else {}
        self.nodes: list[Node] = []
        self.inputs: list[str] = list(base.inputs) if base else []

    def add(self, value: Value, data: Array | None = None) -> str:
        """Registers a value and its data; the name must be new."""
        if value.name in self.values:
            raise ValueError(f"value {value.name!r} is defined twice")
        self.values[value.name] = value
        if data is not None:
            self.data[value.name] = data
        if value.kind is Kind.INPUT:
            self.inputs.append(value.name)
        return value.name

    def const(self, name: str, data: Array, dtype: str) -> str:
        """A constant with its data."""
        return self.add(Value(name, tuple(data.shape), dtype, Kind.CONST), data)

    def emit(self, node: Node, *outputs: Value) -> str:
        """Appends ``node`` and the values it makes; returns the name of the first output."""
        for v in outputs:
            self.add(v)
        self.nodes.append(node)
        return node.outputs[0] if node.outputs else ""

    def build(self, stage: Stage, outputs: Iterable[str]) -> Graph:
        """The finished graph; it is not verified here."""
        return Graph(self.name, stage, tuple(self.inputs), tuple(outputs), self.values, tuple(self.nodes), self.data)
