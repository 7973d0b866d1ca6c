# SPDX-License-Identifier: Apache-2.0
"""Finds the first node that a device computes differently: both sides run again with a call behind every node, at which
what that node has written is compared.

Kernels, plan and order of the nodes stay what they are; only the emitted sequences of calls are compiled anew.
"""

from __future__ import annotations

import ctypes
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any, Final

from trainlet.emit import Compiled
from trainlet.emit.statement import label
from trainlet.ir import DepthFirst, Kind, Node
from trainlet.measure.validate import SEED, run_step, synthetic_step
from trainlet.session.host import HostSession
from trainlet.session.mailbox import DeviceSession
from trainlet.toolchain.targets import MIB, Pool, Target

_PROBE: Final = "tl_port_probe"
_DECLARED: Final = f"void {_PROBE}(const tl_context *c, int32_t point, int32_t row);\n"
_ROOM: Final = 4 * MIB  # of either memory: the added calls need flash and stack

Event = tuple[int, int, int]
"""Point, row of a depth-first run (-1: the whole node), CRC-32 of what was written."""

Make = Callable[[Compiled, Target], DeviceSession]


@dataclass(frozen=True)
class Probed:
    """A model with a call behind every node; ``points``: the nodes, "layer: operator", by the number that the call
    gives."""

    compiled: Compiled
    points: tuple[str, ...]


def instrument(compiled: Compiled) -> Probed:
    """The same model with the calls."""
    prefix, nodes = compiled.sources.prefix, compiled.sources.nodes
    lines = compiled.sources.files[f"{prefix}.c"].splitlines(keepends=True)
    for point, n in reversed([*enumerate(nodes)]):
        lines.insert(n.last, f"    {_PROBE}(c, {point}, {'y' if n.by_row else '-1'});\n")
    text = "".join(lines).replace(f'#include "{prefix}_data.h"\n', f'#include "{prefix}_data.h"\n{_DECLARED}', 1)
    probe = (resources.files("trainlet") / "csrc" / "emulator" / "probe.c").read_text()
    files = {**compiled.sources.files, f"{prefix}.c": text, "probe.c": probe}
    points = tuple(n.label for n in nodes)
    return Probed(replace(compiled, sources=replace(compiled.sources, files=files)), points)


# --- what a node has written ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes of the arena or the state; ``ring``: rows that there are at once, 0 where it is no stack of rows."""

    place: str
    at: int
    nbytes: int
    ring: int = 0
    row_bytes: int = 0

    def of(self, row: int) -> tuple[str, int, int]:
        """Place, offset and size of that row; of all where it is -1."""
        if row < 0 or not self.ring:
            return self.place, self.at, self.nbytes
        return self.place, self.at + row % self.ring * self.row_bytes, self.row_bytes


def written(compiled: Compiled) -> dict[str, list[Piece]]:
    """What the nodes write, by "layer: operator"; nodes of the same layer and operator share an entry."""
    found: defaultdict[str, list[Piece]] = defaultdict(list)
    flat = compiled.graph.flat()
    for n in (*flat.nodes, *(n for n in compiled.graph.nodes if isinstance(n.attrs, DepthFirst))):
        found[label(n)] += _pieces(compiled, flat.values, n)
    return dict(found)


def _pieces(compiled: Compiled, values: Any, node: Node) -> Iterator[Piece]:
    for name in node.outputs:
        v = values[name]
        if v.exponent is not None:
            yield Piece("exponent", 2 * v.exponent, 2)
        if v.kind is not Kind.ACTIVATION or name not in compiled.plan.offsets:
            continue
        place = compiled.plan.places[name]
        rows = place.ring if len(v.shape) == 3 else 0
        yield Piece("arena", place.offset, v.nbytes, rows, v.nbytes // v.shape[0] if rows else 0)
    for name in node.writes:
        yield Piece("state", compiled.layout.offsets[name], values[name].nbytes)


# --- running ----------------------------------------------------------------------------------------------------


class _Recorder:
    """Digests of what each node has written, in the order of execution."""

    def __init__(self, probed: Probed, read: Callable[[str, int, int], bytes]) -> None:
        table = written(probed.compiled)
        self._pieces = [table[p] for p in probed.points]
        self._read = read
        self.events: list[Event] = []

    def reached(self, point: int, row: int) -> None:
        row = row - (1 << 32) if row >> 31 == 1 else row
        crc = 0
        for piece in self._pieces[point]:
            crc = zlib.crc32(self._read(*piece.of(row)), crc)
        self.events.append((point, row, crc))


class _Host(HostSession):
    """The host's session with a recorder behind every node."""

    def record(self, probed: Probed) -> _Recorder:
        recorder = _Recorder(probed, self._piece)
        self._callback = ctypes.CFUNCTYPE(None, ctypes.c_int32, ctypes.c_int32)(recorder.reached)
        self._hook(ctypes.cast(self._callback, ctypes.c_void_p).value)
        return recorder

    def forget(self) -> None:
        """Takes the recorder away: another session of this program gets the same library, and would call it."""
        self._hook(None)

    def _hook(self, address: int | None) -> None:
        ctypes.c_void_p.in_dll(self._lib, f"{_PROBE}_hook").value = address

    def _piece(self, place: str, at: int, nbytes: int) -> bytes:
        if place == "exponent":
            return self._exponents[at // 2 : (at + nbytes) // 2].tobytes()
        return (self._arena if place == "arena" else self._state)[at : at + nbytes].tobytes()


def roomy(target: Target) -> Target:
    """The same core with memory for more code than the target may have room for."""
    sram = max(_ROOM, target.sram_bytes)
    return replace(target, flash_bytes=max(_ROOM, target.flash_bytes), pools=(Pool("SRAM", sram),))


def first_difference(compiled: Compiled, make: Make, target: Target, shape: tuple[int, ...], step: int) -> str:
    """The node, "layer: operator", whose output differs first between the host and the device that ``make`` gives, in
    step ``step`` of a validation or in the inference after it; "" where none does."""
    probed = instrument(compiled)
    host, device = _Host(probed.compiled), make(probed.compiled, roomy(target))
    try:
        for session in (host, device):
            session.reset(SEED)
            for t in range(step):
                run_step(session, *synthetic_step(shape, t, host.classes))
        records = host.record(probed), _Recorder(probed, device.memory)
        device.watch(_PROBE, records[1].reached)
        for session in (host, device):
            run_step(session, *synthetic_step(shape, step, host.classes))
    finally:
        host.forget()
        device.close()
    return _first(probed.points, *(r.events for r in records))


def _first(points: Sequence[str], mine: Sequence[Event], other: Sequence[Event]) -> str:
    for a, b in zip(mine, other, strict=False):
        if a != b:
            row = f", row {a[1]}" if a[1] >= 0 else ""
            return points[a[0]] + row
    if len(mine) == len(other):
        return ""
    longer = mine if len(mine) > len(other) else other
    return f"{points[longer[min(len(mine), len(other))][0]]}, which only one of them reached"
