# SPDX-License-Identifier: Apache-2.0
"""FLOAT -> INT8: batch norm folding, min-max calibration of activations, weights by output channel.

Activations are affine int8 of a whole tensor, weights symmetric int8 in -127..127 with one scale per output channel,
biases int32 in units of weight scale times input scale; the classifier behind the pooled features stays f32. What
remains of the model's error is rounding: docs/arithmetic.md says how the integers are used."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from trainlet.attrs import Add, Attrs, Conv2d
from trainlet.errors import UnsupportedError, UsageError
from trainlet.frontends.common import DEAD_RATIO, check_sums
from trainlet.ir import Image
from trainlet.ir.graph import Graph, GraphBuilder, Kind, Node, QParams, Stage, Value
from trainlet.ops import fan_in
from trainlet.reference import run
from trainlet.verify import verify_graph

PIXELS: Final = QParams(1 / 255, -128)
"""The input of a model that was trained on pixels from 0 to 1, as int8 images hold them (q = pixel - 128)."""

_BATCH: Final = 32  # images that calibration runs at once
_ROOM: Final = float(1 << 29)  # biases stay below it, so that 32-bit sums have room
_MAX_MULTIPLIER: Final = 2.0**30  # beyond, every output would saturate

Range = tuple[float, float]
Floats = NDArray[np.float64]


def fold_batch_norm(
    weight: NDArray[np.floating],
    bias: NDArray[np.floating] | None,
    mean: NDArray[np.floating],
    variance: NDArray[np.floating],
    gamma: NDArray[np.floating],
    beta: NDArray[np.floating],
    epsilon: float,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Weight and bias of the one convolution that equals a convolution and the batch norm behind it.

    ``weight`` has its output channels first, the rest is (O,); ``bias`` None is 0. UsageError where shapes differ or a
    variance is not above -``epsilon``."""
    channels = (weight.shape[0],)
    given = {"mean": mean, "variance": variance, "gamma": gamma, "beta": beta}
    for name, a in {**given, **({} if bias is None else {"bias": bias})}.items():
        if a.shape != channels:
            raise UsageError(f"batch norm: {name} has the shape {a.shape}; {channels[0]} channels need {channels}")
    wide = variance.astype(np.float64) + epsilon
    if not wide.min() > 0:
        raise UsageError(f"batch norm: variance + epsilon is {wide.min():g}; it is above 0 in every channel")
    factor = gamma.astype(np.float64) / np.sqrt(wide)
    w = weight.astype(np.float64) * factor.reshape(-1, *[1] * (weight.ndim - 1))
    b = ((0.0 if bias is None else bias.astype(np.float64)) - mean) * factor + beta
    return w.astype(np.float32), b.astype(np.float32)


# --- ranges -----------------------------------------------------------------------------------------------------


def calibrate(graph: Graph, images: Image, input_q: QParams = PIXELS) -> dict[str, Range]:
    """The smallest and the largest number that each activation of a FLOAT ``graph`` takes over int8 ``images`` (N, H,
    W, C), which stand for the reals that ``input_q`` says. UsageError where there is no image, or one that does not
    fit, or a number that is not finite."""
    shape = graph.values[graph.inputs[0]].shape
    if images.ndim != 4 or images.shape[1:] != shape or images.dtype != np.int8:
        wanted = f"int8 images (N, {', '.join(map(str, shape))})"
        raise UsageError(f"{graph.name}: calibration takes {wanted}, not {images.dtype} {images.shape}")
    if not len(images):
        raise UsageError(f"{graph.name}: there is no image to calibrate with; give some of the training images")
    layers = {n.outputs[0]: n.layer for n in graph.nodes}
    found: dict[str, Range] = {}
    for first in range(0, len(images), _BATCH):
        reals = (images[first : first + _BATCH].astype(np.float64) - input_q.zero) * input_q.scale
        values = run(graph, {graph.inputs[0]: reals})
        for name, layer in layers.items():
            low, high = float(values[name].min()), float(values[name].max())
            if not (math.isfinite(low) and math.isfinite(high)):
                raise UsageError(f"{layer}: its output is not finite in calibration; train the model again")
            was = found.get(name, (low, high))
            found[name] = min(was[0], low), max(was[1], high)
    return found


def range_qparams(layer: str, found: Range) -> QParams:
    """Scale and zero point that reach over ``found`` and hold 0 exactly, as padding and activations need it.
    UsageError where the range is nothing but 0."""
    low, high = min(found[0], 0.0), max(found[1], 0.0)
    scale = (high - low) / 255
    if not scale > 0:
        raise UsageError(
            f"{layer}: its output is 0 for all calibration images, so it has no range; give more varied images, or "
            "remove the layer"
        )
    return QParams(scale, max(-128, min(127, round(-128 - low / scale))))


def _integer_clamp(clamp: Range | None, q: QParams) -> Range:
    """The same bounds in integers; those of int8 where there are none."""
    low, high = clamp or (-math.inf, math.inf)
    return max(-128, _near(low, q)), min(127, _near(high, q))


def _near(real: float, q: QParams) -> int:
    return q.zero + round(max(-512.0, min(512.0, real / q.scale)))


# --- weights ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Weights:
    """Integers of a convolution, output channels first."""

    weight: NDArray[np.int8]
    bias: NDArray[np.int32]
    scale: NDArray[np.float32]
    dead: tuple[int, ...]


def _quantize_weights(layer: str, w: Floats, b: Floats, x_scale: float, per_channel: bool) -> _Weights:
    largest = np.abs(w).reshape(len(w), -1).max(axis=1)
    if not largest.max() > 0:
        raise UsageError(f"{layer}: all its weights are 0, so they have no scale; remove the layer")
    scale = largest / 127 if per_channel else np.full(len(w), largest.max() / 127)
    dead = np.flatnonzero(scale < DEAD_RATIO * scale.max())
    scale[dead] = scale.max()
    # a channel with tiny weights and a large bias gives up the weights' precision, which the bias drowns anyway
    scale = np.maximum(scale, np.abs(b) / (x_scale * _ROOM)).astype(np.float32)
    wide = scale.astype(np.float64)
    q = np.clip(np.rint(w / wide.reshape(-1, *[1] * (w.ndim - 1))), -127, 127).astype(np.int8)
    q[dead] = 0
    bias = np.rint(b / (wide * x_scale)).astype(np.int32)
    return _Weights(q, bias, scale, tuple(map(int, dead)))


# --- nodes ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Walk:
    """The INT8 graph in progress, and what its nodes are made from."""

    graph: Graph
    ranges: Mapping[str, Range]
    per_channel: bool
    g: GraphBuilder

    def q(self, name: str) -> QParams:
        q = self.g.values[name].q
        assert q is not None, "the order of the nodes makes every input before it is read"
        return q

    def emit(self, node: Node, inputs: tuple[str, ...], attrs: Attrs, q: QParams) -> None:
        out = self.graph.values[node.outputs[0]]
        self.g.emit(replace(node, inputs=inputs, attrs=attrs), replace(out, dtype="s8", q=q))


def _conv(walk: _Walk, node: Node) -> None:
    attrs, x = node.attrs, walk.q(node.inputs[0])
    assert isinstance(attrs, Conv2d)
    w, b = (walk.graph.data[n].astype(np.float64) for n in node.inputs[1:3])
    made = _quantize_weights(node.layer, w, b, x.scale, walk.per_channel)
    check_sums(node.layer, made.bias, fan_in(attrs, walk.g.values[node.inputs[0]].shape[2]))
    y = range_qparams(node.layer, walk.ranges[node.outputs[0]])
    if not x.scale * float(made.scale.max()) / y.scale < _MAX_MULTIPLIER:
        raise UsageError(f"{node.layer}: its weights are so large that every output saturates; train the model again")
    inputs = (
        node.inputs[0],
        walk.g.const(node.inputs[1], made.weight, "s8"),
        walk.g.const(node.inputs[2], made.bias, "s32"),
        walk.g.const(f"{node.name}.scale", made.scale, "f32"),
    )
    walk.emit(node, inputs, replace(attrs, clamp=_integer_clamp(attrs.clamp, y), dead=made.dead), y)


def _add(walk: _Walk, node: Node) -> None:
    attrs = node.attrs
    assert isinstance(attrs, Add)
    y = range_qparams(node.layer, walk.ranges[node.outputs[0]])
    walk.emit(node, node.inputs, replace(attrs, clamp=_integer_clamp(attrs.clamp, y)), y)


def _pool(walk: _Walk, node: Node) -> None:
    walk.emit(node, node.inputs, node.attrs, walk.q(node.inputs[0]))


def _dense(walk: _Walk, node: Node) -> None:
    """Stays as it is; it reads int8 features and puts their scale in."""
    if node is not walk.graph.nodes[-1]:
        raise UnsupportedError(f"{node.layer}: a dense layer is supported at the end of a model only; use convolutions")
    for name in node.inputs[1:]:
        walk.g.add(walk.graph.values[name], walk.graph.data.get(name))
    walk.g.emit(node, walk.graph.values[node.outputs[0]])


_RULES: Final[Mapping[str, Callable[[_Walk, Node], None]]] = {
    "conv2d": _conv,
    "add": _add,
    "avg_pool": _pool,
    "dense": _dense,
}


def _check(graph: Graph) -> None:
    if graph.stage is not Stage.FLOAT:
        raise UsageError(f"{graph.name}: a graph of stage {graph.stage}; give one of stage float to quantize")
    for node in graph.nodes:
        if node.op not in _RULES:
            known = ", ".join(_RULES)
            raise UnsupportedError(f"{node.layer}: {node.op!r} cannot be quantized; models are made of {known}")
    verify_graph(graph)
    for node in graph.find("conv2d"):
        missing = [n for n in node.inputs[1:] if graph.values[n].kind is not Kind.CONST]
        if missing:
            raise UnsupportedError(f"{node.layer}: {missing[0]!r} is no constant; quantize before training")


def quantize(graph: Graph, images: Image, input_q: QParams = PIXELS, *, per_channel: bool = True) -> Graph:
    """The INT8 graph of a FLOAT ``graph``, with the ranges that its activations take over int8 ``images`` (N, H, W, C);
    ``input_q`` says which reals these stand for. ``per_channel`` False gives all channels of a layer one weight scale.

    Raises UsageError (images, weights or ranges that are of no use) and UnsupportedError, both naming the layer."""
    _check(graph)
    ranges = calibrate(graph, images, input_q)
    walk = _Walk(graph, ranges, per_channel, GraphBuilder(graph.name))
    name = graph.inputs[0]
    walk.g.add(Value(name, graph.values[name].shape, "s8", Kind.INPUT, input_q))
    for node in graph.nodes:
        _RULES[node.op](walk, node)
    made = walk.g.build(Stage.INT8, graph.outputs)
    verify_graph(made)
    return made
