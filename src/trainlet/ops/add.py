# SPDX-License-Identifier: Apache-2.0
"""Residual addition, with a fused activation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from trainlet.ir import Attrs, Bound, Node, Value
from trainlet.ops import numerics
from trainlet.ops.op import (
    MODEL,
    NO_WEIGHTS,
    Clamp,
    Emitter,
    Kernel,
    Move,
    No,
    Op,
    Overwrites,
    Quantizer,
    Tape,
    Type,
    always,
    anywhere,
    call,
    need,
    no_macs,
    no_scratch,
    nothing_aside,
    operands,
    same_row,
)
from trainlet.ops.quantization import integer_clamp, range_qparams


@dataclass(frozen=True, slots=True)
class Add(Attrs):
    """Residual addition; clamp and activation as in ``Conv2d``."""

    clamp: Clamp | None = None
    activation: bool = False


def _add_of(node: Node) -> Add:
    assert isinstance(node.attrs, Add)
    return node.attrs


def rule_add(node: Node, ins: Bound[Value]) -> tuple[Type, ...]:
    a, b = ins["a"], ins["b"]
    need(a.shape == b.shape and a.dtype == b.dtype, "two inputs of one shape")
    need(a.dtype != "s8" or len(a.shape) == 3, "integers are added as (H, W, C)")
    return ((a.shape, a.dtype),)


def vjp_add(tape: Tape, node: Node, g: str) -> None:
    """Both inputs get the output's gradient itself."""
    for operand in ("a", "b"):
        if tape.needs_gradient(node[operand]):
            tape.reach(node, operand, Move(g))


def quantize_add(to: Quantizer, node: Node) -> None:
    y = range_qparams(node.layer, to.range(node))
    to.emit(replace(node, attrs=replace(_add_of(node), clamp=integer_clamp(_add_of(node).clamp, y))), y)


def emit_add(e: Emitter, node: Node) -> str:
    attrs, (a, b, y) = _add_of(node), (node["a"], node["b"], node.output)
    assert attrs.clamp is not None
    s = numerics.add_scale(e.scale(a), e.scale(b), e.scale(y))
    zeros = (e.zero(a), e.zero(b), e.zero(y), int(attrs.clamp[0]), int(attrs.clamp[1]))
    table = e.struct(f"{node.name}.scale", "tl_add", *zeros, s.a[0], s.b[0], s.y[0], s.a[1], s.b[1], s.y[1])
    h, w, c = e.value(y).shape
    return call("tl_add_s8", f"&{table}", e.view(a), e.view(b), e.view(y), w, c, e.rows(h))


def _activation(attrs: Attrs) -> Clamp | None:
    assert isinstance(attrs, Add)
    return attrs.clamp if attrs.activation else None


ROWS: Final = (
    Op(
        name="add",
        attrs=Add,
        operands=operands("a", "b"),
        stores=(),
        params=(),
        stages=MODEL,
        rule=rule_add,
        data=No("it has no constants"),
        macs=no_macs,
        integer=True,
        activation=_activation,
        rows=same_row,
        overwrites=Overwrites(("a", "b"), True, always),
        exponent=No("it makes no gradient"),
        refuses=False,
        loss=No("it is a layer"),
        quantize=quantize_add,
        vjp=vjp_add,
        takes_reals=No("it hands an int8 gradient on"),
        fusions=(),
        kernels=(Kernel("tl_add_s8", anywhere, NO_WEIGHTS, no_scratch, nothing_aside, emit_add),),
    ),
)
