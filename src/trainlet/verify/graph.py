# SPDX-License-Identifier: Apache-2.0
"""The check of a graph against its stage and the operator table. It runs after every front end, pass and load."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import fields

import numpy as np

from trainlet.attrs import Add, Attrs, Conv2d, FusedDx, Mask, MaskFrom, RoundGrad, SelectChannels
from trainlet.ir.graph import Array, Graph, Kind, Node, Stage
from trainlet.ops import DTYPE_BITS, OPS, RuleError, fan_in
from trainlet.verify.errors import check, fail

MAX_SIZE = 65535  # rows, columns and channels, see csrc/kernels/tl.h
MAX_KERNEL = 255
MAX_FAN_IN = 33155  # 127 * 255 * K + 2**30 < 2**31
MAX_BIAS = 2**30

NUMPY_DTYPE = {"b1": "u1", "s4": "i1", "s8": "i1", "s16": "i2", "u16": "u2", "s32": "i4", "f32": "f4"}
"""How ``Graph.data`` holds each dtype; b1 and s4 are unpacked there, one element each."""

DATA_RANGE = {"b1": (0, 1), "s4": (-8, 7)}

MAKES_GRADIENT = frozenset(
    {"enter_grad", "mask_grad", "round_grad", "conv2d_dx", "conv2d_dw", "conv2d_db", "conv2d_dx_round"}
)
OWNS_EXPONENT = frozenset({"enter_grad", "round_grad", "conv2d_dx_round"})
REFUSES = frozenset({"check_lr", "softmax_xent", "enter_grad"})
"""Operators that may end a step with a status; by then nothing may have changed."""


def verify_graph(graph: Graph) -> None:
    """Checks ``graph`` against its stage and the operator table.

    Raises VerifyError that names the first node or value at fault, its layer and the rule."""
    for rule in _CHECKS:
        rule(graph)
    flat = graph.flat()
    if flat is not graph:
        verify_graph(flat)


def _check_values(graph: Graph) -> None:
    for name, v in graph.values.items():
        check(name == v.name, v, f"is registered under its own name, not {name!r}")
        check(v.dtype in DTYPE_BITS, v, f"dtype is one of {', '.join(DTYPE_BITS)}, not {v.dtype!r}")
        check(len(v.shape) > 0 and min(v.shape) > 0, v, f"every dimension is at least 1, not {v.shape}")
        check(v.q is None or v.dtype == "s8", v, f"only s8 has a scale and a zero point, not {v.dtype}")
        check(v.exponent is None or v.dtype in ("s8", "s32"), v, "only s8 and s32 have an exponent slot")
        check(v.exponent is None or v.exponent >= 0, v, "an exponent slot is not negative")
        if v.kind in (Kind.INPUT, Kind.ACTIVATION) and len(v.shape) == 3:
            check(max(v.shape) <= MAX_SIZE, v, f"rows, columns and channels are at most {MAX_SIZE}, not {v.shape}")
        if v.q is not None:
            check(math.isfinite(v.q.scale) and v.q.scale > 0, v, f"scale is finite and above 0, not {v.q.scale!r}")
            check(-128 <= v.q.zero <= 127, v, f"zero point lies within -128..127, not {v.q.zero}")


def _check_interface(graph: Graph) -> None:
    for name in (*graph.inputs, *graph.outputs):
        check(name in graph.values, graph, f"input or output {name!r} is a value of the graph")
    check(len(set(graph.inputs)) == len(graph.inputs), graph, "an input is listed once")
    check(len(set(graph.outputs)) == len(graph.outputs), graph, "an output is listed once")
    check(len(graph.outputs) > 0, graph, "has at least one output")
    for v in graph.values.values():
        check((v.kind is Kind.INPUT) == (v.name in graph.inputs), v, "inputs are listed, and only inputs are")
    for name in graph.outputs:
        check(graph.values[name].kind is Kind.ACTIVATION, graph.values[name], "an output is made by a node")


def _check_data(graph: Graph) -> None:
    for name in graph.data:
        check(name in graph.values, graph, f"data {name!r} belongs to a value")
    for v in graph.values.values():
        data = graph.data.get(v.name)
        if data is None:
            check(v.kind is not Kind.CONST, v, "a constant has data")
            continue
        check(v.kind in (Kind.CONST, Kind.STATE), v, "only constants and states have data")
        check(data.shape == v.shape, v, f"data has the shape {v.shape}, not {data.shape}")
        want = np.dtype(NUMPY_DTYPE[v.dtype])
        check(data.dtype == want, v, f"data of {v.dtype} is {want.name}, not {data.dtype}")
        if v.dtype == "f32":
            check(bool(np.isfinite(data).all()), v, "data is finite")
        if v.dtype in DATA_RANGE:
            lo, hi = DATA_RANGE[v.dtype]
            check(_within(data, lo, hi), v, f"data lies within {lo}..{hi}")


def _within(data: Array, lo: int, hi: int) -> bool:
    wide = data.astype(np.int64)
    return lo <= int(wide.min()) and int(wide.max()) <= hi


def _check_schedule(graph: Graph) -> None:
    names: set[str] = set()
    made: set[str] = set()
    for node in graph.nodes:
        check(node.name not in names, node, "the name of a node is unique")
        names.add(node.name)
        op = OPS.get(node.op)
        if op is None:
            raise fail(node, f"the operator {node.op!r} is in the table")
        stages = ", ".join(op.stages)
        check(graph.stage.value in op.stages, node, f"belongs to stage {stages}, not {graph.stage.value}")
        given = type(node.attrs)
        check(given is op.attrs, node, f"its attributes are {op.attrs.__name__}, not {given.__name__}")
        for name in (*node.inputs, *node.outputs, *node.writes):
            check(name in graph.values, node, f"{name!r} is a value of the graph")
        for name in node.inputs:
            ready = name in made or graph.values[name].kind is not Kind.ACTIVATION
            check(ready, node, f"its input {name!r} is made by an earlier node")
        for name in node.outputs:
            check(graph.values[name].kind is Kind.ACTIVATION, node, f"its output {name!r} is an activation")
            check(name not in made, node, f"its output {name!r} is made by no other node")
            made.add(name)
    for v in graph.values.values():
        check(v.kind is not Kind.ACTIVATION or v.name in made, v, "an activation is made by a node")


def _check_writes(graph: Graph) -> None:
    """Each state has one writer, after every reader of the old value; and what may refuse a step comes before."""
    writer: dict[str, Node] = {}
    first: Node | None = None
    for node in graph.nodes:
        for name in node.inputs:
            late = writer.get(name)
            if late is not None:
                raise fail(node, f"reads {name!r} before it is written, but {late.name!r} has written it")
        for name in node.writes:
            check(graph.values[name].kind is Kind.STATE, node, f"writes only states, and {name!r} is none")
            other = writer.get(name)
            if other is not None:
                raise fail(node, f"is the only writer of {name!r}, but {other.name!r} writes it too")
            writer[name] = node
        if node.op in REFUSES and first is not None:
            raise fail(node, f"may refuse the step, so it comes before the first write, which is {first.name!r}")
        if node.writes and first is None:
            first = node


OVERWRITES = frozenset({"conv2d", "conv2d_dx_round", "add", "mask_grad", "stream"})
"""Operators whose kernels may write over an input; of convolutions the depthwise ones that keep the shape."""


def _check_overwrites(graph: Graph) -> None:
    """What is overwritten no later node reads; only streams write over something of another size, and over an image."""
    for i, node in enumerate(graph.nodes):
        gone = node.overwrites
        if not gone:
            continue
        check(node.op in OVERWRITES, node, f"{node.op!r} cannot write over an input")
        check(node.inputs.count(gone) == 1, node, f"overwrites {gone!r}, which it reads once")
        later = next((n.name for n in graph.nodes[i + 1 :] if gone in n.inputs), "")
        check(not later and gone not in graph.outputs, node, f"overwrites {gone!r}, but {later!r} still reads it")
        if node.op == "stream":
            check(len(graph.values[gone].shape) == 3, node, f"overwrites an image or an activation, not {gone!r}")
            continue
        v, y = graph.values[gone], graph.values[node.outputs[0]]
        check(v.kind is Kind.ACTIVATION, node, f"overwrites an activation, not {gone!r}")
        check((v.shape, v.dtype) == (y.shape, y.dtype), node, f"its output has the type of {gone!r}, overwritten")
        conv = node.attrs.dx.conv if isinstance(node.attrs, FusedDx) else node.attrs
        same = not isinstance(conv, Conv2d) or (conv.depthwise and conv.stride == (1, 1))
        check(same, node, "a convolution that overwrites its input is depthwise and goes pixel by pixel")


def _check_rules(graph: Graph) -> None:
    for node in graph.nodes:
        ins = [graph.values[n] for n in node.inputs]
        try:
            types = OPS[node.op].rule(node, ins)
        except RuleError as e:
            raise fail(node, str(e)) from None
        except (ValueError, IndexError, ArithmeticError):
            # a rule takes its inputs apart before it can say what is wrong with them
            shapes = ", ".join(str(v.shape) for v in ins) or "none"
            raise fail(node, f"number and rank of its inputs fit the operator, not {shapes}") from None
        check(len(types) == len(node.outputs), node, f"has {len(types)} outputs, not {len(node.outputs)}")
        for name, (shape, dtype) in zip(node.outputs, types, strict=True):
            v = graph.values[name]
            check(v.shape == shape, node, f"its output {name!r} has the shape {shape}, not {v.shape}")
            check(v.dtype == dtype, node, f"its output {name!r} is {dtype}, not {v.dtype}")


def _check_layers(graph: Graph) -> None:
    seen: dict[str, str] = {}
    for node in graph.find("conv2d"):
        other = seen.setdefault(node.layer, node.name)
        check(other == node.name, node, f"its layer is its own, for schemes name layers; {other!r} has it too")


def _check_stage_dtypes(graph: Graph) -> None:
    if graph.stage is Stage.FLOAT:
        for v in graph.values.values():
            check(v.dtype == "f32", v, f"everything is f32 in stage float, not {v.dtype}")
    if graph.stage is not Stage.INT8:
        return
    for node in graph.nodes:
        if node.op in ("conv2d", "add", "avg_pool"):
            dtype = graph.values[node.outputs[0]].dtype
            check(dtype == "s8", node, f"its output is s8 in stage int8, not {dtype}")


_QUANTIZED = {"conv2d": 1, "add": 2, "avg_pool": 1, "dense": 1}  # how many leading inputs are activations


def _check_quantized(graph: Graph) -> None:
    """Activations of an integer model have a scale and a zero point. A pool hands its input's integers on, but may
    say another scale for them: the head reads that one."""
    for node in graph.nodes:
        count = _QUANTIZED.get(node.op, 0)
        for name in (*node.inputs[:count], *(node.outputs if count else ())):
            v = graph.values[name]
            check(v.dtype != "s8" or v.q is not None, node, f"{name!r} is s8 and has a scale and a zero point")


def _check_convolutions(graph: Graph) -> None:
    for node in graph.find("conv2d"):
        attrs = node.attrs
        assert isinstance(attrs, Conv2d)
        sizes = (*attrs.kernel, *attrs.stride, *attrs.dilation)
        check(max(sizes) <= MAX_KERNEL, node, f"kernel, stride and dilation are at most {MAX_KERNEL}")
        x, w = (graph.values[n] for n in node.inputs[:2])
        if x.dtype != "s8":
            continue
        k = fan_in(attrs, x.shape[2])
        check(k <= MAX_FAN_IN, node, f"C_in/groups * kh * kw is at most {MAX_FAN_IN} (32-bit sums), not {k}")
        dead = attrs.dead
        check(
            list(dead) == sorted(set(dead)) and all(0 <= o < w.shape[0] for o in dead),
            node,
            "dead lists output channels in ascending order",
        )
        _check_conv_data(graph, node, attrs)


def _check_clamps(graph: Graph) -> None:
    for node in graph.nodes:
        attrs = node.attrs
        if not isinstance(attrs, Conv2d | Add):
            continue
        clamp = attrs.clamp
        check(clamp is None or clamp[0] < clamp[1], node, f"clamp is (low, high), not {clamp}")
        check(clamp is not None or not attrs.activation, node, "an activation has clamp bounds")
        if graph.values[node.outputs[0]].dtype != "s8":
            continue
        inside = clamp is not None and all(-128 <= c <= 127 and c == int(c) for c in clamp)
        check(inside, node, f"clamp bounds are integers within -128..127, not {clamp}")


def _check_conv_data(graph: Graph, node: Node, attrs: Conv2d) -> None:
    weights = graph.data.get(node.inputs[1])
    bias = graph.data.get(node.inputs[2])
    scale = graph.data.get(node.inputs[3])
    trained = node.inputs[4:]
    for name in (node.inputs[1], *trained[:1]):
        data = graph.data.get(name)
        check(data is None or _within(data, -127, 127), node, f"int8 weights {name!r} lie within -127..127")
    dead = list(attrs.dead)
    check(weights is None or not np.any(weights[dead]), node, "weights of dead channels are 0")
    # the saturated bias of a dead channel is harmless: nothing is added to it
    live = None if bias is None else np.abs(np.delete(bias, dead).astype(np.int64))
    check(live is None or live.size == 0 or int(live.max()) <= MAX_BIAS, node, f"|bias| is at most {MAX_BIAS}")
    check(scale is not None, node, "the scale of the weights is a constant")
    check(scale is None or float(scale.astype(np.float64).min()) > 0, node, "every scale of the weights is above 0")
    if trained:
        last = graph.values[node.inputs[1]].shape[0 if attrs.depthwise else 3]
        _check_channels(graph, node, trained[1], last)


def _check_channels(graph: Graph, node: Node, name: str, limit: int) -> None:
    table = graph.data.get(name)
    if table is None:
        raise fail(node, f"the channel table {name!r} is a constant")
    steps = np.diff(table.astype(np.int64))
    ok = bool((steps > 0).all()) and int(table[-1]) < limit
    check(ok, node, f"the channel table {name!r} ascends and stays below {limit}")


def _check_select(graph: Graph) -> None:
    for node in graph.find("select_channels"):
        assert isinstance(node.attrs, SelectChannels)
        groups = node.attrs.groups
        channels = graph.values[node.inputs[0]].shape[2]
        check(groups > 0 and channels % groups == 0, node, "groups divides the channels")
        _check_channels(graph, node, node.inputs[1], channels // groups)


def _check_masks(graph: Graph) -> None:
    for node in graph.nodes:
        attrs = node.attrs
        if isinstance(attrs, Mask):
            check(attrs.source != "none" and attrs.clamp[0] < attrs.clamp[1], node, "a mask has a source and bounds")
        if node.op == "mask_grad" and isinstance(attrs, Mask):
            _check_mask_source(graph, node, node.inputs[1], attrs.source)
        if isinstance(attrs, RoundGrad) and attrs.mask != "none":
            lead = 0 if not attrs.computes else 2 if graph.values[node.inputs[0]].dtype == "s32" else 1
            check(attrs.mask == "bits" or attrs.clamp is not None, node, "a mask by value has two bounds")
            _check_mask_source(graph, node, node.inputs[lead], attrs.mask)


def _check_mask_source(graph: Graph, node: Node, name: str, source: MaskFrom) -> None:
    bits = graph.values[name].dtype == "b1"
    check(bits == (source == "bits"), node, f"the mask source {name!r} is b1 exactly where the mask is made of bits")


def _check_exponents(graph: Graph) -> None:
    """Integer gradients have an exponent slot: a rounding its own, what is made from one gradient that gradient's."""
    owner: dict[int, Node] = {}
    for node in graph.nodes:
        if node.op not in MAKES_GRADIENT or not node.outputs:
            continue
        v = graph.values[node.outputs[0]]
        if v.dtype == "f32":
            check(v.exponent is None, node, f"the gradient {v.name!r} is f32 and has no exponent slot")
            continue
        slot = v.exponent
        if slot is None:
            raise fail(node, f"the gradient {v.name!r} has an exponent slot")
        if node.op not in OWNS_EXPONENT:
            given = graph.values[node.inputs[0]].exponent
            check(given == slot, node, f"{v.name!r} has the exponent slot of {node.inputs[0]!r}, {given}, not {slot}")
            continue
        other = owner.setdefault(slot, node)
        check(other is node, node, f"a rounding has its own exponent slot; {other.name!r} has {slot} too")


def _check_sites(graph: Graph) -> None:
    seen: dict[int, Node] = {}
    if not any(v.dtype == "s8" for v in graph.values.values()):
        return  # reals are not rounded
    for node in graph.nodes:
        for site in _sites(node.attrs):
            check(0 <= site < 2**32 - 1, node, f"a site is a 32-bit number below 0xffffffff, not {site}")
            other = seen.setdefault(site, node)
            check(other is node, node, f"a rounding has its own site; {other.name!r} has {site} too")


def _check_entry(graph: Graph) -> None:
    """All exponents of a step are relative to one anchor, which the entry of the gradient sets."""
    for node in graph.find("enter_grad")[1:]:
        check(False, node, "is the one place where gradients enter; a second one would need an anchor of its own")


def _sites(attrs: Attrs) -> Iterable[int]:
    for f in fields(attrs):
        inner = getattr(attrs, f.name)
        if f.name == "site":
            yield inner
        elif isinstance(inner, Attrs):
            yield from _sites(inner)


_CHECKS: tuple[Callable[[Graph], None], ...] = (
    _check_values,
    _check_interface,
    _check_data,
    _check_schedule,
    _check_writes,
    _check_overwrites,
    _check_rules,
    _check_layers,
    _check_stage_dtypes,
    _check_quantized,
    _check_clamps,
    _check_convolutions,
    _check_select,
    _check_masks,
    _check_exponents,
    _check_sites,
    _check_entry,
)
