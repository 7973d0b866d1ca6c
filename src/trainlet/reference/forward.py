# SPDX-License-Identifier: Apache-2.0
"""The model's operators and what a forward pass keeps, section 1 and 3 of docs/arithmetic.md.

Activations are (H, W, C), or (N, H, W, C) for a batch of images in inference."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trainlet.attrs import Add, AvgPool, CheckLr, Conv2d, Mask, SelectChannels
from trainlet.errors import UsageError
from trainlet.ir.graph import Node
from trainlet.ops import conv_out_hw
from trainlet.reference.arithmetic import Tensor
from trainlet.reference.linear import conv_sum, pad, taps
from trainlet.reference.run import Run, mask_of, need_finite


def merged_weight(conv: Conv2d, weight: Tensor, partial: Sequence[Tensor]) -> Tensor:
    """``weight`` with its trained channels; ``partial`` is empty or (trained, channels)."""
    if not partial:
        return weight
    trained, channels = partial
    whole = weight.copy()
    if conv.depthwise:
        whole[channels] = trained
    else:
        whole[..., channels] = trained
    return whole


def ref_conv2d(run: Run, node: Node, ins: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """(x, weight, bias[, w_scale][, trained, channels]) -> y."""
    conv = node.attrs
    assert isinstance(conv, Conv2d)
    real = run.is_real(node.inputs[0])
    weight = merged_weight(conv, ins[1], ins[3 if real else 4 :])
    x, y = run.q(node.inputs[0]), run.q(node.outputs[0])
    w_scale = np.ones(1) if real else ins[3].astype(np.float64)
    acc = conv_sum(ins[0], x.zero, weight, conv) + ins[2]
    return (run.rounding.requantize(acc, x.scale * w_scale / y.scale, y.zero, conv.clamp),)


def ref_add(run: Run, node: Node, ins: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """(a, b) -> a + b."""
    attrs = node.attrs
    assert isinstance(attrs, Add)
    a, b, y = (run.q(name) for name in (*node.inputs, *node.outputs))
    wide = [x - np.asarray(q.zero, np.int64) for x, q in zip(ins, (a, b), strict=True)]
    return (run.rounding.add(wide[0], wide[1], (a.scale, b.scale, y.scale), y.zero, attrs.clamp),)


def ref_avg_pool(run: Run, node: Node, ins: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """x -> its mean over windows; padding is not counted."""
    a = node.attrs
    assert isinstance(a, AvgPool)
    x = ins[0]
    windows = Conv2d(a.kernel, a.stride, a.pads)
    out_hw = conv_out_hw(windows, *x.shape[-3:-1])
    wide = x if np.issubdtype(x.dtype, np.floating) else x.astype(np.int64)
    padded, inside = pad(wide, a.pads), pad(np.ones((*x.shape[-3:-1], 1), np.int64), a.pads)
    total, count = 0 * padded[..., : out_hw[0], : out_hw[1], :], np.zeros((*out_hw, 1), np.int64)
    for _, _, rows, cols in taps(windows, out_hw):
        total = total + padded[..., rows, cols, :]
        count = count + inside[rows, cols]
    return (run.rounding.mean(total, count),)


def features(run: Run, name: str, x: Tensor, size: int) -> Tensor:
    """f: the head's input in real units, (N, size)."""
    real, q = run.rounding.real, run.q(name)
    whole = x.reshape(-1, size) - np.asarray(q.zero, np.int64)
    return np.asarray(whole.astype(real) * real.type(q.scale))


def ref_dense(run: Run, node: Node, ins: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """(x, weight, bias) -> logits."""
    x, weight, bias = ins
    f = features(run, node.inputs[0], x, weight.shape[1])
    a = np.zeros((f.shape[0], weight.shape[0]), run.rounding.real)
    for c in range(weight.shape[1]):  # single precision: the order of the sum is part of the result
        a = a + weight[:, c] * f[:, c : c + 1]
    a = a + bias
    return (a if x.ndim > len(run.graph.values[node.inputs[0]].shape) else a[0],)


def ref_clip_mask(run: Run, node: Node, ins: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """y -> a bool per element: strictly within the clamp."""
    assert isinstance(node.attrs, Mask)
    return (mask_of(ins[0], "value", node.attrs.clamp),)


def ref_select_channels(run: Run, node: Node, ins: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """(x, channels) -> those channels of every group."""
    assert isinstance(node.attrs, SelectChannels)
    x, groups = ins[0], node.attrs.groups
    chosen = x.reshape(*x.shape[:-1], groups, -1)[..., ins[1]]
    return (chosen.reshape(*x.shape[:-1], -1),)


def ref_check_lr(run: Run, node: Node, ins: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """lr -> nothing, or UsageError where it is negative, not finite, or too large for a layer's scale."""
    assert isinstance(node.attrs, CheckLr)
    lr = ins[0][0]
    if not np.isfinite(lr) or lr < 0:
        raise UsageError(f"learning rate {lr}: it is a finite number of at least 0; give one such as 0.0004")
    if not np.isfinite(lr * run.rounding.real.type(node.attrs.largest)):
        raise UsageError(
            f"learning rate {lr}: times {node.attrs.largest:g}, a layer's largest factor, it is not finite; "
            "give a smaller one"
        )
    return ()


def ref_softmax_xent(run: Run, node: Node, ins: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """(logits, label) -> (loss (1,), g), or UsageError (label) or MismatchError (logits)."""
    logits, label = ins[0], int(ins[1][0])
    if not 0 <= label < logits.size:
        raise UsageError(f"label {label}: the model has {logits.size} classes; give one from 0 to {logits.size - 1}")
    need_finite(node, "a logit", logits)
    shifted = logits - logits.max()
    e = run.rounding.exp(shifted)
    z = run.rounding.real.type(0)
    for k in range(e.size):
        z = z + e[k]
    p = run.rounding.flush(e / z, -60)
    loss = run.rounding.log(np.asarray([z])) - shifted[label]
    return loss, p - np.eye(1, p.size, label, dtype=p.dtype)[0]
