# SPDX-License-Identifier: Apache-2.0
"""The gradient of a convolution's input: sums that ``round_grad`` rounds, and the two in one node."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from trainlet.errors import UnsupportedError
from trainlet.ir import Attrs, Bound, Graph, Node, Operands, Value
from trainlet.ops import numerics, scratch
from trainlet.ops.geometry import Conv2d, Layer, conv2d_of, conv_out_hw, fan_out, geometry_table, split_weights
from trainlet.ops.gradient import RoundGrad, need_rounding, site_literal, sums_table
from trainlet.ops.op import (
    LOWERED,
    STEP,
    Core,
    Emitter,
    Exponent,
    Fusion,
    Kernel,
    No,
    Overwrites,
    Sums,
    Tape,
    Type,
    Weights,
    anywhere,
    call,
    need,
    no_scratch,
    operands,
    step_op,
)

# --- attributes -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Conv2dDx(Attrs):
    """Input gradient of ``conv``, whose input had ``in_hw`` pixels: sums, not yet rounded."""

    conv: Conv2d
    in_hw: tuple[int, int]


@dataclass(frozen=True, slots=True)
class FusedDx(Attrs):
    """conv2d_dx and round_grad in one node; the sums never exist as a tensor."""

    dx: Conv2dDx
    round: RoundGrad


def _dx(node: Node) -> Conv2dDx:
    a = node.attrs.dx if isinstance(node.attrs, FusedDx) else node.attrs
    assert isinstance(a, Conv2dDx)
    return a


def _round(node: Node) -> RoundGrad:
    assert isinstance(node.attrs, FusedDx)
    return node.attrs.round


# --- gradient rule --------------------------------------------------------------------------------------------


def sums_of_dx(conv: Conv2d, out_c: int) -> tuple[int, int]:
    """(levels, bound) of the sums of an input gradient; levels is 0 for a depthwise layer, which has a scale for each
    channel, and bound is 0 where the sums of a general one do not fit 32 bits."""
    k = fan_out(conv, out_c)
    levels = 0 if conv.depthwise else numerics.dx_levels(k)
    return levels, 127 * 127 * k * (1 if conv.depthwise else levels)


def reach_input(tape: Tape, node: Node, g: str) -> None:
    a, x, w = conv2d_of(node), tape.value(node["x"]), tape.value(node["weight"])
    levels, bound = sums_of_dx(a, w.shape[0])
    if not bound:
        raise UnsupportedError(
            f"{node.layer}: its input gradient sums {fan_out(a, w.shape[0])} products, too many for 32 bits; "
            "train no layer before it"
        )
    trained = tape.trained(node, "weight")
    acc = Value(f"{node.name}.dx", x.shape, tape.sums, exponent=tape.same_exponent(g))
    read = Operands(
        g=g,
        weight=node["weight"],
        scale=node.get("scale"),
        trained=trained.state if trained else None,
        channels=trained.channels if trained else None,
    )
    attrs = Conv2dDx(a, (x.shape[0], x.shape[1]))
    tape.emit(Node("conv2d_dx", acc.name, node.layer, read, (acc.name,), attrs), acc)
    tape.reach(node, "x", Sums(acc.name, bound, node.get("scale"), levels))


# --- rules ----------------------------------------------------------------------------------------------------


def _rule_dx(node: Node, ins: Bound[Value]) -> tuple[Type, ...]:
    a, g, w = _dx(node), ins["g"], ins["weight"]
    need(len(w.shape) == 4, "weight is (C_out, kh, kw, C_in/groups)")
    o, _, _, cg = w.shape
    need(("scale" in ins) == (g.dtype == "s8"), "weights have a scale exactly where g is s8")
    need(g.shape in ((1, 1, o), (*conv_out_hw(a.conv, *a.in_hw), o)), "g has the shape of the output")
    return (((*a.in_hw, cg * a.conv.groups), "s32" if g.dtype == "s8" else "f32"),)


def _rule_fused_dx(node: Node, ins: Bound[Value]) -> tuple[Type, ...]:
    a = _round(node)
    ((shape, _),) = _rule_dx(node, ins)
    need((a.levels, a.bound) == sums_of_dx(_dx(node).conv, ins["weight"].shape[0]), "rounds what its sums can be")
    need_rounding(a, shape, ins)
    return ((shape, "s8"),)


def _macs_dx(node: Node, ins: Bound[Value]) -> int:
    a = _dx(node)
    oh, ow = conv_out_hw(a.conv, *a.in_hw)
    return oh * ow * ins["weight"].size


def _fuse_dx(sums: Node, rounding: Node) -> Node:
    assert isinstance(sums.attrs, Conv2dDx)
    assert isinstance(rounding.attrs, RoundGrad)
    read = Operands(**{**sums.operands, "mask": rounding.get("mask"), "further": rounding.all("further")})
    attrs = FusedDx(sums.attrs, rounding.attrs)
    return Node("conv2d_dx_round", rounding.name, rounding.layer, read, rounding.outputs, attrs, rounding.stores)


def _same_pixels(attrs: Attrs) -> bool:
    assert isinstance(attrs, FusedDx)
    return attrs.dx.conv.depthwise and attrs.dx.conv.stride == (1, 1)


# --- kernels --------------------------------------------------------------------------------------------------


def _dx_layer(graph: Graph, node: Node) -> Layer:
    a, w = _dx(node), graph.values[node["weight"]].shape
    return Layer((*a.in_hw, w[3] * a.conv.groups), (*conv_out_hw(a.conv, *a.in_hw), w[0]))


def _dx_depthwise(graph: Graph, node: Node, target: Core) -> bool:
    return _dx(node).conv.depthwise


def _dx_scratch(figure: Callable[..., int]) -> Callable[[Graph, Node], int]:
    def scratch_of(graph: Graph, node: Node) -> int:
        conv, layer = _dx(node).conv, _dx_layer(graph, node)
        return figure(*layer.x, *layer.y, *conv.kernel, conv.groups, 0)

    return scratch_of


def _dx_aside(graph: Graph, node: Node) -> int:
    conv = _dx(node).conv
    return scratch.depthwise_ring(_dx(node).in_hw[1], (conv.kernel[0] - 1) * conv.dilation[0] + 1)


def _factors(e: Emitter, node: Node) -> str:
    """mt of a general convolution's sums."""
    levels, _ = sums_of_dx(_dx(node).conv, e.value(node["weight"]).shape[0])
    return e.table(f"{node.name}.mt", numerics.channel_factors(e.scales(node["scale"]), levels))


def emit_conv2d_dx(e: Emitter, node: Node) -> str:
    conv = _dx(node).conv
    geometry = geometry_table(e, node, conv, _dx_layer(e.graph, node), 0)
    return call(
        "tl_conv2d_dx_s32", geometry, _factors(e, node), split_weights(e, conv, node), e.view(node["g"]),
        e.ptr(node.output),
    )  # fmt: skip


def emit_depthwise_dx(e: Emitter, node: Node) -> str:
    conv = _dx(node).conv
    geometry = geometry_table(e, node, conv, _dx_layer(e.graph, node), 0)
    return call("tl_depthwise_dx_s32", geometry, split_weights(e, conv, node), e.view(node["g"]), e.ptr(node.output))


def _dx_round(e: Emitter, node: Node, function: str, factors: str) -> str:
    a, conv = _round(node), _dx(node).conv
    scale = sums_table(e, node, a, e.scales(node["scale"]), factors)
    weights, g = split_weights(e, conv, node), e.grad(node["g"])
    site, out = site_literal(e, node, a), e.ptr(node.output)
    geometry = geometry_table(e, node, conv, _dx_layer(e.graph, node), 0)
    rows = _dx(node).in_hw[0]
    return call(function, "&c->step", geometry, scale, weights, g, site, out, 0, rows, e.scratch(node))


def emit_conv2d_dx_round(e: Emitter, node: Node) -> str:
    return _dx_round(e, node, "tl_conv2d_dx_s8", _factors(e, node))


def emit_depthwise_dx_round(e: Emitter, node: Node) -> str:
    return _dx_round(e, node, "tl_depthwise_dx_s8", "NULL")


_READS_ANEW: Final = No("a general convolution reads its gradient anew for each channel")
_OTHER_TYPE: Final = No("what it makes has another type than what it reads")
_NOT_BY_ROWS: Final = No("gradients and updates run over whole maps")
_NO_CONSTANTS: Final = No("its constants are those of the layer, which are checked there")
_NO_LOSS: Final = No("it is a gradient")

ROWS: Final = (
    step_op(
        name="conv2d_dx",
        attrs=Conv2dDx,
        operands=operands("g", "weight", "scale?", "trained?", "channels?"),
        stores=(),
        stages=STEP,
        rule=_rule_dx,
        data=_NO_CONSTANTS,
        macs=_macs_dx,
        rows=_NOT_BY_ROWS,
        overwrites=_OTHER_TYPE,
        exponent=Exponent.OF_G,
        refuses=False,
        loss=_NO_LOSS,
        fusions=(Fusion("round_grad", "acc", _fuse_dx),),
        kernels=(
            Kernel("tl_depthwise_dx_s32", _dx_depthwise, Weights.SPLIT, no_scratch, _OTHER_TYPE, emit_depthwise_dx),
            Kernel("tl_conv2d_dx_s32", anywhere, Weights.SPLIT, no_scratch, _OTHER_TYPE, emit_conv2d_dx),
        ),
    ),
    step_op(
        name="conv2d_dx_round",
        attrs=FusedDx,
        operands=operands("g", "weight", "scale", "trained?", "channels?", "mask?", "further*"),
        stores=operands("rho"),
        stages=LOWERED,
        rule=_rule_fused_dx,
        data=_NO_CONSTANTS,
        macs=_macs_dx,
        rows=_NOT_BY_ROWS,
        overwrites=Overwrites(("g",), False, _same_pixels),
        exponent=Exponent.OWN,
        refuses=False,
        loss=_NO_LOSS,
        fusions=(),
        kernels=(
            Kernel(
                "tl_depthwise_dx_s8",
                _dx_depthwise,
                Weights.SPLIT,
                _dx_scratch(scratch.depthwise_dx_scratch),
                _dx_aside,
                emit_depthwise_dx_round,
            ),
            Kernel(
                "tl_conv2d_dx_s8",
                anywhere,
                Weights.SPLIT,
                _dx_scratch(scratch.conv2d_dx_scratch),
                _READS_ANEW,
                emit_conv2d_dx_round,
            ),
        ),
    ),
)
