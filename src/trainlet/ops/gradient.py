# SPDX-License-Identifier: Apache-2.0
"""What becomes of gradients whatever operator they come from: their entry into the integers, the one rounding of each
tensor, masks; and what the forward pass keeps for masks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal

from trainlet.ir import Attrs, Bound, Node, Value
from trainlet.ops import numerics
from trainlet.ops.op import (
    F32,
    NO_WEIGHTS,
    STEP,
    Clamp,
    Emitter,
    Exponent,
    Kernel,
    No,
    Overwrites,
    Type,
    always,
    anywhere,
    c_float,
    call,
    need,
    no_macs,
    no_scratch,
    nothing_aside,
    operands,
    same_row,
    step_op,
)

MaskFrom = Literal["none", "bits", "value"]
GradType = Literal["s8", "f32"]


# --- attributes -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class EnterGrad(Attrs):
    """Where a gradient in reals becomes that of a tensor of ``shape`` (H, W, C), as s8 at the rounding ``site``, or as
    f32 in a graph of reals. Its numbers, times ``factor``, are one for each element, or one for each channel, which
    stands for all pixels."""

    shape: tuple[int, int, int]
    factor: float
    site: int
    dtype: GradType


@dataclass(frozen=True, slots=True)
class RoundGrad(Attrs):
    """The one rounding of a gradient tensor: [sums] + further gradients, in the order of their consumers, masked, to
    int8. ``levels`` and ``bound`` are those of the sums (``op.Sums``), 0 where there are none."""

    site: int
    mask: MaskFrom
    clamp: Clamp | None
    levels: int
    bound: int


@dataclass(frozen=True, slots=True)
class Mask(Attrs):
    """A gradient passes where clamp[0] < y < clamp[1]. ``source``: packed bits, or the stored output itself."""

    clamp: Clamp
    source: MaskFrom = "value"


# --- rules ------------------------------------------------------------------------------------------------------


def _rule_enter_grad(node: Node, ins: Bound[Value]) -> tuple[Type, ...]:
    a, g = node.attrs, ins["g"]
    assert isinstance(a, EnterGrad)
    need(len(g.shape) == 1 and g.dtype == "f32", "g is a gradient (n,) in f32")
    h, w, c = a.shape
    need(g.size in (c, h * w * c), f"there is a number for each of {c} channels or {h * w * c} elements, not {g.size}")
    return (((1, 1, c) if g.size == c else a.shape, a.dtype),)


def need_rounding(a: RoundGrad, shape: tuple[int, ...], ins: Bound[Value]) -> None:
    """RuleError unless mask and further gradients fit a tensor of that shape."""
    need(("mask" in ins) == (a.mask != "none"), "there is a mask source exactly where there is a mask")
    mask = ins.get("mask")
    if mask is not None:
        need_mask(mask, a.mask, a.clamp)
    ones = (*ins.all("further"), *((mask,) if mask else ()))
    fit = (shape, (1, 1, shape[-1]))
    need(all(v.shape in fit for v in ones), "all gradients have the shape of the tensor")


def need_mask(source: Value, kind: MaskFrom, clamp: Clamp | None) -> None:
    """RuleError unless ``source`` can be a mask of that kind."""
    bits = source.dtype == "b1"
    need(bits == (kind == "bits"), f"the mask source {source.name!r} is b1 exactly where the mask is made of bits")
    need(kind == "bits" or clamp is not None, "a mask by value has two bounds")


def _rule_round_grad(node: Node, ins: Bound[Value]) -> tuple[Type, ...]:
    a, acc = node.attrs, ins.get("acc")
    assert isinstance(a, RoundGrad)
    further = ins.all("further")
    need(acc is not None or bool(further), "there is something to round")
    need((acc is not None) == (a.bound > 0), "sums have a bound, and nothing else has one")
    need("scale" not in ins or acc is not None, "a scale is that of sums")
    dtype = (acc or further[0]).dtype
    need(dtype in ("s32" if acc else "s8", "f32"), "sums are s32 and gradients s8, or all is f32")
    need(("rho" in node.stores) == (dtype != "f32"), "a rounding to integers has its rho")
    shapes = [v.shape for v in ins.flat() if len(v.shape) == 3]
    shape = max(shapes, key=math.prod)
    need_rounding(a, shape, ins)
    return ((shape, "f32" if dtype == "f32" else "s8"),)


def _rule_mask_grad(node: Node, ins: Bound[Value]) -> tuple[Type, ...]:
    a, g, mask = node.attrs, ins["g"], ins["mask"]
    assert isinstance(a, Mask)
    need(a.source != "none" and a.clamp[0] < a.clamp[1], "a mask has a source and bounds")
    need_mask(mask, a.source, a.clamp)
    need(g.shape in (mask.shape, (1, 1, mask.shape[-1])), "the gradient fits the mask")
    return ((mask.shape, g.dtype),)


def _rule_clip_mask(node: Node, ins: Bound[Value]) -> tuple[Type, ...]:
    a = node.attrs
    assert isinstance(a, Mask)
    need(a.source != "none" and a.clamp[0] < a.clamp[1], "a mask has a source and bounds")
    return ((ins["x"].shape, "b1"),)


# --- C ----------------------------------------------------------------------------------------------------------


def sums_table(e: Emitter, node: Node, a: RoundGrad, scales: F32 | None, factors: str) -> str:
    """Pointer to the tl_dx_scale of the node's sums; ``factors`` is the C name of mt, or NULL."""
    s = numerics.sums_scale(numerics.sums_units(scales, a.levels), a.bound)
    tables = (factors, e.table(f"{node.name}.mult", s.mult), e.table(f"{node.name}.exp", s.exp))
    return "&" + e.struct(f"{node.name}.scale", "tl_dx_scale", *tables, s.pre)


def _mask_literal(e: Emitter, kind: MaskFrom, clamp: Clamp | None, source: str | None) -> str:
    if source is None or clamp is None:
        return "(tl_mask){NULL, NULL, 0, 0}"
    both = (e.ptr(source), "NULL") if kind == "bits" else ("NULL", e.ptr(source))
    return f"(tl_mask){{{both[0]}, {both[1]}, {int(clamp[0])}, {int(clamp[1])}}}"


def site_literal(e: Emitter, node: Node, a: RoundGrad) -> str:
    """Pointer to a tl_site literal."""
    mask = _mask_literal(e, a.mask, a.clamp, node.get("mask"))
    further = [e.grad(g) for g in node.all("further")]
    array = f"(const tl_grad[]){{{', '.join(further)}}}" if further else "NULL"
    rho = e.ptr(node.stores["rho"][0])
    return f"&(const tl_site){{{a.site}u, {rho}, &{e.exponent(node.output)}, {array}, {len(further)}, {mask}}}"


def emit_enter_grad(e: Emitter, node: Node) -> str:
    a, out = node.attrs, e.value(node.output)
    assert isinstance(a, EnterGrad)
    given = (f"{a.site}u", e.ptr(node["g"]), out.size, c_float(a.factor))
    return call("tl_enter_grad_s8", "&c->step", *given, e.ptr(out.name), f"&{e.exponent(out.name)}")


def _rounds_sums(graph: object, node: Node, target: object) -> bool:
    return "acc" in node.operands


def emit_round_sums(e: Emitter, node: Node) -> str:
    a, acc, out = node.attrs, node["acc"], e.value(node.output)
    assert isinstance(a, RoundGrad)
    scale = node.get("scale")
    v = sums_table(e, node, a, None if scale is None else e.scales(scale), "NULL")
    per_channel = int(scale is not None and not a.levels)
    sums = (e.ptr(acc), e.exponent(acc))
    site = site_literal(e, node, a)
    return call("tl_round_grad_s32", "&c->step", v, per_channel, *sums, site, *out.shape, e.ptr(out.name))


def emit_round_grad(e: Emitter, node: Node) -> str:
    a, out = node.attrs, e.value(node.output)
    assert isinstance(a, RoundGrad)
    return call("tl_round_grad_s8", "&c->step", site_literal(e, node, a), *out.shape, e.ptr(out.name))


def emit_mask_grad(e: Emitter, node: Node) -> str:
    a, out = node.attrs, e.value(node.output)
    assert isinstance(a, Mask)
    mask = _mask_literal(e, a.source, a.clamp, node["mask"])
    return call("tl_mask_grad_s8", e.view(node["g"]), mask, *out.shape, e.ptr(out.name))


def emit_clip_mask(e: Emitter, node: Node) -> str:
    a, x = node.attrs, node["x"]
    assert isinstance(a, Mask)
    lo, hi = int(a.clamp[0]), int(a.clamp[1])
    return call("tl_clip_mask_s8", e.begin(x), e.part(x)[1], lo, hi, e.begin(node.output))


_NOT_BY_ROWS: Final = No("gradients run over whole maps")
_OTHER_TYPE: Final = No("what it makes has another type than what it reads")
_NO_CONSTANTS: Final = No("it has no constants of its own")
_NO_LOSS: Final = No("it makes no loss")

ROWS: Final = (
    step_op(
        name="enter_grad",
        attrs=EnterGrad,
        operands=operands("g"),
        stores=(),
        stages=STEP,
        rule=_rule_enter_grad,
        data=_NO_CONSTANTS,
        macs=no_macs,
        rows=_NOT_BY_ROWS,
        overwrites=_OTHER_TYPE,
        exponent=Exponent.OWN,
        refuses=True,
        loss=_NO_LOSS,
        fusions=(),
        kernels=(Kernel("tl_enter_grad_s8", anywhere, NO_WEIGHTS, no_scratch, _OTHER_TYPE, emit_enter_grad),),
    ),
    step_op(
        name="round_grad",
        attrs=RoundGrad,
        operands=operands("acc?", "scale?", "mask?", "further*"),
        stores=operands("rho?"),
        stages=STEP,
        rule=_rule_round_grad,
        data=_NO_CONSTANTS,
        macs=no_macs,
        rows=_NOT_BY_ROWS,
        overwrites=_OTHER_TYPE,
        exponent=Exponent.OWN,
        refuses=False,
        loss=_NO_LOSS,
        fusions=(),
        kernels=(
            Kernel("tl_round_grad_s32", _rounds_sums, NO_WEIGHTS, no_scratch, _OTHER_TYPE, emit_round_sums),
            Kernel("tl_round_grad_s8", anywhere, NO_WEIGHTS, no_scratch, _OTHER_TYPE, emit_round_grad),
        ),
    ),
    step_op(
        name="mask_grad",
        attrs=Mask,
        operands=operands("g", "mask"),
        stores=(),
        stages=STEP,
        rule=_rule_mask_grad,
        data=_NO_CONSTANTS,
        macs=no_macs,
        rows=_NOT_BY_ROWS,
        overwrites=Overwrites(("g",), True, always),
        exponent=Exponent.OF_G,
        refuses=False,
        loss=_NO_LOSS,
        fusions=(),
        kernels=(Kernel("tl_mask_grad_s8", anywhere, NO_WEIGHTS, no_scratch, nothing_aside, emit_mask_grad),),
    ),
    step_op(
        name="clip_mask",
        attrs=Mask,
        operands=operands("x"),
        stores=(),
        stages=STEP,
        rule=_rule_clip_mask,
        data=_NO_CONSTANTS,
        macs=no_macs,
        rows=same_row,
        overwrites=_OTHER_TYPE,
        exponent=No("it is made of activations"),
        refuses=False,
        loss=_NO_LOSS,
        fusions=(),
        kernels=(Kernel("tl_clip_mask_s8", anywhere, NO_WEIGHTS, no_scratch, _OTHER_TYPE, emit_clip_mask),),
    ),
)
