# SPDX-License-Identifier: Apache-2.0
"""Counts the instructions that an emulator executes, by node of the graph: in C where this machine has a compiler, else
in Python, which slows the run down by about five times."""

from __future__ import annotations

import ctypes
from collections import Counter
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from trainlet.errors import ToolMissingError
from trainlet.toolchain.cache import digest, entry
from trainlet.toolchain.chip import Firmware
from trainlet.toolchain.host import STRICT, compiler_identity, find_compiler, run_compiler
from trainlet.toolchain.thumb import instruction_bytes

_FLAGS = ("-std=c99", "-O2", "-shared", "-fPIC", *STRICT)


class InstructionCounter(Protocol):
    """``total`` instructions so far; ``calls``: the address of each call of the emitted model -> its instructions."""

    def start(self) -> None:
        """A new command begins: what comes before the model's first call counts for no node."""

    def total(self) -> int:
        """Instructions since the emulator was made."""

    def call(self) -> int:
        """Address of the latest call in the emitted functions; 0 if there was none in this command."""

    def calls(self) -> dict[int, int]:
        """Instructions by address of call, since the emulator was made; address 0: outside the model."""

    def blocks(self) -> dict[int, int]:
        """Instructions by address of basic block, since the emulator was made."""

    def executions(self) -> NDArray[np.int64]:
        """How often each halfword of flash was executed since the emulator was made; flash in use, from its base."""


class _Struct(ctypes.Structure):
    """tl_counter of csrc/emulator/count.c."""

    _fields_ = (
        ("base", ctypes.c_uint64),
        ("model", ctypes.c_uint64),
        ("model_end", ctypes.c_uint64),
        ("runtime_end", ctypes.c_uint64),
        ("blocks", ctypes.c_uint64),
        ("bytes", ctypes.c_void_p),
        ("instructions", ctypes.c_void_p),
        ("by_block", ctypes.c_void_p),
        ("by_call", ctypes.c_void_p),
        ("change", ctypes.c_void_p),
        ("current", ctypes.c_uint64),
        ("total", ctypes.c_uint64),
        ("read", ctypes.c_void_p),
    )


def _library() -> Path:
    """The C counter, built once."""
    command = find_compiler()
    text = (resources.files("trainlet") / "csrc" / "emulator" / "count.c").read_text()

    def make(out: Path) -> None:
        source = out / "count.c"
        source.write_text(text)
        run_compiler([*command, *_FLAGS, str(source), "-o", str(out / "count.so")])

    return entry(digest(*compiler_identity(command, _FLAGS), text), make) / "count.so"


class CCounter:
    """A callback in C, which costs the emulator next to nothing."""

    def __init__(self, uc: Any, firmware: Firmware) -> None:
        import unicorn
        from unicorn.unicorn_py3.unicorn import uclib

        halfwords = firmware.flash_bytes // 2 + 1
        self._model = firmware.symbols["tl_port_model"].address
        end = firmware.symbols["tl_port_model_end"].address
        self._tables = (np.zeros(halfwords, np.uint16), np.zeros(halfwords, np.uint16))
        self._base = firmware.target.flash_base
        self._by_block: NDArray[np.uint64] = np.zeros(halfwords, np.uint64)
        self._by_call: NDArray[np.uint64] = np.zeros((end - self._model) // 2 + 1, np.uint64)
        self._change: NDArray[np.int64] = np.zeros(halfwords, np.int64)
        self._struct = _Struct(
            firmware.target.flash_base,
            self._model,
            end,
            firmware.symbols["tl_port_runtime_end"].address,
            halfwords,
            self._tables[0].ctypes.data,
            self._tables[1].ctypes.data,
            self._by_block.ctypes.data,
            self._by_call.ctypes.data,
            self._change.ctypes.data,
            0,
            0,
            ctypes.cast(uclib.uc_mem_read, ctypes.c_void_p).value,
        )
        self._lib = ctypes.CDLL(str(_library()))
        callback = ctypes.cast(self._lib.tl_count_block, ctypes.c_void_p)
        self._handle = ctypes.c_size_t()
        everywhere = (ctypes.c_uint64(1), ctypes.c_uint64(0))
        status = uclib.uc_hook_add(
            uc._uch,
            ctypes.byref(self._handle),
            ctypes.c_int(unicorn.UC_HOOK_BLOCK),
            callback,
            ctypes.byref(self._struct),
            *everywhere,
        )
        if status != 0:
            raise unicorn.UcError(status)

    def start(self) -> None:
        self._struct.current = 0

    def total(self) -> int:
        return int(self._struct.total)

    def call(self) -> int:
        return self._model + 2 * (int(self._struct.current) - 1) if self._struct.current else 0

    def calls(self) -> dict[int, int]:
        used = np.flatnonzero(self._by_call)
        return {self._model + 2 * (int(i) - 1) if i else 0: int(self._by_call[i]) for i in used}

    def blocks(self) -> dict[int, int]:
        return {self._base + 2 * int(i): int(self._by_block[i]) for i in np.flatnonzero(self._by_block)}

    def executions(self) -> NDArray[np.int64]:
        return np.cumsum(self._change)


class PythonCounter:
    """The same in Python."""

    def __init__(self, uc: Any, firmware: Firmware) -> None:
        import unicorn

        self._model = firmware.symbols["tl_port_model"].address
        self._end = firmware.symbols["tl_port_model_end"].address
        self._runtime_end = firmware.symbols["tl_port_runtime_end"].address
        self._sizes: dict[tuple[int, int], int] = {}
        self._calls: Counter[int] = Counter()
        self._blocks: Counter[int] = Counter()
        self._base, self._halfwords = firmware.target.flash_base, firmware.flash_bytes // 2 + 1
        self._runs: Counter[tuple[int, int]] = Counter()
        self._current = 0
        uc.hook_add(unicorn.UC_HOOK_BLOCK, self._block)

    def _block(self, uc: Any, address: int, size: int, _: object) -> None:
        key = (address, size)
        if key not in self._sizes:
            self._sizes[key] = _instructions(bytes(uc.mem_read(address, size)))
        if self._model <= address < self._runtime_end:
            self._current = address + size - 2 if address < self._end else 0
        self._calls[self._current] += self._sizes[key]
        self._blocks[address] += self._sizes[key]
        self._runs[key] += 1

    def start(self) -> None:
        self._current = 0

    def total(self) -> int:
        return self._calls.total()

    def call(self) -> int:
        return self._current

    def calls(self) -> dict[int, int]:
        return dict(self._calls)

    def blocks(self) -> dict[int, int]:
        return dict(self._blocks)

    def executions(self) -> NDArray[np.int64]:
        found: NDArray[np.int64] = np.zeros(self._halfwords, np.int64)
        for (address, size), count in self._runs.items():
            at = (address - self._base) // 2
            found[at : at + size // 2] += count
        return found


def _instructions(code: bytes) -> int:
    """Thumb instructions in ``code``."""
    at = count = 0
    while at < len(code):
        at += instruction_bytes(code, at)
        count += 1
    return count


def make_counter(uc: Any, firmware: Firmware) -> InstructionCounter:
    """The faster counter that this machine can have."""
    try:
        return CCounter(uc, firmware)
    except ToolMissingError:
        return PythonCounter(uc, firmware)
