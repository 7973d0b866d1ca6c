# SPDX-License-Identifier: Apache-2.0
"""Pools: the average and the maximum over windows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from trainlet.errors import UnsupportedError
from trainlet.ir import Attrs, Bound, Graph, Node, Operands, Value
from trainlet.ops.geometry import Conv2d, Layer, check_sizes, conv_out_hw, geometry_table
from trainlet.ops.op import (
    MODEL,
    NO_WEIGHTS,
    STEP,
    Core,
    Emitter,
    Exponent,
    Kernel,
    Move,
    No,
    Op,
    Quantizer,
    Sums,
    Tape,
    Type,
    Window,
    anywhere,
    call,
    need,
    no_macs,
    no_scratch,
    operands,
    step_op,
)


@dataclass(frozen=True, slots=True)
class AvgPool(Attrs):
    """Average over windows; padding is left out of the mean."""

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)

    def __post_init__(self) -> None:
        check_sizes(self, kernel=2, stride=2, pads=4)


@dataclass(frozen=True, slots=True)
class MaxPool(Attrs):
    """Maximum over windows; padding never wins. Scale and zero point stay."""

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)

    def __post_init__(self) -> None:
        check_sizes(self, kernel=2, stride=2, pads=4)


@dataclass(frozen=True, slots=True)
class MaxPoolDx(Attrs):
    """Gradient of ``pool``, whose input had ``in_hw`` pixels: to the element of each window that won. ``moves`` where
    windows lie apart, so that an element wins at most once; otherwise sums, not yet rounded."""

    pool: MaxPool
    in_hw: tuple[int, int]
    moves: bool


def _avg_pool_of(node: Node) -> AvgPool:
    assert isinstance(node.attrs, AvgPool)
    return node.attrs


def pooled_type(kernel: tuple[int, int], stride: tuple[int, int], pads: tuple[int, ...], x: Value) -> Type:
    """Shape and dtype of what windows over ``x`` give, one number each and channel; RuleError where they are none."""
    need(len(x.shape) == 3, "x is (H, W, C)")
    need(min(*kernel, *stride) > 0 and min(pads) >= 0, "kernel and stride are at least 1")
    need(max(pads[:2]) < kernel[0] and max(pads[2:]) < kernel[1], "padding is smaller than the window")
    h, w, c = x.shape
    t, b, left, r = pads
    oh, ow = conv_out_hw(Conv2d(kernel, stride, (t, b, left, r)), h, w)
    need(oh > 0 and ow > 0, "the window fits into the padded input")
    return (oh, ow, c), x.dtype


def rule_avg_pool(node: Node, ins: Bound[Value]) -> tuple[Type, ...]:
    a = _avg_pool_of(node)
    return (pooled_type(a.kernel, a.stride, a.pads, ins["x"]),)


def is_global(node: Node, x: Value) -> bool:
    """Whether an average pool is one window over all of ``x``."""
    a = node.attrs
    return isinstance(a, AvgPool) and a.kernel == x.shape[:2] and not any(a.pads)


def vjp_avg_pool(tape: Tape, node: Node, g: str) -> None:
    """dL/dx = g / (H W) at every pixel: one vector stands for all. Only a global pool at the end of the model."""
    a, x = _avg_pool_of(node), tape.value(node["x"])
    if not is_global(node, x) or tape.value(g).dtype != "f32" or len(tape.value(g).shape) != 1:
        raise UnsupportedError(
            f"{node.layer}: gradients pass a global average pool in front of the head, not a "
            f"{a.kernel[0]}x{a.kernel[1]} pool; train no layer before it"
        )
    tape.reach(node, "x", Move(tape.enter(node, "x", g, 1.0 / (a.kernel[0] * a.kernel[1]))))


def quantize_pool(to: Quantizer, node: Node) -> None:
    to.emit(node, to.q(node["x"]))


def pool_table(e: Emitter, node: Node, conv: Conv2d) -> str:
    """Pointer to the node's tl_conv."""
    (h, w, c), (oh, ow, oc) = e.value(node["x"]).shape, e.value(node.output).shape
    return geometry_table(e, node, conv, Layer((h, w, c), (oh, ow, oc)), 0)


def emit_avg_pool(e: Emitter, node: Node) -> str:
    a, x, y = _avg_pool_of(node), node["x"], node.output
    table = pool_table(e, node, Conv2d(a.kernel, a.stride, a.pads))
    return call("tl_avg_pool_s8", table, e.view(x), e.view(y), 0, e.value(y).shape[0], e.scratch(node))


def _avg_pool_scratch(graph: Graph, node: Node) -> int:
    return 4 * graph.values[node["x"]].shape[-1]


# --- maximum ----------------------------------------------------------------------------------------------------

MAX_TAPS: Final = 127  # the index of a winner is an int8


def _max_pool_of(node: Node) -> MaxPool:
    a = node.attrs.pool if isinstance(node.attrs, MaxPoolDx) else node.attrs
    assert isinstance(a, MaxPool)
    return a


def rule_max_pool(node: Node, ins: Bound[Value]) -> tuple[Type, ...]:
    a = _max_pool_of(node)
    return (pooled_type(a.kernel, a.stride, a.pads, ins["x"]),)


def _rule_winners(node: Node, ins: Bound[Value]) -> tuple[Type, ...]:
    a = _max_pool_of(node)
    need(
        a.kernel[0] * a.kernel[1] <= MAX_TAPS, f"a window has at most {MAX_TAPS} elements, or its winner has no number"
    )
    shape, _ = pooled_type(a.kernel, a.stride, a.pads, ins["x"])
    return ((shape, "s8"),)


def _rule_max_pool_dx(node: Node, ins: Bound[Value]) -> tuple[Type, ...]:
    a, g, winners = node.attrs, ins["g"], ins["winners"]
    assert isinstance(a, MaxPoolDx)
    need(winners.dtype == "s8" and len(winners.shape) == 3, "winners are numbers of elements, (H, W, C)")
    c = winners.shape[2]
    x = Value("x", (*a.in_hw, c), g.dtype)
    need(
        pooled_type(a.pool.kernel, a.pool.stride, a.pool.pads, x)[0] == winners.shape,
        "there is a winner for each window",
    )
    need(g.shape in (winners.shape, (1, 1, c)), "g has the shape of the output")
    need(not a.moves or _apart(a.pool), "windows that share elements give sums")
    return (((*a.in_hw, c), g.dtype if a.moves or g.dtype == "f32" else "s32"),)


def _apart(a: MaxPool) -> bool:
    return a.stride[0] >= a.kernel[0] and a.stride[1] >= a.kernel[1]


def vjp_max_pool(tape: Tape, node: Node, g: str) -> None:
    """dL/dx = g at the first element of its window that is the maximum, 0 elsewhere; sums where windows overlap."""
    a, x, y = _max_pool_of(node), tape.value(node["x"]), tape.value(node.output)
    if not tape.needs_gradient(x.name):
        return
    if a.kernel[0] * a.kernel[1] > MAX_TAPS:
        raise UnsupportedError(
            f"{node.layer}: gradients pass windows of at most {MAX_TAPS} elements, not of {a.kernel[0]}x{a.kernel[1]}; "
            "train no layer before it"
        )
    winners = Value(f"{node.name}.winners", y.shape, "s8")
    read = Operands(x=x.name)
    tape.keep(Node("max_pool_winners", winners.name, node.layer, read, (winners.name,), a), winners)
    moves = _apart(a)
    dtype = tape.gradient if moves else tape.sums
    out = Value(f"{node.name}.dx", x.shape, dtype, exponent=tape.same_exponent(g))
    attrs = MaxPoolDx(a, (x.shape[0], x.shape[1]), moves)
    read = Operands(g=g, winners=winners.name)
    tape.emit(Node("max_pool_dx", out.name, node.layer, read, (out.name,), attrs), out)
    wins = -(-a.kernel[0] // a.stride[0]) * -(-a.kernel[1] // a.stride[1])
    tape.reach(node, "x", Move(out.name) if moves else Sums(out.name, 127 * wins, None, 0))


def _windows(node: Node) -> Conv2d:
    a = _max_pool_of(node)
    return Conv2d(a.kernel, a.stride, a.pads)


def _pool_rows(attrs: Attrs) -> Window:
    assert isinstance(attrs, MaxPool)
    return Window(attrs.kernel[0], attrs.stride[0], attrs.pads[0])


def _emit_rows(function: str) -> Callable[[Emitter, Node], str]:
    def emit(e: Emitter, node: Node) -> str:
        x, y = node["x"], node.output
        return call(function, pool_table(e, node, _windows(node)), e.view(x), e.view(y), e.rows(e.value(y).shape[0]))

    return emit


def emit_max_pool_dx(e: Emitter, node: Node) -> str:
    a = node.attrs
    assert isinstance(a, MaxPoolDx)
    (h, w, c), (oh, ow, _) = e.value(node.output).shape, e.value(node["winners"]).shape
    table = geometry_table(e, node, _windows(node), Layer((h, w, c), (oh, ow, c)), 0)
    function = "tl_max_pool_dx_s8" if a.moves else "tl_max_pool_dx_s32"
    return call(function, table, e.view(node["g"]), e.ptr(node["winners"]), e.ptr(node.output))


def _moves(graph: Graph, node: Node, target: Core) -> bool:
    assert isinstance(node.attrs, MaxPoolDx)
    return node.attrs.moves


_OTHER_SHAPE: Final = No("its output is smaller than its input")
_NO_LOSS: Final = No("it makes none")

ROWS: Final = (
    Op(
        name="avg_pool",
        attrs=AvgPool,
        operands=operands("x"),
        stores=(),
        params=(),
        stages=MODEL,
        rule=rule_avg_pool,
        data=No("it has no constants"),
        macs=no_macs,
        integer=True,
        activation=No("its kernel has no clamp"),
        rows=No("it stands at the end of a model, where nothing is wide"),
        overwrites=_OTHER_SHAPE,
        exponent=No("it makes no gradient"),
        refuses=False,
        loss=No("it is a layer"),
        quantize=quantize_pool,
        vjp=vjp_avg_pool,
        takes_reals=is_global,
        fusions=(),
        kernels=(Kernel("tl_avg_pool_s8", anywhere, NO_WEIGHTS, _avg_pool_scratch, _OTHER_SHAPE, emit_avg_pool),),
    ),
    Op(
        name="max_pool",
        attrs=MaxPool,
        operands=operands("x"),
        stores=(),
        params=(),
        stages=MODEL,
        rule=rule_max_pool,
        data=No("it has no constants"),
        macs=no_macs,
        integer=True,
        activation=No("its kernel has no clamp"),
        rows=_pool_rows,
        overwrites=_OTHER_SHAPE,
        exponent=No("it makes no gradient"),
        refuses=False,
        loss=No("it is a layer"),
        quantize=quantize_pool,
        vjp=vjp_max_pool,
        takes_reals=No("which element gets a gradient is a question of integers"),
        fusions=(),
        kernels=(
            Kernel("tl_max_pool_s8", anywhere, NO_WEIGHTS, no_scratch, _OTHER_SHAPE, _emit_rows("tl_max_pool_s8")),
        ),
    ),
    step_op(
        name="max_pool_winners",
        attrs=MaxPool,
        operands=operands("x"),
        stores=(),
        stages=STEP,
        rule=_rule_winners,
        data=No("it has no constants"),
        macs=no_macs,
        rows=_pool_rows,
        overwrites=_OTHER_SHAPE,
        exponent=No("it is made of activations"),
        refuses=False,
        loss=_NO_LOSS,
        fusions=(),
        kernels=(
            Kernel(
                "tl_max_pool_winners_s8",
                anywhere,
                NO_WEIGHTS,
                no_scratch,
                _OTHER_SHAPE,
                _emit_rows("tl_max_pool_winners_s8"),
            ),
        ),
    ),
    step_op(
        name="max_pool_dx",
        attrs=MaxPoolDx,
        operands=operands("g", "winners"),
        stores=(),
        stages=STEP,
        rule=_rule_max_pool_dx,
        data=No("it has no constants"),
        macs=no_macs,
        rows=No("gradients run over whole maps"),
        overwrites=No("its output is larger than its input"),
        exponent=Exponent.OF_G,
        refuses=False,
        loss=_NO_LOSS,
        fusions=(),
        kernels=(
            Kernel("tl_max_pool_dx_s8", _moves, NO_WEIGHTS, no_scratch, No("it is larger"), emit_max_pool_dx),
            Kernel("tl_max_pool_dx_s32", anywhere, NO_WEIGHTS, no_scratch, No("it is larger"), emit_max_pool_dx),
        ),
    ),
)
