# SPDX-License-Identifier: Apache-2.0
"""What a model file may ask for: sizes that a compiler can work through, scales that the arithmetic can carry, names
that a training step leaves free. Files are hostile until they have passed here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

import numpy as np

from trainlet.errors import UnsupportedError
from trainlet.ir import Attrs, Graph, Kind, Node, Stage, Value
from trainlet.ops import OPS, Add, Conv2d
from trainlet.ops.roles import heads

MAX_NODES: Final = 4096
MAX_MODEL_NODES: Final = 512  # a model becomes several times as many nodes of a training step
MAX_VALUES: Final = 8 * MAX_NODES
MAX_SIDE: Final = 4096
MAX_ROWS: Final = 1 << 16  # of all activations together: each is a step of the plan
MAX_ELEMENTS: Final = 1 << 26  # of an activation
MAX_NAME: Final = 200

# within these a number is a normal float32, which is what a training step computes with
SMALLEST: Final = 2.0**-126
LARGEST: Final = 2.0**126
MAX_MULTIPLIER: Final = 2.0**30  # beyond, every output would saturate

_STEP: Final = frozenset(("label", "lr", "loss"))
_PARTS: Final = frozenset((
    "bias_sgd", "channels", "db", "dw", "dx", "exp", "fraction", "frozen", "geometry", "grad", "kept", "mask",
    "mask_grad", "mt", "mult", "entered", "enter", "rate", "ready", "requant", "rho", "round", "sgd", "share", "shift",
    "stages", "start", "depth_first", "winners", "trained", "update", "weight_sgd",
))  # fmt: skip
"""What a training step, and its C, put behind the names of a model's nodes and values."""
_RENAME: Final = "rename it in the model"

MODEL_STAGES: Final = frozenset((Stage.FLOAT, Stage.INT8))


def check_limits(graph: Graph) -> None:
    """Raises UnsupportedError naming the node or value that is above a limit. ``graph`` is valid for its stage."""
    for rule in _RULES:
        rule(graph)


def check_count(what: str, count: int, limit: int) -> None:
    """Raises UnsupportedError where there are more than ``limit`` of ``what``."""
    if count > limit:
        raise UnsupportedError(f"{what}: there are {count}, and at most {limit} are read; use a smaller model")


def printable(name: str) -> str:
    """A name of a model from one of a file: what cannot be printed becomes ``_``, and what is too long goes."""
    return "".join(c if c.isprintable() else "_" for c in name[:MAX_NAME]) or "_"


def check_free(graph: Graph, names: Iterable[str]) -> None:
    """Raises UnsupportedError where a value of ``graph`` has one of the names that a new head will have."""
    taken = next((n for n in names if n in graph.values), None)
    if taken is not None:
        raise UnsupportedError(f"{graph.name}: value {taken!r}: a new head has a value of this name; {_RENAME}")


def _need(ok: bool, subject: Node | Value, rule: str) -> None:
    if not ok:
        kind = "node" if isinstance(subject, Node) else "value"
        raise UnsupportedError(f"{kind} {subject.name!r}: {rule}")


def _check_counts(graph: Graph) -> None:
    check_count("nodes", len(graph.nodes), MAX_MODEL_NODES if graph.stage in MODEL_STAGES else MAX_NODES)
    check_count("values", len(graph.values), MAX_VALUES)


def _activations(graph: Graph) -> Iterable[Value]:
    return (v for v in graph.values.values() if v.kind in (Kind.INPUT, Kind.ACTIVATION))


def _check_sizes(graph: Graph) -> None:
    rows = 0
    for v in _activations(graph):
        _need(v.size <= MAX_ELEMENTS, v, f"an activation has at most {MAX_ELEMENTS} elements, not {v.size}")
        if len(v.shape) == 3:
            _need(max(v.shape[:2]) <= MAX_SIDE, v, f"at most {MAX_SIDE} x {MAX_SIDE} pixels, not {v.shape[:2]}")
            rows += v.shape[0]
    check_count("rows of all activations", rows, MAX_ROWS)


def _check_model(graph: Graph) -> None:
    """A model has one image, one output, and constants; only its head may be a state, and without data."""
    if graph.stage not in MODEL_STAGES:
        return
    own = {node[p.operand] for node in heads(graph) for p in OPS[node.op].params}
    if not graph.inputs or not graph.outputs:
        raise UnsupportedError("inputs and outputs: a model has one of each at least")
    if graph.interface.targets or graph.interface.rate or graph.interface.losses:
        raise UnsupportedError("interface: a model has no targets, rate or losses, which belong to a training step")
    for image in (graph.values[name] for name in graph.inputs):
        _need(len(image.shape) == 3, image, f"the input of a model is an image (H, W, C), not {image.shape}")
    for v in graph.values.values():
        _need(v.kind is not Kind.STATE or v.name in own, v, "a model has no state but its head")
        _need(v.exponent is None, v, "a model has no gradient, so nothing in it has an exponent slot")


def _check_slots(graph: Graph) -> None:
    for v in graph.values.values():
        _need(v.exponent is None or v.exponent < MAX_VALUES, v, f"an exponent slot is below {MAX_VALUES}")


# --- scales -----------------------------------------------------------------------------------------------------


def _normal(number: float) -> bool:
    return SMALLEST <= number <= LARGEST


def _check_scales(graph: Graph) -> None:
    for v in graph.values.values():
        ok = v.q is None or _normal(v.q.scale)
        _need(ok, v, f"its scale lies within 2^-126 .. 2^126, where float32 is exact; it is {v.q and v.q.scale!r}")
    for node in graph.nodes:
        rule = _SCALES.get(type(node.attrs))
        if rule is not None:
            rule(graph, node)


def _check_conv_scales(graph: Graph, node: Node) -> None:
    """The multiplier of the forward pass, and the rates of both updates."""
    x, y, name = graph.values[node["x"]].q, graph.values[node.output].q, node.get("scale")
    scale = None if name is None else graph.data.get(name)
    if scale is None or x is None or y is None:
        return
    wide = scale.astype(np.float64)
    low, high = float(wide.min()), float(wide.max())
    _need(
        _normal(low) and _normal(high), node, f"its weight scales lie within 2^-126 .. 2^126, not {low:g} .. {high:g}"
    )
    worst = x.scale * high / y.scale
    _need(worst < MAX_MULTIPLIER, node, f"its scales make outputs {worst:g} times its sums, which all saturate")
    rates = (x.scale / high, x.scale / low, 1 / (x.scale * high), 1 / (x.scale * low))
    bad = next((r for r in rates if not _normal(r)), None)
    _need(bad is None, node, f"its scales give an update rate of {bad}, which is no normal float32")


def _check_add_scales(graph: Graph, node: Node) -> None:
    a, b, y = (graph.values[n].q for n in (node["a"], node["b"], node.output))
    if a is None or b is None or y is None:
        return
    worst = max(a.scale, b.scale) / y.scale
    _need(worst < MAX_MULTIPLIER, node, f"its scales make outputs {worst:g} times its inputs, which all saturate")


_SCALES: Final[dict[type[Attrs], Callable[[Graph, Node], None]]] = {Conv2d: _check_conv_scales, Add: _check_add_scales}


# --- names ------------------------------------------------------------------------------------------------------


def names_of_step(graph: Graph) -> Callable[[str], bool]:
    """Says of a name whether something in a training step of the model ``graph`` may be called so."""
    nodes = {n.name for n in graph.nodes}
    bases = nodes | graph.values.keys()
    # an addition's table, and what quantizing makes for a convolution
    scaled = {n.name for n in graph.nodes if isinstance(n.attrs, Add) or graph.stage is Stage.FLOAT}

    def taken(name: str) -> bool:
        rest = name.removeprefix("row.")  # a function that makes a row is called after its node
        parts = rest.split(".")
        ends = ((".".join(parts[:i]), parts[i]) for i in range(1, len(parts)))
        made = any((base in bases and part in _PARTS) or (base in scaled and part == "scale") for base, part in ends)
        return made or name in _STEP or (rest != name and rest in nodes)

    return taken


def _check_names(graph: Graph) -> None:
    """No value of a model has the name of one that its training step, or its C, will have."""
    if graph.stage not in MODEL_STAGES:
        return
    taken = names_of_step(graph)
    for v in graph.values.values():
        _need(not taken(v.name), v, f"a training step has a value of this name too; {_RENAME}")


_RULES: Final[tuple[Callable[[Graph], None], ...]] = (
    _check_counts,
    _check_sizes,
    _check_model,
    _check_slots,
    _check_scales,
    _check_names,
)
