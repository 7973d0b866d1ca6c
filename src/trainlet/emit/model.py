# SPDX-License-Identifier: Apache-2.0
"""The files of a model: NAME.h (its interface), NAME.c (one call per node) and NAME_data.h (constant tables only)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np

from trainlet.emit.code import Lines, NodeLines, c_name, comment, joined, plain
from trainlet.emit.depth_first import run_text
from trainlet.emit.emitter import Emitter
from trainlet.emit.statement import function
from trainlet.errors import UnsupportedError
from trainlet.ir import DepthFirst, Graph, Kind, Node, Stage
from trainlet.names import is_reserved, shortened
from trainlet.ops import OPS, No
from trainlet.ops.op import c_float
from trainlet.ops.roles import head_of, heads
from trainlet.plan.arena import MemoryPlan, feeds
from trainlet.plan.sections import sections
from trainlet.plan.state import StateLayout


@dataclass(frozen=True)
class Sources:
    """The emitted text by file name, and the prefix of its C names. ``symbols``: the C names of its constants by what
    they are called in the graph, such as ``conv.3.weight.frozen``; ``purposes``: what each C name is for (one of
    FLASH_PURPOSES); ``nodes``: which lines of NAME.c run which node."""

    prefix: str
    files: Mapping[str, str]
    symbols: Mapping[str, str] = field(default_factory=dict)
    purposes: Mapping[str, str] = field(default_factory=dict)
    nodes: tuple[NodeLines, ...] = ()


def _functions(e: Emitter, graph: Graph) -> Lines:
    """The five functions of a model."""
    s = sections(graph)
    fed = int(feeds(graph) is not None)  # the first node runs as the image arrives
    before = max(fed - len(s.prefix), 0)
    parts: dict[str, tuple[Node, ...]] = {
        "prefix": s.prefix[fed:],
        "forward": s.forward[before:],
        "gradient": s.gradient,
        "head": s.head,
        "backward": s.backward,
    }
    made = [_function(e, name, nodes) for name, nodes in parts.items()]
    return joined(part for one in made for part in (one, plain("\n")))


def _function(e: Emitter, name: str, nodes: tuple[Node, ...]) -> Lines:
    if name == "gradient":
        return function(e, f"static tl_status {name}(tl_context *c)", nodes, "    return TL_OK;\n")
    return function(e, f"static void {name}(tl_context *c)", nodes)


def _init_table(e: Emitter, layout: StateLayout) -> list[str]:
    rows = []
    for v in e.graph.states():
        where = f"{layout.offsets[v.name]}u, {v.nbytes}u"
        data = e.graph.data.get(v.name)
        if v.fan_in is not None:
            rows.append(f"    {{{where}, NULL, {c_float(1.0 / math.sqrt(v.fan_in))}}},")
        elif data is not None and data.any():
            rows.append(f"    {{{where}, {e.table(f'{v.name}.start', data, 'initial_state')}, 0.0f}},")
    return rows


_TYPES: Final = {"s8": "TL_S8", "s32": "TL_S32", "f32": "TL_F32"}


def _ports(e: Emitter, role: str, names: tuple[str, ...]) -> str:
    """The table of what the caller gives or gets in that role."""
    if not names:
        return ""
    rows = ""
    for name in names:
        v, place = e.value(name), e.places.get(name)
        h, w, c = v.shape if len(v.shape) == 3 else (1, 1, v.size)
        at, ring = (f"{place.offset}u", place.ring) if place else ("0u", h)
        rows += f"    {{{_TYPES[v.dtype]}, {h}, {w}, {c}, {at}, {ring}, {c_float(e.scale(name))}, {e.zero(name)}}},\n"
    return f"static const tl_port {role}[] = {{\n{rows}}};\n"


def _frozen_weights(graph: Graph) -> frozenset[str]:
    """Constants that are weights of layers."""
    return frozenset(n[p.operand] for n in graph.nodes for p in OPS[n.op].params if not isinstance(p.channels, No))


def source_name(name: str) -> str:
    """What the files of a model are called, and its C names begin with: a short C identifier that takes nobody's
    place."""
    ident = shortened(c_name(name))
    return f"m_{ident}" if is_reserved(ident) else ident


def emit(graph: Graph, plan: MemoryPlan, layout: StateLayout, model_hash: str) -> Sources:
    """The C of a LOWERED graph with one (H, W, C) input and one dense head. ``model_hash`` is hexadecimal; its first
    eight digits go into the saved state."""
    if graph.stage is not Stage.LOWERED:
        raise UnsupportedError(f"{graph.name}: only a lowered graph is emitted, not stage {graph.stage.value!r}")
    feed = feeds(graph)
    flat = graph.flat()
    e = Emitter(flat, plan, {**plan.places, **layout.places(graph)}, _frozen_weights(flat))
    name = source_name(graph.name)
    runs = [run_text(e, n) for n in graph.nodes if isinstance(n.attrs, DepthFirst)]
    functions = _functions(e, graph)
    init = _init_table(e, layout)
    head = head_of(graph)
    classes = graph.values[head.output].size
    slots = 1 + max((v.exponent for v in graph.values.values() if v.exponent is not None), default=0)
    image = graph.image
    face = graph.interface
    roles = {"inputs": face.inputs, "outputs": face.outputs, "targets": face.targets}
    ports = "".join(_ports(e, role, names) for role, names in roles.items())
    fields = {
        "hash": f"0x{model_hash[:8]}u",
        "arena_bytes": f"{plan.arena_bytes}u",
        "state_bytes": f"{layout.nbytes}u",
        **{k: k if names else "NULL" for k, names in roles.items()},
        **{f"n_{k}": len(names) for k, names in roles.items()},
        "feed": f"&{e.symbol(feed.name)}" if feed else "NULL",
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
    end = f"{start}{ports}static const tl_model model = {{\n{model}\n}};\n\n{_API.format(**values)}"
    code = joined((plain(_C_HEAD.format(**values) + e.offset_table()), *runs, functions, plain(end)))
    data = f"{_DATA_HEAD.format(**values)}{''.join(e.tables.values())}"
    files = {f"{name}.h": _HEADER.format(**values), f"{name}.c": "\n".join(code.text) + "\n", f"{name}_data.h": data}
    own = dict.fromkeys(("model", "start", *roles, *_structs(e)), "constants")
    purposes = {**e.purposes, **own}
    return Sources(name, files, dict(e.symbols), purposes, code.nodes)


def _structs(e: Emitter) -> Iterable[str]:
    """C names of tables that NAME.c defines itself."""
    return (symbol for symbol in e.symbols.values() if symbol not in e.tables)


def _with_new_head(graph: Graph) -> Graph:
    """The graph as if its head were a new one: a saved state holds the whole head, wherever it started."""
    data, values = dict(graph.data), dict(graph.values)
    for head in heads(graph):
        weight, bias = values[head["weight"]], values[head["bias"]]
        if weight.kind is Kind.STATE:
            data.pop(weight.name, None)
            values[weight.name] = replace(weight, fan_in=weight.shape[-1])
            data[bias.name] = np.zeros(bias.shape, np.float32)
    return replace(graph, data=data, values=values)


def graph_hash(graph: Graph) -> str:
    """SHA-256 of a graph's text and data, where the head starts left out: what makes a saved state belong to a
    model."""
    graph = _with_new_head(graph)
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
