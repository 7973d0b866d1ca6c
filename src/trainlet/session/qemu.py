# SPDX-License-Identifier: Apache-2.0
"""A second emulated chip, by QEMU: slower to control than the first, but it has what that one lacks: exceptions, an FPU
that is off after reset, and instructions that refuse an unaligned address.

None of its boards is a target, so the program is linked to a board's addresses, and start-up code sets the memory
protection unit to the target's sizes: flash can be read and executed, SRAM read and written, nothing else is there.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Final

from trainlet.emit import Compiled
from trainlet.errors import DeviceError, UsageError
from trainlet.session.gdb import Remote
from trainlet.session.mailbox import Chip, DeviceSession
from trainlet.toolchain.chip import Firmware, build_device
from trainlet.toolchain.find import find_qemu
from trainlet.toolchain.targets import MIB, Target
from trainlet.toolchain.thumb import call_before

SECONDS: Final = 300.0
"""How long one command may run: feeding a row, an inference, a training step."""

BOARDS: Final = {"cortex-m7": "mps2-an500", "cortex-m4": "mps2-an386", "cortex-m0plus": "mps2-an385"}
"""Boards by core. The last one has a Cortex-M3, which runs all that a Cortex-M0+ runs."""

_FLASH: Final = 0x00400000
"""The same memory as at 0, where the core finds its vectors after reset; so a null pointer points to nothing."""

_SRAM: Final = 0x20000000
_ROOM: Final = 4 * MIB  # of either

_FAULT_STATUS: Final = 0xE000ED28
_FAULT_ADDRESS: Final = 0xE000ED34
_ADDRESS_VALID: Final = 1 << 7
_NO_FRAME: Final = (1 << 4) | (1 << 12)
_DATA: Final = 1 << 1
_FAULTS: Final = {
    1 << 4: "the stack has left memory",
    1 << 0: "execution outside memory, or in SRAM",
    _DATA: "access outside memory",
    1 << 3: "return from an exception without a stack",
    1 << 5: "the FPU's registers do not fit the stack",
    1 << 8: "bus error at an instruction",
    1 << 9: "bus error at data",
    1 << 10: "late bus error at data",
    1 << 12: "bus error at the stack",
    1 << 16: "undefined instruction",
    1 << 17: "a jump to an address without the Thumb bit",
    1 << 18: "bad return from an exception",
    1 << 19: "the FPU is used and the start-up code did not enable it",
    1 << 24: "unaligned access",
    1 << 25: "division by zero",
}
"""Bits of the Configurable Fault Status Register, most telling first."""


# --- memory protection ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Region:
    """A region of an Armv7-M memory protection unit: ``size`` bytes, a power of two of at least 256, from a multiple of
    it on; of its eight equal parts the first ``parts`` are there."""

    base: int
    size: int
    parts: int
    writable: bool

    def registers(self) -> tuple[int, int]:
        """Base address and attributes: normal memory, written back; what is writable is not executed."""
        access = (3 << 24) | (1 << 28) if self.writable else 6 << 24
        hidden = 0xFF & ~((1 << self.parts) - 1)
        log2 = self.size.bit_length() - 1
        return self.base, access | (1 << 19) | (1 << 17) | (1 << 16) | (hidden << 8) | ((log2 - 1) << 1) | 1


def regions(base: int, nbytes: int, writable: bool) -> Iterator[Region]:
    """Regions that cover exactly ``nbytes``, a multiple of 1 KiB, from ``base`` on, which is a multiple of the next
    power of two."""
    while nbytes:
        size = max(1 << (nbytes - 1).bit_length(), 256)
        parts = nbytes * 8 // size
        yield Region(base, size, parts, writable)
        base, nbytes = base + parts * size // 8, nbytes - parts * size // 8


def board_target(target: Target) -> Target:
    """``target`` at a board's addresses. UsageError where the board has less memory."""
    if max(target.flash_bytes, target.sram_bytes) > _ROOM:
        raise UsageError(
            f"{target.name} has {target.flash_bytes} bytes of flash and {target.sram_bytes} of SRAM, QEMU's boards "
            f"have {_ROOM} of each: give --flash 4M --sram 4M"
        )
    return replace(target, flash_base=_FLASH, sram_base=_SRAM)


def protection(target: Target) -> str:
    """The line that makes csrc/port/startup.c protect memory: rows of base address and attributes."""
    flash = regions(target.flash_base, target.flash_bytes, False)
    rows = (r.registers() for r in (*flash, *regions(target.sram_base, target.sram_bytes, True)))
    return f"#define TL_PORT_REGIONS {', '.join(f'{{{base:#x}u, {attributes:#x}u}}' for base, attributes in rows)}"


# --- the machine ------------------------------------------------------------------------------------------------


class QemuMachine(Chip):
    """A board under control of its debugger's interface. ``seconds``: how long a command may run."""

    def __init__(self, firmware: Firmware, seconds: float = SECONDS) -> None:
        super().__init__(firmware)
        self._seconds = seconds
        self._wait, self._stop = (firmware.symbols[f"tl_port_{n}"].address for n in ("wait", "fault"))
        self._watched: dict[int, Callable[[int, int], None]] = {}
        quiet = ("-display", "none", "-monitor", "none", "-serial", "none")
        board = ("-M", BOARDS[self.target.core], "-kernel", str(firmware.path))
        self._remote = Remote((find_qemu(), *board, *quiet, "-S", "-gdb", "stdio"))
        try:
            for address in (self._wait, self._stop):
                self._remote.break_at(address)
            self._run()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._remote.close()

    def read(self, address: int, count: int) -> bytes:
        return self._remote.read(address, count)

    def write(self, address: int, data: bytes) -> None:
        self._remote.write(address, data)

    def stack_pointer(self) -> int:
        return self._remote.registers()[13]

    def watch(self, address: int, reached: Callable[[int, int], None]) -> None:
        self._watched[address] = reached
        self._remote.break_at(address)

    def _go(self) -> None:
        self._remote.go_to(self._remote.registers()[14])
        self._run()

    def _run(self) -> None:
        while True:
            back = self._remote.run(self._seconds)
            registers = self._remote.registers()
            if registers[15] not in self._watched:
                break
            self._watched[registers[15]](registers[1], registers[2])
            self._remote.go_to(registers[14])
        if back and registers[15] == self._wait:
            return
        if not back:
            calls = self._returns((registers[14],), registers[13])
            self._fault = self._at(f"no end after {self._seconds:g} s", registers[15], _in_model(self.firmware, calls))
        elif registers[15] == self._stop:
            self._fault = self._exception(registers[13])
        else:
            self._fault = self._at("stopped before its work was done", registers[15], 0)
        raise DeviceError(self._fault)

    def _exception(self, pointer: int) -> str:
        """What the fault registers, and the frame that the exception has put on the stack, tell."""
        status = self.word(_FAULT_STATUS)
        kind = next((bit for bit in _FAULTS if status & bit), 0)
        if status & _NO_FRAME:
            known = list(self._returns((), pointer))
            what = f"{_FAULTS[kind]}{self._overflow(pointer, pointer)}, in what was called"
            return self._at(what, known[0] if known else 0, _in_model(self.firmware, known))
        what = _FAULTS.get(kind, "stopped")
        frame = struct.unpack("<8I", self.read(pointer, 32))
        if kind == _DATA and status & _ADDRESS_VALID:
            what = self._access(pointer)
        calls = self._returns((frame[5],), pointer + 32)
        return self._at(what, frame[6], _in_model(self.firmware, (frame[6], *calls)))

    def _access(self, pointer: int) -> str:
        """A refused access to data; flash can be read, so one to flash is a write."""
        address = self.word(_FAULT_ADDRESS)
        flash = 0 <= address - self.target.flash_base < self.target.flash_bytes
        what = "write to flash" if flash else _FAULTS[_DATA]
        return f"{what}: at {address:#010x}{self._overflow(pointer, address)}"

    def _returns(self, first: tuple[int, ...], pointer: int) -> Iterator[int]:
        """Where calls have come from, innermost first: the words of ``first`` and of the stack from ``pointer`` up that
        point behind a call."""
        low, top = (self.firmware.symbols[f"tl_port_stack_{k}"].address for k in ("low", "top"))
        begin = min(max(pointer, low) + 3 & ~3, top)
        words = struct.unpack(f"<{(top - begin) // 4}I", self.read(begin, (top - begin) // 4 * 4))
        return (call for w in (*first, *words) if (call := self._call_before(w)))

    def _call_before(self, word: int) -> int:
        """Address of the call that returns to ``word``; 0 where there is none."""
        address = word & ~1
        if not word & 1 or self.firmware.function_at(address - 2) == "?":
            return 0
        size = call_before(self.read(address - 4, 4))
        return address - size if size else 0


def _in_model(firmware: Firmware, addresses: Iterable[int]) -> int:
    """The first of the addresses that is the call of a node; 0 where none is."""
    return next((a for a in addresses if firmware.node_at(a)), 0)


class QemuSession(DeviceSession):
    """Runs a compiled model on a board of QEMU, with the memory of ``target``; see ``Session``. Nothing counts
    instructions here."""

    def __init__(self, compiled: Compiled, target: Target, *, stack_bytes: int | None = None, seed: int = 0) -> None:
        board = board_target(target)
        firmware = build_device(compiled, board, stack_bytes=stack_bytes, startup=protection(board))
        self.machine = QemuMachine(firmware)
        super().__init__(compiled, firmware, self.machine, seed)
