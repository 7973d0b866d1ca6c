# SPDX-License-Identifier: Apache-2.0
"""What a graph is given and what it gives, as data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Interface:
    """Names of values. ``inputs`` is what a model looks at, ``outputs`` what it says; a training step also has the
    ``targets`` that its ``losses`` compare outputs with, and the learning ``rate``, which is "" elsewhere."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    targets: tuple[str, ...] = ()
    rate: str = ""
    losses: tuple[str, ...] = ()

    @property
    def given(self) -> tuple[str, ...]:
        """All that the caller gives."""
        return (*self.inputs, *self.targets, *((self.rate,) if self.rate else ()))

    @property
    def made(self) -> tuple[str, ...]:
        """All that the caller gets, and so exists to the end."""
        return (*self.outputs, *self.losses)
