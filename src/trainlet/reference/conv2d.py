# SPDX-License-Identifier: Apache-2.0
"""Convolution, its gradients and its updates, section 1 and 4 of docs/arithmetic.md.

Activations are (H, W, C), or (N, H, W, C) for a batch of images in inference. A gradient that is the same for all
pixels has the shape (1, 1, C) in the graph; here it is spread over its pixels, as a view, so that every sum counts all
of them."""

from __future__ import annotations

from typing import Final

import numpy as np

from trainlet.errors import UnsupportedError
from trainlet.ir import Bound, Node
from trainlet.ops import Conv2dDb, Conv2dDw, Conv2dDx, FusedDb, FusedDw, FusedDx, SgdBias, SgdWeight
from trainlet.ops.geometry import Conv2d, conv_out_hw, fan_out
from trainlet.reference.arithmetic import Int, Tensor
from trainlet.reference.gradient import round_gradient
from trainlet.reference.linear import conv_dw_sum, conv_dx_sum, conv_sum
from trainlet.reference.rounding import Sums
from trainlet.reference.run import Run, need_finite

MAX_BIAS: Final = 1 << 30


def merged_weight(conv: Conv2d, ins: Bound[Tensor]) -> Tensor:
    """``weight`` with its trained channels, if there are some."""
    weight, trained = ins["weight"], ins.get("trained")
    if trained is None:
        return weight
    whole, channels = weight.copy(), ins["channels"]
    if conv.depthwise:
        whole[channels] = trained
    else:
        whole[..., channels] = trained
    return whole


def ref_conv2d(run: Run, node: Node, ins: Bound[Tensor]) -> tuple[Tensor, ...]:
    """(x, weight, bias[, scale][, trained, channels]) -> y."""
    conv = node.attrs
    assert isinstance(conv, Conv2d)
    scale = ins.get("scale")
    x, y = run.q(node["x"]), run.q(node.output)
    w_scale = np.ones(1) if scale is None else scale.astype(np.float64)
    acc = conv_sum(ins["x"], x.zero, merged_weight(conv, ins), conv) + ins["bias"]
    return (run.rounding.requantize(acc, x.scale * w_scale / y.scale, y.zero, conv.clamp),)


# --- input gradient -----------------------------------------------------------------------------------------


def factor_levels(conv: Conv2d, out_c: int, layer: str) -> int:
    """2^b - 1 of a general convolution, 1 of a depthwise one; UnsupportedError where no b fits 32 bits."""
    if conv.depthwise:
        return 1
    k = fan_out(conv, out_c)
    fitting = [b for b in range(1, 8) if 127 * 127 * (2**b - 1) * k < 2**31]
    if not fitting:
        raise UnsupportedError(
            f"{layer}: its input gradient sums {k} products, which do not fit 32 bits; train only layers behind it"
        )
    return int(2 ** fitting[-1] - 1)


def _dx(run: Run, a: Conv2dDx, node: Node, ins: Bound[Tensor]) -> Sums:
    """The sums of an input gradient, sum W t, with their real unit v and their worst case."""
    conv, scale = a.conv, ins.get("scale")
    whole = merged_weight(conv, ins)
    r = np.broadcast_to(ins["g"], (*conv_out_hw(conv, *a.in_hw), whole.shape[0]))
    e = run.exponent(node["g"])
    if scale is None:
        return Sums(conv_dx_sum(r, whole, conv, a.in_hw, 0), np.ones(1), 0, e)
    s = scale.astype(np.float64)
    levels = factor_levels(conv, s.size, node.layer)
    if not conv.depthwise:
        r = r * run.rounding.channel_factors(scale, levels)
    acc = conv_dx_sum(r, whole, conv, a.in_hw, 127 * levels)
    v = s if conv.depthwise else s.max(keepdims=True) / levels
    return Sums(acc, v, 127 * 127 * levels * fan_out(conv, s.size), e)


def ref_conv2d_dx(run: Run, node: Node, ins: Bound[Tensor]) -> tuple[Tensor, ...]:
    """(g, weight[, scale][, trained, channels]) -> sums of the input gradient."""
    assert isinstance(node.attrs, Conv2dDx)
    return run.made_sums(node, _dx(run, node.attrs, node, ins))


def ref_conv2d_dx_round(run: Run, node: Node, ins: Bound[Tensor]) -> tuple[Tensor, ...]:
    """(g, weight, scale[, trained, channels][, mask], further...) -> r; writes rho."""
    a = node.attrs
    assert isinstance(a, FusedDx)
    return (round_gradient(run, a.round, node, ins, _dx(run, a.dx, node, ins)),)


# --- parameter gradients ------------------------------------------------------------------------------------


def _dw(run: Run, a: Conv2dDw, node: Node, ins: Bound[Tensor]) -> Tensor:
    """sum r (x - z) of the kept channels, which a depthwise gradient has in ``channels`` of g."""
    g, x = ins["g"], ins["x"]
    r = np.broadcast_to(g, (*conv_out_hw(a.conv, x.shape[0], x.shape[1]), g.shape[-1]))
    return conv_dw_sum(r[..., ins["channels"]] if a.conv.depthwise else r, x, run.q(node["x"]).zero, a.conv)


def _db(g: Tensor, pixels: int) -> Tensor:
    """Sum of r over ``pixels`` pixels, of which one vector may stand for all."""
    repeat = pixels // (g.shape[0] * g.shape[1])
    return np.asarray(repeat * g.sum(axis=(0, 1), dtype=np.float64 if g.dtype.kind == "f" else np.int64))


def ref_conv2d_dw(run: Run, node: Node, ins: Bound[Tensor]) -> tuple[Tensor, ...]:
    """(g, kept channels of x, channels) -> sums of the weight gradient."""
    assert isinstance(node.attrs, Conv2dDw)
    return (_dw(run, node.attrs, node, ins),)


def ref_conv2d_db(run: Run, node: Node, ins: Bound[Tensor]) -> tuple[Tensor, ...]:
    """g -> sums of the bias gradient."""
    assert isinstance(node.attrs, Conv2dDb)
    return (_db(ins["g"], node.attrs.pixels),)


# --- updates ------------------------------------------------------------------------------------------------


def _wide(a: Tensor) -> Tensor:
    return a if a.dtype.kind == "f" else a.astype(np.int64)


def _rate(run: Run, node: Node, conv: Conv2d, lr: Tensor, factor: Tensor) -> Tensor:
    """v of every output channel: lr times its factor, 0 for a dead channel."""
    factor = factor.copy()
    factor[list(conv.dead)] = 0.0
    v = run.rounding.rate(lr, factor)
    need_finite(node, "the learning rate times a channel's factor", v)
    return v


def full_index(shape: tuple[int, ...], channels: Tensor, depthwise: bool) -> Int:
    """The positions of the kept channels' elements in the full weight of that shape."""
    whole = np.arange(np.prod(shape)).reshape(shape)
    return whole[channels] if depthwise else whole[..., channels]


def _full_shape(a: SgdWeight, out_c: int) -> tuple[int, ...]:
    return (out_c, *a.conv.kernel, 1 if a.conv.depthwise else a.shape[2] // a.conv.groups)


def _weight(run: Run, a: SgdWeight, node: Node, dw: tuple[Tensor, int], ins: Bound[Tensor]) -> None:
    """F = clamp(F - step). ``dw`` are the sums and their exponent."""
    channels, scale, depthwise = ins["channels"], ins.get("scale"), a.conv.depthwise
    shape = _full_shape(a, a.conv.groups if depthwise else dw[0].shape[0])
    s = np.ones(shape[0]) if scale is None else scale.astype(np.float64)
    rate = _rate(run, node, a.conv, ins["lr"], a.x_scale / s)
    v = (rate[channels] if depthwise else rate)[:, None, None, None]
    index = full_index(shape, channels, depthwise)
    worst = 127 * 255 * a.pixels
    step = run.rounding.delta(Sums(dw[0], v, worst, dw[1]), a.fraction_bits, run.key(a.site), index)
    w, fraction = _wide(run.values[node.stores["weight"][0]]), node.updated("fraction")
    full = w * (1 << a.fraction_bits) + (_wide(run.values[fraction]) if fraction else 0)
    new = full - step
    if scale is not None:
        new = np.clip(new, -(127 << a.fraction_bits), 127 << a.fraction_bits)
    parts = run.rounding.split(np.where(v == 0, full, new), a.fraction_bits)
    run.values.update(zip(node.writes, parts, strict=False))


def _bias(run: Run, a: SgdBias, node: Node, db: tuple[Tensor, int], ins: Bound[Tensor]) -> None:
    """b = clamp(b - step). ``db`` are the sums and their exponent."""
    scale, name = ins.get("scale"), node.stores["bias"][0]
    b = _wide(run.values[name])
    s = np.ones(b.size) if scale is None else scale.astype(np.float64)
    v = _rate(run, node, a.conv, ins["lr"], 1.0 / (s * a.x_scale))
    step = run.rounding.delta(Sums(db[0], v, 127 * a.pixels, db[1]), 0, run.key(a.site), np.arange(b.size))
    new = b - step
    if scale is not None:
        new = np.clip(new, -MAX_BIAS, MAX_BIAS)
    run.values[name] = np.where(v == 0, b, new).astype(run.values[name].dtype)


def ref_sgd_weight(run: Run, node: Node, ins: Bound[Tensor]) -> tuple[Tensor, ...]:
    """(dw, lr[, scale], channels); writes the trained channels and their fraction bits."""
    assert isinstance(node.attrs, SgdWeight)
    _weight(run, node.attrs, node, (ins["dw"], run.exponent(node["dw"])), ins)
    return ()


def ref_sgd_bias(run: Run, node: Node, ins: Bound[Tensor]) -> tuple[Tensor, ...]:
    """(db, lr[, scale]); writes the bias."""
    assert isinstance(node.attrs, SgdBias)
    _bias(run, node.attrs, node, (ins["db"], run.exponent(node["db"])), ins)
    return ()


def ref_conv2d_dw_sgd(run: Run, node: Node, ins: Bound[Tensor]) -> tuple[Tensor, ...]:
    """(g, kept channels of x, lr[, scale], channels); conv2d_dw, then sgd_weight."""
    a = node.attrs
    assert isinstance(a, FusedDw)
    _weight(run, a.sgd, node, (_dw(run, a.dw, node, ins), run.exponent(node["g"])), ins)
    return ()


def ref_conv2d_db_sgd(run: Run, node: Node, ins: Bound[Tensor]) -> tuple[Tensor, ...]:
    """(g, lr[, scale]); conv2d_db, then sgd_bias."""
    assert isinstance(node.attrs, FusedDb)
    a = node.attrs.sgd
    _bias(run, a, node, (_db(ins["g"], a.pixels), run.exponent(node["g"])), ins)
    return ()
