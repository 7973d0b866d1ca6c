# SPDX-License-Identifier: Apache-2.0
"""The types of elements: how many bits one takes, how numpy and C hold it, which numbers it may be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class DType:
    """``bits`` of one element in memory; ``numpy`` and ``ctype`` hold it, packed types one to an element there;
    integers lie within ``low`` .. ``high``, which are None for reals."""

    name: str
    bits: int
    numpy: str
    ctype: str
    low: int | None
    high: int | None


DTYPES: Final = {
    t.name: t
    for t in (
        DType("b1", 1, "u1", "uint8_t", 0, 1),  # a packed mask bit
        DType("s4", 4, "i1", "uint8_t", -8, 7),  # a packed nibble
        DType("s8", 8, "i1", "int8_t", -(1 << 7), (1 << 7) - 1),
        DType("s16", 16, "i2", "int16_t", -(1 << 15), (1 << 15) - 1),
        DType("u16", 16, "u2", "uint16_t", 0, (1 << 16) - 1),
        DType("s32", 32, "i4", "int32_t", -(1 << 31), (1 << 31) - 1),
        DType("f32", 32, "f4", "float", None, None),
    )
}


def dtype_bits(dtype: str) -> int:
    """Bits of one element."""
    return DTYPES[dtype].bits
