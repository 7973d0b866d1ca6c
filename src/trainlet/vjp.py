# SPDX-License-Identifier: Apache-2.0
"""One short gradient rule per operator.

A rule ``vjp_<op>(tape, node, g)`` appends what carries the gradient ``g`` of the node's output to its inputs, and the
updates of its own parameters. What reaches an input is handed to ``tape.reach``; how several consumers' shares become
one tensor, with one mask and one rounding, is the business of ``autodiff.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainlet.attrs import Attrs, AvgPool, Conv2d, Conv2dDb, Conv2dDw, Conv2dDx, SgdBias, SgdWeight
from trainlet.errors import UnsupportedError
from trainlet.ir.graph import Node, Value
from trainlet.numerics import MAX_UPDATE_PIXELS, dx_bits
from trainlet.ops import fan_out

if TYPE_CHECKING:
    from trainlet.autodiff.walk import Tape


WEIGHT, BIAS = 32, 33
"""Slots of a node's rounding sites: 0 to 31 are its operands, from 32 on its parameters."""


@dataclass(frozen=True, slots=True)
class Sums:
    """A share that a convolution computed, not yet rounded: sums, and the scale of their weights (None in reals)."""

    acc: str
    scale: str | None
    node: Node


@dataclass(frozen=True, slots=True)
class Shared:
    """A share that is an existing gradient, neither copied nor rounded."""

    grad: str


def _hw(v: Value) -> tuple[int, int]:
    return v.shape[0], v.shape[1]


def vjp_conv2d(tape: Tape, node: Node, g: str) -> None:
    """dL/dx = conv_transpose(g, W); dL/dW = x * g; dL/db = sum of g."""
    a = node.attrs
    assert isinstance(a, Conv2d)
    x, w = tape.value(node.inputs[0]), tape.value(node.inputs[1])
    if tape.needs_gradient(x.name):
        if not dx_bits(fan_out(a, w.shape[0])):
            raise UnsupportedError(
                f"{node.layer}: its input gradient sums {fan_out(a, w.shape[0])} products, too many for 32 bits; "
                "train no layer before it"
            )
        acc = Value(f"{node.name}.dx", x.shape, tape.sums, exponent=tape.value(g).exponent)
        tape.emit("conv2d_dx", acc.name, node.layer, (g, *tape.weights_of(node)), Conv2dDx(a, _hw(x)), acc)
        tape.reach(x.name, node, Sums(acc.name, tape.scale_of(node), node))
    _update_weight(tape, node, a, g)
    _update_bias(tape, node, a, g)


def _update_weight(tape: Tape, node: Node, a: Conv2d, g: str) -> None:
    choice = tape.trained.get(node.name)
    if choice is None:
        return
    y = tape.value(node.outputs[0])
    pixels = y.shape[0] * y.shape[1]
    if pixels > MAX_UPDATE_PIXELS:
        raise UnsupportedError(
            f"{node.layer}: it has {pixels} output pixels, more than the {MAX_UPDATE_PIXELS} whose weight gradient "
            "fits 32 bits; train its bias only, or use a smaller image"
        )
    slot = tape.value(g).exponent
    shape = tape.value(choice.weight).shape
    dw = Value(f"{node.name}.dw", shape, tape.sums, exponent=slot)
    attrs = Conv2dDw(a, tape.value(choice.channels).size)
    tape.emit("conv2d_dw", dw.name, node.layer, (g, choice.kept), attrs, dw)
    sgd = SgdWeight(tape.site(node, WEIGHT), tape.fraction_bits, tape.x_scale(node), pixels, a)
    ins = tuple(v for v in (dw.name, "lr", tape.scale_of(node), choice.channels) if v)
    writes = (choice.weight, choice.fraction) if choice.fraction else (choice.weight,)
    tape.emit("sgd_weight", f"{node.name}.weight_sgd", node.layer, ins, sgd, writes=writes)


def _update_bias(tape: Tape, node: Node, a: Conv2d, g: str) -> None:
    bias = node.inputs[2]
    if node.layer not in tape.scheme.biases:
        return
    y = tape.value(node.outputs[0])
    db = Value(f"{node.name}.db", tape.value(bias).shape, tape.sums, exponent=tape.value(g).exponent)
    tape.emit("conv2d_db", db.name, node.layer, (g,), Conv2dDb(y.shape[0] * y.shape[1]), db)
    sgd = SgdBias(tape.site(node, BIAS), tape.x_scale(node), y.shape[0] * y.shape[1], a)
    ins = tuple(v for v in (db.name, "lr", tape.scale_of(node)) if v)
    tape.emit("sgd_bias", f"{node.name}.bias_sgd", node.layer, ins, sgd, writes=(bias,))


def vjp_add(tape: Tape, node: Node, g: str) -> None:
    """Both inputs get the output's gradient itself."""
    for x in node.inputs:
        if tape.needs_gradient(x):
            tape.reach(x, node, Shared(g))


def vjp_avg_pool(tape: Tape, node: Node, g: str) -> None:
    """dL/dx = g / (H W) at every pixel: one vector stands for all. Only a global pool at the end of the model."""
    a = node.attrs
    assert isinstance(a, AvgPool)
    x = tape.value(node.inputs[0])
    if a.kernel != x.shape[:2] or any(a.pads) or tape.value(g).dtype != "f32" or len(tape.value(g).shape) != 1:
        raise UnsupportedError(
            f"{node.layer}: gradients pass a global average pool in front of the head, not a "
            f"{a.kernel[0]}x{a.kernel[1]} pool; train no layer before it"
        )
    h, w = a.kernel
    tape.reach(x.name, node, Shared(tape.enter(node, x.name, g, 1.0 / (h * w))))


def vjp_dense(tape: Tape, node: Node, g: str) -> None:
    """The head: dL/dx = W^T g; its update is an outer product that never exists as a tensor."""
    x, w, b = node.inputs
    if tape.needs_gradient(x):
        gf = Value(f"{node.name}.dx", (tape.value(w).shape[1],), "f32")
        tape.emit("dense_dx", gf.name, node.layer, (g, w), Attrs(), gf)
        tape.reach(x, node, Shared(gf.name if tape.takes_reals(x) else tape.enter(node, x, gf.name, 1.0)))
    # after everything that may still refuse the step
    tape.defer(Node("dense_sgd", f"{node.name}.sgd", node.layer, (g, x, "lr"), (), Attrs(), (w, b)))


VJP: dict[str, Callable[[Tape, Node, str], None]] = {
    "conv2d": vjp_conv2d,
    "add": vjp_add,
    "avg_pool": vjp_avg_pool,
    "dense": vjp_dense,
}

NOT_DIFFERENTIABLE = frozenset(
    {
        "clip_mask", "select_channels", "check_lr", "softmax_xent", "dense_dx", "dense_sgd", "enter_grad", "mask_grad",
        "round_grad", "conv2d_dx", "conv2d_dw", "conv2d_db", "sgd_weight", "sgd_bias", "conv2d_dx_round",
        "conv2d_dw_sgd", "conv2d_db_sgd", "stream",
    }
)  # fmt: skip
"""Operators of a training step, which is not differentiated again (softmax_xent starts the walk)."""
