# SPDX-License-Identifier: Apache-2.0
"""The head: a dense layer in reals over int8 features. It always trains."""

from __future__ import annotations

from typing import Final

from trainlet.errors import UnsupportedError
from trainlet.ir import Attrs, Bound, Node, Operands, Value
from trainlet.ops.op import (
    MODEL,
    NO_WEIGHTS,
    STEP,
    Emitter,
    Kernel,
    Move,
    No,
    Op,
    Param,
    Quantizer,
    Tape,
    Type,
    anywhere,
    c_float,
    call,
    need,
    no_scratch,
    operands,
    step_op,
)


def rule_dense(node: Node, ins: Bound[Value]) -> tuple[Type, ...]:
    x, w, b = ins["x"], ins["weight"], ins["bias"]
    need(w.dtype == b.dtype == "f32", "the head is f32")
    need(x.dtype in ("s8", "f32") and len(w.shape) == 2 and w.shape[1] == x.size, "weight is (classes, features)")
    need(b.shape == (w.shape[0],), "one bias per class")
    return ((b.shape, "f32"),)


def _rule_dense_dx(node: Node, ins: Bound[Value]) -> tuple[Type, ...]:
    g, w = ins["g"], ins["weight"]
    need(len(w.shape) == 2 and g.shape == (w.shape[0],), "g has one entry for each row of the weight")
    return (((w.shape[1],), "f32"),)


def _rule_dense_sgd(node: Node, ins: Bound[Value]) -> tuple[Type, ...]:
    g, lr = ins["g"], ins["lr"]
    need(len(g.shape) == 1 and g.dtype == "f32", "g is (classes,) in f32")
    need(lr.shape == (1,) and lr.dtype == "f32", "lr is one f32")
    return ()


def vjp_dense(tape: Tape, node: Node, g: str) -> None:
    """dL/dx = W^T g; the update is an outer product that never exists as a tensor."""
    x = node["x"]
    if tape.needs_gradient(x):
        gf = Value(f"{node.name}.dx", (tape.value(node["weight"]).shape[1],), "f32")
        read = Operands(g=g, weight=node["weight"])
        tape.emit(Node("dense_dx", gf.name, node.layer, read, (gf.name,), Attrs()), gf)
        tape.reach(node, "x", Move(gf.name if tape.takes_reals(x) else tape.enter(node, "x", gf.name, 1.0)))
    read = Operands(g=g, x=x, lr=tape.rate)
    stores = Operands(weight=node["weight"], bias=node["bias"])
    # after everything that may still refuse the step
    tape.defer(Node("dense_sgd", f"{node.name}.sgd", node.layer, read, (), Attrs(), stores))


def quantize_dense(to: Quantizer, node: Node) -> None:
    """Stays as it is; it reads int8 features and puts their scale in."""
    if to.value(node["x"]).dtype != "s8":
        raise UnsupportedError(f"{node.layer}: a dense layer is supported at the end of a model only; use convolutions")
    for operand in ("weight", "bias"):
        to.carry(node[operand])
    to.emit(node, None)


def _macs_dense(node: Node, ins: Bound[Value]) -> int:
    return ins["weight"].size


def _macs_dense_sgd(node: Node, ins: Bound[Value]) -> int:
    return ins["g"].size * ins["x"].size


def _features(e: Emitter, x: str) -> tuple[str, int, str]:
    return e.ptr(x), e.zero(x), c_float(e.scale(x))


def emit_dense(e: Emitter, node: Node) -> str:
    w = node["weight"]
    read = (*_features(e, node["x"]), e.ptr(w), e.ptr(node["bias"]))
    return call("tl_dense_f32", *read, *e.value(w).shape, e.ptr(node.output))


def emit_dense_dx(e: Emitter, node: Node) -> str:
    w = node["weight"]
    return call("tl_dense_dx_f32", e.ptr(node["g"]), e.ptr(w), *e.value(w).shape, e.ptr(node.output))


def emit_dense_sgd(e: Emitter, node: Node) -> str:
    (w,), (b,) = node.stores["weight"], node.stores["bias"]
    read = (e.ptr(node["g"]), *_features(e, node["x"]), "c->lr")
    return call("tl_dense_sgd_f32", *read, *e.value(w).shape, e.ptr(w), e.ptr(b))


_IN_REALS: Final = No("it is in reals")
_WHOLE: Final = No("a head trains whole")
_NO_MAP: Final = No("it reads or makes a vector, which has no rows")
_OTHER_TYPE: Final = No("what it makes has another type than what it reads")
_NO_LOSS: Final = No("it makes no loss")
_NO_CONSTANTS: Final = No("any finite numbers will do, and that is checked of all data")

ROWS: Final = (
    Op(
        name="dense",
        attrs=Attrs,
        operands=operands("x", "weight", "bias"),
        stores=(),
        params=(Param("weight", True, _WHOLE, _IN_REALS), Param("bias", True, _WHOLE, _IN_REALS)),
        stages=MODEL,
        rule=rule_dense,
        data=_NO_CONSTANTS,
        macs=_macs_dense,
        integer=False,
        activation=No("logits are not clamped"),
        rows=_NO_MAP,
        overwrites=_OTHER_TYPE,
        exponent=No("it makes no gradient"),
        refuses=False,
        loss=_NO_LOSS,
        quantize=quantize_dense,
        vjp=vjp_dense,
        takes_reals=No("its gradient is that of a loss"),
        fusions=(),
        kernels=(Kernel("tl_dense_f32", anywhere, NO_WEIGHTS, no_scratch, _OTHER_TYPE, emit_dense),),
    ),
    step_op(
        name="dense_dx",
        attrs=Attrs,
        operands=operands("g", "weight"),
        stores=(),
        stages=STEP,
        rule=_rule_dense_dx,
        data=_NO_CONSTANTS,
        macs=_macs_dense,
        rows=_NO_MAP,
        overwrites=_OTHER_TYPE,
        exponent=_IN_REALS,
        refuses=False,
        loss=_NO_LOSS,
        fusions=(),
        kernels=(Kernel("tl_dense_dx_f32", anywhere, NO_WEIGHTS, no_scratch, _OTHER_TYPE, emit_dense_dx),),
    ),
    step_op(
        name="dense_sgd",
        attrs=Attrs,
        operands=operands("g", "x", "lr"),
        stores=operands("weight", "bias"),
        stages=STEP,
        rule=_rule_dense_sgd,
        data=_NO_CONSTANTS,
        macs=_macs_dense_sgd,
        rows=_NO_MAP,
        overwrites=No("it updates a parameter and makes nothing"),
        exponent=_IN_REALS,
        refuses=False,
        loss=_NO_LOSS,
        fusions=(),
        kernels=(Kernel("tl_dense_sgd_f32", anywhere, NO_WEIGHTS, no_scratch, _OTHER_TYPE, emit_dense_sgd),),
    ),
)
