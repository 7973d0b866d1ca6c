# SPDX-License-Identifier: Apache-2.0
"""FLOAT -> INT8: batch norm folding, min-max calibration of activations, weights by output channel.

Activations are affine int8 of a whole tensor, weights symmetric int8 in -127..127 with one scale per output channel,
biases int32 in units of weight scale times input scale; the classifier behind the pooled features stays f32. What
remains of the model's error is rounding: docs/arithmetic.md says how the integers are used."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from trainlet.errors import UnsupportedError, UsageError
from trainlet.ir import Array, Graph, GraphBuilder, Image, Kind, Node, QParams, Stage, Value
from trainlet.ops import OPS, No
from trainlet.ops.quantization import range_qparams as range_qparams
from trainlet.reference import run
from trainlet.verify import verify_graph

PIXELS: Final = QParams(1 / 255, -128)
"""The input of a model that was trained on pixels from 0 to 1, as int8 images hold them (q = pixel - 128)."""

_BATCH: Final = 32  # images that calibration runs at once

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
    shape = graph.image.shape
    if images.ndim != 4 or images.shape[1:] != shape or images.dtype != np.int8:
        wanted = f"int8 images (N, {', '.join(map(str, shape))})"
        raise UsageError(f"{graph.name}: calibration takes {wanted}, not {images.dtype} {images.shape}")
    if not len(images):
        raise UsageError(f"{graph.name}: there is no image to calibrate with; give some of the training images")
    layers = {n.output: n.layer for n in graph.nodes}
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


# --- nodes ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Walk:
    """The INT8 graph in progress, and what its nodes are made from (``ops.op.Quantizer``)."""

    graph: Graph
    ranges: Mapping[str, Range]
    per_channel: bool
    g: GraphBuilder

    def value(self, name: str) -> Value:
        return self.g.values[name]

    def q(self, name: str) -> QParams:
        q = self.g.values[name].q
        assert q is not None, "the order of the nodes makes every input before it is read"
        return q

    def data(self, name: str) -> Array:
        return self.graph.data[name]

    def const(self, name: str, data: Array, dtype: str) -> str:
        return self.g.const(name, data, dtype)

    def carry(self, name: str) -> None:
        if name not in self.g.values:
            self.g.add(self.graph.values[name], self.graph.data.get(name))

    def range(self, node: Node) -> Range:
        return self.ranges[node.output]

    def emit(self, node: Node, q: QParams | None) -> None:
        out = self.graph.values[node.output]
        self.g.emit(node, out if q is None else replace(out, dtype="s8", q=q))


def _check(graph: Graph) -> None:
    if graph.stage is not Stage.FLOAT:
        raise UsageError(f"{graph.name}: a graph of stage {graph.stage}; give one of stage float to quantize")
    verify_graph(graph)
    for node in graph.nodes:
        rule = OPS[node.op].quantize
        if isinstance(rule, No):
            raise UnsupportedError(f"{node.layer}: {node.op!r} cannot be quantized, since {rule.why}")
        params = [node[p.operand] for p in OPS[node.op].params if not p.always]
        missing = [name for name in params if graph.values[name].kind is not Kind.CONST]
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
        rule = OPS[node.op].quantize
        assert not isinstance(rule, No), "_check has refused it"
        rule(walk, node)
    made = walk.g.build(Stage.INT8, graph.outputs)
    verify_graph(made)
    return made
