# SPDX-License-Identifier: Apache-2.0
"""Losses, and the check of the learning rate: what may refuse a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from trainlet.ir import Attrs, Bound, Kind, Node, Value
from trainlet.ops.op import (
    NO_WEIGHTS,
    STEP,
    Emitter,
    Kernel,
    Loss,
    No,
    Type,
    anywhere,
    c_float,
    call,
    need,
    no_macs,
    no_scratch,
    operands,
    step_op,
)


@dataclass(frozen=True, slots=True)
class CheckLr(Attrs):
    """``largest`` is the largest constant that lr is multiplied by anywhere in the step."""

    largest: float


def _rule_softmax_xent(node: Node, ins: Bound[Value]) -> tuple[Type, ...]:
    logits, label = ins["logits"], ins["label"]
    need(len(logits.shape) == 1 and logits.dtype == "f32", "logits are (classes,) in f32")
    need(label.dtype == "s32" and label.shape == (1,), "label is one s32")
    return ((1,), "f32"), (logits.shape, "f32")


def _rule_check_lr(node: Node, ins: Bound[Value]) -> tuple[Type, ...]:
    need(ins["lr"].shape == (1,), "lr is one number")
    return ()


def _label(logits: Value) -> Value:
    return Value("label", (1,), "s32", Kind.INPUT)


def emit_softmax_xent(e: Emitter, node: Node) -> str:
    _, g = node.outputs  # the loss goes to the context
    logits = node["logits"]
    return call("tl_softmax_xent_f32", e.ptr(logits), e.value(logits).size, "*c->target", "&c->loss", e.ptr(g))


def emit_check_lr(e: Emitter, node: Node) -> str:
    assert isinstance(node.attrs, CheckLr)
    return call("tl_check_lr", "c->lr", c_float(node.attrs.largest))


_IN_REALS: Final = No("it is in reals")
_NO_MAP: Final = No("it reads a vector, which has no rows")
_OTHER: Final = No("what it makes has another meaning than what it reads, which may still be needed")
_NO_CONSTANTS: Final = No("it has no constants")

ROWS: Final = (
    step_op(
        name="softmax_xent",
        attrs=Attrs,
        operands=operands("logits", "label"),
        stores=(),
        stages=STEP,
        rule=_rule_softmax_xent,
        data=_NO_CONSTANTS,
        macs=no_macs,
        rows=_NO_MAP,
        overwrites=_OTHER,
        exponent=_IN_REALS,
        refuses=True,
        loss=Loss(_label),
        fusions=(),
        kernels=(Kernel("tl_softmax_xent_f32", anywhere, NO_WEIGHTS, no_scratch, _OTHER, emit_softmax_xent),),
    ),
    step_op(
        name="check_lr",
        attrs=CheckLr,
        operands=operands("lr"),
        stores=(),
        stages=STEP,
        rule=_rule_check_lr,
        data=_NO_CONSTANTS,
        macs=no_macs,
        rows=_NO_MAP,
        overwrites=_OTHER,
        exponent=_IN_REALS,
        refuses=True,
        loss=No("it makes none"),
        fusions=(),
        kernels=(Kernel("tl_check_lr", anywhere, NO_WEIGHTS, no_scratch, _OTHER, emit_check_lr),),
    ),
)
