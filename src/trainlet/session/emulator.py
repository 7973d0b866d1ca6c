# SPDX-License-Identifier: Apache-2.0
"""An emulated chip: the compiled model as a program in flash, with exactly the target's memory and nothing beside it.

Flash can be read and executed, SRAM read and written; the system control space, where start-up code enables the FPU, is
there too. Any other access stops the run.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Mapping
from enum import IntEnum
from types import ModuleType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from trainlet.compiler import Compiled
from trainlet.device import Firmware, build_device
from trainlet.emit import prefix_values
from trainlet.errors import DeviceError, ToolMissingError
from trainlet.session import Image, StepInfo
from trainlet.session.checks import check_image, check_label, check_prefix, check_status, class_count
from trainlet.session.counter import make_counter
from trainlet.session.state import StateCodec
from trainlet.targets import Target
from trainlet.toolchain import M7_HINT

_PAINT: Final = bytes([0xC5])
_SYSTEM: Final = (0xE000E000, 0x1000)
_CPACR: Final = 0xE000ED88
_FPU_ON: Final = 0xF00000
_MAILBOX: Final = struct.Struct("<IIif")  # command, seed, label, lr
_ANSWER: Final = struct.Struct("<ififI")  # status, loss, prediction, saturated, logits


class _Command(IntEnum):
    INIT = 1
    RESET = 2
    BEGIN = 3
    FEED_ROW = 4
    FINISH = 5
    TRAIN = 6
    PREFIX = 7
    INFER_REST = 8
    TRAIN_REST = 9


def _unicorn() -> tuple[ModuleType, ModuleType]:
    try:
        import unicorn
        from unicorn import arm_const
    except ImportError:
        raise ToolMissingError(f"unicorn is not installed; {M7_HINT}") from None
    return unicorn, arm_const


class Machine:
    """A Cortex-M with one program in it. Thumb-2, DSP and single-precision instructions run; a double-precision one
    stops the run, as on the chip."""

    def __init__(self, firmware: Firmware) -> None:
        self.firmware, self.target = firmware, firmware.target
        self._u, self._arm = _unicorn()
        u, target = self._u, self.target
        self.uc = u.Uc(u.UC_ARCH_ARM, u.UC_MODE_THUMB | u.UC_MODE_MCLASS)
        self.uc.mem_map(target.flash_base, target.flash_bytes, u.UC_PROT_READ | u.UC_PROT_EXEC)
        self.uc.mem_map(target.sram_base, target.sram_bytes, u.UC_PROT_READ | u.UC_PROT_WRITE)
        self.uc.mem_map(*_SYSTEM, u.UC_PROT_READ | u.UC_PROT_WRITE)
        for address, data in firmware.segments:
            self.uc.mem_write(address, data)
        self.uc.hook_add(u.UC_HOOK_MEM_INVALID, self._on_memory)
        self.uc.hook_add(u.UC_HOOK_INTR, self._on_exception)
        self.counter = make_counter(self.uc, firmware)
        self._wait = firmware.symbols["tl_port_wait"].address
        self._fault = ""
        stack, reset = struct.unpack("<II", self.read(target.flash_base, 8))
        self.uc.reg_write(self._arm.UC_ARM_REG_SP, stack)
        self._go(reset)
        if target.fpu and not self.word(_CPACR) & _FPU_ON:
            raise DeviceError(f"{target.name}: the start-up code did not enable the FPU; on a chip this stops at once")

    def read(self, address: int, count: int) -> bytes:
        """``count`` bytes of memory."""
        return bytes(self.uc.mem_read(address, count))

    def write(self, address: int, data: bytes) -> None:
        """Writes memory from outside."""
        self.uc.mem_write(address, data)

    def word(self, address: int) -> int:
        """A 32-bit word."""
        return int.from_bytes(self.read(address, 4), "little")

    def resume(self) -> None:
        """Lets the program run until it waits again. DeviceError where it stops anywhere else."""
        if self._fault:
            raise DeviceError(f"{self._fault}; it has stopped, begin a new session")
        self.counter.start()
        self._go(self.uc.reg_read(self._arm.UC_ARM_REG_LR))

    def _go(self, pc: int) -> None:
        try:
            self.uc.emu_start(pc | 1, self._wait)
        except self._u.UcError as e:
            self._fault = self._fault or self._where(f"stopped: {e}")
        at = self.uc.reg_read(self._arm.UC_ARM_REG_PC) & ~1
        if not self._fault and at != self._wait:
            self._fault = self._where("stopped before its work was done")
        if self._fault:
            raise DeviceError(self._fault)

    def _where(self, what: str) -> str:
        pc = self.uc.reg_read(self._arm.UC_ARM_REG_PC) & ~1
        node = self.firmware.node_at(self.counter.call())
        layer = f", layer {node}" if node else ""
        return f"{self.target.name}: {what}, at {pc:#010x} in {self.firmware.function_at(pc)}{layer}"

    def _on_memory(self, uc: Any, access: int, address: int, size: int, value: int, _: object) -> bool:
        u = self._u
        kinds = {
            u.UC_MEM_READ_UNMAPPED: "read outside memory",
            u.UC_MEM_WRITE_UNMAPPED: "write outside memory",
            u.UC_MEM_FETCH_UNMAPPED: "execution outside memory",
            u.UC_MEM_WRITE_PROT: "write to flash",
            u.UC_MEM_FETCH_PROT: "execution in SRAM",
        }
        what = f"{kinds.get(access, 'bad access')}: {size} bytes at {address:#010x}"
        pointer = uc.reg_read(self._arm.UC_ARM_REG_SP)
        low = self.target.sram_base
        if pointer < low or (address < low and low - address <= self.firmware.stack_bytes):
            what += f" (the stack has overflowed its {self.firmware.stack_bytes} bytes)"
        self._fault = self._where(what)
        return False

    def _on_exception(self, uc: Any, number: int, _: object) -> None:
        self._fault = self._fault or self._where(f"exception {number}")
        uc.emu_stop()

    def stack_used(self) -> int:
        """Bytes of stack that were ever used since it was painted."""
        low, top = (self.firmware.symbols[f"tl_port_stack_{k}"].address for k in ("low", "top"))
        free = self.read(low, top - low)
        return len(free.lstrip(_PAINT)) if free.strip(_PAINT) else 0

    def paint_stack(self) -> None:
        """Begins the measurement of the stack anew."""
        low = self.firmware.symbols["tl_port_stack_low"].address
        self.write(low, _PAINT * (self.uc.reg_read(self._arm.UC_ARM_REG_SP) - low))


class EmulatorSession:
    """Runs a compiled model on an emulated chip; see ``Session``. ``last_instructions`` are those of the latest
    ``infer`` or ``train_step``, feeding the image included; ``step_instructions`` and ``steps`` add up those of all
    training steps on whole images."""

    def __init__(self, compiled: Compiled, target: Target, *, stack_bytes: int | None = None, seed: int = 0) -> None:
        self.compiled, self.target = compiled, target
        self.arena_bytes = compiled.plan.arena_bytes
        self.state_bytes = compiled.layout.nbytes
        self.model_hash = compiled.model_hash
        self.classes = class_count(compiled)
        self.firmware = build_device(compiled, target, stack_bytes=stack_bytes)
        self.machine = Machine(self.firmware)
        self.last_instructions = self.step_instructions = self.steps = 0
        self._shape = compiled.graph.values[compiled.graph.inputs[0]].shape
        self._codec = StateCodec(compiled.graph, compiled.layout)
        self._cut = [(compiled.plan.offsets[v], compiled.graph.values[v].nbytes) for v in prefix_values(compiled.graph)]
        names = ("mailbox", "row", "arena", "state")
        self._mailbox, self._row, self._arena, self._state = (
            self.firmware.symbols[f"tl_port_{n}"].address for n in names
        )
        self._command(_Command.INIT, seed=seed)

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
        return self.machine.stack_used()

    def facts(self) -> dict[str, int]:
        """What was measured, bytes: RAM and its parts, flash, and the mean of instructions per training step."""
        measured = {
            "ram_bytes": self.ram_bytes,
            **{f"ram_{k}_bytes": v for k, v in self.firmware.purposes.items()},
            "ram_stack_bytes": self.stack_used,
            "stack_reserved_bytes": self.firmware.stack_bytes,
            "flash_bytes": self.flash_bytes,
        }
        return measured | ({"instructions_per_step": self.step_instructions // self.steps} if self.steps else {})

    def profile(self) -> dict[str, int]:
        """Executed instructions by node ("layer: operator") since the session began; "" is what belongs to none."""
        found: Counter[str] = Counter()
        for address, count in self.machine.counter.calls().items():
            found[self.firmware.node_at(address) if address else ""] += count
        return dict(found)

    def functions(self) -> dict[str, int]:
        """Executed instructions by C function since the session began."""
        found: Counter[str] = Counter()
        for address, count in self.machine.counter.blocks().items():
            found[self.firmware.function_at(address)] += count
        return dict(found)

    def _command(self, command: _Command, *, seed: int = 0, label: int = 0, lr: float = 0.0) -> tuple[StepInfo, int]:
        self.machine.write(self._mailbox, _MAILBOX.pack(command, seed, label, lr))
        self.machine.resume()
        answer = self.machine.read(self._mailbox + _MAILBOX.size, _ANSWER.size)
        status, loss, prediction, saturated, logits = _ANSWER.unpack(answer)
        check_status(self.compiled, status, label, lr)
        return StepInfo(loss, prediction, saturated), logits

    def _feed(self, image: Image) -> None:
        rows = check_image(image, self._shape)
        self._begin_count = self.machine.counter.total()
        self._command(_Command.BEGIN)
        for row in rows:
            self.machine.write(self._row, row.tobytes())
            self._command(_Command.FEED_ROW)

    def _logits(self, address: int) -> NDArray[np.float32]:
        self.last_instructions = self.machine.counter.total() - self._begin_count
        return np.frombuffer(self.machine.read(address, 4 * self.classes), np.float32).copy()

    def _trained(self, info: StepInfo) -> StepInfo:
        self.last_instructions = self.machine.counter.total() - self._begin_count
        return info

    def reset(self, seed: int) -> None:
        self._command(_Command.RESET, seed=seed)

    def infer(self, image: Image) -> NDArray[np.float32]:
        self._feed(image)
        return self._logits(self._command(_Command.FINISH)[1])

    def train_step(self, image: Image, label: int, lr: float) -> StepInfo:
        check_label(self.compiled, label)
        self._feed(image)
        info = self._trained(self._command(_Command.TRAIN, label=label, lr=lr)[0])
        self.step_instructions += self.last_instructions
        self.steps += 1
        return info

    def prefix(self, image: Image) -> bytes:
        if not self._cut:
            return b""
        self._feed(image)
        self._command(_Command.PREFIX)
        return b"".join(self.machine.read(self._arena + at, n) for at, n in self._cut)

    def _restore(self, prefix: bytes) -> None:
        check_prefix(prefix, sum(n for _, n in self._cut))
        self._begin_count = self.machine.counter.total()
        begin = 0
        for at, n in self._cut:
            self.machine.write(self._arena + at, prefix[begin : begin + n])
            begin += n

    def infer_cached(self, prefix: bytes) -> NDArray[np.float32]:
        self._restore(prefix)
        return self._logits(self._command(_Command.INFER_REST)[1])

    def train_step_cached(self, prefix: bytes, label: int, lr: float) -> StepInfo:
        check_label(self.compiled, label)
        self._restore(prefix)
        return self._trained(self._command(_Command.TRAIN_REST, label=label, lr=lr)[0])

    def state_block(self) -> bytes:
        """The block of state as it lies in SRAM."""
        return self.machine.read(self._state, self.state_bytes)

    def state(self) -> dict[str, NDArray[np.generic]]:
        return self._codec.unpack(self.state_block())

    def load_state(self, state: Mapping[str, NDArray[np.generic]]) -> None:
        self.machine.write(self._state, self._codec.pack(state))
