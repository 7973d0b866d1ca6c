# SPDX-License-Identifier: Apache-2.0
"""Where a tensor lies: one record says it for every kind of memory, for rings of rows and for vectors that stand for
all pixels."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from trainlet.ir import Value


class Pool(StrEnum):
    """A memory that tensors lie in."""

    ARENA = "arena"  # SRAM that is shared over the step
    STATE = "state"  # SRAM that outlives it


@dataclass(frozen=True, slots=True)
class Place:
    """``offset`` bytes from the begin of ``pool``, in the block named ``buffer``, which several tensors may share. The
    element (y, x, c) of a map lies (y % ring) * row + x * pixel + c elements behind; ``pixel`` and ``row`` are 0 where
    one vector stands for all pixels, and for what is no map."""

    pool: Pool
    buffer: str
    offset: int
    pixel: int
    row: int
    ring: int


def place_of(v: Value, pool: Pool, buffer: str, offset: int, ring: int | None = None) -> Place:
    """The place of ``v`` at ``offset``; ``ring`` is how many of its rows there are at once, all if not given."""
    if len(v.shape) != 3 or is_vector(v):
        return Place(pool, buffer, offset, 0, 0, 1)
    h, w, c = v.shape
    return Place(pool, buffer, offset, c, w * c, h if ring is None else ring)


def is_vector(v: Value) -> bool:
    """Whether ``v`` is a gradient that is the same for all pixels, and stored once."""
    return v.exponent is not None and v.shape[:2] == (1, 1)
