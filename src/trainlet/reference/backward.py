# SPDX-License-Identifier: Apache-2.0
"""Gradients, section 3 and 4 of docs/arithmetic.md.

A gradient that is the same for all pixels has the shape (1, 1, C) in the graph; here it is spread over its pixels
when it is made, as a view, so that every sum counts all of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trainlet.attrs import Conv2d, Conv2dDb, Conv2dDw, Conv2dDx, EnterGrad, FusedDx, Mask, RoundGrad
from trainlet.errors import UnsupportedError
from trainlet.ir.graph import Node
from trainlet.ops import conv_out_hw, fan_out
from trainlet.reference.arithmetic import Tensor
from trainlet.reference.forward import merged_weight
from trainlet.reference.linear import conv_dw_sum, conv_dx_sum
from trainlet.reference.rounding import Site, Sums
from trainlet.reference.run import Run, mask_of, need_finite


def ref_dense_dx(run: Run, node: Node, ins: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """(g, weight) -> the feature gradient."""
    g, weight = ins
    gf = np.zeros(weight.shape[1], run.rounding.real)
    for k in range(g.size):
        gf = gf + weight[k] * g[k]
    return (gf,)


def ref_enter_grad(run: Run, node: Node, ins: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """g -> r; sets the anchor, or ``zero_gradient``. MismatchError where g is not finite."""
    a = node.attrs
    assert isinstance(a, EnterGrad)
    v = ins[0] * run.rounding.real.type(a.factor)
    need_finite(node, "the gradient of the features", v)
    entry = run.rounding.enter(run.rounding.flush(v, -100), run.key(a.site))
    run.anchor, run.zero_gradient = entry.anchor, entry.zero
    run.set_exponent(node.outputs[0], entry.e)
    run.count(0 if entry.zero else v.size, entry.saturated)
    one_vector = v.size == a.shape[2]
    return (np.broadcast_to(entry.r, a.shape) if one_vector else entry.r.reshape(a.shape),)


def ref_mask_grad(run: Run, node: Node, ins: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """(r, mask source) -> r where the mask is 1, else 0."""
    a = node.attrs
    assert isinstance(a, Mask)
    return (np.where(mask_of(ins[1], a.source, a.clamp), ins[0], ins[0].dtype.type(0)),)


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


def _dx(
    run: Run, a: Conv2dDx, layer: str, g: Tensor, weight: Tensor, w_scale: Tensor | None, partial: Sequence[Tensor]
) -> Tensor:
    """The sums of an input gradient, sum W t."""
    whole = merged_weight(a.conv, weight, partial)
    r = np.broadcast_to(g, (*conv_out_hw(a.conv, *a.in_hw), whole.shape[0]))
    if w_scale is None:
        return conv_dx_sum(r, whole, a.conv, a.in_hw, 0)
    levels = factor_levels(a.conv, whole.shape[0], layer)
    if not a.conv.depthwise:
        r = r * run.rounding.channel_factors(w_scale, levels)
    return conv_dx_sum(r, whole, a.conv, a.in_hw, 127 * levels)


def _round(
    run: Run, a: RoundGrad, node: Node, sums: Sums | None, mask: Tensor | None, further: Sequence[tuple[Tensor, int]]
) -> Tensor:
    """Rounds a gradient, writes its exponent and its rho."""
    out = node.outputs[0]
    declared = run.graph.values[out].shape
    one_vector = declared[:2] == (1, 1)
    whole = max((r.shape for r in _present(sums, mask, further)), key=np.prod)
    if one_vector:
        further = [(r[:1, :1], e) for r, e in further]
    rho = int(run.values[node.writes[0]][0]) if node.writes else 0
    given = None if mask is None else mask_of(mask, a.mask, a.clamp)
    done = run.rounding.gradient(declared, sums, further, given, Site(run.key(a.site), run.anchor, rho))
    run.set_exponent(out, done.e)
    run.count(done.r.size, done.saturated)
    for name in node.writes:
        run.values[name] = np.full(1, done.rho, run.values[name].dtype)
    return np.broadcast_to(done.r, whole) if one_vector else done.r


def _present(sums: Sums | None, mask: Tensor | None, further: Sequence[tuple[Tensor, int]]) -> list[Tensor]:
    made = [] if sums is None else [sums.acc]
    return made + ([] if mask is None else [mask]) + [r for r, _ in further]


def _sums(conv: Conv2d, node: Node, acc: Tensor, w_scale: Tensor | None, e: int) -> Sums:
    """The sums with their real unit v and their worst case."""
    if w_scale is None:
        return Sums(acc, np.ones(1), 0, e)
    s = w_scale.astype(np.float64)
    levels = factor_levels(conv, s.size, node.layer)
    v = s if conv.depthwise else s.max(keepdims=True) / levels
    return Sums(acc, v, 127 * 127 * levels * fan_out(conv, s.size), e)


def _rest(
    run: Run, a: RoundGrad, node: Node, ins: Sequence[Tensor], at: int
) -> tuple[Tensor | None, list[tuple[Tensor, int]]]:
    """What follows the sums: the mask source and the further gradients with their exponents."""
    mask = None if a.mask == "none" else ins[at]
    at += mask is not None
    return mask, [(r, run.exponent(name)) for r, name in zip(ins[at:], node.inputs[at:], strict=True)]


def ref_conv2d_dx(run: Run, node: Node, ins: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """(g, weight[, w_scale][, trained, channels]) -> sums of the input gradient."""
    a = node.attrs
    assert isinstance(a, Conv2dDx)
    scales = 0 if run.is_real(node.inputs[0]) else 1
    return (_dx(run, a, node.layer, ins[0], ins[1], ins[2] if scales else None, ins[2 + scales :]),)


def ref_round_grad(run: Run, node: Node, ins: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """([acc[, w_scale],] [mask source,] further...) -> r; writes rho."""
    a = node.attrs
    assert isinstance(a, RoundGrad)
    if not a.computes:
        mask, further = _rest(run, a, node, ins, 0)
        return (_round(run, a, node, None, mask, further),)
    if a.conv is None:
        raise ValueError(f"{node.name}: a rounding that computes has the attributes of its convolution")
    scales = 0 if run.is_real(node.inputs[0]) else 1
    mask, further = _rest(run, a, node, ins, 1 + scales)
    w_scale = ins[1] if scales else None
    sums = _sums(a.conv, node, ins[0], w_scale, run.exponent(node.inputs[0]))
    return (_round(run, a, node, sums, mask, further),)


def ref_conv2d_dx_round(run: Run, node: Node, ins: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """(g, weight[, w_scale][, trained, channels][, mask source], further...) -> r; writes rho."""
    a = node.attrs
    assert isinstance(a, FusedDx)
    scales = 0 if run.is_real(node.inputs[0]) else 1
    at = 2 + scales
    w_scale = ins[2] if scales else None
    partial = ins[at : at + 2] if _is_table(run, node, at + 1) else ()
    acc = _dx(run, a.dx, node.layer, ins[0], ins[1], w_scale, partial)
    mask, further = _rest(run, a.round, node, ins, at + len(partial))
    sums = _sums(a.dx.conv, node, acc, w_scale, run.exponent(node.inputs[0]))
    return (_round(run, a.round, node, sums, mask, further),)


def _is_table(run: Run, node: Node, at: int) -> bool:
    return len(node.inputs) > at and run.graph.values[node.inputs[at]].dtype == "u16"


# --- parameter gradients ------------------------------------------------------------------------------------


def weight_sums(run: Run, a: Conv2dDw, x_name: str, g: Tensor, x: Tensor, channels: Tensor) -> Tensor:
    """sum r (x - z) of the kept channels, which a depthwise gradient has in ``channels`` of g."""
    r = np.broadcast_to(g, (*conv_out_hw(a.conv, *x.shape[:2]), g.shape[-1]))
    return conv_dw_sum(r[..., channels] if a.conv.depthwise else r, x, run.q(x_name).zero, a.conv)


def bias_sums(g: Tensor, pixels: int) -> Tensor:
    """Sum of r over ``pixels`` pixels, of which one vector may stand for all."""
    repeat = pixels // (g.shape[0] * g.shape[1])
    return np.asarray(repeat * g.sum(axis=(0, 1), dtype=np.float64 if g.dtype.kind == "f" else np.int64))


def _update_of(run: Run, node: Node) -> Node:
    return next(n for n in run.graph.consumers(node.outputs[0]) if n.op == "sgd_weight")


def ref_conv2d_dw(run: Run, node: Node, ins: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """(g, kept channels of x) -> sums of the weight gradient. Which channels of a depthwise layer are kept is an input
    of the update that follows."""
    a = node.attrs
    assert isinstance(a, Conv2dDw)
    g, x = ins
    channels = np.arange(a.kept)
    if a.conv.depthwise and a.kept < g.shape[-1]:
        channels = run.values[_update_of(run, node).inputs[-1]]
    return (weight_sums(run, a, node.inputs[1], g, x, channels),)


def ref_conv2d_db(run: Run, node: Node, ins: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """g -> sums of the bias gradient."""
    assert isinstance(node.attrs, Conv2dDb)
    return (bias_sums(ins[0], node.attrs.pixels),)
