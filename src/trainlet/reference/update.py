# SPDX-License-Identifier: Apache-2.0
"""Updates: nodes that write states, section 3 and 4 of docs/arithmetic.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from trainlet.ir import Node
from trainlet.ops import Conv2d, FusedDb, FusedDw, SgdBias, SgdWeight
from trainlet.reference.arithmetic import Tensor
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


def _live(conv: Conv2d, factor: Tensor) -> Tensor:
    """The factors of the output channels, with 0 for those that take part in no update."""
    factor = factor.copy()
    factor[list(conv.dead)] = 0.0
    return factor


def _rate(run: Run, node: Node, lr: Tensor, conv: Conv2d, factor: Tensor) -> Tensor:
    v = run.rounding.rate(lr, _live(conv, factor))
    need_finite(node, "the learning rate times a channel's factor", v)
    return v


def _weight(run: Run, a: SgdWeight, node: Node, dw: Tensor, e: int, lr: Tensor, w_scale: Tensor | None, channels: Tensor) -> None:
    """F = clamp(F - step): dw has the kept channels only, its words those of the full layout."""
    name, *extra = node.writes
    w, bits, conv = run.values[name], a.fraction_bits, a.conv
    full = w * run.rounding.real(1) if w_scale is None else _full(run, w, extra, bits)
    scales = np.ones(w.shape[0] if conv.depthwise else dw.shape[0]) if w_scale is None else w_scale.astype(np.float64)
    v = _rate(run, node, lr, conv, a.x_scale / scales)
    if conv.depthwise:
        v, columns = (v if v.size == w.shape[0] else v[channels])[:, None, None, None], 1
    else:
        v, columns = v[:, None, None, None], _columns(run, node, channels)
    taps = conv.kernel[0] * conv.kernel[1]
    rows = channels if conv.depthwise else np.arange(w.shape[0])
    row = rows.astype(np.int64)[:, None, None] * taps + np.arange(taps)[None, :, None]
    last = np.zeros(1, np.int64) if conv.depthwise else channels.astype(np.int64)
    index = (row * columns + last[None, None, :]).reshape(w.shape)
    step = run.rounding.delta(Sums(dw, v, 127 * 255 * a.pixels, e), bits, run.key(a.stream), index)
    new = full - step
    if w_scale is not None:
        new = np.clip(new, -(127 << bits), 127 << bits)
    new = np.where(v == 0, full, new)
    parts = run.rounding.split(new, bits)
    for target, part in zip(node.writes, parts, strict=False):
        run.values[target] = part
