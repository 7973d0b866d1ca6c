# SPDX-License-Identifier: Apache-2.0
"""What a row of the operator table says, and what its functions may ask of the compiler.

No fact has a default: what an operator lacks is written as ``No`` with the reason, which is what the user reads where
the fact would be needed. The compiler is known here only by the protocols ``Tape``, ``Emitter`` and ``Quantizer``, so
that imports run one way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from trainlet.ir import Array, Attrs, Bound, Graph, Node, Operands, QParams, Stage, Value

F32 = NDArray[np.float32]
Clamp = tuple[float, float]
Type = tuple[tuple[int, ...], str]
"""Shape and dtype of a value."""

MODEL: Final = (Stage.FLOAT, Stage.INT8, Stage.TRAIN, Stage.LOWERED)
STEP: Final = (Stage.TRAIN, Stage.LOWERED)
LOWERED: Final = (Stage.LOWERED,)


class RuleError(ValueError):
    """A node breaks its operator's rule; the message says which, without naming the node."""


def need(ok: bool, rule: str) -> None:
    """Raises RuleError(rule) unless ``ok``."""
    if not ok:
        raise RuleError(rule)


@dataclass(frozen=True, slots=True)
class No:
    """The operator lacks the fact, and why."""

    why: str


# --- operands and parameters ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Operand:
    """A place for values: ``optional`` may have none, ``many`` any number."""

    name: str
    optional: bool
    many: bool


def operands(*names: str) -> tuple[Operand, ...]:
    """Operands by name, in their order: ``x`` has one value, ``scale?`` one or none, ``further*`` any number."""
    return tuple(Operand(n.rstrip("?*"), n.endswith(("?", "*")), n.endswith("*")) for n in names)


def check_operands(given: Operands, row: tuple[Operand, ...], what: str) -> None:
    """RuleError where ``given`` are not the operands of the row, in its order."""
    names = [o.name for o in row]
    for name in given:
        need(name in names, f"has no {what} {name!r}; its {what}s are {', '.join(names) or 'none'}")
    for o in row:
        count = len(given.get(o.name, ()))
        need(count > 0 or o.optional, f"its {what} {o.name!r} is missing")
        need(count <= 1 or o.many, f"its {what} {o.name!r} is one value, not {count}")
    need(list(given) == [n for n in names if n in given], f"its {what}s stand in the order {', '.join(names)}")


FIRST_PARAM: Final = 32
"""Slots of a node's rounding sites: 0 to 31 are its operands, from 32 on its parameters."""


@dataclass(frozen=True, slots=True)
class Channels:
    """How a ratio selects channels of a weight: along which of its axes, and in how many groups of the channels of
    ``operand``, which is kept for the update."""

    axis: Callable[[Attrs], int]
    groups: Callable[[Attrs], int]
    operand: str


@dataclass(frozen=True, slots=True)
class Param:
    """What of an operator trains: the constant at ``operand``, known to a scheme by that name. ``always``: in every
    step, whatever the scheme says; those are in reals and belong to a head. ``channels``: how a share of it is chosen,
    or ``No`` where it trains whole. ``rate``: integer steps per real gradient, by output channel, from the attributes,
    the scales of the weights and the scale of the input."""

    operand: str
    always: bool
    channels: Channels | No
    rate: Callable[[Attrs, F32, float], F32] | No


# --- rows and places --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Window:
    """Row y of the output needs the rows y * stride - pad .. + size - 1 of each (H, W, C) operand, as far as there are
    such."""

    size: int
    stride: int
    pad: int

    def first(self, y: int, height: int) -> int:
        """The first row of the input, of ``height`` rows, that output rows from ``y`` on need."""
        return min(max(y * self.stride - self.pad, 0), height)

    def end(self, y: int, height: int) -> int:
        """Past the last row of the input that output row ``y`` needs."""
        return min(max(y * self.stride - self.pad + self.size, 0), height)


SAME_ROW: Final = Window(1, 1, 0)


def same_row(attrs: Attrs) -> Window:
    """An operator that makes each row from the same row."""
    return SAME_ROW


def always(attrs: Attrs) -> bool:
    """A rule whatever the attributes."""
    return True


@dataclass(frozen=True, slots=True)
class Overwrites:
    """The output may take the memory of one of ``operands`` of its shape and type. ``elementwise``: each element is
    read before the same element is written, by rows too; otherwise the kernel keeps rows aside, and runs over all."""

    operands: tuple[str, ...]
    elementwise: bool
    when: Callable[[Attrs], bool]


class Exponent(Enum):
    """Whose exponent an integer gradient has that a node makes."""

    OWN = "its own"
    OF_G = "that of its operand g"


# --- differentiation --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sums:
    """A share of a gradient that was computed and is not yet rounded: int32 sums ``acc`` of at most ``bound``, each
    worth acc v 2^e real with v = 1; with ``scale``, a constant of weight scales, v is the largest of them over
    ``levels``, or that of the channel where ``levels`` is 0. In reals the sums are the share itself."""

    acc: str
    bound: int
    scale: str | None
    levels: int


@dataclass(frozen=True, slots=True)
class Move:
    """A share that is an existing gradient, neither computed nor rounded."""

    grad: str


class Tape(Protocol):
    """The walk in progress: what a gradient rule may ask, and where it says what it found."""

    @property
    def integer(self) -> bool:
        """Whether gradients are integers; otherwise the graph is one of reals."""

    @property
    def sums(self) -> str:
        """The dtype of sums."""

    @property
    def gradient(self) -> str:
        """The dtype of gradients."""

    @property
    def fraction_bits(self) -> int:
        """Bits that trained weights have behind their int8."""

    @property
    def rate(self) -> str:
        """The learning rate's value."""

    def value(self, name: str) -> Value:
        """The value of that name, of the model or of the step so far."""

    def scale_of(self, name: str) -> float:
        """Scale of an activation; 1 in reals."""

    def needs_gradient(self, name: str) -> bool:
        """Whether a trained parameter lies before this value."""

    def trained(self, node: Node, operand: str) -> Trained | None:
        """The trained states of a parameter; None where it is frozen."""

    def site(self, node: Node, operand: str) -> int:
        """The rounding site of the gradient of an operand, or of a parameter."""

    def takes_reals(self, name: str) -> bool:
        """Whether the maker of a value takes its gradient in reals, before it has entered the integers."""

    def same_exponent(self, name: str) -> int | None:
        """The exponent slot of a gradient, for what is made from it; None in reals."""

    def keep(self, node: Node, *made: Value) -> None:
        """A node of the forward pass: it runs right behind what makes its operand ``x``."""

    def emit(self, node: Node, *made: Value) -> None:
        """A node of the backward pass."""

    def defer(self, node: Node) -> None:
        """A node that runs once nothing can refuse the step any more."""

    def enter(self, node: Node, operand: str, g: str, factor: float) -> str:
        """The gradient ``g`` in reals, times ``factor``, as the integers of an operand's gradient; its name."""

    def reach(self, node: Node, operand: str, share: Sums | Move) -> None:
        """``share`` is what ``node`` adds to the gradient of the value at one of its operands."""


@dataclass(frozen=True, slots=True)
class Trained:
    """A parameter that trains. ``state`` holds it, or the ``channels`` (a table of u16) of it that train; ``fraction``
    the bits behind its int8; ``kept`` is what its update reads of the operand that it is multiplied by."""

    state: str
    fraction: str | None
    channels: str | None
    kept: str | None
    whole: bool


@dataclass(frozen=True, slots=True)
class Loss:
    """A loss over a model's output in reals: ``target`` is the value that the caller gives, from that output."""

    target: Callable[[Value], Value]


@dataclass(frozen=True, slots=True)
class Fusion:
    """The node's one output may disappear in the node of operator ``into`` that alone reads it, at ``operand``."""

    into: str
    operand: str
    make: Callable[[Node, Node], Node]


# --- C ----------------------------------------------------------------------------------------------------------


class Core(Protocol):
    """What a kernel may know of a target."""

    @property
    def core(self) -> str:
        """Such as ``cortex-m7``; ``host`` for this machine."""


class Emitter(Protocol):
    """What the C call of a node may ask for. ``row`` y of a depth-first run, or all rows."""

    @property
    def graph(self) -> Graph:
        """The graph, its depth-first runs flat."""

    def value(self, name: str) -> Value:
        """The value of that name."""

    def table(self, name: str, array: Array, purpose: str = "tables") -> str:
        """A constant array; its C name. ``purpose`` is one of FLASH_PURPOSES."""

    def struct(self, name: str, ctype: str, *fields: object) -> str:
        """A constant struct; its C name."""

    def symbol(self, name: str) -> str:
        """The C name of a table; two names never share one."""

    def ptr(self, name: str) -> str:
        """A typed pointer to a value."""

    def bits(self, name: str) -> str:
        """A pointer to a value's bytes."""

    def begin(self, name: str) -> str:
        """A pointer to what a call reads or writes of a value: its begin, or the row."""

    def part(self, name: str) -> tuple[int, int]:
        """Rows and elements of a value that a call covers."""

    def rows(self, height: int) -> str:
        """The output rows of a call, as two arguments."""

    def view(self, name: str) -> str:
        """A tl_view of an (H, W, C) value."""

    def grad(self, name: str) -> str:
        """A tl_grad: a gradient with its exponent."""

    def exponent(self, name: str) -> str:
        """The exponent of a gradient, an lvalue."""

    def scratch(self, node: Node) -> str:
        """The node's scratch, or NULL."""

    def scale(self, name: str) -> float:
        """Scale of an activation; 1 where it has none."""

    def zero(self, name: str) -> int:
        """Zero point of an activation; 0 where it has none."""

    def scales(self, name: str) -> F32:
        """The weight scales held by a constant."""


class Weights(Enum):
    """How a kernel takes the weights of a layer."""

    SPLIT = "frozen and trained channels apart"
    PREPACKED = "in flash, in the order in which the kernel reads them"


@dataclass(frozen=True, slots=True)
class Kernel:
    """C that runs a node. ``name`` is unique; ``applies`` says for which nodes (with their graph) and targets;
    ``scratch`` gives bytes, ``in_place`` those that writing over an operand takes in addition; ``call`` the C call."""

    name: str
    applies: Callable[[Graph, Node, Core], bool]
    weights: Weights | No
    scratch: Callable[[Graph, Node], int]
    in_place: Callable[[Graph, Node], int] | No
    call: Callable[[Emitter, Node], str]


def anywhere(graph: Graph, node: Node, target: Core) -> bool:
    """A kernel for every node of its operator, and every target."""
    return True


def no_scratch(graph: Graph, node: Node) -> int:
    """A kernel that needs no memory of its own."""
    return 0


def nothing_aside(graph: Graph, node: Node) -> int:
    """A kernel that may write over an operand and keeps nothing of it aside."""
    return 0


def call(function: str, *args: object) -> str:
    """A C call."""
    return f"{function}({', '.join(map(str, args))})"


def c_float(v: float) -> str:
    """A float literal that reads back exactly."""
    return f"{float(np.float32(v)).hex()}f"


# --- quantization -----------------------------------------------------------------------------------------------


class Quantizer(Protocol):
    """A FLOAT graph on its way to INT8."""

    @property
    def per_channel(self) -> bool:
        """Whether each output channel has a weight scale of its own."""

    def value(self, name: str) -> Value:
        """A value of the INT8 graph so far."""

    def q(self, name: str) -> QParams:
        """Scale and zero point of an activation of the INT8 graph."""

    def data(self, name: str) -> Array:
        """A constant of the FLOAT graph."""

    def const(self, name: str, data: Array, dtype: str) -> str:
        """A constant of the INT8 graph; its name."""

    def carry(self, name: str) -> None:
        """Takes a constant or a state over as it is."""

    def range(self, node: Node) -> tuple[float, float]:
        """The smallest and the largest number of the node's output in calibration."""

    def emit(self, node: Node, q: QParams | None) -> None:
        """The node of the INT8 graph, whose output is s8 with ``q``, or stays in reals."""


# --- the row ----------------------------------------------------------------------------------------------------

Rule = Callable[[Node, Bound[Value]], tuple[Type, ...]]
Macs = Callable[[Node, Bound[Value]], int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """All that the compiler knows of an operator. What it means is in ``reference/``."""

    name: str
    attrs: type[Attrs]
    operands: tuple[Operand, ...]
    stores: tuple[Operand, ...]  # states that it updates
    params: tuple[Param, ...]  # what of it trains
    stages: tuple[Stage, ...]  # of the graphs that may contain it
    rule: Rule  # shapes and dtypes of its outputs; RuleError where the node breaks a rule
    data: Callable[[Graph, Node], None] | No  # rules for the contents of constants; RuleError
    macs: Macs  # multiply-accumulates
    integer: bool  # whether its output is s8 in an INT8 graph; otherwise it is in reals, or it is no layer
    activation: Callable[[Attrs], Clamp | None] | No  # the bounds strictly within which a gradient passes
    rows: Callable[[Attrs], Window] | No  # the rows of an operand that an output row needs
    overwrites: Overwrites | No
    exponent: Exponent | No  # of an integer gradient that it makes
    refuses: bool  # may end a step with a status; by then nothing may have changed
    loss: Loss | No
    quantize: Callable[[Quantizer, Node], None] | No
    vjp: Callable[[Tape, Node, str], None] | No
    takes_reals: Callable[[Node, Value], bool] | No  # whether its vjp takes a gradient that is still in reals
    fusions: tuple[Fusion, ...]
    kernels: tuple[Kernel, ...] | No


STEP_ONLY: Final = No("it belongs to a training step, which is not differentiated again")
NO_LAYER: Final = No("it is no layer of a model")
NO_WEIGHTS: Final = No("it reads no weights")
"""Reasons that many rows share."""


def step_op(
    *,
    name: str,
    attrs: type[Attrs],
    operands: tuple[Operand, ...],
    stores: tuple[Operand, ...],
    stages: tuple[Stage, ...],
    rule: Rule,
    data: Callable[[Graph, Node], None] | No,
    macs: Macs,
    rows: Callable[[Attrs], Window] | No,
    overwrites: Overwrites | No,
    exponent: Exponent | No,
    refuses: bool,
    loss: Loss | No,
    fusions: tuple[Fusion, ...],
    kernels: tuple[Kernel, ...] | No,
) -> Op:
    """The row of an operator that only a training step has: it is no layer and is not differentiated again."""
    return Op(
        name=name,
        attrs=attrs,
        operands=operands,
        stores=stores,
        params=(),
        stages=stages,
        rule=rule,
        data=data,
        macs=macs,
        integer=False,
        activation=NO_LAYER,
        rows=rows,
        overwrites=overwrites,
        exponent=exponent,
        refuses=refuses,
        loss=loss,
        quantize=NO_LAYER,
        vjp=STEP_ONLY,
        takes_reals=STEP_ONLY,
        fusions=fusions,
        kernels=kernels,
    )


def no_macs(node: Node, ins: Bound[Value]) -> int:
    """An operator that multiplies nothing."""
    return 0
