# SPDX-License-Identifier: Apache-2.0
"""The check of a graph against its stage and the operator table. It runs after every front end, pass and load."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import fields

import numpy as np

from trainlet.ir import DTYPES, Array, Attrs, DepthFirst, Graph, Kind, Node, Stage
from trainlet.ops import OPS, No, RuleError
from trainlet.ops.op import Exponent, check_operands
from trainlet.ops.roles import enters, is_trainable
from trainlet.verify.errors import check, fail

MAX_SIZE = 65535  # rows, columns and channels, see csrc/kernels/tl.h


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
        check(v.dtype in DTYPES, v, f"dtype is one of {', '.join(DTYPES)}, not {v.dtype!r}")
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
    given, made = graph.interface.given, graph.interface.made
    for name in (*given, *made):
        check(name in graph.values, graph, f"input or output {name!r} is a value of the graph")
    check(len(set(given)) == len(given), graph, "an input is listed once")
    check(len(set(made)) == len(made), graph, "an output is listed once")
    check(len(graph.outputs) > 0, graph, "has at least one output")
    for v in graph.values.values():
        check((v.kind is Kind.INPUT) == (v.name in given), v, "inputs are listed, and only inputs are")
    for name in made:
        check(graph.values[name].kind is Kind.ACTIVATION, graph.values[name], "an output is made by a node")


def _check_data(graph: Graph) -> None:
    for name in graph.data:
        check(name in graph.values, graph, f"data {name!r} belongs to a value")
    for v in graph.values.values():
        data = graph.data.get(v.name)
        if data is None:
            check(v.kind is not Kind.CONST, v, "a constant has data")
            drawn = v.fan_in is not None and v.fan_in > 0 and v.dtype == "f32"
            check(v.kind is not Kind.STATE or drawn, v, "a state has data, or is f32 and drawn with a fan-in above 0")
            continue
        check(v.fan_in is None, v, "what has data is not drawn")
        check(v.kind in (Kind.CONST, Kind.STATE), v, "only constants and states have data")
        check(data.shape == v.shape, v, f"data has the shape {v.shape}, not {data.shape}")
        dtype = DTYPES[v.dtype]
        want = np.dtype(dtype.numpy)
        check(data.dtype == want, v, f"data of {v.dtype} is {want.name}, not {data.dtype}")
        if v.dtype == "f32":
            check(bool(np.isfinite(data).all()), v, "data is finite")
        if dtype.low is not None and dtype.high is not None:
            check(_within(data, dtype.low, dtype.high), v, f"data lies within {dtype.low}..{dtype.high}")


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
        _check_operands(node)
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


def _check_operands(node: Node) -> None:
    row = OPS[node.op]
    try:
        check_operands(node.operands, row.operands, "operand")
        check_operands(node.stores, row.stores, "state")
    except RuleError as e:
        raise fail(node, str(e)) from None


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
        if OPS[node.op].refuses and first is not None:
            raise fail(node, f"may refuse the step, so it comes before the first write, which is {first.name!r}")
        if node.writes and first is None:
            first = node


def _check_overwrites(graph: Graph) -> None:
    """What is overwritten no later node reads; only depth-first runs write over something of another size, and over an
    image."""
    for i, node in enumerate(graph.nodes):
        gone = node.overwrites
        if not gone:
            continue
        rule = OPS[node.op].overwrites
        if isinstance(rule, No):
            raise fail(node, f"{node.op!r} cannot write over an input: {rule.why}")
        check(node.inputs.count(gone) == 1, node, f"overwrites {gone!r}, which it reads once")
        later = next((n.name for n in graph.nodes[i + 1 :] if gone in n.inputs), "")
        check(
            not later and gone not in graph.interface.made, node, f"overwrites {gone!r}, but {later!r} still reads it"
        )
        may = rule.when(node.attrs) and any(gone in node.all(o) for o in rule.operands)
        check(may, node, f"may write over {' or '.join(rule.operands)}, where its attributes let it, not {gone!r}")
        if isinstance(node.attrs, DepthFirst):
            check(len(graph.values[gone].shape) == 3, node, f"overwrites an image or an activation, not {gone!r}")
            continue
        v, y = graph.values[gone], graph.values[node.output]
        check(v.kind is Kind.ACTIVATION, node, f"overwrites an activation, not {gone!r}")
        check((v.shape, v.dtype) == (y.shape, y.dtype), node, f"its output has the type of {gone!r}, overwritten")


def _check_rules(graph: Graph) -> None:
    for node in graph.nodes:
        ins = node.bind(graph.values)
        try:
            types = OPS[node.op].rule(node, ins)
        except RuleError as e:
            raise fail(node, str(e)) from None
        except (ValueError, TypeError, IndexError, ArithmeticError):
            # a rule takes its inputs apart before it can say what is wrong with them
            shapes = ", ".join(str(v.shape) for v in ins.flat()) or "none"
            raise fail(node, f"number and rank of its inputs fit the operator, not {shapes}") from None
        check(len(types) == len(node.outputs), node, f"has {len(types)} outputs, not {len(node.outputs)}")
        for name, (shape, dtype) in zip(node.outputs, types, strict=True):
            v = graph.values[name]
            check(v.shape == shape, node, f"its output {name!r} has the shape {shape}, not {v.shape}")
            check(v.dtype == dtype, node, f"its output {name!r} is {dtype}, not {v.dtype}")


def _check_layers(graph: Graph) -> None:
    """Schemes name layers."""
    seen: dict[str, str] = {}
    for node in graph.nodes:
        if not is_trainable(node):
            continue
        other = seen.setdefault(node.layer, node.name)
        check(other == node.name, node, f"its layer is its own, for schemes name layers; {other!r} has it too")


def _check_stage_dtypes(graph: Graph) -> None:
    if graph.stage is Stage.FLOAT:
        for v in graph.values.values():
            check(v.dtype == "f32", v, f"everything is f32 in stage float, not {v.dtype}")
    if graph.stage is not Stage.INT8:
        return
    for node in graph.nodes:
        if OPS[node.op].integer:
            dtype = graph.values[node.output].dtype
            check(dtype == "s8", node, f"its output is s8 in stage int8, not {dtype}")


def _check_quantized(graph: Graph) -> None:
    """Activations of an integer model have a scale and a zero point. A pool hands its input's integers on, but may
    say another scale for them: the head reads that one."""
    for node in graph.nodes:
        if Stage.INT8 not in OPS[node.op].stages:
            continue
        for v in (graph.values[name] for name in (*node.inputs, *node.outputs)):
            known = v.dtype != "s8" or v.q is not None or v.kind in (Kind.CONST, Kind.STATE)
            check(known, node, f"{v.name!r} is s8 and has a scale and a zero point")


def _check_clamps(graph: Graph) -> None:
    for node in graph.nodes:
        activation = OPS[node.op].activation
        if isinstance(activation, No):
            continue
        clamp = getattr(node.attrs, "clamp", None)
        check(clamp is None or clamp[0] < clamp[1], node, f"clamp is (low, high), not {clamp}")
        passes = not getattr(node.attrs, "activation", False) or activation(node.attrs) is not None
        check(passes, node, "an activation has clamp bounds")
        if graph.values[node.output].dtype != "s8":
            continue
        inside = clamp is not None and all(-128 <= c <= 127 and c == int(c) for c in clamp)
        check(inside, node, f"clamp bounds are integers within -128..127, not {clamp}")


def _check_constants(graph: Graph) -> None:
    """What operators ask of the contents of their constants."""
    for node in graph.nodes:
        rule = OPS[node.op].data
        if isinstance(rule, No):
            continue
        try:
            rule(graph, node)
        except RuleError as e:
            raise fail(node, str(e)) from None


def _check_exponents(graph: Graph) -> None:
    """Integer gradients have an exponent slot: a rounding its own, what is made from one gradient that gradient's."""
    owner: dict[int, Node] = {}
    for node in graph.nodes:
        exponent = OPS[node.op].exponent
        if isinstance(exponent, No):
            continue
        v = graph.values[node.output]
        if v.dtype == "f32":
            check(v.exponent is None, node, f"the gradient {v.name!r} is f32 and has no exponent slot")
            continue
        slot = v.exponent
        if slot is None:
            raise fail(node, f"the gradient {v.name!r} has an exponent slot")
        if exponent is Exponent.OF_G:
            given = graph.values[node["g"]].exponent
            check(given == slot, node, f"{v.name!r} has the exponent slot of {node['g']!r}, {given}, not {slot}")
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
    first: Node | None = None
    for node in graph.nodes:
        if not enters(node):
            continue
        check(
            first is None, node, "is the one place where gradients enter; a second one would have an anchor of its own"
        )
        first = node


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
    _check_constants,
    _check_exponents,
    _check_sites,
    _check_entry,
)
