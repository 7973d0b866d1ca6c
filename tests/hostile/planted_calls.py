# SPDX-License-Identifier: Apache-2.0
"""Libraries with one fault each, which a hostile caller must notice."""

from __future__ import annotations

import functools
import random
from pathlib import Path
from typing import Final

from hostile import calls
from hostile.calls import Model
from hostile.case import Attack, Kind, Place
from trainlet.toolchain import host

FAULTY: Final = {
    "too-many-rows": ("c->rows >= x->height", "c->rows > x->height + 1"),
    "short-blob": ("if (bytes < TL_BLOB_HEADER + m->state_bytes) return TL_BAD_SIZE;\n    if (get32", "if (get32"),
    "no-checksum": ("|| get32(blob + 16) != crc32(blob + TL_BLOB_HEADER, m->state_bytes))", ")"),
    "negative-label": ("label < 0 || ", ""),
    "reset-keeps-the-state": ("memset(c->state, 0, m->state_bytes);", ""),
    "odd-address": ("& 3u) return", "& 0u) return"),
    "refuses-too-late": ("if (status != TL_OK && status != TL_ZERO_GRADIENT) return status;\n    m->head(c);",
                         "m->head(c);\n    if (status != TL_OK && status != TL_ZERO_GRADIENT) return status;"),
}  # fmt: skip
"""Of each: a piece of model.c and what stands in its place."""

_WRONG: dict[str, Model] = {}
CALLS: Final = 60


def _prepare(fault: str, base: Path) -> None:
    sound, faulty = FAULTY[fault]
    sources = host.kernel_sources()
    assert sound in sources["model.c"], f"model.c has no {sound!r} any more; plant the fault anew"
    changed = {**sources, "model.c": sources["model.c"].replace(sound, faulty, 1)}
    model, real = _model(), host.kernel_sources
    host.kernel_sources = lambda: changed
    try:
        _WRONG[fault] = calls.with_library(model, host.NATIVE)
    finally:
        host.kernel_sources = real


@functools.cache
def _model() -> Model:
    return calls.models(host.NATIVE)[0]


def _make(fault: str, rng: random.Random, place: Place) -> Attack:
    return lambda: "".join(calls.attack(_WRONG[fault], rng, CALLS) for _ in range(5))


KINDS: Final = tuple(
    Kind(f"planted-{f}", functools.partial(_prepare, f), functools.partial(_make, f), compiles=True) for f in FAULTY
)
