# SPDX-License-Identifier: Apache-2.0
"""One interface for everything that runs a compiled model: the host library, an emulated chip, a board."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from trainlet.ir import Image

Inputs = Image | Mapping[str, NDArray[np.generic]]
"""An image, int8 (H, W, C); or the array of each input by its name in the graph's interface."""
Targets = int | Mapping[str, NDArray[np.generic]]
"""The number of a class; or the array of each target by its name."""


@dataclass(frozen=True, slots=True)
class StepInfo:
    """What one training step reports: the loss and the prediction *before* its update, and the share of rounded
    gradient elements that met the clamp."""

    loss: float
    prediction: int
    saturated: float


class Session(Protocol):
    """Runs one compiled model. Images are int8 (H, W, C), q = pixel - 128 for the published checkpoints.

    A session with a frozen prefix can hand out what the prefix computed (``prefix``), so that an epoch over the same
    images need not compute it again; the bytes are the same."""

    arena_bytes: int
    state_bytes: int
    classes: int
    model_hash: str

    def reset(self, seed: int) -> None:
        """Factory weights, the model's own head or a random one from ``seed``, step 0."""

    def infer(self, inputs: Inputs) -> NDArray[np.float32]:
        """Logits, (classes,). ``inputs`` is the image, or a mapping from the name of each input to its array."""

    def train_step(self, inputs: Inputs, targets: Targets, lr: float) -> StepInfo:
        """One step of SGD at batch 1 with the rate ``lr`` (per image, in real units). ``targets`` is the class, from 0,
        or a mapping from the name of each target to its array. Raises UsageError (inputs, targets, lr) or MismatchError
        (a number that is not finite); nothing has changed then."""

    def prefix(self, image: Image) -> bytes:
        """What the frozen prefix leaves in the arena for ``image``; empty bytes where there is no frozen prefix."""

    def infer_cached(self, prefix: bytes) -> NDArray[np.float32]:
        """``infer`` from a stored prefix."""

    def train_step_cached(self, prefix: bytes, label: int, lr: float) -> StepInfo:
        """``train_step`` from a stored prefix."""

    def state(self) -> dict[str, NDArray[np.generic]]:
        """The trained state as named arrays (see docs/layout.md): conv.21.weight (int32, the full form F = w 2^L + l),
        conv.21.channels, conv.21.bias, head.weight, head.bias, rho, seed, step."""

    def load_state(self, state: Mapping[str, NDArray[np.generic]]) -> None:
        """Restores what ``state`` gave; UsageError where names, shapes or types are of another model or scheme."""
