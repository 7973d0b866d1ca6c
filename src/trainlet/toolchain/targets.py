# SPDX-License-Identifier: Apache-2.0
"""Chips as data: memory, core and compiler flags. One list of names, used everywhere."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Final

from trainlet.errors import UsageError

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GRAIN: Final = KIB
"""Limits are multiples of this: the smallest piece of memory that can be mapped."""


@dataclass(frozen=True, slots=True)
class Pool:
    """A piece of SRAM, in bytes; the pools of a target follow each other without a gap."""

    name: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Target:
    """A chip. Addresses and sizes are in bytes; ``flags`` choose the core and its FPU for GCC. ``fpu`` says whether
    single-precision arithmetic is in hardware."""

    name: str
    core: str
    mhz: int
    flash_base: int
    flash_bytes: int
    sram_base: int
    pools: tuple[Pool, ...]
    flags: tuple[str, ...]
    fpu: bool
    about: str

    @property
    def sram_bytes(self) -> int:
        """All pools together."""
        return sum(p.nbytes for p in self.pools)


@dataclass(frozen=True, slots=True)
class Host:
    """This machine, and any other: plain C99 that its compiler makes the best of."""

    core: str = "host"


HOST: Final = Host()

_M7 = ("-mcpu=cortex-m7", "-mthumb", "-mfpu=fpv5-sp-d16", "-mfloat-abi=hard")
_M4F = ("-mcpu=cortex-m4", "-mthumb", "-mfpu=fpv4-sp-d16", "-mfloat-abi=hard")
_M0 = ("-mcpu=cortex-m0plus", "-mthumb", "-mfloat-abi=soft")
_SRAM = 0x20000000

TARGETS: Final = {
    t.name: t
    for t in (
        Target(
            "stm32f746", "cortex-m7", 216, 0x08000000, MIB, _SRAM,
            (Pool("DTCM", 64 * KIB), Pool("SRAM1", 240 * KIB), Pool("SRAM2", 16 * KIB)),
            _M7, True, "ST STM32F746, single-precision FPU",
        ),
        Target(
            "nrf52840", "cortex-m4", 64, 0x00000000, MIB, _SRAM,
            (Pool("RAM", 256 * KIB),), _M4F, True, "Nordic nRF52840, single-precision FPU",
        ),
        Target(
            "nrf52832", "cortex-m4", 64, 0x00000000, 512 * KIB, _SRAM,
            (Pool("RAM", 64 * KIB),), _M4F, True, "Nordic nRF52832, single-precision FPU",
        ),
        Target(
            "rp2040", "cortex-m0plus", 133, 0x10000000, 2 * MIB, _SRAM,
            (Pool("SRAM0-3", 256 * KIB), Pool("SRAM4", 4 * KIB), Pool("SRAM5", 4 * KIB)),
            _M0, False, "Raspberry Pi RP2040 with 2 MB of flash, no FPU",
        ),
        Target(
            "lab", "cortex-m7", 216, 0x08000000, 16 * MIB, _SRAM,
            (Pool("SRAM", 16 * MIB),), _M7, True, "no chip: a Cortex-M7 with room for what fits nowhere",
        ),
    )
}  # fmt: skip

DEFAULT_TARGET: Final = {"cortex-m7": "stm32f746", "cortex-m4": "nrf52840", "cortex-m0plus": "rp2040"}
"""What ``--on CORE`` runs on where no target is named."""

_MOST: Final = 1_000_000_000_000
_COUNTS: Final = {"": 1, "K": 1_000, "M": 1_000_000, "G": 1_000_000_000}
_UNITS: Final = {"": 1, "K": KIB, "M": MIB}


def find_target(name: str) -> Target:
    """The target of that name; UsageError lists the names."""
    if name not in TARGETS:
        raise UsageError(f"--target {name!r}: unknown; choose one of {', '.join(TARGETS)}")
    return TARGETS[name]


def parse_size(text: str, option: str = "--sram") -> int:
    """Bytes: a whole number with K, KB, KiB (1024 bytes), M, MB, MiB or nothing behind it."""
    found = re.fullmatch(r"\s*([0-9]{1,12})\s*([KM]?)(?:I?B)?\s*", text.upper())
    if not found or not int(found[1]):
        raise UsageError(f"{option} {text!r}: give a size such as 320K, 1M or 262144")
    return int(found[1]) * _UNITS[found[2]]


def parse_count(text: str, option: str) -> int:
    """A whole number with K, M, G (thousands, millions, billions) or nothing behind it."""
    found = re.fullmatch(r"\s*([0-9]{1,12})\s*([KMG]?)\s*", text.upper())
    count = int(found[1]) * _COUNTS[found[2]] if found else 0
    if not 0 < count <= _MOST:
        raise UsageError(f"{option} {text!r}: give a number such as 120M or 120000000, at most {_MOST}")
    return count


def with_limits(target: Target, sram: int | None = None, flash: int | None = None) -> Target:
    """The target with its memory cut to exactly ``sram`` and ``flash`` bytes; pools are cut from the end. UsageError
    where a limit is above what the chip has or no multiple of 1 KiB."""
    if sram is not None:
        _check(target, "--sram", sram, target.sram_bytes)
        target = replace(target, pools=_cut(target.pools, sram))
    if flash is not None:
        _check(target, "--flash", flash, target.flash_bytes)
        target = replace(target, flash_bytes=flash)
    return target


def _check(target: Target, option: str, limit: int, most: int) -> None:
    if not 0 < limit <= most or limit % GRAIN:
        raise UsageError(
            f"{option} {limit}: {target.name} has {most} bytes; give that or less, a multiple of {GRAIN} bytes"
        )


def _cut(pools: tuple[Pool, ...], room: int) -> tuple[Pool, ...]:
    kept = []
    for p in pools:
        kept.append(Pool(p.name, min(p.nbytes, room)))
        room -= kept[-1].nbytes
    return tuple(p for p in kept if p.nbytes)
