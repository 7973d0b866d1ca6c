# SPDX-License-Identifier: Apache-2.0
"""Contributions without training runs: squared gradients over a few images, by the engine itself.

One step of a scheme that trains everything, from factory weights behind a trained head, moves each parameter by
-lr x gradient; with 8 fraction bits, and rounded without bias, what it moved by is the gradient. Two scores come from
these, both in squared float32 units and summed over the parameters that a choice trains: ``fisher``, the mean square of
an image's gradient, and ``descent``, the square of the mean gradient, which is what a small step along it takes from
the loss. They rank; they are no losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from trainlet.autodiff.scheme import UpdateScheme, selected_channels, trainable_layers
from trainlet.compiler import compile_model
from trainlet.errors import UsageError
from trainlet.ir import Graph, Node
from trainlet.ops import Conv2d
from trainlet.select.problem import RATIOS, Contributions
from trainlet.select.runs import Part, Place, Study, check_data, feed, open_job, train
from trainlet.select.store import Result, Spec
from trainlet.session.host import HostSession

ESTIMATORS: Final = ("fisher", "descent")
BITS: Final = 16
LR: Final = 2.0**-7
"""Of the one step: large enough that a gradient is many units of a weight, small enough that few clip."""
_SETTLE: Final = 4  # steps at rate 0, after which the exponents of gradients have found their place

Floats = NDArray[np.float64]


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation, equal values at the mean of their ranks. ValueError for fewer than 2 pairs; 0 where one side is
    all equal."""
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(f"{len(a)} and {len(b)} values: two sequences of one length, 2 or more, are ranked")
    x, y = (_ranks(np.asarray(v, np.float64)) for v in (a, b))
    x, y = x - x.mean(), y - y.mean()
    norm = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / norm if norm else 0.0


def _ranks(v: Floats) -> Floats:
    _, inverse, counts = np.unique(v, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: Floats = (last - (counts - 1) / 2)[inverse]
    return ranks


# --- the job ----------------------------------------------------------------------------------------------------


@dataclass
class _Moments:
    """Sums over images of a gradient and of its square."""

    first: Floats
    second: Floats

    def add(self, g: Floats) -> None:
        self.first += g
        self.second += g * g

    def scores(self, n: int, chosen: NDArray[np.uint16] | None = None, axis: int = 0) -> dict[str, float]:
        """Of the parameters at ``chosen`` along ``axis``, or of all; ``descent`` without the bias that the spread
        between images gives to the square of a mean, so it may be below 0."""
        first, second = (a if chosen is None else np.take(a, chosen, axis) for a in (self.first, self.second))
        unbiased = (first * first - second).sum() / (n * (n - 1))
        return {"fisher": float(second.sum() / n), "descent": float(unbiased)}


class _Layer:
    """One convolution of a session that trains all of it: what its state's integers are worth, and their moments."""

    def __init__(self, graph: Graph, node: Node) -> None:
        assert isinstance(node.attrs, Conv2d)
        self.weight, self.bias = f"{node.name}.weight", node["bias"]
        self.kernel = graph.data[node["weight"]]
        self.depthwise = node.attrs.depthwise
        scale = graph.data[node["scale"]].astype(np.float64)
        q = graph.values[node["x"]].q
        assert q is not None
        # a weight's unit over its fraction bits; a bias is in units of s_w s_x
        self.unit = (scale / (1 << BITS - 8)).reshape(-1, *[1] * (self.kernel.ndim - 1))
        self.bias_unit = scale * q.scale
        self.weights = _Moments(np.zeros(self.kernel.shape), np.zeros(self.kernel.shape))
        self.biases = _Moments(np.zeros(len(scale)), np.zeros(len(scale)))

    def add(self, before: Mapping[str, NDArray[Any]], after: Mapping[str, NDArray[Any]]) -> None:
        for name, unit, moments in (
            (self.weight, self.unit, self.weights),
            (self.bias, self.bias_unit, self.biases),
        ):
            moments.add((before[name] - after[name].astype(np.float64)) * unit / LR)

    def scores(self, n: int) -> dict[str, Any]:
        axis = 0 if self.depthwise else self.kernel.ndim - 1
        weights = {}
        for ratio in RATIOS:
            if int(ratio * self.kernel.shape[axis]) < 1:
                continue
            channels = selected_channels(self.kernel, ratio, axis=0 if self.depthwise else 3)
            weights[str(ratio)] = self.weights.scores(n, channels, axis)
        return {"bias": self.biases.scores(n), "weight": weights}


def gradient_job(place: Place, spec: Spec) -> Result:
    """Trains the head alone, then takes the gradients of all parameters for ``count`` images. Its result: ``layers``,
    by layer ``bias`` and, by ratio, ``weight``, each with both scores."""
    graph, fit, _ = open_job(place, spec)
    alone = HostSession(compile_model(graph, UpdateScheme("head")))
    train(feed(alone, fit, place, spec), spec)
    layers = trainable_layers(graph)
    everything = UpdateScheme("full", tuple(layers), dict.fromkeys(layers, 1.0), BITS)
    session = HostSession(compile_model(graph, everything))
    session.reset(spec["seed"])
    head = {k: v for k, v in alone.state().items() if k.startswith("head.")}
    count = min(spec["count"], len(fit.indices))
    if count < 2:
        raise UsageError(f"{count} image for gradients: give at least 2")
    chosen = np.linspace(0, len(fit.indices) - 1, count).astype(np.int64)
    found = {name: _Layer(graph, node) for name, node in layers.items()}
    _accumulate(session, fit, chosen, head, list(found.values()))
    check_data(place, spec)
    return {"layers": {name: layer.scores(count) for name, layer in found.items()}}


def _accumulate(
    session: HostSession,
    fit: Part,
    chosen: NDArray[np.int64],
    head: Mapping[str, NDArray[np.generic]],
    layers: Sequence[_Layer],
) -> None:
    """Adds the gradient of each chosen image to the moments of all layers."""
    session.load_state({**session.state(), **head})
    for i in chosen[:_SETTLE].tolist():
        session.train_step(fit.image(i), int(fit.labels[i]), 0.0)
    before = session.state()
    for n, i in enumerate(chosen.tolist()):
        session.load_state({**before, "step": np.array([n], np.uint32)})  # other random words for each image
        session.train_step(fit.image(i), int(fit.labels[i]), LR)
        after = session.state()
        for layer in layers:
            layer.add(before, after)


# --- what comes of it -------------------------------------------------------------------------------------------


def cheap_contributions(study: Study, result: Result, bits: int, estimator: str = "fisher") -> Contributions:
    """The scores of a ``gradient_job`` in the form of contributions: of the biases summed over the last layers, of the
    weights each by itself. ``estimator`` is one of ESTIMATORS."""
    layers: Mapping[str, Any] = result["layers"]
    names = tuple(trainable_layers(study.graph))
    biases, total = {0: 0.0}, 0.0
    for depth, name in enumerate(reversed(names), 1):
        total += layers[name]["bias"][estimator]
        biases[depth] = total
    weights = {(n, float(r)): s[estimator] for n in names for r, s in layers[n]["weight"].items()}
    return Contributions(study.graph.name, bits, names, biases, weights)


def agreement(measured: Contributions, cheap: Contributions) -> dict[str, float | None]:
    """Rank correlation of cheap and measured contributions over what both have: ``biases``, ``weights`` and, among the
    latter, ``weights_whole`` at ratio 1; None where there are fewer than 3 to compare."""
    groups = {
        "biases": [(v, cheap.biases[k]) for k, v in measured.biases.items() if k and k in cheap.biases],
        "weights": [(v, cheap.weights[k]) for k, v in measured.weights.items() if k in cheap.weights],
        "weights_whole": [
            (v, cheap.weights[k]) for k, v in measured.weights.items() if k[1] == 1 and k in cheap.weights
        ],
    }
    return {
        name: spearman([a for a, _ in pairs], [b for _, b in pairs]) if len(pairs) >= 3 else None
        for name, pairs in groups.items()
    }
