# SPDX-License-Identifier: Apache-2.0
"""An emulated chip: the compiled model as a program in flash, with exactly the target's memory and nothing beside it.

Flash can be read and executed, SRAM read and written; the system control space, where start-up code enables the FPU, is
there too. Any other access stops the run.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable
from types import ModuleType
from typing import Any, Final

from trainlet.emit import Compiled
from trainlet.errors import DeviceError, ToolMissingError
from trainlet.session import Inputs, StepInfo, Targets
from trainlet.session.counter import make_counter
from trainlet.session.mailbox import Chip, DeviceSession
from trainlet.toolchain.chip import Firmware, build_device
from trainlet.toolchain.find import M7_HINT
from trainlet.toolchain.targets import Target

_SYSTEM: Final = (0xE000E000, 0x1000)
_CPACR: Final = 0xE000ED88
_FPU_ON: Final = 0xF00000


def _unicorn() -> tuple[ModuleType, ModuleType]:
    try:
        import unicorn
        from unicorn import arm_const
    except ImportError:
        raise ToolMissingError(f"unicorn is not installed; {M7_HINT}") from None
    return unicorn, arm_const


class Machine(Chip):
    """Thumb-2, DSP and single-precision instructions run; a double-precision one stops the run, as on the chip."""

    def __init__(self, firmware: Firmware) -> None:
        super().__init__(firmware)
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
        stack, reset = struct.unpack("<II", self.read(target.flash_base, 8))
        self.uc.reg_write(self._arm.UC_ARM_REG_SP, stack)
        self._run(reset)
        if target.fpu and not self.word(_CPACR) & _FPU_ON:
            raise DeviceError(f"{target.name}: the start-up code did not enable the FPU; on a chip this stops at once")

    def read(self, address: int, count: int) -> bytes:
        return bytes(self.uc.mem_read(address, count))

    def write(self, address: int, data: bytes) -> None:
        self.uc.mem_write(address, data)

    def stack_pointer(self) -> int:
        return int(self.uc.reg_read(self._arm.UC_ARM_REG_SP))

    def watch(self, address: int, reached: Callable[[int, int], None]) -> None:
        registers = self._arm.UC_ARM_REG_R1, self._arm.UC_ARM_REG_R2

        def entered(uc: Any, *_: object) -> None:
            first, second = (uc.reg_read(r) for r in registers)
            reached(first, second)

        self.uc.hook_add(self._u.UC_HOOK_CODE, entered, begin=address, end=address)
        self.uc.ctl_flush_tb()  # what was translated before has no hook

    def _go(self) -> None:
        self.counter.start()
        self._run(self.uc.reg_read(self._arm.UC_ARM_REG_LR))

    def _run(self, pc: int) -> None:
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
        return self._at(what, pc, self.counter.call())

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
        self._fault = self._where(what + self._overflow(self.stack_pointer(), address))
        return False

    def _on_exception(self, uc: Any, number: int, _: object) -> None:
        self._fault = self._fault or self._where(f"exception {number}")
        uc.emu_stop()


class EmulatorSession(DeviceSession):
    """Runs a compiled model on an emulated chip; see ``Session``. ``last_instructions`` are those of the latest
    ``infer`` or ``train_step``, feeding the image included; ``step_instructions`` and ``steps`` add up those of all
    training steps on whole images."""

    def __init__(self, compiled: Compiled, target: Target, *, stack_bytes: int | None = None, seed: int = 0) -> None:
        firmware = build_device(compiled, target, stack_bytes=stack_bytes)
        self.machine = Machine(firmware)
        self.last_instructions = self.step_instructions = self.steps = self._begin_count = 0
        super().__init__(compiled, firmware, self.machine, seed)

    def facts(self) -> dict[str, int]:
        """What was measured, bytes: RAM and its parts, flash, and the mean of instructions per training step."""
        mean = {"instructions_per_step": self.step_instructions // self.steps} if self.steps else {}
        return super().facts() | mean

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

    def _started(self) -> None:
        self._begin_count = self.machine.counter.total()

    def _finished(self) -> None:
        self.last_instructions = self.machine.counter.total() - self._begin_count

    def train_step(self, inputs: Inputs, targets: Targets, lr: float) -> StepInfo:
        info = super().train_step(inputs, targets, lr)
        self.step_instructions += self.last_instructions
        self.steps += 1
        return info
