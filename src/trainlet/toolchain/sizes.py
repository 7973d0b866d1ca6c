# SPDX-License-Identifier: Apache-2.0
"""Every byte of a linked program has one purpose: by the symbol that holds it, else padding, else unnamed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

PADDING: Final = "padding"
OTHER: Final = "other"

RAM_PURPOSES: Final = ("arena", "state", "row", "context", "mailbox", PADDING, OTHER)
"""What .data and .bss hold; the stack is measured, not linked."""

FLASH_PURPOSES: Final = (
    "startup", "kernels", "model", "helpers", "weights", "initial_state", "tables", "constants", "data_init", PADDING,
    OTHER,
)  # fmt: skip
"""startup: vectors, start-up code and the main that serves the mailbox; kernels: the engine's code; model: the emitted
calls; helpers: the compiler's library; weights: of frozen layers; initial_state: what a reset copies into the trained
state; tables: biases, multipliers, shifts, rates, channel numbers; constants: geometries, other structs, and literals
that the compiler gave no name; data_init: initial values of .data."""

_RAM: Final = {f"tl_port_{k}": k for k in ("arena", "state", "row", "context", "mailbox")}
_PORT: Final = frozenset(("Reset_Handler", "main", "serve", "memcpy", "memmove", "memset", "memcmp"))
_ALIGNMENTS: Final = (2, 4, 8)


@dataclass(frozen=True, slots=True)
class Symbol:
    """A name of the ELF: address without the Thumb bit, size in bytes; ``file``: the source of a local name."""

    name: str
    address: int
    size: int
    file: str = ""


@dataclass(frozen=True, slots=True)
class Section:
    """An allocated section of the ELF; ``in_flash`` says whether its bytes are stored in flash."""

    name: str
    address: int
    size: int
    in_flash: bool


Purpose = Callable[[Symbol], str]


def ram_purpose(symbol: Symbol) -> str:
    """One of RAM_PURPOSES."""
    return _RAM.get(symbol.name, OTHER)


def code_purpose(kernel_files: Iterable[str], model: range) -> Purpose:
    """The purpose of a function: ``kernel_files`` are the engine's sources, ``model`` the addresses of the emitted
    functions."""
    engine = frozenset(kernel_files)

    def purpose(s: Symbol) -> str:
        if s.address in model:
            return "model"
        if s.name in _PORT or s.name.startswith("tl_port_"):
            return "startup"
        if s.name.startswith("tl_") or s.file in engine:
            return "kernels"
        return "helpers" if s.name.startswith("__") else OTHER

    return purpose


def constant_purpose(tables: Mapping[str, str], model_file: str, kernel_files: Iterable[str]) -> Purpose:
    """The purpose of a constant: ``tables`` gives that of the arrays in the emitted ``model_file``."""
    engine = frozenset(kernel_files)

    def purpose(s: Symbol) -> str:
        if s.file == model_file:
            return tables.get(s.name, OTHER)
        if s.name.startswith("tl_") or s.file in engine:
            return "constants"
        return "helpers" if s.name.startswith("__") else OTHER

    return purpose


def spread(section: Section, symbols: Iterable[Symbol], purpose: Purpose, unnamed: str = OTHER) -> Counter[str]:
    """Bytes of a section by purpose; they add up to its size. Of two names for one byte the first counts, the longer
    one where they begin together. Between two symbols lies padding where it is as short as an alignment asks for, else
    something ``unnamed``."""
    end = section.address + section.size
    inside = [s for s in symbols if section.address <= s.address < end]
    inside.sort(key=lambda s: (s.address, -s.size, s.name))
    found: Counter[str] = Counter()
    at = section.address
    for s in inside:
        _gap(found, at, s.address, unnamed)
        begin, at = max(at, s.address), max(at, min(s.address + s.size, end))
        found[purpose(s)] += at - begin
    _gap(found, at, end, unnamed)
    return +found


def _gap(found: Counter[str], begin: int, end: int, unnamed: str) -> None:
    if begin < end:
        padding = any(end == -(-begin // n) * n for n in _ALIGNMENTS)
        found[PADDING if padding else unnamed] += end - begin
