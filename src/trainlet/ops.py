# SPDX-License-Identifier: Apache-2.0
"""The operator table: shape and dtype rule, and cost of every operator; attributes are in ``attrs.py``.

An operator is one row across a few tables: here what it is, in ``reference/`` what it means, in ``vjp.py`` its
gradient, in ``emit/rules.py`` its C call, in ``csrc/kernels`` its kernel. ``tests/test_ops.py`` asserts that no row
has a hole. The same operators serve FLOAT graphs (dtype f32, real numbers) and INT8 graphs (integers); the
dtype of the data input decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from trainlet.attrs import (
    Add,
    Attrs,
    AvgPool,
    CheckLr,
    Conv2d,
    Conv2dDb,
    Conv2dDw,
    Conv2dDx,
    EnterGrad,
    FusedDb,
    FusedDw,
    FusedDx,
    Mask,
    RoundGrad,
    SelectChannels,
    SgdBias,
    SgdWeight,
    Stream,
)

if TYPE_CHECKING:
    from trainlet.ir.graph import Node, Value

DTYPE_BITS = {"b1": 1, "s4": 4, "s8": 8, "s16": 16, "u16": 16, "s32": 32, "f32": 32}


def dtype_bits(dtype: str) -> int:
    """Bits of one element: b1 is a packed mask bit, s4 a packed nibble."""
    return DTYPE_BITS[dtype]


# --- shape and dtype rules ----------------------------------------------------------------------------------

Type = tuple[tuple[int, ...], str]  # shape, dtype


class RuleError(ValueError):
    """A node breaks its operator's rule; the message says which, without naming the node."""


def need(ok: bool, rule: str) -> None:
    """Raises RuleError(rule) unless ``ok``."""
    if not ok:
        raise RuleError(rule)


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


def _conv_geometry(conv: Conv2d) -> None:
    need(min(*conv.kernel, *conv.stride, *conv.dilation) > 0, "kernel, stride and dilation are at least 1")
    need(min(conv.pads) >= 0, "padding is not negative")
    need(conv.groups > 0, "groups is at least 1")


def _rule_conv2d(node: Node, ins: Sequence[Value]) -> tuple[Type, ...]:
    a = node.attrs
    assert isinstance(a, Conv2d)
    _conv_geometry(a)
    integer = ins[0].dtype == "s8"
    need(len(ins) in ((4, 6) if integer else (3, 5)), "inputs are x, weight, bias[, scale][, trained, channels]")
    x, w, b = ins[0], ins[1], ins[2]
    need(len(x.shape) == 3, "x is (H, W, C)")
    h, wd, c = x.shape
    o = w.shape[0]
    need(a.depthwise == is_depthwise(a.groups, c, o), "depthwise is said exactly where groups = C_in = C_out > 1")
    need(c % a.groups == 0 and o % a.groups == 0, "groups divides both channel counts")
    need(w.shape == (o, *a.kernel, c // a.groups), f"weight is (C_out, kh, kw, C_in/groups), not {w.shape}")
    need(b.shape == (o,), "bias has one entry per output channel")
    oh, ow = conv_out_hw(a, h, wd)
    need(oh > 0 and ow > 0, "the kernel fits into the padded input")
    if integer:
        need(w.dtype == "s8" and b.dtype == "s32", "weights are s8 and biases s32")
        need(ins[3].shape == (o,) and ins[3].dtype == "f32", "scale is f32, one per output channel")
        need(a.clamp is not None and -128 <= a.clamp[0] < a.clamp[1] <= 127, "clamp lies within -128..127")
        need(x.q is not None, "x has a scale and a zero point")
    if len(ins) >= 5:
        _rule_trained(a, ins[1], ins[-2], ins[-1])
    return (((oh, ow, o), x.dtype),)


def _rule_trained(a: Conv2d, w: Value, trained: Value, channels: Value) -> None:
    k = channels.size
    need(channels.dtype == "u16" and k > 0, "channels is a table of u16")
    want = (k, *a.kernel, 1) if a.depthwise else (w.shape[0], *a.kernel, k)
    need(trained.shape == want and trained.dtype == w.dtype, f"trained weights are {want}, not {trained.shape}")


def _rule_add(node: Node, ins: Sequence[Value]) -> tuple[Type, ...]:
    need(len(ins) == 2 and ins[0].shape == ins[1].shape and ins[0].dtype == ins[1].dtype, "two inputs of one shape")
    return ((ins[0].shape, ins[0].dtype),)


def _rule_avg_pool(node: Node, ins: Sequence[Value]) -> tuple[Type, ...]:
    a = node.attrs
    assert isinstance(a, AvgPool)
    need(len(ins) == 1 and len(ins[0].shape) == 3, "one input (H, W, C)")
    h, w, c = ins[0].shape
    need(min(a.kernel) > 0 and min(a.stride) > 0 and min(a.pads) >= 0, "kernel and stride are at least 1")
    need(max(a.pads[:2]) < a.kernel[0] and max(a.pads[2:]) < a.kernel[1], "padding is smaller than the window")
    oh, ow = conv_out_hw(Conv2d(a.kernel, a.stride, a.pads), h, w)
    need(oh > 0 and ow > 0, "the window fits into the padded input")
    return (((oh, ow, c), ins[0].dtype),)


def _rule_dense(node: Node, ins: Sequence[Value]) -> tuple[Type, ...]:
    need(len(ins) == 3, "inputs are x, weight, bias")
    x, w, b = ins
    need(w.dtype == b.dtype == "f32", "the head is f32")
    need(x.dtype in ("s8", "f32") and len(w.shape) == 2 and w.shape[1] == x.size, "weight is (classes, features)")
    need(b.shape == (w.shape[0],), "one bias per class")
    return ((b.shape, "f32"),)


def _rule_softmax_xent(node: Node, ins: Sequence[Value]) -> tuple[Type, ...]:
    need(len(ins) == 2 and len(ins[0].shape) == 1 and ins[0].dtype == "f32", "inputs are logits and label")
    need(ins[1].dtype == "s32" and ins[1].shape == (1,), "label is one s32")
    return ((1,), "f32"), (ins[0].shape, "f32")


def _rule_dense_dx(node: Node, ins: Sequence[Value]) -> tuple[Type, ...]:
    need(len(ins) == 2 and len(ins[1].shape) == 2 and ins[0].shape == (ins[1].shape[0],), "inputs are g and weight")
    return (((ins[1].shape[1],), "f32"),)


def _rule_dense_sgd(node: Node, ins: Sequence[Value]) -> tuple[Type, ...]:
    need(len(ins) == 3 and len(node.writes) == 2, "reads g, x, lr; writes weight and bias")
    return ()


def _rule_check_lr(node: Node, ins: Sequence[Value]) -> tuple[Type, ...]:
    need(len(ins) == 1 and ins[0].shape == (1,), "input is lr")
    return ()


def _rule_enter_grad(node: Node, ins: Sequence[Value]) -> tuple[Type, ...]:
    need(len(ins) == 1 and len(ins[0].shape) == 1 and ins[0].dtype == "f32", "input is a gradient (n,) in f32")
    a = node.attrs
    assert isinstance(a, EnterGrad)
    h, w, c = a.shape
    n = ins[0].size
    need(n in (c, h * w * c), f"there is a number for each of {c} channels or {h * w * c} elements, not {n}")
    return (((1, 1, c) if n == c else a.shape, a.dtype),)


def _rule_clip_mask(node: Node, ins: Sequence[Value]) -> tuple[Type, ...]:
    need(len(ins) == 1, "one input")
    return ((ins[0].shape, "b1"),)


def _rule_mask_grad(node: Node, ins: Sequence[Value]) -> tuple[Type, ...]:
    need(len(ins) == 2, "inputs are a gradient and a mask source")
    need(ins[0].shape in (ins[1].shape, (1, 1, ins[1].shape[-1])), "the gradient fits the mask")
    return ((ins[1].shape, ins[0].dtype),)


def _rule_select_channels(node: Node, ins: Sequence[Value]) -> tuple[Type, ...]:
    a = node.attrs
    assert isinstance(a, SelectChannels)
    need(len(ins) == 2 and ins[1].dtype == "u16", "inputs are x and a table of channels")
    h, w, _ = ins[0].shape
    return (((h, w, ins[1].size * a.groups), ins[0].dtype),)


def _rule_conv2d_dx(node: Node, ins: Sequence[Value]) -> tuple[Type, ...]:
    a = node.attrs
    assert isinstance(a, Conv2dDx)
    integer = ins[0].dtype == "s8"
    need(len(ins) in ((3, 5) if integer else (2, 4)), "inputs are g, weight[, scale][, trained, channels]")
    o, _, _, cg = ins[1].shape
    need(ins[0].shape in ((1, 1, o), (*conv_out_hw(a.conv, *a.in_hw), o)), "g has the shape of the output")
    return (((*a.in_hw, cg * a.conv.groups), "s32" if integer else "f32"),)


def _rule_round_grad(node: Node, ins: Sequence[Value]) -> tuple[Type, ...]:
    a = node.attrs
    assert isinstance(a, RoundGrad)
    lead = (2 if ins[0].dtype == "s32" else 1) if a.computes else 0
    lead += a.mask != "none"
    need(len(ins) > lead or (a.computes and len(ins) == lead), "there is something to round")
    shapes = [v.shape for v in ins if len(v.shape) == 3]
    shape = max(shapes, key=math.prod)
    need(all(s in (shape, (1, 1, shape[2])) for s in shapes), "all gradients have the shape of the tensor")
    return ((shape, "f32" if ins[0].dtype == "f32" else "s8"),)


def _rule_conv2d_dw(node: Node, ins: Sequence[Value]) -> tuple[Type, ...]:
    a = node.attrs
    assert isinstance(a, Conv2dDw)
    need(len(ins) == 2 and len(ins[1].shape) == 3, "inputs are g and x")
    o = ins[0].shape[-1]
    depthwise = a.conv.depthwise
    need(ins[1].shape[2] == a.kept * (1 if depthwise else a.conv.groups), "x holds the kept channels only")
    shape = (a.kept, *a.conv.kernel, 1) if depthwise else (o, *a.conv.kernel, a.kept)
    return ((shape, "s32" if ins[0].dtype == "s8" else "f32"),)


def _rule_conv2d_db(node: Node, ins: Sequence[Value]) -> tuple[Type, ...]:
    need(len(ins) == 1, "input is g")
    return (((ins[0].shape[-1],), "s32" if ins[0].dtype == "s8" else "f32"),)


def _need_weight_update(a: SgdWeight, node: Node, dw: Type, rest: Sequence[Value]) -> None:
    """``dw`` is the gradient's type, ``rest`` are lr[, scale], channels."""
    shape, dtype = dw
    integer = dtype == "s32"
    need(a.fraction_bits in (0, 4, 8), "fraction bits are 0, 4 or 8")
    need(a.pixels > 0, "the layer's output has at least one pixel")
    need(len(node.writes) == (2 if a.fraction_bits else 1), "writes the weight and its fraction bits")
    need(dtype in ("s32", "f32") and len(shape) == 4, "the gradient is s32 or f32, of the weights' shape")
    need(len(rest) == (3 if integer else 2), "behind the gradient come lr, [scale,] channels")
    lr, channels = rest[0], rest[-1]
    need(lr.shape == (1,) and lr.dtype == "f32", "lr is one f32")
    need(channels.dtype == "u16" and len(channels.shape) == 1, "channels is a table of u16")
    k = channels.size
    want = (k, *a.conv.kernel, 1) if a.conv.depthwise else (shape[0], *a.conv.kernel, k)
    need(shape == want, f"the gradient of {k} channels is {want}, not {shape}")
    out_c = a.conv.groups if a.conv.depthwise else shape[0]
    scaled = not integer or (rest[1].shape == (out_c,) and rest[1].dtype == "f32")
    need(scaled, f"scale is f32, one for each of {out_c} output channels")


def _rule_sgd_weight(node: Node, ins: Sequence[Value]) -> tuple[Type, ...]:
    a = node.attrs
    assert isinstance(a, SgdWeight)
    _need_weight_update(a, node, (ins[0].shape, ins[0].dtype), ins[1:])
    return ()


def _need_bias_update(a: SgdBias, node: Node, db: Type, rest: Sequence[Value]) -> None:
    """``db`` is the gradient's type, ``rest`` are lr[, scale]."""
    shape, dtype = db
    integer = dtype == "s32"
    need(len(node.writes) == 1, "writes the bias")
    need(a.pixels > 0, "the layer's output has at least one pixel")
    need(dtype in ("s32", "f32") and len(shape) == 1, "the gradient is s32 or f32, one per output channel")
    need(len(rest) == (2 if integer else 1), "behind the gradient come lr[, scale]")
    need(rest[0].shape == (1,) and rest[0].dtype == "f32", "lr is one f32")
    scaled = not integer or (rest[1].shape == shape and rest[1].dtype == "f32")
    need(scaled, f"scale is f32, one for each of {shape[0]} output channels")


def _rule_sgd_bias(node: Node, ins: Sequence[Value]) -> tuple[Type, ...]:
    a = node.attrs
    assert isinstance(a, SgdBias)
    _need_bias_update(a, node, (ins[0].shape, ins[0].dtype), ins[1:])
    return ()


def _rule_fused_dx(node: Node, ins: Sequence[Value]) -> tuple[Type, ...]:
    a = node.attrs
    assert isinstance(a, FusedDx)
    _, _, _, cg = ins[1].shape
    return (((*a.dx.in_hw, cg * a.dx.conv.groups), "s8"),)


def _rule_fused_dw(node: Node, ins: Sequence[Value]) -> tuple[Type, ...]:
    a = node.attrs
    assert isinstance(a, FusedDw)
    (dw,) = _rule_conv2d_dw(replace(node, attrs=a.dw), ins[:2])
    _need_weight_update(a.sgd, node, dw, ins[2:])
    return ()


def _rule_fused_db(node: Node, ins: Sequence[Value]) -> tuple[Type, ...]:
    a = node.attrs
    assert isinstance(a, FusedDb)
    (db,) = _rule_conv2d_db(node, ins[:1])
    _need_bias_update(a.sgd, node, db, ins[1:])
    return ()


def _rule_stream(node: Node, ins: Sequence[Value]) -> tuple[Type, ...]:
    a = node.attrs
    assert isinstance(a, Stream)
    need(len(a.nodes) > 0, "holds at least one node")
    known = dict(zip(node.inputs, ins, strict=True))
    values = {v.name: v for v in a.values}
    for inner in a.nodes:
        need(inner.op in STREAMED, f"{inner.op!r} does not run by rows; {', '.join(STREAMED)} do")
        need(all(i in known for i in inner.inputs), f"{inner.name!r} reads inputs of the stream and what it has made")
        (made,) = OPS[inner.op].rule(inner, [known[i] for i in inner.inputs])
        y = values.get(inner.outputs[0])
        need(y is not None and (y.shape, y.dtype) == made, f"the stream holds what {inner.name!r} makes, {made}")
        known[inner.outputs[0]] = values[inner.outputs[0]]
    rows = dict(a.rings)
    need(all(0 < r <= known[n].shape[0] for n, r in rows.items()), "a ring has at most as many rows as its value")
    need(all(o in values and o not in rows for o in node.outputs), "its outputs are made inside, and whole")
    return tuple((values[o].shape, values[o].dtype) for o in node.outputs)


STREAMED = ("conv2d", "add", "clip_mask", "select_channels")
"""Operators with one output that can be made row by row."""


# --- cost: multiply-accumulates -----------------------------------------------------------------------------


def _macs_none(node: Node, ins: Sequence[Value], outs: Sequence[Value]) -> int:
    return 0


def _macs_conv2d(node: Node, ins: Sequence[Value], outs: Sequence[Value]) -> int:
    assert isinstance(node.attrs, Conv2d)
    return outs[0].size * fan_in(node.attrs, ins[0].shape[2])


def _macs_dense(node: Node, ins: Sequence[Value], outs: Sequence[Value]) -> int:
    return ins[1].size


def _macs_dense_sgd(node: Node, ins: Sequence[Value], outs: Sequence[Value]) -> int:
    return ins[0].size * ins[1].size


def _macs_dx(node: Node, ins: Sequence[Value], outs: Sequence[Value]) -> int:
    a = node.attrs.dx if isinstance(node.attrs, FusedDx) else node.attrs
    assert isinstance(a, Conv2dDx)
    oh, ow = conv_out_hw(a.conv, *a.in_hw)
    return oh * ow * ins[1].size


def _macs_dw(node: Node, ins: Sequence[Value], outs: Sequence[Value]) -> int:
    a = node.attrs.dw if isinstance(node.attrs, FusedDw) else node.attrs
    assert isinstance(a, Conv2dDw)
    oh, ow = conv_out_hw(a.conv, ins[1].shape[0], ins[1].shape[1])
    o = ins[0].shape[-1]
    per_pixel = a.kept if a.conv.depthwise else o * a.kept
    return oh * ow * per_pixel * a.conv.kernel[0] * a.conv.kernel[1]


def _macs_stream(node: Node, ins: Sequence[Value], outs: Sequence[Value]) -> int:
    a = node.attrs
    assert isinstance(a, Stream)
    known = {**dict(zip(node.inputs, ins, strict=True)), **{v.name: v for v in a.values}}
    return sum(OPS[n.op].macs(n, [known[v] for v in n.inputs], [known[v] for v in n.outputs]) for n in a.nodes)


# --- the table --------------------------------------------------------------------------------------------

Rule = Callable[["Node", "Sequence[Value]"], tuple[Type, ...]]
Macs = Callable[["Node", "Sequence[Value]", "Sequence[Value]"], int]


@dataclass(frozen=True, slots=True)
class Op:
    """One row: the attribute class, the shape rule, the cost, and the stages that admit the operator."""

    attrs: type[Attrs]
    rule: Rule
    macs: Macs
    stages: tuple[str, ...]


_MODEL = ("float", "int8", "train", "lowered")
_STEP = ("train", "lowered")
_UNFUSED = ("train", "lowered")
_FUSED = ("lowered",)

OPS: dict[str, Op] = {
    # the model
    "conv2d": Op(Conv2d, _rule_conv2d, _macs_conv2d, _MODEL),
    "add": Op(Add, _rule_add, _macs_none, _MODEL),
    "avg_pool": Op(AvgPool, _rule_avg_pool, _macs_none, _MODEL),
    "dense": Op(Attrs, _rule_dense, _macs_dense, _MODEL),
    # what the forward pass keeps for the backward pass
    "clip_mask": Op(Mask, _rule_clip_mask, _macs_none, _STEP),
    "select_channels": Op(SelectChannels, _rule_select_channels, _macs_none, _STEP),
    # loss and head
    "check_lr": Op(CheckLr, _rule_check_lr, _macs_none, _STEP),
    "softmax_xent": Op(Attrs, _rule_softmax_xent, _macs_none, _STEP),
    "dense_dx": Op(Attrs, _rule_dense_dx, _macs_dense, _STEP),
    "dense_sgd": Op(Attrs, _rule_dense_sgd, _macs_dense_sgd, _STEP),
    "enter_grad": Op(EnterGrad, _rule_enter_grad, _macs_none, _STEP),
    # gradients and updates
    "mask_grad": Op(Mask, _rule_mask_grad, _macs_none, _STEP),
    "round_grad": Op(RoundGrad, _rule_round_grad, _macs_none, _STEP),
    "conv2d_dx": Op(Conv2dDx, _rule_conv2d_dx, _macs_dx, _UNFUSED),
    "conv2d_dw": Op(Conv2dDw, _rule_conv2d_dw, _macs_dw, _UNFUSED),
    "conv2d_db": Op(Conv2dDb, _rule_conv2d_db, _macs_none, _UNFUSED),
    "sgd_weight": Op(SgdWeight, _rule_sgd_weight, _macs_none, _UNFUSED),
    "sgd_bias": Op(SgdBias, _rule_sgd_bias, _macs_none, _UNFUSED),
    # fused by passes/fuse.py
    "conv2d_dx_round": Op(FusedDx, _rule_fused_dx, _macs_dx, _FUSED),
    "conv2d_dw_sgd": Op(FusedDw, _rule_fused_dw, _macs_dw, _FUSED),
    "conv2d_db_sgd": Op(FusedDb, _rule_fused_db, _macs_none, _FUSED),
    # made by passes/stream.py
    "stream": Op(Stream, _rule_stream, _macs_stream, _FUSED),
}
