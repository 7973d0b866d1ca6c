# SPDX-License-Identifier: Apache-2.0
"""One pass over a graph in progress: what the operators of the reference read and write besides their inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from trainlet.errors import MismatchError
from trainlet.ir import Bound, Graph, Node, QParams
from trainlet.ops import MaskFrom, SelectChannels
from trainlet.reference.arithmetic import Tensor, key
from trainlet.reference.rounding import Rounding, Sums

REAL_UNITS: Final = QParams(1.0, 0)


@dataclass
class Run:
    """``values`` holds what is known so far by name, states included; a write replaces its entry and never the array,
    so that a step that is refused has changed nothing. ``exponents`` is the run-time exponent table, ``sums`` what the
    values that are sums of gradients are worth, as their makers know it."""

    graph: Graph
    rounding: Rounding
    seed: int
    step: int
    values: dict[str, Tensor]
    exponents: dict[int, int] = field(default_factory=dict)
    sums: dict[str, Sums] = field(default_factory=dict)
    anchor: int = 0
    saturated: int = 0
    rounded: int = 0
    zero_gradient: bool = False

    def key(self, site: int) -> int:
        """The key of the rounding ``site`` in this step."""
        return key(self.seed, self.step, site & 0xFFFFFFFF)

    def q(self, name: str) -> QParams:
        """Scale and zero point of an activation; a selection of channels has those of its input."""
        v = self.graph.values[name]
        if v.q is not None:
            return v.q
        if v.dtype != "s8":
            return REAL_UNITS
        maker = self.graph.producer(name)
        if maker is None or not isinstance(maker.attrs, SelectChannels):
            raise ValueError(f"{name!r} is s8 and has no scale and zero point")
        return self.q(maker["x"])

    def made_sums(self, node: Node, sums: Sums) -> tuple[Tensor, ...]:
        """The output of a node that makes sums, which whatever rounds them will look up."""
        self.sums[node.output] = sums
        return (sums.acc,)

    def exponent(self, name: str) -> int:
        """The exponent of a gradient, or of sums made from one; 0 for reals."""
        slot = self.graph.values[name].exponent
        return 0 if slot is None else self.exponents[slot]

    def set_exponent(self, name: str, e: int) -> None:
        """Enters the exponent of a gradient into the table."""
        slot = self.graph.values[name].exponent
        if slot is not None:
            self.exponents[slot] = e

    def count(self, elements: int, saturated: int) -> None:
        """Adds to the statistics of rounded gradients."""
        self.rounded += elements
        self.saturated += saturated


Op = Callable[[Run, Node, Bound[Tensor]], tuple[Tensor, ...]]
"""The meaning of an operator: its operands to outputs in the order of ``node.outputs``."""


def mask_of(source: Tensor, kind: MaskFrom, clamp: tuple[float, float] | None) -> Tensor:
    """True where a gradient passes; ``source`` holds the bits or the stored output."""
    if kind == "bits":
        return source.astype(bool)
    if clamp is None:
        raise ValueError("a mask by value has two bounds")
    return np.asarray((clamp[0] < source) & (source < clamp[1]))


def need_finite(node: Node, what: str, v: Tensor) -> None:
    """MismatchError unless all of ``v`` is finite."""
    if not np.isfinite(v).all():
        raise MismatchError(
            f"{node.layer}: {what} is not a finite number, so the step is refused and nothing has changed; "
            "train with a smaller learning rate from the last saved state"
        )
