# SPDX-License-Identifier: Apache-2.0
"""One rule per operator: ``emit_<op>`` writes its kernel call, with literal arguments and no logic."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from trainlet import numerics
from trainlet.attrs import (
    Add,
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
)
from trainlet.emit.emitter import Emitter, c_float
from trainlet.ir.graph import Kind, Node
from trainlet.plan.arena import ready_weights, weight_update


def call(function: str, *args: object) -> str:
    """A C call."""
    return f"{function}({', '.join(map(str, args))})"


def emit_conv2d(e: Emitter, n: Node) -> str:
    a = n.attrs
    assert isinstance(a, Conv2d)
    assert a.clamp is not None
    x, y = n.inputs[0], n.outputs[0]
    mult, shift = numerics.requantize(e.scale(x), e.scales(n.inputs[3]), e.scale(y))
    tables = (e.table(f"{n.name}.mult", mult), e.table(f"{n.name}.shift", shift))
    q = e.struct(f"{n.name}.requant", "tl_requant", *tables, e.zero(y), int(a.clamp[0]), int(a.clamp[1]))
    kernel = "tl_depthwise_s8" if a.depthwise else "tl_conv2d_s8"
    ready = ready_weights(e.graph, n)
    w = e.ready_weights(a, n.inputs[1]) if ready else e.weights(a, n.inputs[1], n.inputs[4:])
    rows = e.rows(e.value(y).shape[0])
    bias = e.ptr(n.inputs[2])
    return call(kernel, e.conv(n, e.zero(x)), f"&{q}", w, bias, e.view(x), e.view(y), rows, e.scratch(n))


def emit_add(e: Emitter, n: Node) -> str:
    a = n.attrs
    assert isinstance(a, Add)
    assert a.clamp is not None
    p, q, y = (*n.inputs, *n.outputs)
    s = numerics.add_scale(e.scale(p), e.scale(q), e.scale(y))
    zeros = (e.zero(p), e.zero(q), e.zero(y), int(a.clamp[0]), int(a.clamp[1]))
    table = e.struct(f"{n.name}.scale", "tl_add", *zeros, s.a[0], s.b[0], s.y[0], s.a[1], s.b[1], s.y[1])
    h, w, c = e.value(y).shape
    return call("tl_add_s8", f"&{table}", e.view(p), e.view(q), e.view(y), w, c, e.rows(h))


def emit_avg_pool(e: Emitter, n: Node) -> str:
    a = n.attrs
    assert isinstance(a, AvgPool)
    x, y = e.value(n.inputs[0]), e.value(n.outputs[0])
    fields = (*x.shape, *y.shape, *a.kernel, *a.stride, 1, 1, a.pads[0], a.pads[2], 1, 0)
    table = e.struct(f"{n.name}.geometry", "tl_conv", *fields)
    return call("tl_avg_pool_s8", f"&{table}", e.view(x.name), e.view(y.name), 0, y.shape[0], e.scratch(n))


def emit_dense(e: Emitter, n: Node) -> str:
    x, w, b = n.inputs
    k, c = e.value(w).shape
    scale = c_float(e.scale(x))
    return call("tl_dense_f32", e.ptr(x), e.zero(x), scale, e.ptr(w), e.ptr(b), k, c, e.ptr(n.outputs[0]))


def emit_clip_mask(e: Emitter, n: Node) -> str:
    a = n.attrs
    assert isinstance(a, Mask)
    lo, hi = int(a.clamp[0]), int(a.clamp[1])
    return call("tl_clip_mask_s8", e.begin(n.inputs[0]), e.part(n.inputs[0])[1], lo, hi, e.begin(n.outputs[0]))


def emit_select_channels(e: Emitter, n: Node) -> str:
    a = n.attrs
    assert isinstance(a, SelectChannels)
    _, w, c = e.value(n.inputs[0]).shape
    pixels = e.part(n.inputs[0])[0] * w
    table = (e.ptr(n.inputs[1]), e.value(n.inputs[1]).size)
    x, y = e.begin(n.inputs[0]), e.begin(n.outputs[0])
    return call("tl_select_channels_s8", x, pixels, c, a.groups, *table, y)


def emit_check_lr(e: Emitter, n: Node) -> str:
    assert isinstance(n.attrs, CheckLr)
    return call("tl_check_lr", "c->lr", c_float(n.attrs.largest))


def emit_softmax_xent(e: Emitter, n: Node) -> str:
    k = e.value(n.inputs[0]).size
    g = n.outputs[1]  # the loss goes to the context
    return call("tl_softmax_xent_f32", e.ptr(n.inputs[0]), k, "c->label", "&c->loss", e.ptr(g))


def emit_dense_dx(e: Emitter, n: Node) -> str:
    k, c = e.value(n.inputs[1]).shape
    return call("tl_dense_dx_f32", e.ptr(n.inputs[0]), e.ptr(n.inputs[1]), k, c, e.ptr(n.outputs[0]))


def emit_dense_sgd(e: Emitter, n: Node) -> str:
    g, x, _ = n.inputs
    w, b = n.writes
    k, c = e.value(w).shape
    scale = c_float(e.scale(x))
    return call("tl_dense_sgd_f32", e.ptr(g), e.ptr(x), e.zero(x), scale, "c->lr", k, c, e.ptr(w), e.ptr(b))


def emit_enter_grad(e: Emitter, n: Node) -> str:
    a = n.attrs
    assert isinstance(a, EnterGrad)
    out = e.value(n.outputs[0])
    slot = f"&c->exponent[{out.exponent}]"
    given = (f"{a.site}u", e.ptr(n.inputs[0]), out.size, c_float(a.factor))
    return call("tl_enter_grad_s8", "&c->step", *given, e.ptr(out.name), slot)


def emit_mask_grad(e: Emitter, n: Node) -> str:
    a = n.attrs
    assert isinstance(a, Mask)
    out = e.value(n.outputs[0])
    mask = e.mask(a.source, a.clamp, n.inputs[1])
    return call("tl_mask_grad_s8", e.view(n.inputs[0]), mask, *out.shape, e.ptr(out.name))


def emit_round_grad(e: Emitter, n: Node) -> str:
    a = n.attrs
    assert isinstance(a, RoundGrad)
    out = e.value(n.outputs[0])
    if not a.computes:
        return call("tl_round_grad_s8", "&c->step", e.site(n, a, n.inputs), *out.shape, e.ptr(out.name))
    acc, scale, *rest = n.inputs
    assert a.conv is not None
    v = _dx_scale(e, n, numerics.dx_scale(a.conv, e.scales(scale)), "NULL")
    sums = (e.ptr(acc), _exponent(e, acc))
    site = e.site(n, a, tuple(rest))
    return call("tl_round_grad_s32", "&c->step", v, int(a.conv.depthwise), *sums, site, *out.shape, e.ptr(out.name))


def _exponent(e: Emitter, name: str) -> str:
    return f"c->exponent[{e.value(name).exponent}]"


def _dx_scale(e: Emitter, n: Node, s: numerics.DxScale, mt: str) -> str:
    tables = (mt, e.table(f"{n.name}.mult", s.mult), e.table(f"{n.name}.exp", s.exp))
    return "&" + e.struct(f"{n.name}.scale", "tl_dx_scale", *tables, s.pre)


def emit_conv2d_dx(e: Emitter, n: Node) -> str:
    a = n.attrs
    assert isinstance(a, Conv2dDx)
    g, weight, scale = n.inputs[:3]
    w = e.weights(a.conv, weight, n.inputs[3:])
    geo, r, acc = e.conv(n, 0), e.view(g), e.ptr(n.outputs[0])
    if a.conv.depthwise:
        return call("tl_depthwise_dx_s32", geo, w, r, acc)
    return call("tl_conv2d_dx_s32", geo, _mt(e, n, numerics.dx_scale(a.conv, e.scales(scale))), w, r, acc)


def _mt(e: Emitter, n: Node, s: numerics.DxScale) -> str:
    return "NULL" if s.mt is None else e.table(f"{n.name}.mt", s.mt)


def emit_conv2d_dx_round(e: Emitter, n: Node) -> str:
    a = n.attrs
    assert isinstance(a, FusedDx)
    conv = a.dx.conv
    s = numerics.dx_scale(conv, e.scales(n.inputs[2]))
    scale = _dx_scale(e, n, s, _mt(e, n, s))
    count = _trained_inputs(e, n)
    w = e.weights(conv, n.inputs[1], n.inputs[3 : 3 + count])
    kernel = "tl_depthwise_dx_s8" if conv.depthwise else "tl_conv2d_dx_s8"
    site = e.site(n, a.round, n.inputs[3 + count :])
    out = e.ptr(n.outputs[0])
    g = e.grad(n.inputs[0])
    rows = a.dx.in_hw[0]
    return call(kernel, "&c->step", e.conv(n, 0), scale, w, g, site, out, 0, rows, e.scratch(n))


def _trained_inputs(e: Emitter, n: Node) -> int:
    """2 where (trained, channels) follow the scales of an input gradient, else 0."""
    following = n.inputs[3:4]
    return 2 if following and e.value(following[0]).kind is Kind.STATE else 0


def emit_conv2d_dw(e: Emitter, n: Node) -> str:
    a = n.attrs
    assert isinstance(a, Conv2dDw)
    g, x = n.inputs
    geo, dw = e.conv(n, e.zero(x)), e.ptr(n.outputs[0])
    if a.conv.depthwise:
        channels = e.ptr(weight_update(e.graph, n).inputs[-1])
        return call("tl_depthwise_dw_s32", geo, channels, a.kept, e.view(g), e.view(x), dw)
    return call("tl_conv2d_dw_s32", geo, a.kept, e.view(g), e.view(x), dw)


def _weight_update(e: Emitter, n: Node, a: SgdWeight, scale: str, channels: str) -> tuple[str, str, str]:
    """The tl_dw of an update, and what it writes: weights and fraction bits."""
    rate = e.table(f"{n.name}.rate", numerics.weight_rate(a.conv, e.scales(scale), a.x_scale))
    pre = numerics.pre_shift(127 * 255 * a.pixels)
    fields = (f"{a.site}u", e.ptr(channels), e.value(channels).size, a.fraction_bits, pre, rate)
    fraction = f"TL_AT(uint8_t, s, {e.layout.offsets[n.writes[1]]})" if len(n.writes) > 1 else "NULL"
    return "&" + e.struct(f"{n.name}.update", "tl_dw", *fields), e.ptr(n.writes[0]), fraction


def emit_sgd_weight(e: Emitter, n: Node) -> str:
    assert isinstance(n.attrs, SgdWeight)
    dw, _, scale, channels = n.inputs
    update, w, fraction = _weight_update(e, n, n.attrs, scale, channels)
    sums = (e.ptr(dw), _exponent(e, dw))
    return call("tl_weight_sgd_s32", "&c->step", e.conv(n, 0), update, *sums, "c->lr", w, fraction)


def emit_conv2d_dw_sgd(e: Emitter, n: Node) -> str:
    a = n.attrs
    assert isinstance(a, FusedDw)
    g, x, _, scale, channels = n.inputs
    update, w, fraction = _weight_update(e, n, a.sgd, scale, channels)
    kernel = "tl_depthwise_dw_s8" if a.dw.conv.depthwise else "tl_conv2d_dw_s8"
    geo = e.conv(n, e.zero(x))
    return call(kernel, "&c->step", geo, update, e.grad(g), e.view(x), "c->lr", w, fraction, e.scratch(n))


def _bias_pixels(e: Emitter, g: str, pixels: int) -> tuple[int, int, int]:
    """Rows, columns and channels that a bias gradient sums; one vector may stand for all pixels."""
    h, w, c = e.value(g).shape
    return (pixels, 1, c) if (h, w) == (1, 1) else (h, w, c)


def emit_conv2d_db(e: Emitter, n: Node) -> str:
    a = n.attrs
    assert isinstance(a, Conv2dDb)
    (g,) = n.inputs
    return call("tl_bias_grad_s32", e.view(g), *_bias_pixels(e, g, a.pixels), e.ptr(n.outputs[0]))


def _bias_update(e: Emitter, n: Node, a: SgdBias, scale: str) -> tuple[object, ...]:
    """Rates, lr, pre-shift and bias of an update."""
    rate = e.table(f"{n.name}.rate", numerics.bias_rate(a.conv, e.scales(scale), a.x_scale))
    return rate, "c->lr", numerics.pre_shift(127 * a.pixels), e.ptr(n.writes[0])


def emit_sgd_bias(e: Emitter, n: Node) -> str:
    a = n.attrs
    assert isinstance(a, SgdBias)
    db, _, scale = n.inputs
    sums = (e.ptr(db), _exponent(e, db), e.value(db).size)
    return call("tl_bias_sgd_s32", "&c->step", f"{a.site}u", *sums, *_bias_update(e, n, a, scale))


def emit_conv2d_db_sgd(e: Emitter, n: Node) -> str:
    assert isinstance(n.attrs, FusedDb)
    a = n.attrs.sgd
    g, _, scale = n.inputs
    grad = (e.grad(g), *_bias_pixels(e, g, a.pixels))
    return call("tl_bias_sgd_s8", "&c->step", f"{a.site}u", *grad, *_bias_update(e, n, a, scale), e.scratch(n))


def emit_stream(e: Emitter, n: Node) -> str:
    return call("tl_stream_run", f"&{e.symbol(n.name)}", "c")


EMIT: Mapping[str, Callable[[Emitter, Node], str]] = {
    "conv2d": emit_conv2d,
    "add": emit_add,
    "avg_pool": emit_avg_pool,
    "dense": emit_dense,
    "clip_mask": emit_clip_mask,
    "select_channels": emit_select_channels,
    "check_lr": emit_check_lr,
    "softmax_xent": emit_softmax_xent,
    "dense_dx": emit_dense_dx,
    "dense_sgd": emit_dense_sgd,
    "enter_grad": emit_enter_grad,
    "mask_grad": emit_mask_grad,
    "round_grad": emit_round_grad,
    "conv2d_dx": emit_conv2d_dx,
    "conv2d_dw": emit_conv2d_dw,
    "conv2d_db": emit_conv2d_db,
    "sgd_weight": emit_sgd_weight,
    "sgd_bias": emit_sgd_bias,
    "conv2d_dx_round": emit_conv2d_dx_round,
    "conv2d_dw_sgd": emit_conv2d_dw_sgd,
    "conv2d_db_sgd": emit_conv2d_db_sgd,
    "stream": emit_stream,
}
