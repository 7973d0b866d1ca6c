# SPDX-License-Identifier: Apache-2.0
"""Instances that the tests of selectors share: a model with the shapes of MCUNet-5FPS, the contributions that its
authors' curve shows, and brute force over small models."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from itertools import product

from graphs import int8_chain
from random_nets import NAMED, Net

from trainlet.autodiff.scheme import trainable_layers
from trainlet.frontends import attach_head
from trainlet.ir.graph import Graph
from trainlet.select.cuts import Progress, SearchLimit, Selector, depths, make_choice, options
from trainlet.select.evolution import Settings, evolution
from trainlet.select.freeze import Tell, freeze
from trainlet.select.problem import RATIOS, Choice, Contributions, Selection, Trained

FEW = Settings(population=24, generations=20, parents=8)
few_evolution: Selector = partial(evolution, settings=FEW)
"""Evolution, as long as models of a few layers need."""

# expanded channels, depthwise kernel, stride, channels out; the first block has no expansion
_BLOCKS = (
    (0, 3, 1, 8), (32, 3, 2, 16), (48, 3, 1, 16), (48, 7, 2, 24), (120, 3, 1, 24), (120, 3, 2, 40), (160, 7, 1, 40),
    (160, 5, 1, 48), (144, 3, 1, 48), (192, 3, 1, 48), (240, 7, 2, 96), (384, 5, 1, 96), (384, 5, 1, 96),
    (576, 3, 1, 160),
)  # fmt: skip

# convolution -> what training 1/8, 1/4, 1/2 and all of its input channels adds, in percent, off the published curve
CURVE = {
    21: (1.2, 2.5, 3.3, 5.5), 24: (1.0, 2.2, 3.7, 6.5), 27: (1.6, 3.6, 5.7, 8.4), 30: (2.2, 3.7, 6.1, 9.3),
    33: (2.2, 3.6, 6.0, 8.0), 36: (2.3, 3.9, 5.5, 8.8), 39: (3.0, 6.2, 10.2, 13.7),
}  # fmt: skip


@cache
def mcunet() -> Graph:
    """MCUNet-5FPS by its shapes, with other weights and a head of 10 classes."""
    net = Net((128, 128, 3), name="mcunet")
    x = net.conv(net.input, 16, (3, 3), stride=(2, 2), pads=(1, 1, 1, 1), activation=True)
    for expanded, k, stride, out in _BLOCKS:
        y = net.conv(x, expanded, activation=True) if expanded else x
        pad = k // 2
        c = net.shape(y)[2]
        y = net.conv(
            y, c, (k, k), stride=(stride, stride), pads=(pad, pad, pad, pad), groups=c, activation=True
        )  # fmt: skip
        y = net.conv(y, out)
        x = net.add(x, y) if net.shape(x) == net.shape(y) else y
    return net.finish(x, 10)


def on_curve(graph: Graph, *bias_depths: int, bits: int = 8) -> Contributions:
    """The curve's contributions for ``graph``, which has MCUNet's layers; biases add nothing at these depths."""
    layers = tuple(trainable_layers(graph))
    weights = {(layers[i], r): g for i, gains in CURVE.items() for r, g in zip(RATIOS, gains, strict=True)}
    return Contributions("mcunet-5fps", bits, layers, dict.fromkeys(bias_depths, 0.0), weights)


@cache
def small(name: str) -> Graph:
    """A model of few layers."""
    return attach_head(int8_chain(), 4) if name == "chain" else NAMED[name]()[1]


SMALL = ("chain", "add_with_activation", "add_is_first", "twice", "activation_before_pool", "dilated_groups")


def drawn(graph: Graph, gains: Iterable[float], bits: int = 8, first: int = 0) -> Contributions:
    """Contributions of all depths and of all layers at all ratios; ``gains`` are used in turn. The ``first`` layers
    have none."""
    layers = tuple(trainable_layers(graph))
    take = iter(list(gains) * 1000)
    biases = {0: 0.0} | {k: next(take) for k in range(1, len(layers) + 1 - first)}
    weights = {(layer, r): next(take) for layer in layers[first:] for r in RATIOS}
    return Contributions(graph.name, bits, layers, biases, weights)


def freezing(
    contributions: Contributions,
    limit: SearchLimit,
    max_drop: float | None,
    *,
    loss: Callable[[Choice], float] = lambda choice: 5 - choice.value,
    asked: list[Choice] | None = None,
    tell: Tell = lambda step: None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Selection:
    """Freezing, with a formula instead of training: ``loss``, and an accuracy that falls with it. ``asked`` gets what
    was trained."""

    def train(choices: Sequence[Choice], left: int) -> list[Trained]:
        if asked is not None:
            asked.extend(choices)
        return [Trained(v, 0.0 if math.isinf(v) else 0.91 - v / 10, 0.0) for v in map(loss, choices)]

    return freeze(contributions, limit, train=train, max_drop=max_drop, tell=tell)


def every_choice(contributions: Contributions, limit: SearchLimit) -> Iterator[Choice]:
    """All choices, whether or not they fit."""
    for depth in depths(contributions):
        found = options(contributions, limit, depth, harmful=True)
        ways = ([(layer, 0.0), *((layer, r) for r, _ in rows)] for layer, rows in found.items())
        for picked in product(*ways):
            yield make_choice(contributions, depth, {layer: r for layer, r in picked if r})
