# SPDX-License-Identifier: Apache-2.0
"""Pools: the average over windows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from trainlet.errors import UnsupportedError
from trainlet.ir import Attrs, Bound, Graph, Node, Value
from trainlet.ops.geometry import Conv2d, Layer, conv_out_hw, geometry_table
from trainlet.ops.op import (
    MODEL,
    NO_WEIGHTS,
    Emitter,
    Kernel,
    Move,
    No,
    Op,
    Quantizer,
    Tape,
    Type,
    anywhere,
    call,
    need,
    no_macs,
    operands,
)


@dataclass(frozen=True, slots=True)
class AvgPool(Attrs):
    """Average over windows; padding is left out of the mean."""

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)


def _avg_pool_of(node: Node) -> AvgPool:
    assert isinstance(node.attrs, AvgPool)
    return node.attrs


def pooled_type(kernel: tuple[int, int], stride: tuple[int, int], pads: tuple[int, ...], x: Value) -> Type:
    """Shape and dtype of what windows over ``x`` give, one number each and channel; RuleError where they are none."""
    need(len(x.shape) == 3, "x is (H, W, C)")
    need(len(kernel) == 2 and len(stride) == 2 and len(pads) == 4, "kernel and stride are pairs, pads are four sizes")
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


def quantize_avg_pool(to: Quantizer, node: Node) -> None:
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


_OTHER_SHAPE: Final = No("its output is smaller than its input")

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
        quantize=quantize_avg_pool,
        vjp=vjp_avg_pool,
        takes_reals=is_global,
        fusions=(),
        kernels=(Kernel("tl_avg_pool_s8", anywhere, NO_WEIGHTS, _avg_pool_scratch, _OTHER_SHAPE, emit_avg_pool),),
    ),
)
