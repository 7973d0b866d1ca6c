# SPDX-License-Identifier: Apache-2.0
"""Trains on a device and evaluates here: an inference gives the same bytes in both places, and here it is fast."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from trainlet.ir import Image
from trainlet.session import Inputs, Session, StepInfo, Targets


class MixedSession:
    """Every training step runs whole on ``device``, so that what it costs is measured; ``host`` only infers, from the
    state that the device has. No prefix is handed out."""

    def __init__(self, device: Session, host: Session) -> None:
        self._device, self._host = device, host
        self.arena_bytes, self.state_bytes = device.arena_bytes, device.state_bytes
        self.classes, self.model_hash = device.classes, device.model_hash
        self._changed = True

    def reset(self, seed: int) -> None:
        self._changed = True
        self._device.reset(seed)

    def infer(self, inputs: Inputs) -> NDArray[np.float32]:
        if self._changed:
            self._host.load_state(self._device.state())
            self._changed = False
        return self._host.infer(inputs)

    def train_step(self, inputs: Inputs, targets: Targets, lr: float) -> StepInfo:
        self._changed = True
        return self._device.train_step(inputs, targets, lr)

    def prefix(self, image: Image) -> bytes:
        return b""

    def infer_cached(self, prefix: bytes) -> NDArray[np.float32]:
        return self._device.infer_cached(prefix)

    def train_step_cached(self, prefix: bytes, label: int, lr: float) -> StepInfo:
        self._changed = True
        return self._device.train_step_cached(prefix, label, lr)

    def state(self) -> dict[str, NDArray[np.generic]]:
        return self._device.state()

    def load_state(self, state: Mapping[str, NDArray[np.generic]]) -> None:
        self._changed = True
        self._device.load_state(state)
