# SPDX-License-Identifier: Apache-2.0
"""The memory that a program may take, read once, where it comes in."""

from __future__ import annotations

from dataclasses import dataclass

from trainlet.errors import UsageError
from trainlet.toolchain.targets import Target, parse_size, with_limits

Size = int | str
"""Bytes, or a text such as 128K (1024 bytes each)."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes, or None for as much as the chip has. ``sram`` is all of it: arena, trained state, what else the program
    keeps, and the stack. ``flash`` is all that is loaded."""

    sram: int | None = None
    flash: int | None = None

    @classmethod
    def parse(cls, sram: Size | None = None, flash: Size | None = None) -> Budget:
        """From what a user gives; UsageError where that is no size."""
        return cls(_bytes(sram, "--sram"), _bytes(flash, "--flash"))

    def cut(self, target: Target) -> Target:
        """The target with this much memory. UsageError where it has less, or where that is no multiple of 1 KiB."""
        return with_limits(target, self.sram, self.flash)


def _bytes(size: object, option: str) -> int | None:
    if size is None or isinstance(size, str):
        return None if size is None else parse_size(size, option)
    if isinstance(size, bool) or not isinstance(size, int) or size <= 0:
        raise UsageError(f"{option} {size!r:.40}: give a size such as 320K, 1M or 262144")
    return size
