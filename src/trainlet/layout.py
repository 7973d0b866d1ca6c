# SPDX-License-Identifier: Apache-2.0
"""Where the trained state lies in its block of SRAM: seed and step, then every state value, widest type first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from trainlet.ir import Graph, Value
from trainlet.ops import dtype_bits

HEADER_BYTES = 8  # uint32 seed, uint32 step


@dataclass(frozen=True)
class StateLayout:
    """Byte offsets by state value, and the size of the whole block (a multiple of 4)."""

    offsets: Mapping[str, int]
    nbytes: int


def state_layout(graph: Graph) -> StateLayout:
    """Lays out the states of a TRAIN or LOWERED graph; packed nibbles begin at a byte."""
    offsets: dict[str, int] = {}
    at = HEADER_BYTES
    for v in sorted(graph.states(), key=_width):
        offsets[v.name] = at
        at += v.nbytes
    return StateLayout(offsets, (at + 3) // 4 * 4)


def _width(v: Value) -> int:
    return -max(dtype_bits(v.dtype), 8)
