# SPDX-License-Identifier: Apache-2.0
"""Measured memory and work: the linked program's bytes by purpose, its stack after a run, its executed instructions.
Training and inference alone are two programs, linked and run the same way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from trainlet.emit import Compiled
from trainlet.errors import MismatchError, ToolMissingError
from trainlet.measure.cycles import CORE, LEFT_OUT, CycleEstimate, estimate
from trainlet.session.emulator import EmulatorSession
from trainlet.toolchain.chip import Firmware
from trainlet.toolchain.host import kernel_sources
from trainlet.toolchain.sizes import (
    FLASH_PURPOSES,
    OTHER,
    PADDING,
    Purpose,
    Section,
    code_purpose,
    constant_purpose,
    spread,
)
from trainlet.toolchain.targets import Target
from trainlet.toolchain.vectors import LR, synthetic_image

SEED: Final = 0
_WIDEST: Final = 8  # the largest alignment of a section


@dataclass(frozen=True)
class Work:
    """What one training step or one inference executed, feeding the image included. ``nodes`` by "layer: operator", ""
    for what belongs to none; ``executions`` of each halfword of flash."""

    instructions: int
    nodes: Mapping[str, int] = field(repr=False)
    functions: Mapping[str, int] = field(repr=False)
    executions: NDArray[np.int64] = field(repr=False)


@dataclass(frozen=True)
class Program:
    """A linked program. Bytes by purpose: ``ram`` with the stack that was used (sizes.RAM_PURPOSES and "stack"),
    ``flash`` (sizes.FLASH_PURPOSES). ``work`` is its own: a step of training, or an inference."""

    compiled: Compiled
    firmware: Firmware
    ram: Mapping[str, int]
    flash: Mapping[str, int]
    work: Work

    @property
    def ram_bytes(self) -> int:
        """All SRAM in use: .data, .bss and the stack's high-water mark."""
        return sum(self.ram.values())

    @property
    def flash_bytes(self) -> int:
        """All flash in use."""
        return sum(self.flash.values())

    def facts(self) -> dict[str, Any]:
        """For JSON; bytes."""
        return {
            "ram_bytes": self.ram_bytes,
            "flash_bytes": self.flash_bytes,
            "arena_bytes": self.compiled.plan.arena_bytes,
            "lower_bound_bytes": self.compiled.plan.lower_bound,
            "state_bytes": self.compiled.state_bytes,
            **{f"ram_{k}_bytes": v for k, v in self.ram.items()},
            "stack_reserved_bytes": self.firmware.stack_bytes,
            "sram_needed_bytes": self.firmware.sram_bytes,
            **{f"flash_{k}_bytes": v for k, v in self.flash.items()},
            "sections": self.firmware.sections,
        }


@dataclass(frozen=True)
class Measurement:
    """The same model, linked to train and linked to infer only. ``train_infers`` is an inference of the former."""

    train: Program
    infer: Program
    train_infers: int


# --- flash by purpose -------------------------------------------------------------------------------------------


def flash_by_purpose(firmware: Firmware, compiled: Compiled) -> dict[str, int]:
    """All bytes of flash by purpose (FLASH_PURPOSES): each section by its symbols, and what lies between sections.
    MismatchError where that is not what the ELF loads."""
    engine = kernel_sources()
    emitted = range(firmware.symbols["tl_port_model"].address, firmware.symbols["tl_port_model_end"].address)
    code = code_purpose(engine, emitted)
    constant = constant_purpose(compiled.sources.purposes, f"{compiled.sources.prefix}.c", engine)
    kinds: dict[str, tuple[Purpose, str]] = {
        ".vectors": (code, OTHER),
        ".text": (code, OTHER),
        ".rodata": (constant, "constants"),
        ".data": (lambda s: "data_init", "data_init"),
    }
    found: Counter[str] = Counter()
    stored = [s for s in firmware.layout if s.in_flash]
    for s in stored:
        purpose, unnamed = kinds.get(s.name, (lambda s: OTHER, OTHER))
        found += spread(s, firmware.sized, purpose, unnamed)
    between = firmware.flash_bytes - sum(s.size for s in stored)
    if not 0 <= between < _WIDEST * len(stored):
        raise _disagree("flash", "the sections", firmware.flash_bytes - between, firmware.flash_bytes, stored)
    found[PADDING] += between
    check_sum("flash", found, firmware.flash_bytes, stored)
    return {k: found[k] for k in FLASH_PURPOSES}


def check_sum(memory: str, parts: Mapping[str, int], whole: int, sections: list[Section]) -> None:
    """MismatchError where the parts of a memory do not add up to what the ELF has there."""
    if sum(parts.values()) != whole:
        raise _disagree(memory, ", ".join(f"{k} {v}" for k, v in parts.items()), sum(parts.values()), whole, sections)


def _disagree(memory: str, parts: str, total: int, whole: int, sections: list[Section]) -> MismatchError:
    sizes = ", ".join(f"{s.name} {s.size}" for s in sections)
    return MismatchError(
        f"{memory}: {parts} add up to {total} bytes, but the ELF has {whole} there ({sizes}); report this, the figures "
        "would be wrong"
    )


# --- running ----------------------------------------------------------------------------------------------------


def _observe(session: EmulatorSession, run: Callable[[], object]) -> Work:
    """What ``run`` executes."""
    counter = session.machine.counter
    before = Counter(session.profile()), Counter(session.functions()), counter.executions()
    run()
    nodes, functions = Counter(session.profile()), Counter(session.functions())
    return Work(session.last_instructions, nodes - before[0], functions - before[1], counter.executions() - before[2])


def _program(session: EmulatorSession, work: Work) -> Program:
    firmware = session.firmware
    ram = {**firmware.purposes, "stack": session.stack_used}
    check_sum("SRAM", ram, session.ram_bytes, [s for s in firmware.layout if s.name in (".data", ".bss")])
    return Program(session.compiled, firmware, ram, flash_by_purpose(firmware, session.compiled), work)


def measure(compiled: Compiled, inference: Compiled, target: Target) -> Measurement:
    """Links ``compiled`` and ``inference`` (compile_inference of the same model) for ``target`` and runs both there on
    a synthetic image. OverBudgetError where one does not fit, MismatchError where the two infer differently or a sum
    of bytes is wrong."""
    shape = compiled.graph.image.shape
    image = synthetic_image(shape, 0)
    trains, infers = (EmulatorSession(c, target, seed=SEED) for c in (compiled, inference))
    logits = trains.infer(image)
    train_infers = trains.last_instructions
    step = _observe(trains, lambda: trains.train_step(image, 0, LR))
    other: list[NDArray[np.float32]] = []
    alone = _observe(infers, lambda: other.append(infers.infer(image)))
    if other[0].tobytes() != logits.tobytes():
        raise MismatchError(
            f"{compiled.graph.name}: the program that only infers has other logits than the one that trains; "
            "report this"
        )
    return Measurement(_program(trains, step), _program(infers, alone), train_infers)


# --- the estimate -----------------------------------------------------------------------------------------------


def estimate_cycles(program: Program) -> tuple[CycleEstimate | None, str]:
    """The estimate of a program's work, and what to say about it: what it leaves out, or why there is none."""
    target = program.firmware.target
    if target.core != CORE:
        return None, f"no estimate of cycles: there is one for {CORE} only, and {target.name} is a {target.core}"
    try:
        found = estimate(program.firmware, program.work.executions, program.work.instructions)
    except ToolMissingError as e:
        return None, f"no estimate of cycles: {e}"
    return found, f"an estimate by llvm-mca of {found.tool}, not a measurement; it leaves out {LEFT_OUT}"
