# SPDX-License-Identifier: Apache-2.0
"""LOWERED graph + memory plan -> C99: one kernel call per node, literal arguments, no logic.

``emit_<op>`` writes the call of one operator. Three files come out: NAME.h (the model's API), NAME.c (the calls) and
NAME_data.h (constant tables only).
"""

from __future__ import annotations

import hashlib
import math
import re
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from trainlet import numerics
from trainlet.errors import UnsupportedError
from trainlet.ir import Array, Graph, Kind, Node, Stage, Value
from trainlet.layout import StateLayout
from trainlet.ops import (
    Add,
    AvgPool,
    AvgPoolDx,
    CheckLr,
    Conv2d,
    FusedDb,
    FusedDw,
    FusedDx,
    Mask,
    MaskFrom,
    RoundGrad,
    SelectChannels,
)
from trainlet.plan import MemoryPlan, geometry

CTYPE = {"s8": "int8_t", "s16": "int16_t", "u16": "uint16_t", "s32": "int32_t", "f32": "float", "b1": "uint8_t",
         "s4": "uint8_t"}  # fmt: skip
NUMPY_CTYPE = {"int8": "int8_t", "int16": "int16_t", "uint16": "uint16_t", "int32": "int32_t", "float32": "float"}
RESERVED = ("model", "start", "prefix", "forward", "gradient", "head", "backward", "a", "s", "c")
"""What NAME.c itself defines."""
REFUSES = frozenset({"check_lr", "softmax_xent", "avg_pool_dx"})


def c_name(name: str) -> str:
    """``name`` as a C identifier; tl_ is the kernels' own."""
    ident = re.sub(r"\W", "_", name, flags=re.ASCII)
    return ident if ident[:1].isalpha() and not f"{ident}_".startswith("tl_") else f"m_{ident}"


def comment(text: str) -> str:
    """``text`` so that it neither ends nor opens a comment and stays on its line."""
    printable = "".join(c if c.isprintable() else " " for c in text)
    return printable.replace("*/", "* /").replace("/*", "/ *")


def c_float(v: float) -> str:
    """A float literal that reads back exactly."""
    return f"{float(np.float32(v)).hex()}f"


@dataclass(frozen=True)
class Sources:
    """The emitted text by file name, and the prefix of its C names."""

    prefix: str
    files: Mapping[str, str]


@dataclass
class Emitter:
    """What the rules read, and the constant tables they ask for."""

    graph: Graph
    plan: MemoryPlan
    layout: StateLayout
    tables: dict[str, str] = field(default_factory=dict)
    symbols: dict[str, str] = field(default_factory=dict)

    def symbol(self, name: str) -> str:
        """The C name of a table; two names never share one."""
        if name not in self.symbols:
            taken = {*self.symbols.values(), *RESERVED}
            first = c_name(name)
            tries = (first, *(f"{first}_{i}" for i in range(2, len(taken) + 3)))
            self.symbols[name] = next(t for t in tries if t not in taken)
        return self.symbols[name]

    def value(self, name: str) -> Value:
        """The value of that name."""
        return self.graph.values[name]

    def table(self, name: str, array: Array) -> str:
        """A constant array; returns its C name."""
        symbol = self.symbol(name)
        if symbol not in self.tables:
            ctype = NUMPY_CTYPE[array.dtype.name]
            flat = array.reshape(-1).tolist()
            items = [c_float(v) for v in flat] if ctype == "float" else map(str, flat)
            body = textwrap.fill(", ".join(items), 118, initial_indent="    ", subsequent_indent="    ")
            self.tables[symbol] = f"static const {ctype} {symbol}[{array.size}] = {{\n{body}\n}};\n"
        return symbol

    def struct(self, name: str, ctype: str, *fields: object) -> str:
        """A constant struct; returns its C name."""
        symbol = self.symbol(name)
        if symbol not in self.tables:
            self.tables[symbol] = f"static const {ctype} {symbol} = {{{', '.join(map(str, fields))}}};\n"
        return symbol

    def ptr(self, name: str) -> str:
        """A typed pointer to a value."""
        v = self.value(name)
        if v.kind is Kind.CONST:
            return self.table(name, self.graph.data[name])
        base, at = ("s", self.layout.offsets[name]) if v.kind is Kind.STATE else ("a", self.plan.offsets[name])
        return f"TL_AT({CTYPE[v.dtype]}, {base}, {at})"

    def view(self, name: str) -> str:
        """A view of an (H, W, C) tensor; a (1, 1, C) gradient stands for every pixel."""
        v = self.value(name)
        h, w, c = v.shape
        if v.exponent is not None and (h, w) == (1, 1):
            return f"TL_VECTOR({self.ptr(name)})"
        return f"TL_PLAIN({self.ptr(name)}, {h}, {w}, {c})"

    def grad(self, name: str) -> str:
        """A gradient with its exponent."""
        return f"(tl_grad){{{self.view(name)}, c->exponent[{self.value(name).exponent}]}}"

    def scratch(self, node: Node) -> str:
        """The node's scratch."""
        at = self.plan.scratch_offsets.get(node.name)
        return "NULL" if at is None else f"a + {at}"

    def conv(self, node: Node, x_zero: int) -> str:
        """The geometry table of a convolution node."""
        a, x, y = geometry(self.graph, node)
        pads = (a.pads[0], a.pads[2])
        return "&" + self.struct(
            f"{node.name}.geometry", "tl_conv", *x, *y, *a.kernel, *a.stride, *a.dilation, *pads, a.groups, x_zero
        )

    def zero(self, name: str) -> int:
        """Zero point of an activation."""
        q = self.value(name).q
        return q.zero if q else 0

    def scale(self, name: str) -> float:
        """Scale of an activation."""
        q = self.value(name).q
        return q.scale if q else 1.0

    def scales(self, name: str) -> numerics.F32:
        """The weight scales held by a constant."""
        return self.graph.data[name].astype(np.float32)

    def weights(self, conv: Conv2d, weight: str, trained: tuple[str, ...]) -> str:
        """A tl_weights literal. ``trained`` is () or (trained, channels)."""
        if not trained:
            return f"(tl_weights){{{self.ptr(weight)}, NULL, NULL, 0}}"
        channels = self.graph.data[trained[1]]
        w = self.graph.data[weight]
        axis = 0 if conv.depthwise else 3
        n = len(channels)
        if n == w.shape[axis]:
            return f"(tl_weights){{NULL, {self.ptr(trained[0])}, NULL, {n}}}"
        frozen = self.table(f"{weight}.frozen", np.delete(w, channels.astype(np.int64), axis))
        return f"(tl_weights){{{frozen}, {self.ptr(trained[0])}, {self.ptr(trained[1])}, {n}}}"

    def mask(self, source: MaskFrom, clamp: tuple[float, float] | None, name: str) -> str:
        """A tl_mask literal."""
        if source == "none" or clamp is None:
            return "(tl_mask){NULL, NULL, 0, 0}"
        both = (self.ptr(name), "NULL") if source == "bits" else ("NULL", self.ptr(name))
        return f"(tl_mask){{{both[0]}, {both[1]}, {int(clamp[0])}, {int(clamp[1])}}}"

    def site(self, node: Node, a: RoundGrad, rest: tuple[str, ...]) -> str:
        """A tl_site literal; ``rest`` is the mask source, if any, and the further gradients."""
        masked = a.mask != "none"
        mask = self.mask(a.mask, a.clamp, rest[0] if masked else "")
        further = [self.grad(g) for g in rest[masked:]]
        array = f"(const tl_grad[]){{{', '.join(further)}}}" if further else "NULL"
        slot = self.value(node.outputs[0]).exponent
        rho = self.ptr(node.writes[0])
        return f"&(const tl_site){{{a.stream}u, {rho}, &c->exponent[{slot}], {array}, {len(further)}, {mask}}}"


# --- one rule per operator ----------------------------------------------------------------------------------


def call(function: str, *args: object) -> str:
    """A C call."""
    return f"{function}({', '.join(map(str, args))})"


def emit_conv2d(e: Emitter, n: Node) -> str:
    a = n.attrs
    assert isinstance(a, Conv2d)
    assert a.clamp is not None
    x, y = n.inputs[0], n.outputs[0]
    mult, shift = numerics.requantize(e.scale(x), e.scales(n.inputs[3]), e.scale(y))
    tables = (e.table(f"{n.name}.mult", mult), e.table(f"{n.name}.shift", shift))
    q = e.struct(f"{n.name}.requant", "tl_requant", *tables, e.zero(y), int(a.clamp[0]), int(a.clamp[1]))
    kernel = "tl_depthwise_s8" if a.depthwise else "tl_conv2d_s8"
    w = e.weights(a, n.inputs[1], n.inputs[4:])
    rows = e.value(y).shape[0]
    bias = e.ptr(n.inputs[2])
    return call(kernel, e.conv(n, e.zero(x)), f"&{q}", w, bias, e.view(x), e.view(y), 0, rows, e.scratch(n))


def emit_add(e: Emitter, n: Node) -> str:
    a = n.attrs
    assert isinstance(a, Add)
    assert a.clamp is not None
    p, q, y = (*n.inputs, *n.outputs)
    s = numerics.add_scale(e.scale(p), e.scale(q), e.scale(y))
    zeros = (e.zero(p), e.zero(q), e.zero(y), int(a.clamp[0]), int(a.clamp[1]))
    table = e.struct(f"{n.name}.scale", "tl_add", *zeros, s.a[0], s.b[0], s.y[0], s.a[1], s.b[1], s.y[1])
    h, w, c = e.value(y).shape
    return call("tl_add_s8", f"&{table}", e.view(p), e.view(q), e.view(y), w, c, 0, h)


def emit_avg_pool(e: Emitter, n: Node) -> str:
    a = n.attrs
    assert isinstance(a, AvgPool)
    x, y = e.value(n.inputs[0]), e.value(n.outputs[0])
    fields = (*x.shape, *y.shape, *a.kernel, *a.stride, 1, 1, a.pads[0], a.pads[2], 1, 0)
    table = e.struct(f"{n.name}.geometry", "tl_conv", *fields)
    return call("tl_avg_pool_s8", f"&{table}", e.view(x.name), e.view(y.name), 0, y.shape[0], e.scratch(n))


def emit_dense(e: Emitter, n: Node) -> str:
    x, w, b = n.inputs
    k, c = e.value(w).shape
    scale = c_float(e.scale(x))
    return call("tl_dense_f32", e.ptr(x), e.zero(x), scale, e.ptr(w), e.ptr(b), k, c, e.ptr(n.outputs[0]))


def emit_clip_mask(e: Emitter, n: Node) -> str:
    a = n.attrs
    assert isinstance(a, Mask)
    lo, hi = int(a.clamp[0]), int(a.clamp[1])
    return call("tl_clip_mask_s8", e.ptr(n.inputs[0]), e.value(n.inputs[0]).size, lo, hi, e.ptr(n.outputs[0]))


def emit_select_channels(e: Emitter, n: Node) -> str:
    a = n.attrs
    assert isinstance(a, SelectChannels)
    h, w, c = e.value(n.inputs[0]).shape
    table = n.inputs[1]
    return call(
        "tl_select_channels_s8",
        e.ptr(n.inputs[0]),
        h * w,
        c,
        a.groups,
        e.ptr(table),
        e.value(table).size,
        e.ptr(n.outputs[0]),
    )


def emit_check_lr(e: Emitter, n: Node) -> str:
    assert isinstance(n.attrs, CheckLr)
    return call("tl_check_lr", "c->lr", c_float(n.attrs.largest))


def emit_softmax_xent(e: Emitter, n: Node) -> str:
    k = e.value(n.inputs[0]).size
    g = n.outputs[1]  # the loss goes to the context
    return call("tl_softmax_xent_f32", e.ptr(n.inputs[0]), k, "c->label", "&c->loss", e.ptr(g))


def emit_dense_dx(e: Emitter, n: Node) -> str:
    k, c = e.value(n.inputs[1]).shape
    return call("tl_dense_dx_f32", e.ptr(n.inputs[0]), e.ptr(n.inputs[1]), k, c, e.ptr(n.outputs[0]))


def emit_dense_sgd(e: Emitter, n: Node) -> str:
    g, x, _ = n.inputs
    w, b = n.writes
    k, c = e.value(w).shape
    scale = c_float(e.scale(x))
    return call("tl_dense_sgd_f32", e.ptr(g), e.ptr(x), e.zero(x), scale, "c->lr", k, c, e.ptr(w), e.ptr(b))


def emit_avg_pool_dx(e: Emitter, n: Node) -> str:
    a = n.attrs
    assert isinstance(a, AvgPoolDx)
    out = e.value(n.outputs[0])
    inverse = c_float(1.0 / (a.in_hw[0] * a.in_hw[1]))
    slot = f"&c->exponent[{out.exponent}]"
    gf = e.ptr(n.inputs[0])
    return call("tl_avg_pool_dx_s8", "&c->step", f"{a.stream}u", gf, out.shape[2], inverse, e.ptr(out.name), slot)


def emit_mask_grad(e: Emitter, n: Node) -> str:
    a = n.attrs
    assert isinstance(a, Mask)
    out = e.value(n.outputs[0])
    mask = e.mask(a.source, a.clamp, n.inputs[1])
    return call("tl_mask_grad_s8", e.view(n.inputs[0]), mask, *out.shape, e.ptr(out.name))


def emit_round_grad(e: Emitter, n: Node) -> str:
    a = n.attrs
    assert isinstance(a, RoundGrad)
    if a.computes:
        raise UnsupportedError(f"{n.layer}: sums are rounded where they are made; run the pass 'fuse' first")
    out = e.value(n.outputs[0])
    return call("tl_round_grad_s8", "&c->step", e.site(n, a, n.inputs), *out.shape, e.ptr(out.name))


def emit_conv2d_dx_round(e: Emitter, n: Node) -> str:
    a = n.attrs
    assert isinstance(a, FusedDx)
    conv = a.dx.conv
    s = numerics.dx_scale(conv, e.scales(n.inputs[2]))
    mt = "NULL" if s.mt is None else e.table(f"{n.name}.mt", s.mt)
    tables = (mt, e.table(f"{n.name}.mult", s.mult), e.table(f"{n.name}.exp", s.exp))
    scale = e.struct(f"{n.name}.scale", "tl_dx_scale", *tables, s.pre)
    count = _trained_inputs(e, n)
    w = e.weights(conv, n.inputs[1], n.inputs[3 : 3 + count])
    kernel = "tl_depthwise_dx_s8" if conv.depthwise else "tl_conv2d_dx_s8"
    site = e.site(n, a.round, n.inputs[3 + count :])
    out = e.ptr(n.outputs[0])
    g = e.grad(n.inputs[0])
    rows = a.dx.in_hw[0]
    return call(kernel, "&c->step", e.conv(n, 0), f"&{scale}", w, g, site, out, 0, rows, e.scratch(n))


def _trained_inputs(e: Emitter, n: Node) -> int:
    """2 where (trained, channels) follow the scales of an input gradient, else 0."""
    following = n.inputs[3:4]
    return 2 if following and e.value(following[0]).kind is Kind.STATE else 0


def emit_conv2d_dw_sgd(e: Emitter, n: Node) -> str:
    a = n.attrs
    assert isinstance(a, FusedDw)
    conv, sgd = a.dw.conv, a.sgd
    g, x, _, scale, channels = n.inputs
    rate = e.table(f"{n.name}.rate", numerics.weight_rate(conv, e.scales(scale), sgd.x_scale))
    pre = numerics.pre_shift(127 * 255 * sgd.pixels)
    fields = (f"{sgd.stream}u", e.ptr(channels), a.dw.kept, sgd.fraction_bits, pre, rate)
    table = e.struct(f"{n.name}.update", "tl_dw", *fields)
    kernel = "tl_depthwise_dw_s8" if conv.depthwise else "tl_conv2d_dw_s8"
    w = e.ptr(n.writes[0])
    fraction = f"TL_AT(uint8_t, s, {e.layout.offsets[n.writes[1]]})" if len(n.writes) > 1 else "NULL"
    geo = e.conv(n, e.zero(x))
    return call(kernel, "&c->step", geo, f"&{table}", e.grad(g), e.view(x), "c->lr", w, fraction, e.scratch(n))


def emit_conv2d_db_sgd(e: Emitter, n: Node) -> str:
    assert isinstance(n.attrs, FusedDb)
    sgd = n.attrs.sgd
    g, _, scale = n.inputs
    rate = e.table(f"{n.name}.rate", numerics.bias_rate(sgd.conv, e.scales(scale), sgd.x_scale))
    h, w, c = e.value(g).shape
    if (h, w) == (1, 1):  # one vector for all pixels
        h, w = sgd.pixels, 1
    pre = numerics.pre_shift(127 * sgd.pixels)
    bias = e.ptr(n.writes[0])
    stream = f"{sgd.stream}u"
    return call("tl_bias_sgd_s8", "&c->step", stream, e.grad(g), h, w, c, rate, "c->lr", pre, bias, e.scratch(n))


EMIT: Mapping[str, Callable[[Emitter, Node], str]] = {
    "conv2d": emit_conv2d,
    "add": emit_add,
    "avg_pool": emit_avg_pool,
    "dense": emit_dense,
    "clip_mask": emit_clip_mask,
    "select_channels": emit_select_channels,
    "check_lr": emit_check_lr,
    "softmax_xent": emit_softmax_xent,
    "dense_dx": emit_dense_dx,
    "dense_sgd": emit_dense_sgd,
    "avg_pool_dx": emit_avg_pool_dx,
    "mask_grad": emit_mask_grad,
    "round_grad": emit_round_grad,
    "conv2d_dx_round": emit_conv2d_dx_round,
    "conv2d_dw_sgd": emit_conv2d_dw_sgd,
    "conv2d_db_sgd": emit_conv2d_db_sgd,
}


# --- the files --------------------------------------------------------------------------------------------------


def prefix_length(graph: Graph) -> int:
    """How many leading nodes depend on the image and on constants alone: the frozen prefix."""
    for i, n in enumerate(graph.nodes):
        touched = [graph.values[v] for v in (*n.inputs, *n.writes)]
        if any(v.kind is Kind.STATE or v.name in ("label", "lr") for v in touched):
            return i
    return len(graph.nodes)


def prefix_values(graph: Graph) -> tuple[str, ...]:
    """What the frozen prefix leaves in the arena for the rest, in the order it was made; () without a prefix."""
    length = prefix_length(graph)
    made = [name for n in graph.nodes[:length] for name in n.outputs]
    read = {name for n in graph.nodes[length:] for name in n.inputs}
    return tuple(v for v in (*graph.inputs[:1], *made) if v in read) if length else ()


def _sections(graph: Graph) -> dict[str, list[Node]]:
    """The nodes of the five functions of a model."""
    nodes = graph.nodes
    cut = prefix_length(graph)
    dense = max(i for i, n in enumerate(nodes) if n.op == "dense")
    checked = max((i for i, n in enumerate(nodes) if n.op in REFUSES), default=dense)
    rest = nodes[checked + 1 :]
    return {
        "prefix": list(nodes[:cut]),
        "forward": list(nodes[cut : dense + 1]),
        "gradient": list(nodes[dense + 1 : checked + 1]),
        "head": [n for n in rest if n.op == "dense_sgd"],
        "backward": [n for n in rest if n.op != "dense_sgd"],
    }


def _statement(e: Emitter, node: Node) -> str:
    text = EMIT[node.op](e, node)
    text = f"TL_TRY({text});" if node.op in REFUSES else f"{text};"
    body = textwrap.fill(
        text, 116, initial_indent="    ", subsequent_indent="        ", break_long_words=False, break_on_hyphens=False
    )
    return f"    /* {comment(node.layer)}: {node.op} */\n{body}\n"


def _function(e: Emitter, name: str, nodes: list[Node]) -> str:
    status = name == "gradient"
    lines = "".join(_statement(e, n) for n in nodes)
    uses = (("a", "arena"), ("s", "state"))
    local = "".join(f"    uint8_t *const {v} = c->{f};\n" for v, f in uses if re.search(rf"\b{v}( \+|,)", lines))
    unused = "" if "c->" in lines + local else "    (void)c;\n"
    end = "    return TL_OK;\n" if status else ""
    return f"static {'tl_status' if status else 'void'} {name}(tl_context *c)\n{{\n{unused}{local}{lines}{end}}}\n"


def _init_table(e: Emitter) -> list[str]:
    rows = []
    for v in e.graph.states():
        data = e.graph.data.get(v.name)
        if data is None or not data.any():
            continue
        at = e.layout.offsets[v.name]
        rows.append(f"    {{{at}u, {v.nbytes}u, {e.table(f'{v.name}.start', data)}}},")
    return rows


def emit(graph: Graph, plan: MemoryPlan, layout: StateLayout, model_hash: str) -> Sources:
    """The C of a LOWERED graph with one (H, W, C) input and one dense head. ``model_hash`` is hexadecimal; its first
    eight digits go into the saved state."""
    if graph.stage is not Stage.LOWERED:
        raise UnsupportedError(f"{graph.name}: only a lowered graph is emitted, not stage {graph.stage.value!r}")
    e = Emitter(graph, plan, layout)
    name = c_name(graph.name)
    functions = "\n".join(_function(e, k, v) for k, v in _sections(graph).items())
    init = _init_table(e)
    head = next(n for n in graph.nodes if n.op == "dense")
    classes, features = graph.values[head.inputs[1]].shape
    slots = 1 + max((v.exponent for v in graph.values.values() if v.exponent is not None), default=0)
    image = graph.values[graph.inputs[0]]
    fields = {
        "hash": f"0x{model_hash[:8]}u",
        "arena_bytes": f"{plan.arena_bytes}u",
        "state_bytes": f"{layout.nbytes}u",
        "height": image.shape[0],
        "width": image.shape[1],
        "channels": image.shape[2],
        "classes": classes,
        "features": features,
        "input": f"{plan.offsets[image.name]}u",
        "logits": f"{plan.offsets[head.outputs[0]]}u",
        "head_w": f"{layout.offsets[head.inputs[1]]}u",
        "head_b": f"{layout.offsets[head.inputs[2]]}u",
        "head_range": c_float(1.0 / math.sqrt(features)),
        "init": "start" if init else "NULL",
        "n_init": len(init),
        **{k: k for k in ("prefix", "forward", "gradient", "head", "backward")},
    }
    model = "\n".join(f"    .{k} = {v}," for k, v in fields.items())
    rows = "\n".join(init)
    start = f"static const tl_init start[] = {{\n{rows}\n}};\n\n" if init else ""
    values = {
        "name": name,
        "NAME": name.upper(),
        "classes": classes,
        "h": image.shape[0],
        "w": image.shape[1],
        "c": image.shape[2],
        "arena": plan.arena_bytes,
        "state": layout.nbytes,
        "hash": model_hash[:8],
        "slots": slots,
        "source": comment(graph.name),
    }
    body = f"{_C_HEAD.format(**values)}{functions}\n{start}static const tl_model model = {{\n{model}\n}};\n\n"
    data = f"{_DATA_HEAD.format(**values)}{''.join(e.tables.values())}"
    return Sources(
        name, {f"{name}.h": _HEADER.format(**values), f"{name}.c": body + _API.format(**values), f"{name}_data.h": data}
    )


def graph_hash(graph: Graph) -> str:
    """SHA-256 of a graph's text and data: what makes a saved state belong to a model."""
    h = hashlib.sha256(str(graph).encode())
    for name in sorted(graph.data):
        data = np.ascontiguousarray(graph.data[name])
        h.update(f"{name}{data.dtype.str}{data.shape}".encode())
        h.update(data.astype(data.dtype.newbyteorder("<")).tobytes())
    return h.hexdigest()


_HEADER = """\
/* SPDX-License-Identifier: Apache-2.0 */
/* {source}, made by trainlet. Contracts of all calls: tl_model.h. */
#ifndef {NAME}_H
#define {NAME}_H

#include "tl_model.h"

#define {NAME}_HEIGHT {h}
#define {NAME}_WIDTH {w}
#define {NAME}_CHANNELS {c}
#define {NAME}_CLASSES {classes}
#define {NAME}_ARENA_BYTES {arena}u /* all activations, gradients and scratch of a step */
#define {NAME}_STATE_BYTES {state}u /* trained parameters; keep it, or save it, between steps */
#define {NAME}_BLOB_BYTES (TL_BLOB_HEADER + {NAME}_STATE_BYTES)
#define {NAME}_MODEL_HASH 0x{hash}u

typedef struct {{
    tl_context base;
    int16_t exponent[{slots}];
}} {name}_context;

tl_status {name}_init({name}_context *c, void *arena, size_t arena_bytes, void *state, size_t state_bytes,
                      uint32_t seed);
void {name}_reset({name}_context *c, uint32_t seed);
tl_status {name}_begin({name}_context *c);
tl_status {name}_feed_row({name}_context *c, const int8_t *row);
tl_status {name}_finish({name}_context *c, const float **logits);
tl_status {name}_finish_train({name}_context *c, int32_t label, float lr, tl_step_info *info);
tl_status {name}_infer({name}_context *c, const int8_t *image, const float **logits);
tl_status {name}_train({name}_context *c, const int8_t *image, int32_t label, float lr, tl_step_info *info);
tl_status {name}_save(const {name}_context *c, uint8_t *blob, size_t bytes);
tl_status {name}_load({name}_context *c, const uint8_t *blob, size_t bytes);
/* The model behind these calls, for the tl_model_* functions. */
const tl_model *{name}_model(void);

#endif
"""

_DATA_HEAD = """\
/* SPDX-License-Identifier: Apache-2.0 */
/* Constant tables of {source}. The weights are the model owner's. Included by {name}.c only. */
"""

_C_HEAD = """\
/* SPDX-License-Identifier: Apache-2.0 */
/* {source}, made by trainlet: one kernel call per node, in the order of the schedule. */
#include "{name}.h"
#include "{name}_data.h"

"""

_API = """\
const tl_model *{name}_model(void)
{{
    return &model;
}}

tl_status {name}_init({name}_context *c, void *arena, size_t arena_bytes, void *state, size_t state_bytes,
                      uint32_t seed)
{{
    return c ? tl_model_init(&model, &c->base, c->exponent, arena, arena_bytes, state, state_bytes, seed)
             : TL_BAD_ARGUMENT;
}}

void {name}_reset({name}_context *c, uint32_t seed)
{{
    tl_model_reset(&model, &c->base, seed);
}}

tl_status {name}_begin({name}_context *c)
{{
    return tl_model_begin(&model, &c->base);
}}

tl_status {name}_feed_row({name}_context *c, const int8_t *row)
{{
    return tl_model_feed_row(&model, &c->base, row);
}}

tl_status {name}_finish({name}_context *c, const float **logits)
{{
    return tl_model_finish(&model, &c->base, logits);
}}

tl_status {name}_finish_train({name}_context *c, int32_t label, float lr, tl_step_info *info)
{{
    return tl_model_finish_train(&model, &c->base, label, lr, info);
}}

tl_status {name}_infer({name}_context *c, const int8_t *image, const float **logits)
{{
    return tl_model_infer(&model, &c->base, image, logits);
}}

tl_status {name}_train({name}_context *c, const int8_t *image, int32_t label, float lr, tl_step_info *info)
{{
    return tl_model_train(&model, &c->base, image, label, lr, info);
}}

tl_status {name}_save(const {name}_context *c, uint8_t *blob, size_t bytes)
{{
    return tl_model_save(&model, &c->base, blob, bytes);
}}

tl_status {name}_load({name}_context *c, const uint8_t *blob, size_t bytes)
{{
    return tl_model_load(&model, &c->base, blob, bytes);
}}
"""
