# SPDX-License-Identifier: Apache-2.0
"""Updates: nodes that write states, section 3 and 4 of docs/arithmetic.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from trainlet.attrs import Conv2d, FusedDb, FusedDw, SgdBias, SgdWeight
from trainlet.ir.graph import Node
from trainlet.reference.arithmetic import Int, Tensor
from trainlet.reference.backward import bias_sums, weight_sums
from trainlet.reference.forward import features
from trainlet.reference.rounding import Sums
from trainlet.reference.run import Run, need_finite

MAX_BIAS: Final = 1 << 30


def ref_dense_sgd(run: Run, node: Node, ins: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """(g, x, lr); writes weight and bias of the head."""
    g, x, lr = ins
    weight, bias = (run.values[name] for name in node.writes)
    f = features(run, node.inputs[1], x, weight.shape[1])
    step = run.rounding.flush(lr * g, -100)
    run.values[node.writes[0]] = weight - step[:, None] * f
    run.values[node.writes[1]] = bias - step
    return ()


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


def _weight(run: Run, a: SgdWeight, node: Node, sums: tuple[Tensor, int], ins: Sequence[Tensor]) -> None:
    """F = clamp(F - step). ``sums`` are dW and its exponent, ``ins`` are (lr[, w_scale], channels)."""
    lr, *scales, channels = ins
    shape = run.layer_weight(node.writes[0]).shape
    s = scales[0].astype(np.float64) if scales else np.ones(shape[0])
    rate = _rate(run, node, a.conv, lr, a.x_scale / s)
    v = (rate[channels] if a.conv.depthwise else rate)[:, None, None, None]
    index = full_index(shape, channels, a.conv.depthwise)
    worst = 127 * 255 * a.pixels
    step = run.rounding.delta(Sums(sums[0], v, worst, sums[1]), a.fraction_bits, run.key(a.site), index)
    w, *fraction = (_wide(run.values[name]) for name in node.writes)
    full = w * (1 << a.fraction_bits) + (fraction[0] if fraction else 0)
    new = full - step
    if scales:
        new = np.clip(new, -(127 << a.fraction_bits), 127 << a.fraction_bits)
    parts = run.rounding.split(np.where(v == 0, full, new), a.fraction_bits)
    run.values.update(zip(node.writes, parts, strict=False))


def _bias(run: Run, a: SgdBias, node: Node, sums: tuple[Tensor, int], ins: Sequence[Tensor]) -> None:
    """b = clamp(b - step). ``sums`` are db and its exponent, ``ins`` are (lr[, w_scale])."""
    lr, *scales = ins
    (name,) = node.writes
    b = _wide(run.values[name])
    s = scales[0].astype(np.float64) if scales else np.ones(b.size)
    v = _rate(run, node, a.conv, lr, 1.0 / (s * a.x_scale))
    step = run.rounding.delta(Sums(sums[0], v, 127 * a.pixels, sums[1]), 0, run.key(a.site), np.arange(b.size))
    new = b - step
    if scales:
        new = np.clip(new, -MAX_BIAS, MAX_BIAS)
    run.values[name] = np.where(v == 0, b, new).astype(run.values[name].dtype)


def ref_sgd_weight(run: Run, node: Node, ins: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """(dw, lr[, w_scale], channels); writes the trained channels and their fraction bits."""
    assert isinstance(node.attrs, SgdWeight)
    _weight(run, node.attrs, node, (ins[0], run.exponent(node.inputs[0])), ins[1:])
    return ()


def ref_sgd_bias(run: Run, node: Node, ins: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """(db, lr[, w_scale]); writes the bias."""
    assert isinstance(node.attrs, SgdBias)
    _bias(run, node.attrs, node, (ins[0], run.exponent(node.inputs[0])), ins[1:])
    return ()


def ref_conv2d_dw_sgd(run: Run, node: Node, ins: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """(g, kept channels of x, lr[, w_scale], channels); conv2d_dw, then sgd_weight."""
    a = node.attrs
    assert isinstance(a, FusedDw)
    dw = weight_sums(run, a.dw, node.inputs[1], ins[0], ins[1], ins[-1])
    _weight(run, a.sgd, node, (dw, run.exponent(node.inputs[0])), ins[2:])
    return ()


def ref_conv2d_db_sgd(run: Run, node: Node, ins: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """(g, lr[, w_scale]); conv2d_db, then sgd_bias."""
    assert isinstance(node.attrs, FusedDb)
    _bias(run, node.attrs.sgd, node, (bias_sums(ins[0], node.attrs.sgd.pixels), run.exponent(node.inputs[0])), ins[1:])
    return ()
