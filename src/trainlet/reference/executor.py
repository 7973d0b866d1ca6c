# SPDX-License-Identifier: Apache-2.0
"""Runs a graph of any stage in numpy, node by node in its order: inference, one evaluation, one training step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

import numpy as np
from numpy.typing import NDArray

from trainlet.errors import UsageError
from trainlet.ir import DepthFirst, Graph, Kind, Node, Value
from trainlet.ops import OPS
from trainlet.ops.roles import enters
from trainlet.reference import add, conv2d, dense, gradient, loss, pool, select
from trainlet.reference.arithmetic import Tensor, key, word
from trainlet.reference.rounding import EXACT, UNROUNDED, Rounding
from trainlet.reference.run import Op, Run

_FAMILIES: Final = (add, conv2d, dense, gradient, loss, pool, select)
REFERENCE: Final[Mapping[str, Op]] = {
    name.removeprefix("ref_"): function
    for family in _FAMILIES
    for name, function in vars(family).items()
    if name.startswith("ref_")
}
"""The meaning of each operator: ``ref_<operator>`` of its family's file. A depth-first run means what its nodes
mean."""

_without = {n for n, op in OPS.items() if op.attrs is not DepthFirst} ^ REFERENCE.keys()
if _without:
    raise ImportError(f"operators without a meaning, or meanings without an operator: {', '.join(sorted(_without))}")

HEAD_SITE: Final = 0xFFFFFFFF
_BATCH_BYTES: Final = 32 << 20  # of the widest activation in int64, per batch of ``infer``


@dataclass
class TrainState:
    """Everything that one step hands to the next: ``arrays`` by the name of their state."""

    seed: int
    step: int
    arrays: dict[str, Tensor]

    def copy(self) -> TrainState:
        """An independent state. Steps replace arrays and never write into them, so the arrays are shared."""
        return TrainState(self.seed, self.step, dict(self.arrays))


class Status(StrEnum):
    """How a step ended; refused steps raise."""

    OK = "ok"
    ZERO_GRADIENT = "zero gradient"  # nothing to propagate: only the head was updated


@dataclass(frozen=True)
class StepResult:
    """Loss, logits and prediction *before* the update, and the share of rounded gradient elements that the clamp
    changed. ``values`` holds every value of the step, states as they are after it."""

    loss: float
    logits: Tensor
    prediction: int
    saturated: float
    status: Status
    values: Mapping[str, Tensor] = field(repr=False)


# --- state --------------------------------------------------------------------------------------------------


def drawn(seed: int, shape: tuple[int, ...], fan_in: int) -> NDArray[np.float32]:
    """The random numbers that a state without data starts from, within +-1/sqrt(fan_in)."""
    words = word(key(seed, 0, HEAD_SITE), np.arange(math.prod(shape)))
    unit = (words >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-23) - np.float32(1)
    return (unit * np.float32(1.0 / math.sqrt(fan_in))).reshape(shape)


def random_head(seed: int, classes: int, channels: int) -> NDArray[np.float32]:
    """The head that a session starts from, (classes, channels)."""
    return drawn(seed, (classes, channels), channels)


def _first(graph: Graph, v: Value, seed: int) -> Tensor:
    """The initial value of a state."""
    data = graph.data.get(v.name)
    if data is not None:
        return data
    if v.fan_in is None:
        raise ValueError(f"state {v.name!r} has no initial value")
    return drawn(seed, v.shape, v.fan_in)


def initial_state(graph: Graph, seed: int) -> TrainState:
    """Step 0: the graph's own data, a head drawn from ``seed`` (uint32), rho at its start."""
    return TrainState(seed, 0, {v.name: _first(graph, v, seed) for v in graph.states()})


# --- execution ----------------------------------------------------------------------------------------------


def _is_real(graph: Graph) -> bool:
    return not any(v.dtype == "s8" for v in graph.values.values())


def start(graph: Graph, inputs: Mapping[str, Tensor], state: TrainState, exact: bool) -> Run:
    """A run that has its inputs, constants and states and has executed nothing yet."""
    rounding: Rounding = EXACT if exact and not _is_real(graph) else UNROUNDED
    known = {n: d for n, d in graph.data.items() if graph.values[n].kind is Kind.CONST}
    known.update({n: _state(graph.values[n], a, rounding) for n, a in state.arrays.items()})
    known.update({n: _input(graph.values[n], a, exact) for n, a in inputs.items()})
    values = {n: rounding.load(np.asarray(a), graph.values[n].dtype) for n, a in known.items()}
    return Run(graph, rounding, state.seed, state.step, values)


def _state(v: Value, a: Tensor, rounding: Rounding) -> Tensor:
    """A state; ValueError where exact arithmetic would go on from an unrounded one."""
    if rounding is EXACT and (a.dtype.kind == "f") != (v.dtype == "f32"):
        raise ValueError(
            f"state {v.name!r} is {a.dtype}: it comes from steps without rounding and cannot go on exactly"
        )
    return a


_NUMPY: Final = {"b1": np.bool_, "s8": np.int8, "s32": np.int32}


def _input(v: Value, given: Tensor, exact: bool) -> Tensor:
    """An input of the declared type and shape, with any number of images in front; UsageError otherwise."""
    a = np.asarray(given)
    if a.shape[-len(v.shape) :] != v.shape or a.ndim > len(v.shape) + 1:
        raise UsageError(f"input {v.name!r} has the shape {v.shape}, not {a.shape}")
    if not exact or v.dtype == "f32":
        return a
    cast: Tensor = a.astype(_NUMPY[v.dtype])
    if not np.array_equal(cast, a):
        raise UsageError(f"input {v.name!r} is {v.dtype}, and {a.dtype} data does not fit")
    return cast


def execute(run: Run, nodes: tuple[Node, ...]) -> None:
    """Runs the nodes. Behind a gradient that is all zero, whatever depends on it is left out."""
    silent: set[str] = set()
    for node in nodes:
        if not silent.isdisjoint(node.inputs):
            silent.update(node.outputs)
            continue
        with np.errstate(all="ignore"):  # overflow to infinity is a result here, and is looked for
            outputs = REFERENCE[node.op](run, node, node.bind(run.values))
        run.values.update(zip(node.outputs, outputs, strict=True))
        if run.zero_gradient and enters(node):
            silent.update(node.outputs)


def _declared(graph: Graph, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values in their declared shapes: a vector that stands for all pixels is one vector again."""
    return {n: a[:1, :1] if graph.values[n].shape[:2] == (1, 1) and a.ndim == 3 else a for n, a in values.items()}


def run(
    graph: Graph, inputs: Mapping[str, Tensor], state: TrainState | None = None, *, rounding: bool = True
) -> dict[str, Tensor]:
    """All values by name, states as they are after the run; ``state`` (else seed 0, step 0) is not changed.

    ``rounding`` False puts the identity in the place of every rounding of an integer graph, over float64. A graph of
    reals is always evaluated in float64. Raises what ``train_step`` raises."""
    graph = graph.flat()
    r = start(graph, inputs, state or initial_state(graph, 0), rounding)
    execute(r, graph.nodes)
    return _declared(graph, r.values)


def train_step(
    graph: Graph, state: TrainState, image: Tensor, label: int, lr: float, *, rounding: bool = True
) -> StepResult:
    """One step of SGD at batch 1 on a TRAIN or LOWERED graph; ``state`` moves on.

    Raises UsageError (image, label, lr) or MismatchError (a number that is not finite); nothing has changed then. A
    gradient that is all zero updates the head only and counts as a step."""
    if not -(2**31) <= label < 2**31:
        raise UsageError(f"label {label}: give the number of a class, from 0")
    graph = graph.flat()
    real = np.float32 if rounding and not _is_real(graph) else np.float64
    with np.errstate(over="ignore"):
        (x,), (target,), rate = graph.inputs, graph.interface.targets, graph.interface.rate
        given = {x: image, target: np.array([label], np.int32), rate: np.array([lr]).astype(real)}
    r = start(graph, given, state, rounding)
    execute(r, graph.nodes)
    state.arrays = {n: r.values[n] for n in state.arrays}
    state.step = (state.step + 1) & 0xFFFFFFFF
    logits = r.values[graph.outputs[0]]
    return StepResult(
        loss=float(r.values[graph.interface.losses[0]].item()),
        logits=logits,
        prediction=int(logits.argmax()),
        saturated=r.saturated / max(r.rounded, 1),
        status=Status.ZERO_GRADIENT if r.zero_gradient else Status.OK,
        values=_declared(graph, r.values),
    )


# --- inference ----------------------------------------------------------------------------------------------


def _needed(graph: Graph, name: str) -> tuple[Node, ...]:
    """The nodes that ``name`` depends on, in order."""
    wanted = {name}
    kept: list[Node] = []
    for node in reversed(graph.nodes):
        if wanted.isdisjoint(node.outputs):
            continue
        wanted.update(node.inputs)
        kept.append(node)
    return tuple(reversed(kept))


def _batches(graph: Graph, nodes: tuple[Node, ...], count: int) -> Iterator[slice]:
    widest = max(graph.values[n].size for node in nodes for n in node.outputs)
    size = max(1, _BATCH_BYTES // (8 * widest))
    for first in range(0, count, size):
        yield slice(first, first + size)


def infer(
    graph: Graph, state: TrainState | None, images: Tensor, *, output: str | None = None, rounding: bool = True
) -> Tensor:
    """The first output of ``graph`` (or the value ``output``) for images (N, H, W, C): (N, *its shape)."""
    graph = graph.flat()
    wanted = output or graph.outputs[0]
    nodes = _needed(graph, wanted)
    given = state or initial_state(graph, 0)
    results = []
    for part in _batches(graph, nodes, len(images)):
        r = start(graph, {graph.inputs[0]: images[part]}, given, rounding)
        execute(r, nodes)
        results.append(r.values[wanted])
    return np.concatenate(results)
