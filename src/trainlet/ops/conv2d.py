# SPDX-License-Identifier: Apache-2.0
"""Convolution: general, grouped and depthwise, with a fused activation. Its gradients are in ``conv2d_grad.py``."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from trainlet.ir import Attrs, Bound, Graph, Node, Value
from trainlet.ops import numerics, scratch
from trainlet.ops.conv2d_dx import reach_input
from trainlet.ops.conv2d_update import update_bias, update_weight
from trainlet.ops.geometry import (
    Conv2d,
    Layer,
    conv2d_of,
    conv_out_hw,
    fan_in,
    geometry_table,
    is_depthwise,
    need_channels,
    need_geometry,
    split_weights,
    trained_shape,
)
from trainlet.ops.op import (
    MODEL,
    Channels,
    Core,
    Emitter,
    Kernel,
    No,
    Op,
    Overwrites,
    Param,
    Quantizer,
    Tape,
    Type,
    Weights,
    Window,
    anywhere,
    call,
    need,
    operands,
)
from trainlet.ops.quantization import check_sums, integer_clamp, quantize_weights, range_qparams

MAX_KERNEL: Final = 255
MAX_FAN_IN: Final = 33155  # 127 * 255 * K + 2**30 < 2**31
MAX_BIAS: Final = 2**30
LANES: Final = 16  # of the inner tile, csrc/kernels/tl_tile.h


# --- rules ------------------------------------------------------------------------------------------------------


def rule_conv2d(node: Node, ins: Bound[Value]) -> tuple[Type, ...]:
    a = conv2d_of(node)
    need_geometry(a)
    x, w, b = ins["x"], ins["weight"], ins["bias"]
    need(len(x.shape) == 3, "x is (H, W, C)")
    need(len(w.shape) == 4, "weight is (C_out, kh, kw, C_in/groups)")
    h, wd, c = x.shape
    o = w.shape[0]
    need(a.depthwise == is_depthwise(a.groups, c, o), "depthwise is said exactly where groups = C_in = C_out > 1")
    need(c % a.groups == 0 and o % a.groups == 0, "groups divides both channel counts")
    need(w.shape == (o, *a.kernel, c // a.groups), f"weight is (C_out, kh, kw, C_in/groups), not {w.shape}")
    need(b.shape == (o,), "bias has one entry per output channel")
    oh, ow = conv_out_hw(a, h, wd)
    need(oh > 0 and ow > 0, "the kernel fits into the padded input")
    need(("scale" in ins) == (x.dtype == "s8"), "weights have a scale exactly where x is s8")
    if x.dtype == "s8":
        _need_integers(a, ins, o)
    need(("trained" in ins) == ("channels" in ins), "trained weights come with a table of their channels")
    if "trained" in ins:
        _need_trained(a, w, ins["trained"], ins["channels"])
    return (((oh, ow, o), x.dtype),)


def _need_integers(a: Conv2d, ins: Bound[Value], out_c: int) -> None:
    scale = ins["scale"]
    need(ins["weight"].dtype == "s8" and ins["bias"].dtype == "s32", "weights are s8 and biases s32")
    need(scale.shape == (out_c,) and scale.dtype == "f32", "scale is f32, one per output channel")
    need(a.clamp is not None and -128 <= a.clamp[0] < a.clamp[1] <= 127, "clamp lies within -128..127")
    need(ins["x"].q is not None, "x has a scale and a zero point")


def _need_trained(a: Conv2d, w: Value, trained: Value, channels: Value) -> None:
    need(channels.dtype == "u16" and channels.size > 0, "channels is a table of u16")
    want = trained_shape(a, w.shape[0], channels.size)
    need(trained.shape == want and trained.dtype == w.dtype, f"trained weights are {want}, not {trained.shape}")


def data_conv2d(graph: Graph, node: Node) -> None:
    """What the 32-bit sums of an integer convolution ask of its constants."""
    a = conv2d_of(node)
    sizes = (*a.kernel, *a.stride, *a.dilation)
    need(max(sizes) <= MAX_KERNEL, f"kernel, stride and dilation are at most {MAX_KERNEL}")
    x, w = graph.values[node["x"]], graph.values[node["weight"]]
    if x.dtype != "s8":
        return
    k = fan_in(a, x.shape[2])
    need(k <= MAX_FAN_IN, f"C_in/groups * kh * kw is at most {MAX_FAN_IN} (32-bit sums), not {k}")
    ascending = list(a.dead) == sorted(set(a.dead)) and all(0 <= o < w.shape[0] for o in a.dead)
    need(ascending, "dead lists output channels in ascending order")
    _need_weights(graph, node, list(a.dead))
    scale = graph.data.get(node["scale"])
    need(scale is not None, "the scale of the weights is a constant")
    need(scale is None or float(scale.astype(np.float64).min()) > 0, "every scale of the weights is above 0")
    if "channels" in node.operands:
        need_channels(graph, node["channels"], w.shape[weight_axis(a)])


def _need_weights(graph: Graph, node: Node, dead: list[int]) -> None:
    for name in filter(None, (node["weight"], node.get("trained"))):
        data = graph.data.get(name)
        small = data is None or np.abs(data.astype(np.int64)).max() <= 127
        need(small, f"int8 weights {name!r} lie within -127..127")
    weights, bias = graph.data.get(node["weight"]), graph.data.get(node["bias"])
    need(weights is None or not np.any(weights[dead]), "weights of dead channels are 0")
    # the saturated bias of a dead channel is harmless: nothing is added to it
    live = None if bias is None else np.abs(np.delete(bias, dead).astype(np.int64))
    need(live is None or live.size == 0 or int(live.max()) <= MAX_BIAS, f"|bias| is at most {MAX_BIAS}")


def weight_axis(attrs: Attrs) -> int:
    """The axis of the weights whose channels are selected: their last, of a depthwise layer the first."""
    assert isinstance(attrs, Conv2d)
    return 0 if attrs.depthwise else 3


def _weight_groups(attrs: Attrs) -> int:
    assert isinstance(attrs, Conv2d)
    return 1 if attrs.depthwise else attrs.groups


def _weight_rate(attrs: Attrs, scale: numerics.F32, x_scale: float) -> numerics.F32:
    assert isinstance(attrs, Conv2d)
    return numerics.weight_rate(attrs.dead, scale, x_scale)


def _bias_rate(attrs: Attrs, scale: numerics.F32, x_scale: float) -> numerics.F32:
    assert isinstance(attrs, Conv2d)
    return numerics.bias_rate(attrs.dead, scale, x_scale)


def _macs_conv2d(node: Node, ins: Bound[Value]) -> int:
    a, x = conv2d_of(node), ins["x"]
    oh, ow = conv_out_hw(a, x.shape[0], x.shape[1])
    return oh * ow * ins["weight"].shape[0] * fan_in(a, x.shape[2])


def _activation(attrs: Attrs) -> tuple[float, float] | None:
    assert isinstance(attrs, Conv2d)
    return attrs.clamp if attrs.activation else None


def _window(attrs: Attrs) -> Window:
    assert isinstance(attrs, Conv2d)
    return Window((attrs.kernel[0] - 1) * attrs.dilation[0] + 1, attrs.stride[0], attrs.pads[0])


def _same_pixels(attrs: Attrs) -> bool:
    assert isinstance(attrs, Conv2d)
    return attrs.depthwise and attrs.stride == (1, 1)


# --- gradient --------------------------------------------------------------------------------------------------


def vjp_conv2d(tape: Tape, node: Node, g: str) -> None:
    """dL/dx = conv_transpose(g, W); dL/dW = x * g; dL/db = sum of g."""
    if tape.needs_gradient(node["x"]):
        reach_input(tape, node, g)
    y = tape.value(node.output)
    pixels = y.shape[0] * y.shape[1]
    weight, bias = tape.trained(node, "weight"), tape.trained(node, "bias")
    if weight is not None:
        update_weight(tape, node, g, weight, pixels)
    if bias is not None:
        update_bias(tape, node, g, bias, pixels)


# --- quantization -----------------------------------------------------------------------------------------------


def quantize_conv2d(to: Quantizer, node: Node) -> None:
    a, x = conv2d_of(node), to.q(node["x"])
    w, b = (to.data(node[name]).astype(np.float64) for name in ("weight", "bias"))
    made = quantize_weights(node.layer, w, b, x.scale, to.per_channel)
    check_sums(node.layer, made.bias, fan_in(a, to.value(node["x"]).shape[2]))
    y = range_qparams(node.layer, to.range(node))
    made.check(node.layer, x, y)
    quantized = node.reading(
        weight=to.const(node["weight"], made.weight, "s8"),
        bias=to.const(node["bias"], made.bias, "s32"),
        scale=to.const(f"{node.name}.scale", made.scale, "f32"),
    )
    attrs = replace(a, clamp=integer_clamp(a.clamp, y), dead=made.dead)
    to.emit(replace(quantized, attrs=attrs), y)


# --- kernels ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Forward:
    """Geometry of a forward node."""

    conv: Conv2d
    layer: Layer

    @classmethod
    def of(cls, graph: Graph, node: Node) -> _Forward:
        x, y = graph.values[node["x"]].shape, graph.values[node.output].shape
        return cls(conv2d_of(node), Layer((x[0], x[1], x[2]), (y[0], y[1], y[2])))


def _is_depthwise(graph: Graph, node: Node, target: Core) -> bool:
    return conv2d_of(node).depthwise


def _can_be_packed(graph: Graph, node: Node, target: Core) -> bool:
    """The general kernel finds its weights packed in flash where nothing else reads them."""
    frozen = "trained" not in node.operands and len(graph.consumers(node["weight"])) == 1
    return frozen and not conv2d_of(node).depthwise


def _depthwise_scratch(graph: Graph, node: Node) -> int:
    f = _Forward.of(graph, node)
    return scratch.depthwise_scratch(*f.layer.x, *f.layer.y, *f.conv.kernel, f.conv.groups, 0)


def _depthwise_aside(graph: Graph, node: Node) -> int:
    f = _Forward.of(graph, node)
    return scratch.depthwise_ring(f.layer.x[1], (f.conv.kernel[0] - 1) * f.conv.dilation[0] + 1)


def _packed_scratch(graph: Graph, node: Node) -> int:
    f = _Forward.of(graph, node)
    return scratch.conv2d_packed_scratch(*f.layer.x, *f.layer.y, *f.conv.kernel, f.conv.groups, 0)


def _general_scratch(graph: Graph, node: Node) -> int:
    f = _Forward.of(graph, node)
    return scratch.conv2d_scratch(*f.layer.x, *f.layer.y, *f.conv.kernel, f.conv.groups, 0)


def _prepacked(e: Emitter, node: Node) -> str:
    """A tl_weights literal of weights in the order of the general forward kernel (tl.h, TL_READY)."""
    name = node["weight"]
    w = e.graph.data[name].reshape(conv2d_of(node).groups, -1, math.prod(e.value(name).shape[1:]))
    _, channels, terms = w.shape
    padded = np.pad(w, ((0, 0), (0, -channels % LANES), (0, terms % 2)))
    packed = padded.reshape(-1, LANES, (terms + 1) // 2, 2).transpose(0, 2, 1, 3)
    return f"(tl_weights){{{e.table(f'{name}.ready', packed, 'weights')}, NULL, NULL, TL_READY}}"


def _call(e: Emitter, node: Node, function: str, weights: str) -> str:
    a, x, y = conv2d_of(node), node["x"], node.output
    assert a.clamp is not None
    mult, shift = numerics.requantize(e.scale(x), e.scales(node["scale"]), e.scale(y))
    tables = (e.table(f"{node.name}.mult", mult), e.table(f"{node.name}.shift", shift))
    q = e.struct(f"{node.name}.requant", "tl_requant", *tables, e.zero(y), int(a.clamp[0]), int(a.clamp[1]))
    geometry = geometry_table(e, node, a, _Forward.of(e.graph, node).layer, e.zero(x))
    rows = e.rows(e.value(y).shape[0])
    bias = e.ptr(node["bias"])
    return call(function, geometry, f"&{q}", weights, bias, e.view(x), e.view(y), rows, e.scratch(node))


def emit_depthwise(e: Emitter, node: Node) -> str:
    return _call(e, node, "tl_depthwise_s8", split_weights(e, conv2d_of(node), node))


def emit_conv2d_packed(e: Emitter, node: Node) -> str:
    return _call(e, node, "tl_conv2d_s8", _prepacked(e, node))


def emit_conv2d(e: Emitter, node: Node) -> str:
    return _call(e, node, "tl_conv2d_s8", split_weights(e, conv2d_of(node), node))


_NOT_GENERAL: Final = No("a general convolution reads its input anew for each output channel")

ROWS: Final = (
    Op(
        name="conv2d",
        attrs=Conv2d,
        operands=operands("x", "weight", "bias", "scale?", "trained?", "channels?"),
        stores=(),
        params=(
            Param("weight", False, Channels(weight_axis, _weight_groups, "x"), _weight_rate),
            Param("bias", False, No("a bias trains whole"), _bias_rate),
        ),
        stages=MODEL,
        rule=rule_conv2d,
        data=data_conv2d,
        macs=_macs_conv2d,
        integer=True,
        activation=_activation,
        rows=_window,
        overwrites=Overwrites(("x",), False, _same_pixels),
        exponent=No("it makes no gradient"),
        refuses=False,
        loss=No("it is a layer"),
        quantize=quantize_conv2d,
        vjp=vjp_conv2d,
        takes_reals=No("its gradient is rounded"),
        fusions=(),
        kernels=(
            Kernel(
                "tl_depthwise_s8",
                _is_depthwise,
                Weights.SPLIT,
                _depthwise_scratch,
                _depthwise_aside,
                emit_depthwise,
            ),
            Kernel(
                "tl_conv2d_s8.packed",
                _can_be_packed,
                Weights.PREPACKED,
                _packed_scratch,
                _NOT_GENERAL,
                emit_conv2d_packed,
            ),
            Kernel("tl_conv2d_s8", anywhere, Weights.SPLIT, _general_scratch, _NOT_GENERAL, emit_conv2d),
        ),
    ),
)
