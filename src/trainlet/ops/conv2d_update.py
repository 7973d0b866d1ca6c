# SPDX-License-Identifier: Apache-2.0
"""The gradients of a convolution's weights and biases, their updates, and both in one node."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from trainlet.errors import UnsupportedError
from trainlet.ir import Attrs, Bound, Graph, Node, Operands, Value
from trainlet.ops import numerics, scratch
from trainlet.ops.geometry import Conv2d, Layer, conv2d_of, conv_out_hw, geometry_table, trained_shape
from trainlet.ops.op import (
    LOWERED,
    NO_WEIGHTS,
    STEP,
    Core,
    Emitter,
    Exponent,
    Fusion,
    Kernel,
    No,
    Tape,
    Trained,
    Type,
    anywhere,
    call,
    need,
    no_macs,
    no_scratch,
    operands,
    step_op,
)

# --- attributes -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Conv2dDw(Attrs):
    """Weight gradient of the kept input channels, ``kept`` of them in each group (depthwise: in all); ``shape`` is that
    of the layer's whole input."""

    conv: Conv2d
    kept: int
    shape: tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Conv2dDb(Attrs):
    """Bias gradient; ``pixels`` is the size of the layer's output, of which one vector may stand for all."""

    pixels: int


@dataclass(frozen=True, slots=True)
class SgdWeight(Attrs):
    """``x_scale`` is the scale of the layer's input, ``pixels`` the size of its output, ``fraction_bits`` 0, 4 or 8;
    ``shape`` as in ``Conv2dDw``."""

    site: int
    fraction_bits: int
    x_scale: float
    pixels: int
    conv: Conv2d
    shape: tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class SgdBias(Attrs):
    """As ``SgdWeight``."""

    site: int
    x_scale: float
    pixels: int
    conv: Conv2d


@dataclass(frozen=True, slots=True)
class FusedDw(Attrs):
    """conv2d_dw and sgd_weight in one node; the gradient never exists as a tensor."""

    dw: Conv2dDw
    sgd: SgdWeight


@dataclass(frozen=True, slots=True)
class FusedDb(Attrs):
    """conv2d_db and sgd_bias in one node."""

    sgd: SgdBias


def _dw(node: Node) -> Conv2dDw:
    a = node.attrs.dw if isinstance(node.attrs, FusedDw) else node.attrs
    assert isinstance(a, Conv2dDw)
    return a


def _sgd_weight(node: Node) -> SgdWeight:
    a = node.attrs.sgd if isinstance(node.attrs, FusedDw) else node.attrs
    assert isinstance(a, SgdWeight)
    return a


def _sgd_bias(node: Node) -> SgdBias:
    a = node.attrs.sgd if isinstance(node.attrs, FusedDb) else node.attrs
    assert isinstance(a, SgdBias)
    return a


def sums_biases(node: Node) -> bool:
    """Whether the node sums a gradient for the update of a bias."""
    return isinstance(node.attrs, Conv2dDb | FusedDb)


# --- gradient rules -------------------------------------------------------------------------------------------

MAX_UPDATE_PIXELS: Final = 66_311  # 127 * 255 * pixels < 2^31


def update_weight(tape: Tape, node: Node, g: str, trained: Trained, pixels: int) -> None:
    if pixels > MAX_UPDATE_PIXELS:
        raise UnsupportedError(
            f"{node.layer}: it has {pixels} output pixels, more than the {MAX_UPDATE_PIXELS} whose weight gradient "
            "fits 32 bits; train its bias only, or use a smaller image"
        )
    assert trained.channels is not None
    a, (h, w, c) = conv2d_of(node), tape.value(node["x"]).shape
    dw = Value(f"{node.name}.dw", tape.value(trained.state).shape, tape.sums, exponent=tape.same_exponent(g))
    read = Operands(g=g, x=trained.kept, channels=trained.channels)
    attrs = Conv2dDw(a, tape.value(trained.channels).size, (h, w, c))
    tape.emit(Node("conv2d_dw", dw.name, node.layer, read, (dw.name,), attrs), dw)
    site = tape.site(node, "weight")
    sgd = SgdWeight(site, tape.fraction_bits, tape.scale_of(node["x"]), pixels, a, (h, w, c))
    read = Operands(dw=dw.name, lr=tape.rate, scale=node.get("scale"), channels=trained.channels)
    stores = Operands(weight=trained.state, fraction=trained.fraction)
    tape.emit(Node("sgd_weight", f"{node.name}.weight_sgd", node.layer, read, (), sgd, stores))


def update_bias(tape: Tape, node: Node, g: str, trained: Trained, pixels: int) -> None:
    db = Value(f"{node.name}.db", tape.value(trained.state).shape, tape.sums, exponent=tape.same_exponent(g))
    tape.emit(Node("conv2d_db", db.name, node.layer, Operands(g=g), (db.name,), Conv2dDb(pixels)), db)
    sgd = SgdBias(tape.site(node, "bias"), tape.scale_of(node["x"]), pixels, conv2d_of(node))
    read = Operands(db=db.name, lr=tape.rate, scale=node.get("scale"))
    stores = Operands(bias=trained.state)
    tape.emit(Node("sgd_bias", f"{node.name}.bias_sgd", node.layer, read, (), sgd, stores))


# --- rules ----------------------------------------------------------------------------------------------------


def _rule_dw(node: Node, ins: Bound[Value]) -> tuple[Type, ...]:
    a, g, x = _dw(node), ins["g"], ins["x"]
    need(len(x.shape) == 3 and len(g.shape) == 3, "g and x are (H, W, C)")
    need(x.shape[2] == a.kept * (1 if a.conv.depthwise else a.conv.groups), "x holds the kept channels only")
    need(x.shape[:2] == a.shape[:2], "x has the pixels of the layer's input")
    need(ins["channels"].size == a.kept, "channels names the kept ones")
    return ((trained_shape(a.conv, g.shape[-1], a.kept), "s32" if g.dtype == "s8" else "f32"),)


def _rule_db(node: Node, ins: Bound[Value]) -> tuple[Type, ...]:
    g = ins["g"]
    return (((g.shape[-1],), "s32" if g.dtype == "s8" else "f32"),)


def _need_rate(lr: Value, scale: Value | None, out_c: int, integer: bool) -> None:
    need(lr.shape == (1,) and lr.dtype == "f32", "lr is one f32")
    need((scale is not None) == integer, "weights have a scale exactly where gradients are integers")
    scaled = scale is None or (scale.shape == (out_c,) and scale.dtype == "f32")
    need(scaled, f"scale is f32, one for each of {out_c} output channels")


def _need_weight_update(node: Node, dw: Type, ins: Bound[Value]) -> None:
    a, (shape, dtype) = _sgd_weight(node), dw
    need(a.fraction_bits in (0, 4, 8), "fraction bits are 0, 4 or 8")
    need(a.pixels > 0, "the layer's output has at least one pixel")
    need(("fraction" in node.stores) == bool(a.fraction_bits), "writes fraction bits exactly where there are some")
    need(dtype in ("s32", "f32") and len(shape) == 4, "the gradient is s32 or f32, of the weights' shape")
    channels = ins["channels"]
    need(channels.dtype == "u16" and len(channels.shape) == 1, "channels is a table of u16")
    want = trained_shape(a.conv, shape[0], channels.size)
    need(shape == want, f"the gradient of {channels.size} channels is {want}, not {shape}")
    out_c = a.conv.groups if a.conv.depthwise else shape[0]
    _need_rate(ins["lr"], ins.get("scale"), out_c, dtype == "s32")


def _need_bias_update(node: Node, db: Type, ins: Bound[Value]) -> None:
    a, (shape, dtype) = _sgd_bias(node), db
    need(a.pixels > 0, "the layer's output has at least one pixel")
    need(dtype in ("s32", "f32") and len(shape) == 1, "the gradient is s32 or f32, one per output channel")
    _need_rate(ins["lr"], ins.get("scale"), shape[0], dtype == "s32")


def _rule_sgd_weight(node: Node, ins: Bound[Value]) -> tuple[Type, ...]:
    _need_weight_update(node, (ins["dw"].shape, ins["dw"].dtype), ins)
    return ()


def _rule_sgd_bias(node: Node, ins: Bound[Value]) -> tuple[Type, ...]:
    _need_bias_update(node, (ins["db"].shape, ins["db"].dtype), ins)
    return ()


def _rule_fused_dw(node: Node, ins: Bound[Value]) -> tuple[Type, ...]:
    (dw,) = _rule_dw(node, ins)
    _need_weight_update(node, dw, ins)
    return ()


def _rule_fused_db(node: Node, ins: Bound[Value]) -> tuple[Type, ...]:
    (db,) = _rule_db(node, ins)
    _need_bias_update(node, db, ins)
    return ()


def _macs_dw(node: Node, ins: Bound[Value]) -> int:
    a = _dw(node)
    oh, ow = conv_out_hw(a.conv, *a.shape[:2])
    per_pixel = a.kept if a.conv.depthwise else ins["g"].shape[-1] * a.kept
    return oh * ow * per_pixel * a.conv.kernel[0] * a.conv.kernel[1]


def _fuse_dw(sums: Node, sgd: Node) -> Node:
    assert isinstance(sums.attrs, Conv2dDw)
    assert isinstance(sgd.attrs, SgdWeight)
    read = Operands(g=sums["g"], x=sums["x"], lr=sgd["lr"], scale=sgd.get("scale"), channels=sgd["channels"])
    return Node("conv2d_dw_sgd", sgd.name, sgd.layer, read, (), FusedDw(sums.attrs, sgd.attrs), sgd.stores)


def _fuse_db(sums: Node, sgd: Node) -> Node:
    assert isinstance(sgd.attrs, SgdBias)
    read = Operands(g=sums["g"], lr=sgd["lr"], scale=sgd.get("scale"))
    return Node("conv2d_db_sgd", sgd.name, sgd.layer, read, (), FusedDb(sgd.attrs), sgd.stores)


# --- kernels --------------------------------------------------------------------------------------------------


def _dw_layer(node: Node, out_c: int) -> Layer:
    a = node.attrs.dw if isinstance(node.attrs, FusedDw) else node.attrs
    assert isinstance(a, Conv2dDw | SgdWeight)
    return Layer(a.shape, (*conv_out_hw(a.conv, a.shape[0], a.shape[1]), out_c))


def _dw_depthwise(graph: Graph, node: Node, target: Core) -> bool:
    return _dw(node).conv.depthwise


def _dw_scratch(figure: Callable[..., int]) -> Callable[[Graph, Node], int]:
    def scratch_of(graph: Graph, node: Node) -> int:
        a, layer = _dw(node), _dw_layer(node, graph.values[node["g"]].shape[-1])
        return figure(*layer.x, *layer.y, *a.conv.kernel, a.conv.groups, a.kept)

    return scratch_of


def _dw_geometry(e: Emitter, node: Node, out_c: int, x_zero: int) -> str:
    a = node.attrs.dw if isinstance(node.attrs, FusedDw) else node.attrs
    assert isinstance(a, Conv2dDw | SgdWeight)
    return geometry_table(e, node, a.conv, _dw_layer(node, out_c), x_zero)


def emit_conv2d_dw(e: Emitter, node: Node) -> str:
    g, x = node["g"], node["x"]
    geometry = _dw_geometry(e, node, e.value(g).shape[-1], e.zero(x))
    return call("tl_conv2d_dw_s32", geometry, _dw(node).kept, e.view(g), e.view(x), e.ptr(node.output))


def emit_depthwise_dw(e: Emitter, node: Node) -> str:
    g, x = node["g"], node["x"]
    geometry = _dw_geometry(e, node, e.value(g).shape[-1], e.zero(x))
    kept = (e.ptr(node["channels"]), _dw(node).kept)
    return call("tl_depthwise_dw_s32", geometry, *kept, e.view(g), e.view(x), e.ptr(node.output))


def _weight_update(e: Emitter, node: Node) -> tuple[str, str, str]:
    """The tl_dw of an update, and what it writes: weights and fraction bits."""
    a, channels = _sgd_weight(node), node["channels"]
    rate = e.table(f"{node.name}.rate", numerics.weight_rate(a.conv.dead, e.scales(node["scale"]), a.x_scale))
    pre = numerics.pre_shift(127 * 255 * a.pixels)
    fields = (f"{a.site}u", e.ptr(channels), e.value(channels).size, a.fraction_bits, pre, rate)
    fraction = node.updated("fraction")
    return (
        "&" + e.struct(f"{node.name}.update", "tl_dw", *fields),
        e.ptr(node.stores["weight"][0]),
        e.bits(fraction) if fraction else "NULL",
    )


def emit_sgd_weight(e: Emitter, node: Node) -> str:
    a, dw = _sgd_weight(node), node["dw"]
    update, w, fraction = _weight_update(e, node)
    out_c = a.conv.groups if a.conv.depthwise else e.value(dw).shape[0]
    sums = (e.ptr(dw), e.exponent(dw))
    geometry = _dw_geometry(e, node, out_c, 0)
    return call("tl_weight_sgd_s32", "&c->step", geometry, update, *sums, "c->lr", w, fraction)


def _dw_sgd(e: Emitter, node: Node, function: str) -> str:
    g, x = node["g"], node["x"]
    update, w, fraction = _weight_update(e, node)
    geometry = _dw_geometry(e, node, e.value(g).shape[-1], e.zero(x))
    return call(
        function, "&c->step", geometry, update, e.grad(g), e.view(x), "c->lr", w, fraction, e.scratch(node)
    )  # fmt: skip


def emit_conv2d_dw_sgd(e: Emitter, node: Node) -> str:
    return _dw_sgd(e, node, "tl_conv2d_dw_s8")


def emit_depthwise_dw_sgd(e: Emitter, node: Node) -> str:
    return _dw_sgd(e, node, "tl_depthwise_dw_s8")


def _bias_pixels(e: Emitter, g: str, pixels: int) -> tuple[int, int, int]:
    """Rows, columns and channels that a bias gradient sums; one vector may stand for all pixels."""
    h, w, c = e.value(g).shape
    return (pixels, 1, c) if (h, w) == (1, 1) else (h, w, c)


def emit_conv2d_db(e: Emitter, node: Node) -> str:
    assert isinstance(node.attrs, Conv2dDb)
    g = node["g"]
    return call("tl_bias_grad_s32", e.view(g), *_bias_pixels(e, g, node.attrs.pixels), e.ptr(node.output))


def _bias_update(e: Emitter, node: Node) -> tuple[object, ...]:
    """Rates, lr, pre-shift and bias of an update."""
    a = _sgd_bias(node)
    rate = e.table(f"{node.name}.rate", numerics.bias_rate(a.conv.dead, e.scales(node["scale"]), a.x_scale))
    return rate, "c->lr", numerics.pre_shift(127 * a.pixels), e.ptr(node.stores["bias"][0])


def emit_sgd_bias(e: Emitter, node: Node) -> str:
    db = node["db"]
    sums = (e.ptr(db), e.exponent(db), e.value(db).size)
    return call("tl_bias_sgd_s32", "&c->step", f"{_sgd_bias(node).site}u", *sums, *_bias_update(e, node))


def emit_conv2d_db_sgd(e: Emitter, node: Node) -> str:
    a, g = _sgd_bias(node), node["g"]
    grad = (e.grad(g), *_bias_pixels(e, g, a.pixels))
    return call("tl_bias_sgd_s8", "&c->step", f"{a.site}u", *grad, *_bias_update(e, node), e.scratch(node))


def _db_scratch(graph: Graph, node: Node) -> int:
    return 4 * graph.values[node["g"]].shape[-1]


_OTHER_TYPE: Final = No("what it makes has another type than what it reads")
_NOT_BY_ROWS: Final = No("gradients and updates run over whole maps")
_MAKES_NONE: Final = No("it updates a parameter and makes nothing")
_NO_CONSTANTS: Final = No("its constants are those of the layer, which are checked there")
_NO_LOSS: Final = No("it is a gradient")

ROWS: Final = (
    step_op(
        name="conv2d_dw",
        attrs=Conv2dDw,
        operands=operands("g", "x", "channels"),
        stores=(),
        stages=STEP,
        rule=_rule_dw,
        data=_NO_CONSTANTS,
        macs=_macs_dw,
        rows=_NOT_BY_ROWS,
        overwrites=_OTHER_TYPE,
        exponent=Exponent.OF_G,
        refuses=False,
        loss=_NO_LOSS,
        fusions=(Fusion("sgd_weight", "dw", _fuse_dw),),
        kernels=(
            Kernel("tl_depthwise_dw_s32", _dw_depthwise, NO_WEIGHTS, no_scratch, _OTHER_TYPE, emit_depthwise_dw),
            Kernel("tl_conv2d_dw_s32", anywhere, NO_WEIGHTS, no_scratch, _OTHER_TYPE, emit_conv2d_dw),
        ),
    ),
    step_op(
        name="conv2d_db",
        attrs=Conv2dDb,
        operands=operands("g"),
        stores=(),
        stages=STEP,
        rule=_rule_db,
        data=_NO_CONSTANTS,
        macs=no_macs,
        rows=_NOT_BY_ROWS,
        overwrites=_OTHER_TYPE,
        exponent=Exponent.OF_G,
        refuses=False,
        loss=_NO_LOSS,
        fusions=(Fusion("sgd_bias", "db", _fuse_db),),
        kernels=(Kernel("tl_bias_grad_s32", anywhere, NO_WEIGHTS, no_scratch, _OTHER_TYPE, emit_conv2d_db),),
    ),
    step_op(
        name="sgd_weight",
        attrs=SgdWeight,
        operands=operands("dw", "lr", "scale?", "channels"),
        stores=operands("weight", "fraction?"),
        stages=STEP,
        rule=_rule_sgd_weight,
        data=_NO_CONSTANTS,
        macs=no_macs,
        rows=_NOT_BY_ROWS,
        overwrites=_MAKES_NONE,
        exponent=_MAKES_NONE,
        refuses=False,
        loss=_NO_LOSS,
        fusions=(),
        kernels=(Kernel("tl_weight_sgd_s32", anywhere, NO_WEIGHTS, no_scratch, _MAKES_NONE, emit_sgd_weight),),
    ),
    step_op(
        name="sgd_bias",
        attrs=SgdBias,
        operands=operands("db", "lr", "scale?"),
        stores=operands("bias"),
        stages=STEP,
        rule=_rule_sgd_bias,
        data=_NO_CONSTANTS,
        macs=no_macs,
        rows=_NOT_BY_ROWS,
        overwrites=_MAKES_NONE,
        exponent=_MAKES_NONE,
        refuses=False,
        loss=_NO_LOSS,
        fusions=(),
        kernels=(Kernel("tl_bias_sgd_s32", anywhere, NO_WEIGHTS, no_scratch, _MAKES_NONE, emit_sgd_bias),),
    ),
    step_op(
        name="conv2d_dw_sgd",
        attrs=FusedDw,
        operands=operands("g", "x", "lr", "scale", "channels"),
        stores=operands("weight", "fraction?"),
        stages=LOWERED,
        rule=_rule_fused_dw,
        data=_NO_CONSTANTS,
        macs=_macs_dw,
        rows=_NOT_BY_ROWS,
        overwrites=_MAKES_NONE,
        exponent=_MAKES_NONE,
        refuses=False,
        loss=_NO_LOSS,
        fusions=(),
        kernels=(
            Kernel(
                "tl_depthwise_dw_s8",
                _dw_depthwise,
                NO_WEIGHTS,
                _dw_scratch(scratch.depthwise_dw_scratch),
                _MAKES_NONE,
                emit_depthwise_dw_sgd,
            ),
            Kernel(
                "tl_conv2d_dw_s8",
                anywhere,
                NO_WEIGHTS,
                _dw_scratch(scratch.conv2d_dw_scratch),
                _MAKES_NONE,
                emit_conv2d_dw_sgd,
            ),
        ),
    ),
    step_op(
        name="conv2d_db_sgd",
        attrs=FusedDb,
        operands=operands("g", "lr", "scale"),
        stores=operands("bias"),
        stages=LOWERED,
        rule=_rule_fused_db,
        data=_NO_CONSTANTS,
        macs=no_macs,
        rows=_NOT_BY_ROWS,
        overwrites=_MAKES_NONE,
        exponent=_MAKES_NONE,
        refuses=False,
        loss=_NO_LOSS,
        fusions=(),
        kernels=(Kernel("tl_bias_sgd_s8", anywhere, NO_WEIGHTS, _db_scratch, _MAKES_NONE, emit_conv2d_db_sgd),),
    ),
)
