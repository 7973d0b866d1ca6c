# SPDX-License-Identifier: Apache-2.0
"""Checks of an operator that need nothing but its row and instances of it. Each gives the faults found, in words."""

from __future__ import annotations

import ctypes
import importlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from graphs import same
from kernel_library import Conv, library
from ops.family import Family, graph_with, in_reals
from random_nets import Case
from test_autodiff import TOLERANCE, gradient_errors

from trainlet.frontends import graph_file
from trainlet.ir import DTYPES, Graph, Kind, Node, Operands, Value
from trainlet.ops import OPS, No, window
from trainlet.ops.geometry import Layer
from trainlet.reference import initial_state, run
from trainlet.reference.executor import REFERENCE, start
from trainlet.verify import VerifyError, verify_graph


def families() -> dict[str, Family]:
    """The family that draws each operator, of all files of tests/ops."""
    names = sorted(p.stem for p in (Path(__file__).parent / "ops").glob("*.py"))
    modules = [importlib.import_module(f"ops.{name}") for name in names]
    found = [m.FAMILY for m in modules if hasattr(m, "FAMILY")]
    return {op: family for family in found for op in family.operators}


# --- refusals ---------------------------------------------------------------------------------------------------


def _put(graph: Graph, node: Node, operand: str, made: Value) -> Graph:
    """The graph with the node reading a constant ``made``, of zeros, at an operand."""
    changed = node.reading(**{operand: made.name})
    nodes = [changed if n is node else n for n in graph.nodes]
    values = {**graph.values, made.name: made}
    data = {**graph.data, made.name: np.zeros(made.shape, DTYPES[made.dtype].numpy)}
    return replace(graph, nodes=tuple(nodes), values=values, data=data)


def _without(graph: Graph, node: Node, operand: str) -> Graph:
    changed = replace(node, operands=Operands(**{k: v for k, v in node.operands.items() if k != operand}))
    return replace(graph, nodes=tuple(changed if n is node else n for n in graph.nodes))


def mutants(graph: Graph, node: Node) -> Iterator[tuple[str, Graph]]:
    """The graph with one operand of the node missing, of another rank, of another dtype, in turn."""
    optional = {o.name for o in OPS[node.op].operands if o.optional}
    for operand, (first, *_) in node.operands.items():
        v = Value("planted", graph.values[first].shape, "s16", Kind.CONST)
        yield f"{operand} s16", _put(graph, node, operand, v)
        rank = replace(v, shape=(7, 1, 1, 1, 1), dtype=graph.values[first].dtype)
        yield f"{operand} of rank 5", _put(graph, node, operand, rank)
        if operand not in optional:
            yield f"{operand} missing", _without(graph, node, operand)


def unrefused(graph: Graph, node: Node) -> list[str]:
    """The mutants of a node that are not refused by its name."""
    return [f"{node.name}: {what}: {how}" for what, mutant in mutants(graph, node) if (how := _verdict(mutant, node))]


def _verdict(graph: Graph, node: Node) -> str:
    try:
        verify_graph(graph)
    except VerifyError as e:
        return "" if repr(node.name) in str(e) else f"refused without its name: {e}"
    return "accepted"


# --- rows -------------------------------------------------------------------------------------------------------


def wrong_rows(graph: Graph, node: Node) -> list[str]:
    """The rows of a node's output that change with a row of an operand on which, as its window says, they do not
    depend."""
    if isinstance(OPS[node.op].rows, No):
        return []
    rng = np.random.default_rng(3)
    given = {n: rng.integers(-128, 128, graph.values[n].shape).astype(np.int8) for n in graph.inputs}
    r = start(graph, {**given, **_rest(graph)}, initial_state(graph, 0), True)
    r.values.update(run(graph, {**given, **_rest(graph)}))
    maps = [v for v in node.inputs if len(graph.values[v].shape) == 3]
    return [f for v in maps for row in range(graph.values[v].shape[0]) for f in _reach(r, node, v, row)]


def _rest(graph: Graph) -> dict[str, np.ndarray]:
    face = graph.interface
    targets = {t: np.zeros(graph.values[t].shape, np.int32) for t in face.targets}
    return targets | ({face.rate: np.full(1, 0.01, np.float32)} if face.rate else {})


def _reach(r: object, node: Node, name: str, row: int) -> Iterator[str]:
    values = r.values  # type: ignore[attr-defined]
    before, known = values[node.output], values[name]
    height = len(known)
    declared = window(node)
    changed = np.zeros(len(before), bool)
    for low in (-128, 127):
        moved = known.copy()
        moved[row] = low
        (after,) = REFERENCE[node.op](r, node, node.bind({**values, name: moved}))
        changed |= (after != before).reshape(len(before), -1).any(axis=1)
    for y in np.flatnonzero(changed):
        first = min(max(int(y) * declared.stride - declared.pad, 0), height)
        if not first <= row < declared.end(int(y), height):
            yield f"{node.name}: row {y} of the output depends on row {row} of {name!r}, outside its window"


# --- gradients --------------------------------------------------------------------------------------------------


def wrong_gradients(case: Case) -> list[str]:
    """The parameters whose gradient on the model in reals is not that of central differences."""
    model = in_reals(case.model)
    found = gradient_errors(model, case.scheme)
    return [f"{name}: relative error {e:.1e}" for name, e in found.items() if not e < TOLERANCE]


# --- files ------------------------------------------------------------------------------------------------------


def lost_in_a_file(graph: Graph) -> bool:
    """Whether a graph that is saved and loaded is another one."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "g.json"
        graph_file.save(graph, path)
        return not same(graph_file.load(path), graph)


def write_version_1(graph: Graph, path: Path) -> None:
    """A model as the first version of the file had it: inputs by position, no interface."""
    graph_file.save(graph, path)
    document = json.loads(path.read_text())
    face = document.pop("interface")
    document |= {"version": 1, "inputs": face["inputs"], "outputs": face["outputs"]}
    for value in document["values"]:
        del value["fan_in"]
    for node in document["nodes"]:
        node["inputs"] = [v for names in node.pop("operands").values() for v in names]
        node["writes"] = [v for names in node.pop("stores").values() for v in names]
    path.write_text(json.dumps(document))


# --- scratch ----------------------------------------------------------------------------------------------------

C_SCRATCH: Mapping[str, tuple[str, bool]] = {
    "tl_conv2d_s8": ("tl_conv2d_scratch", False),
    "tl_conv2d_s8.packed": ("tl_conv2d_packed_scratch", False),
    "tl_depthwise_s8": ("tl_depthwise_scratch", False),
    "tl_conv2d_dx_s8": ("tl_conv2d_dx_scratch", False),
    "tl_depthwise_dx_s8": ("tl_depthwise_dx_scratch", False),
    "tl_conv2d_dw_s8": ("tl_conv2d_dw_scratch", True),
    "tl_depthwise_dw_s8": ("tl_depthwise_dw_scratch", True),
}
"""The function that says what a kernel takes, and whether it asks how many channels are kept."""


def _geometry(graph: Graph, node: Node) -> tuple[object, Layer]:
    attrs = node.attrs
    inner = getattr(attrs, "dx", getattr(attrs, "dw", attrs))
    conv = getattr(inner, "conv", inner)
    if inner is conv:
        x, y = (graph.values[v].shape for v in (node["x"], node.output))
    elif hasattr(inner, "in_hw"):
        w = graph.values[node["weight"]].shape
        x, y = (*inner.in_hw, w[3] * conv.groups), (0, 0, w[0])
    else:
        x, y = inner.shape, (0, 0, graph.values[node["g"]].shape[-1])
    return conv, Layer(x, y)


def wrong_scratch(graph: Graph, node: Node) -> list[str]:
    """Where the row says less scratch than the kernel's own function of the engine."""
    from trainlet.ops import conv_out_hw
    from trainlet.ops.registry import kernel_of

    kernel = kernel_of(node)
    if kernel.name not in C_SCRATCH:
        return []
    name, kept = C_SCRATCH[kernel.name]
    conv, layer = _geometry(graph, node)
    oh, ow = conv_out_hw(conv, *layer.x[:2])  # type: ignore[arg-type]
    sizes = (*layer.x, oh, ow, layer.y[2], *conv.kernel, *conv.stride, *conv.dilation)  # type: ignore[attr-defined]
    c = Conv(*sizes, conv.pads[0], conv.pads[2], conv.groups, 0)  # type: ignore[attr-defined]
    extra = (node.attrs.dw.kept,) if kept else ()  # type: ignore[attr-defined]
    needed = getattr(library("plain"), name)(ctypes.byref(c), *extra)
    said = kernel.scratch(graph, node)
    return [] if said >= needed else [f"{node.name}: {kernel.name} takes {needed} bytes, its row says {said}"]


__all__ = [
    "families",
    "graph_with",
    "lost_in_a_file",
    "unrefused",
    "write_version_1",
    "wrong_gradients",
    "wrong_rows",
    "wrong_scratch",
]
