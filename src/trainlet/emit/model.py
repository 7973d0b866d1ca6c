# SPDX-License-Identifier: Apache-2.0
"""The files of a model: NAME.h (its interface), NAME.c (one call per node) and NAME_data.h (constant tables only)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from trainlet.attrs import Stream
from trainlet.emit.depth_first import stream_text
from trainlet.emit.emitter import Emitter, c_float, c_name, comment
from trainlet.emit.statement import REFUSES, function, statement
from trainlet.errors import UnsupportedError
from trainlet.ir.graph import Graph, Kind, Node, Stage
from trainlet.names import is_reserved, shortened
from trainlet.plan.arena import MemoryPlan, feeds
from trainlet.plan.prefix import prefix_length
from trainlet.plan.state import StateLayout


@dataclass(frozen=True)
class Sources:
    """The emitted text by file name, and the prefix of its C names. ``symbols``: the C names of its constants by what
    they are called in the graph, such as ``conv.3.weight.frozen``."""

    prefix: str
    files: Mapping[str, str]
    symbols: Mapping[str, str] = field(default_factory=dict)


def _sections(graph: Graph) -> dict[str, list[Node]]:
    """The nodes of the five functions of a model."""
    nodes = graph.nodes
    cut = prefix_length(graph)
    fed = feeds(graph) is not None  # the first node runs as the image arrives
    dense = max(i for i, n in enumerate(nodes) if n.op == "dense")
    checked = max((i for i, n in enumerate(nodes) if n.op in REFUSES), default=dense)
    rest = nodes[checked + 1 :]
    return {
        "prefix": list(nodes[fed:cut]),
        "forward": list(nodes[max(cut, fed) : dense + 1]),
        "gradient": list(nodes[dense + 1 : checked + 1]),
        "head": [n for n in rest if n.op == "dense_sgd"],
        "backward": [n for n in rest if n.op != "dense_sgd"],
    }


def _section(e: Emitter, name: str, nodes: list[Node]) -> str:
    status = name == "gradient"
    lines = "".join(statement(e, n) for n in nodes)
    head = f"static {'tl_status' if status else 'void'} {name}(tl_context *c)"
    return function(head, lines + ("    return TL_OK;\n" if status else ""))


def _init_table(e: Emitter) -> list[str]:
    rows = []
    heads = {n.inputs[1] for n in e.graph.find("dense")}  # their memory holds random weights before the table is copied
    for v in e.graph.states():
        data = e.graph.data.get(v.name)
        if data is None or not (data.any() or v.name in heads):
            continue
        at = e.layout.offsets[v.name]
        rows.append(f"    {{{at}u, {v.nbytes}u, {e.table(f'{v.name}.start', data)}}},")
    return rows


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
    streams = graph.find("stream")
    rings = dict(ring for n in streams if isinstance(n.attrs, Stream) for ring in n.attrs.rings)
    feed = feeds(graph)
    e = Emitter(graph.flat(), plan, layout, rings)
    name = source_name(graph.name)
    streaming = "".join(stream_text(e, n) for n in streams)
    functions = "\n".join(_section(e, k, v) for k, v in _sections(graph).items())
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
        "input_rows": rings.get(image.name, image.shape[0]),
        "feed": f"&{e.symbol(feed.name)}" if feed else "NULL",
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
    calls = f"{streaming}{functions}\n"
    body = f"{_C_HEAD.format(**values)}{calls}{start}static const tl_model model = {{\n{model}\n}};\n\n"
    data = f"{_DATA_HEAD.format(**values)}{''.join(e.tables.values())}"
    files = {f"{name}.h": _HEADER.format(**values), f"{name}.c": body + _API.format(**values), f"{name}_data.h": data}
    return Sources(name, files, dict(e.symbols))


def _with_new_head(graph: Graph) -> Graph:
    """The graph as if its head were a new one: a saved state holds the whole head, wherever it started."""
    data = dict(graph.data)
    heads = [n.inputs[1:] for n in graph.find("dense") if graph.values[n.inputs[1]].kind is Kind.STATE]
    for weight, bias in heads:
        data.pop(weight, None)
        data[bias] = np.zeros(graph.values[bias].shape, np.float32)
    return replace(graph, data=data)


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
