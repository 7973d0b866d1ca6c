# SPDX-License-Identifier: Apache-2.0
"""What every chip under control has in common: the program waits, is given a command through the mailbox of
csrc/port/main.c, runs until it waits again, and its answer is read from SRAM."""

from __future__ import annotations

import ctypes
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import Final

import numpy as np
from numpy.typing import NDArray

from trainlet.emit import Compiled
from trainlet.errors import DeviceError
from trainlet.ir import Image
from trainlet.plan.prefix import prefix_values
from trainlet.plan.state import StateCodec
from trainlet.session import Inputs, StepInfo, Targets
from trainlet.session.checks import (
    check_image,
    check_label,
    check_prefix,
    check_rate,
    check_seed,
    check_status,
    class_count,
    one_input,
    one_label,
)
from trainlet.toolchain.chip import Firmware

_PAINT: Final = bytes([0xC5])
_MAILBOX: Final = struct.Struct("<IIif")  # command, seed, label, lr
_EXPONENT_POINTER: Final = 8  # in tl_context, behind two other pointers
_ANSWER: Final = struct.Struct("<ififI")  # status, loss, prediction, saturated, logits


class Command(IntEnum):
    """The commands of csrc/port/main.c."""

    INIT = 1
    RESET = 2
    BEGIN = 3
    FEED_ROW = 4
    FINISH = 5
    TRAIN = 6
    PREFIX = 7
    INFER_REST = 8
    TRAIN_REST = 9


class Chip(ABC):
    """A Cortex-M with one program in it, which stands in tl_port_wait whenever nothing is asked of it."""

    def __init__(self, firmware: Firmware) -> None:
        self.firmware, self.target = firmware, firmware.target
        self._fault = ""

    @abstractmethod
    def read(self, address: int, count: int) -> bytes:
        """``count`` bytes of memory."""

    @abstractmethod
    def write(self, address: int, data: bytes) -> None:
        """Writes memory from outside."""

    @abstractmethod
    def stack_pointer(self) -> int:
        """Where the program's stack ends now."""

    @abstractmethod
    def watch(self, address: int, reached: Callable[[int, int], None]) -> None:
        """Calls ``reached`` with the registers r1 and r2 whenever the function at ``address`` is entered, which then
        returns; memory may be read meanwhile."""

    @abstractmethod
    def _go(self) -> None:
        """Runs until the program waits again; DeviceError where it stops anywhere else."""

    def close(self) -> None:  # noqa: B027  an emulator within this process has nothing to end
        """Ends what runs outside this process."""

    def resume(self) -> None:
        """Lets the program run until it waits again. DeviceError where it stops anywhere else, or has stopped."""
        if self._fault:
            raise DeviceError(f"{self._fault}; it has stopped, begin a new session")
        self._go()

    def word(self, address: int) -> int:
        """A 32-bit word."""
        return int.from_bytes(self.read(address, 4), "little")

    def _at(self, what: str, pc: int, call: int) -> str:
        """``what`` happened at ``pc``; ``call`` is the latest call in the emitted functions, 0 for none."""
        node = self.firmware.node_at(call) if call else ""
        layer = f", layer {node}" if node else ""
        return f"{self.target.name}: {what}, at {pc:#010x} in {self.firmware.function_at(pc)}{layer}"

    def _overflow(self, pointer: int, address: int) -> str:
        """A note where ``address``, or the stack ``pointer``, lies below SRAM by less than a stack."""
        low, size = self.target.sram_base, self.firmware.stack_bytes
        overflowed = pointer < low or 0 < low - address <= size
        return f" (the stack has overflowed its {size} bytes)" if overflowed else ""

    def stack_used(self) -> int:
        """Bytes of stack that were ever used since it was painted."""
        low, top = (self.firmware.symbols[f"tl_port_stack_{k}"].address for k in ("low", "top"))
        free = self.read(low, top - low)
        return len(free.lstrip(_PAINT)) if free.strip(_PAINT) else 0

    def paint_stack(self) -> None:
        """Begins the measurement of the stack anew."""
        low = self.firmware.symbols["tl_port_stack_low"].address
        self.write(low, _PAINT * (self.stack_pointer() - low))


class DeviceSession:
    """Runs a compiled model on a chip; see ``Session``. ``firmware`` is the program that ``machine`` has in it."""

    def __init__(self, compiled: Compiled, firmware: Firmware, machine: Chip, seed: int) -> None:
        self.compiled, self.target, self.firmware = compiled, firmware.target, firmware
        self.arena_bytes = compiled.plan.arena_bytes
        self.state_bytes = compiled.layout.nbytes
        self.model_hash = compiled.model_hash
        self.classes = class_count(compiled)
        self._chip = machine
        self._shape = compiled.graph.image.shape
        self._codec = StateCodec(compiled.graph, compiled.layout)
        self._cut = [(compiled.plan.offsets[v], compiled.graph.values[v].nbytes) for v in prefix_values(compiled.graph)]
        names = ("mailbox", "row", "arena", "state")
        self._mailbox, self._row, self._arena, self._state = (firmware.symbols[f"tl_port_{n}"].address for n in names)
        self._context = firmware.symbols["tl_port_context"].address
        self._command(Command.INIT, seed=seed)

    def close(self) -> None:
        """Ends what runs outside this process; the session is of no use afterwards."""
        self._chip.close()

    @property
    def ram_bytes(self) -> int:
        """All SRAM in use so far: .data and .bss, and the stack's high-water mark."""
        return self.firmware.static_bytes + self.stack_used

    @property
    def flash_bytes(self) -> int:
        """All flash in use."""
        return self.firmware.flash_bytes

    @property
    def stack_used(self) -> int:
        """The stack's high-water mark in bytes."""
        return self._chip.stack_used()

    def facts(self) -> dict[str, int]:
        """What was measured, bytes: RAM in use and its parts, what has to be there of it, and flash."""
        return {
            "ram_bytes": self.ram_bytes,
            **{f"ram_{k}_bytes": v for k, v in self.firmware.purposes.items()},
            "ram_stack_bytes": self.stack_used,
            "stack_reserved_bytes": self.firmware.stack_bytes,
            "sram_needed_bytes": self.firmware.sram_bytes,
            "flash_bytes": self.flash_bytes,
        }

    def memory(self, place: str, at: int, nbytes: int) -> bytes:
        """Bytes of "arena", "state" or "exponent", from offset ``at`` on."""
        if place == "exponent":
            base = self._chip.word(self._context + _EXPONENT_POINTER)
        else:
            base = self._arena if place == "arena" else self._state
        return self._chip.read(base + at, nbytes)

    def watch(self, function: str, reached: Callable[[int, int], None]) -> None:
        """See ``Chip.watch``; by the function's name."""
        self._chip.watch(self.firmware.symbols[function].address, reached)

    def _started(self) -> None:
        """An inference or a training step begins."""

    def _finished(self) -> None:
        """It has ended."""

    def _command(self, command: Command, *, seed: int = 0, label: int = 0, lr: float = 0.0) -> tuple[StepInfo, int]:
        check_seed(seed)
        check_rate(lr)
        rate = ctypes.c_float(lr).value  # what is too large for it is infinite, which the C refuses
        self._chip.write(self._mailbox, _MAILBOX.pack(command, seed, label, rate))
        self._chip.resume()
        answer = self._chip.read(self._mailbox + _MAILBOX.size, _ANSWER.size)
        status, loss, prediction, saturated, logits = _ANSWER.unpack(answer)
        check_status(self.compiled, status, label, lr)
        return StepInfo(loss, prediction, saturated), logits

    def _feed(self, image: NDArray[np.generic]) -> None:
        rows = check_image(image, self._shape)
        self._started()
        self._command(Command.BEGIN)
        for row in rows:
            self._chip.write(self._row, row.tobytes())
            self._command(Command.FEED_ROW)

    def _logits(self, address: int) -> NDArray[np.float32]:
        self._finished()
        return np.frombuffer(self._chip.read(address, 4 * self.classes), np.float32).copy()

    def _trained(self, info: StepInfo) -> StepInfo:
        self._finished()
        return info

    def reset(self, seed: int) -> None:
        self._command(Command.RESET, seed=seed)

    def infer(self, inputs: Inputs) -> NDArray[np.float32]:
        self._feed(one_input(self.compiled, inputs))
        return self._logits(self._command(Command.FINISH)[1])

    def train_step(self, inputs: Inputs, targets: Targets, lr: float) -> StepInfo:
        label = one_label(self.compiled, targets)
        check_label(self.compiled, label)
        self._feed(one_input(self.compiled, inputs))
        return self._trained(self._command(Command.TRAIN, label=label, lr=lr)[0])

    def prefix(self, image: Image) -> bytes:
        if not self._cut:
            return b""
        self._feed(image)
        self._command(Command.PREFIX)
        return b"".join(self._chip.read(self._arena + at, n) for at, n in self._cut)

    def _restore(self, prefix: bytes) -> None:
        check_prefix(prefix, sum(n for _, n in self._cut))
        self._started()
        begin = 0
        for at, n in self._cut:
            self._chip.write(self._arena + at, prefix[begin : begin + n])
            begin += n

    def infer_cached(self, prefix: bytes) -> NDArray[np.float32]:
        self._restore(prefix)
        return self._logits(self._command(Command.INFER_REST)[1])

    def train_step_cached(self, prefix: bytes, label: int, lr: float) -> StepInfo:
        check_label(self.compiled, label)
        self._restore(prefix)
        return self._trained(self._command(Command.TRAIN_REST, label=label, lr=lr)[0])

    def state_block(self) -> bytes:
        """The block of state as it lies in SRAM."""
        return self._chip.read(self._state, self.state_bytes)

    def state(self) -> dict[str, NDArray[np.generic]]:
        return self._codec.unpack(self.state_block())

    def load_state(self, state: Mapping[str, NDArray[np.generic]]) -> None:
        self._chip.write(self._state, self._codec.pack(state))
