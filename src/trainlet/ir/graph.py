# SPDX-License-Identifier: Apache-2.0
"""The graph: an ordered tuple of nodes over named values, and nothing that can change.

The order of ``Graph.nodes`` *is* the schedule: reordering is a permutation and a lifetime is a pair of
indices. Tensors are NHWC with batch 1, so an activation has shape (H, W, C); weights are OHWI (depthwise:
C, kh, kw, 1).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from trainlet.errors import UsageError
from trainlet.ir.dtypes import dtype_bits
from trainlet.ir.interface import Interface

Array = NDArray[np.generic]
Image = NDArray[np.int8]
T = TypeVar("T")


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
    sum made from one): its real value is r * 2**exponent_table[slot]. ``fan_in`` is that of a state without data, which
    starts at random numbers within +-1/sqrt(fan_in)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: Kind = Kind.ACTIVATION
    q: QParams | None = None
    exponent: int | None = None
    fan_in: int | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in memory; 1-bit and 4-bit tensors are packed."""
        return (self.size * dtype_bits(self.dtype) + 7) // 8


@dataclass(frozen=True, slots=True)
class Attrs:
    """What of a node is neither a value that it reads nor one that it writes. Base of all attributes, and the
    attributes of an operator that has none."""


class Operands(Mapping[str, tuple[str, ...]]):
    """The values that stand at the operands of a node, by the operand's name, in the order of the operator's row. What
    is optional and not there has no entry."""

    __slots__ = ("_items",)

    def __init__(self, **values: str | tuple[str, ...] | None) -> None:
        """Each operand by its one value, or by the several that an operand such as ``further`` may have."""
        given = {k: (v,) if isinstance(v, str) else v for k, v in values.items()}
        self._items = {k: tuple(v) for k, v in given.items() if v}

    def __getitem__(self, name: str) -> tuple[str, ...]:
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(tuple(self._items.items()))

    def __repr__(self) -> str:
        return f"Operands({', '.join(f'{k}={v[0] if len(v) == 1 else v!r}' for k, v in self._items.items())})"

    def flat(self) -> tuple[str, ...]:
        """All values, in order."""
        return tuple(v for values in self._items.values() for v in values)


class Bound(Generic[T]):
    """What is known of the values at a node's operands (shapes, arrays, ...), by the operand's name."""

    __slots__ = ("_items",)

    def __init__(self, operands: Mapping[str, tuple[str, ...]], values: Mapping[str, T]) -> None:
        self._items = {k: tuple(values[v] for v in names) for k, names in operands.items()}

    def __getitem__(self, name: str) -> T:
        """That of the operand's one value; KeyError where it has none."""
        (found,) = self._items[name]
        return found

    def __contains__(self, name: object) -> bool:
        return name in self._items

    def get(self, name: str) -> T | None:
        """That of the operand's one value, or None."""
        return self[name] if name in self._items else None

    def all(self, name: str) -> tuple[T, ...]:
        """Those of all values of an operand that may have several."""
        return self._items.get(name, ())

    def flat(self) -> tuple[T, ...]:
        """Those of all operands, in order."""
        return tuple(v for values in self._items.values() for v in values)


@dataclass(frozen=True, slots=True)
class Node:
    """One operator. ``layer`` is the name of the model's layer it comes from, shown in every message; ``operands`` are
    the values that it reads, ``stores`` the states that it updates in place; ``overwrites`` is an input whose memory
    its output takes, or nothing; ``kernel`` the C that runs it (``ops``), once one has been chosen."""

    op: str
    name: str
    layer: str
    operands: Operands
    outputs: tuple[str, ...]
    attrs: Attrs
    stores: Operands = field(default_factory=Operands)
    overwrites: str = ""
    kernel: str = ""

    def __post_init__(self) -> None:
        for what, given in (("operands", self.operands), ("stores", self.stores)):
            if not isinstance(given, Operands):
                raise UsageError(f"node {self.name!r}: {what} are given by name, as Operands(x=...), not {given!r:.80}")

    @property
    def inputs(self) -> tuple[str, ...]:
        """All values that it reads, in the order of the operands."""
        return self.operands.flat()

    @property
    def writes(self) -> tuple[str, ...]:
        """All states that it updates."""
        return self.stores.flat()

    @property
    def output(self) -> str:
        """The one value that it makes; ValueError where it makes none or several."""
        (made,) = self.outputs
        return made

    def __getitem__(self, operand: str) -> str:
        """The one value at an operand; KeyError where it has none."""
        (found,) = self.operands[operand]
        return found

    def get(self, operand: str) -> str | None:
        """The one value at an operand, or None."""
        return self[operand] if operand in self.operands else None

    def all(self, operand: str) -> tuple[str, ...]:
        """The values at an operand that may have several."""
        return self.operands.get(operand, ())

    def bind(self, values: Mapping[str, T]) -> Bound[T]:
        """What ``values`` knows of the operands."""
        return Bound(self.operands, values)

    def updated(self, name: str) -> str | None:
        """The state that it updates under that name, or None."""
        return self.stores[name][0] if name in self.stores else None

    def reading(self, **operands: str | tuple[str, ...] | None) -> Node:
        """The same node with these operands added or changed."""
        return replace(self, operands=Operands(**{**self.operands, **operands}))


@dataclass(frozen=True, slots=True)
class DepthFirst(Attrs):
    """Consecutive forward nodes that run depth first, by output rows. ``values`` are what they make; ``rings`` says how
    many rows there are of each value that never exists whole: of what no other node reads, and of the model's image
    where that is delivered by rows. Where the node overwrites an input, its last output begins ``lead`` bytes before it
    and follows its reader through it."""

    nodes: tuple[Node, ...]
    values: tuple[Value, ...]
    rings: tuple[tuple[str, int], ...]
    lead: int = 0


@dataclass(frozen=True)
class Graph:
    """An immutable program. ``data`` holds the arrays of constants and the initial values of states."""

    name: str
    stage: Stage
    interface: Interface
    values: Mapping[str, Value]
    nodes: tuple[Node, ...]
    data: Mapping[str, Array] = field(repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", MappingProxyType(dict(self.values)))
        object.__setattr__(self, "data", MappingProxyType(dict(self.data)))

    @property
    def inputs(self) -> tuple[str, ...]:
        """What the model looks at; not the targets and the rate of a training step."""
        return self.interface.inputs

    @property
    def outputs(self) -> tuple[str, ...]:
        """What the model says; not the losses of a training step."""
        return self.interface.outputs

    def with_interface(self, **changes: Any) -> Graph:
        """The same graph with other fields of its interface."""
        return replace(self, interface=replace(self.interface, **changes))

    @property
    def image(self) -> Value:
        """The first input: the image of a model."""
        return self.values[self.inputs[0]]

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
        """The same program with the nodes of its depth-first runs one after the other."""
        runs = [n.attrs for n in self.nodes if isinstance(n.attrs, DepthFirst)]
        if not runs:
            return self
        nodes = [inner for n in self.nodes for inner in (n.attrs.nodes if isinstance(n.attrs, DepthFirst) else (n,))]
        values = {**{v.name: v for s in runs for v in s.values}, **self.values}
        return replace(self, nodes=tuple(nodes), values=values)

    def with_nodes(self, nodes: Iterable[Node], *, stage: Stage | None = None) -> Graph:
        """The same graph with another list of nodes; values that nothing names any more are dropped."""
        nodes = tuple(nodes)
        used = {*self.interface.given, *self.interface.made}
        for n in nodes:
            used.update(n.inputs, n.outputs, n.writes)
        values = {k: v for k, v in self.values.items() if k in used}
        data = {k: v for k, v in self.data.items() if k in used}
        return replace(self, nodes=nodes, values=values, data=data, stage=stage or self.stage)

    def __repr__(self) -> str:
        counts = f"{len(self.nodes)} nodes, {len(self.values)} values"
        return f"<Graph {self.name!r}: stage {self.stage}, {counts}, {len(self.states())} states>"

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
        self.given: list[str] = list(base.interface.given) if base else []

    def add(self, value: Value, data: Array | None = None) -> str:
        """Registers a value and its data; the name must be new."""
        if value.name in self.values:
            raise ValueError(f"value {value.name!r} is defined twice")
        self.values[value.name] = value
        if data is not None:
            self.data[value.name] = data
        if value.kind is Kind.INPUT:
            self.given.append(value.name)
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

    def build(
        self,
        stage: Stage,
        outputs: Iterable[str],
        *,
        targets: tuple[str, ...] = (),
        rate: str = "",
        losses: tuple[str, ...] = (),
    ) -> Graph:
        """The finished graph; it is not verified here. What is given and is neither target nor rate is an input."""
        inputs = tuple(v for v in self.given if v not in targets and v != rate)
        interface = Interface(inputs, tuple(outputs), targets, rate, losses)
        return Graph(self.name, stage, interface, self.values, tuple(self.nodes), self.data)
