# SPDX-License-Identifier: Apache-2.0
"""What has to be known of Thumb instructions: how long they are, and which of them call."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence


def instruction_bytes(code: bytes, at: int) -> int:
    """2, or 4 where the Thumb instruction at ``at`` begins with 0b11101, 0b11110 or 0b11111."""
    return 4 if code[at + 1] >= 0xE8 else 2


def is_call(first: int, second: int) -> bool:
    """Whether the two halfwords are a ``bl``."""
    return first >> 11 == 0b11110 and second >> 14 == 0b11 and second >> 12 & 1 == 1


def call_target(at: int, first: int, second: int) -> int:
    """Where the ``bl`` at ``at`` goes."""
    sign = first >> 10 & 1
    high = (second >> 13 & 1) ^ sign ^ 1, (second >> 11 & 1) ^ sign ^ 1
    offset = high[0] << 23 | high[1] << 22 | (first & 0x3FF) << 12 | (second & 0x7FF) << 1
    return at + 4 + offset - (sign << 24)


def is_register_call(halfword: int) -> bool:
    """Whether it is a ``blx`` through a register."""
    return halfword & 0xFF87 == 0x4780


def is_register_jump(halfword: int) -> bool:
    """Whether it is a ``bx`` through a register other than the link register, which would be a return."""
    return halfword & 0xFF87 == 0x4700 and halfword >> 3 & 15 != 14


def call_before(code: bytes) -> int:
    """Bytes of the call that the four bytes of ``code`` end with: 4, 2, or 0 where they end with none."""
    first, second = struct.unpack("<HH", code)
    if is_call(first, second):
        return 4
    return 2 if is_register_call(second) else 0


def instructions(code: bytes, marks: Sequence[tuple[int, bool]]) -> Iterator[tuple[int, int, int]]:
    """Offset and both halfwords of each instruction; the second is 0 for a short one. ``marks``: from which offsets on
    there are instructions (True) or data, ascending."""
    ends = [at for at, _ in marks[1:]] + [len(code)]
    for (begin, executed), end in zip(marks, ends, strict=True):
        at = begin if executed else end
        while at + 2 <= end:
            size = instruction_bytes(code, at)
            first, *rest = struct.unpack_from(f"<{size // 2}H", code, at)
            yield at, first, rest[0] if rest else 0
            at += size
