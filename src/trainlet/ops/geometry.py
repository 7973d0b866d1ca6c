# SPDX-License-Identifier: Apache-2.0
"""Windows that slide over a map: what convolutions, their gradients and pools share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainlet.errors import UsageError
from trainlet.ir import Attrs, Graph, Node
from trainlet.ops.op import Emitter, need


def check_sizes(attrs: Attrs, **counts: int) -> None:
    """UsageError unless each of these fields is a tuple of so many whole numbers: a single one is an easy slip."""
    for name, count in counts.items():
        given = getattr(attrs, name)
        if not (isinstance(given, tuple) and len(given) == count and all(map(_is_whole, given))):
            raise UsageError(f"{type(attrs).__name__}: {name} is a tuple of {count} whole numbers, not {given!r:.60}")


def _is_whole(size: object) -> bool:
    return isinstance(size, int | np.integer) and not isinstance(size, bool)


@dataclass(frozen=True, slots=True)
class Conv2d(Attrs):
    """``pads`` is (top, bottom, left, right). ``clamp`` bounds the output (INT8: integers, always given; FLOAT: reals,
    or None); it is an activation, and masks gradients, only where ``activation`` says so. ``depthwise`` is true where
    groups = C_in = C_out > 1; then weights are (C, kh, kw, 1). ``dead`` lists output channels with no usable scale: all
    their weights are 0 and no update touches them."""

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    clamp: tuple[float, float] | None = None
    activation: bool = False
    depthwise: bool = False
    dead: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_sizes(self, kernel=2, stride=2, dilation=2, pads=4)


@dataclass(frozen=True, slots=True)
class Layer:
    """(H, W, C) of what windows slide over, and of what they give."""

    x: tuple[int, int, int]
    y: tuple[int, int, int]


def conv2d_of(node: Node) -> Conv2d:
    """The attributes of a forward convolution."""
    assert isinstance(node.attrs, Conv2d)
    return node.attrs


def is_depthwise(groups: int, in_c: int, out_c: int) -> bool:
    """Whether every channel is convolved alone; one single channel counts as an ordinary convolution."""
    return groups == in_c == out_c > 1


def conv_out_hw(conv: Conv2d, h: int, w: int) -> tuple[int, int]:
    """Spatial size of the output of ``conv`` over h x w pixels."""
    t, b, left, r = conv.pads
    eh = (conv.kernel[0] - 1) * conv.dilation[0] + 1
    ew = (conv.kernel[1] - 1) * conv.dilation[1] + 1
    return (h + t + b - eh) // conv.stride[0] + 1, (w + left + r - ew) // conv.stride[1] + 1


def fan_in(conv: Conv2d, in_c: int) -> int:
    """K of the forward sum: C_in/groups * kh * kw."""
    return in_c // conv.groups * conv.kernel[0] * conv.kernel[1]


def fan_out(conv: Conv2d, out_c: int) -> int:
    """K of the input gradient's sum: C_out/groups * kh * kw."""
    return out_c // conv.groups * conv.kernel[0] * conv.kernel[1]


def need_geometry(conv: Conv2d) -> None:
    """RuleError unless the windows are ones."""
    need(min(*conv.kernel, *conv.stride, *conv.dilation) > 0, "kernel, stride and dilation are at least 1")
    need(min(conv.pads) >= 0, "padding is not negative")
    need(conv.groups > 0, "groups is at least 1")


def trained_shape(conv: Conv2d, out_c: int, kept: int) -> tuple[int, ...]:
    """The shape of ``kept`` trained channels of a weight."""
    return (kept, *conv.kernel, 1) if conv.depthwise else (out_c, *conv.kernel, kept)


def need_channels(graph: Graph, name: str, limit: int) -> None:
    """RuleError unless ``name`` is a constant table of ascending channels below ``limit``."""
    table = graph.data.get(name)
    need(table is not None, f"the channel table {name!r} is a constant")
    assert table is not None
    steps = np.diff(table.astype(np.int64))
    ok = bool((steps > 0).all()) and int(table[-1]) < limit
    need(ok, f"the channel table {name!r} ascends and stays below {limit}")


# --- C ----------------------------------------------------------------------------------------------------------


def geometry_table(e: Emitter, node: Node, conv: Conv2d, layer: Layer, x_zero: int) -> str:
    """Pointer to the node's tl_conv."""
    pads = (conv.pads[0], conv.pads[2])
    fields = (*layer.x, *layer.y, *conv.kernel, *conv.stride, *conv.dilation, *pads, conv.groups, x_zero)
    return "&" + e.struct(f"{node.name}.geometry", "tl_conv", *fields)


def split_weights(e: Emitter, conv: Conv2d, node: Node) -> str:
    """A tl_weights literal of the node's operands ``weight`` and, where some channels train, ``trained`` and
    ``channels``."""
    weight, trained = node["weight"], node.get("trained")
    if trained is None:
        return f"(tl_weights){{{e.ptr(weight)}, NULL, NULL, 0}}"
    w, channels = e.graph.data[weight], e.graph.data[node["channels"]]
    axis = 0 if conv.depthwise else 3
    n = len(channels)
    if n == w.shape[axis]:
        return f"(tl_weights){{NULL, {e.ptr(trained)}, NULL, {n}}}"
    rest = np.delete(w, channels.astype(np.int64), axis)
    frozen = e.table(f"{weight}.frozen", rest, "weights")
    return f"(tl_weights){{{frozen}, {e.ptr(trained)}, {e.ptr(node['channels'])}, {n}}}"
