# SPDX-License-Identifier: Apache-2.0
"""What a selection is made from and what comes out: measured contributions, a choice, its scheme, and limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

from trainlet.autodiff.scheme import UpdateScheme

RATIOS: Final = (0.125, 0.25, 0.5, 1.0)


@dataclass(frozen=True)
class Contributions:
    """What training adds, as held-out loss that it takes away (more is better). ``layers``: all trainable layers, in
    the order of the model. ``biases``: by depth k, training the biases of the last k layers, over the head alone, which
    is depth 0 and has value 0. ``weights``: by (layer, ratio), training that share of the layer's input channels, over
    the biases alone. ``bits``: of a trained weight. ``noise``: standard deviation of one figure, where runs were
    repeated."""

    model: str
    bits: int
    layers: tuple[str, ...]
    biases: Mapping[int, float]
    weights: Mapping[tuple[str, float], float]
    noise: float = 0.0


@dataclass(frozen=True)
class Choice:
    """The biases of the last ``depth`` layers, and weights of some of these: layer -> ratio. ``value`` is the sum of
    its contributions."""

    depth: int
    weights: Mapping[str, float] = field(default_factory=dict)
    bits: int = 8
    value: float = 0.0

    @property
    def key(self) -> tuple[int, int, tuple[tuple[str, float], ...]]:
        """Equal for equal programs; bits are those of trained weights."""
        return self.depth, self.bits if self.weights else 8, tuple(sorted(self.weights.items()))

    def scheme(self, layers: tuple[str, ...], name: str) -> UpdateScheme:
        """As an UpdateScheme of a model with these trainable layers."""
        return UpdateScheme(name, layers[len(layers) - self.depth :], dict(self.weights), self.bits)


@dataclass(frozen=True)
class Trained:
    """What training a choice came to, over the images that judge it: ``loss``, infinite where it diverged, and
    ``accuracy``, 0 to 1, each a mean over seeds; ``spread``: standard deviation of the accuracy over them."""

    loss: float
    accuracy: float
    spread: float


@dataclass(frozen=True)
class Frozen:
    """A step of freezing: the ``part`` that was frozen, empty for the start, the ``choice`` that was left, what it came
    to when it was trained, and its ``cost`` in bytes."""

    part: str
    choice: Choice
    trained: Trained
    cost: int


class Limit(Protocol):
    """What a choice may cost."""

    def cost(self, choice: Choice) -> int:
        """Bytes of the choice."""

    @property
    def most(self) -> int:
        """Bytes that there are."""


@dataclass(frozen=True)
class Selection:
    """What a selector returns: the choice, what it costs, and how good it is known to be. ``bound``: no choice under
    the limit can have a higher value, where the selector can tell; ``evaluations``: how many choices it has looked
    at; ``course``: of freezing, from the start to the choice."""

    choice: Choice
    cost: int
    method: str
    evaluations: int
    bound: float | None = None
    course: tuple[Frozen, ...] = ()

    @property
    def trained(self) -> Trained | None:
        """What training the choice came to; None of a selector that does not train."""
        return self.course[-1].trained if self.course else None
