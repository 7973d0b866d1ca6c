# SPDX-License-Identifier: Apache-2.0
"""An estimate of cycles on a Cortex-M7: how often each basic block was executed, times what llvm-mca's model of the
core gives for it. The model knows issue slots and latencies; LEFT_OUT says what it does not know. Two
instructions that set flags never issue together in it and a branch waits for its flags, so branchy code comes out slow.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from trainlet.errors import MismatchError, ToolMissingError
from trainlet.toolchain.find import MCA_WHEEL, find_mca, mca_version, objdump_beside

if TYPE_CHECKING:
    from trainlet.toolchain.chip import Firmware

CORE: Final = "cortex-m7"
LEFT_OUT: Final = "flash wait states, cache misses and mispredicted branches"
_ITERATIONS: Final = 100  # of each block, so that filling the pipeline once weighs little
_TRIPLE: Final = "thumbv7em-none-eabihf"
_VIEWS: Final = ("-instruction-info=0", "-resource-pressure=0", "-json")


@dataclass(frozen=True, slots=True)
class CycleEstimate:
    """Estimated ``cycles`` of ``instructions`` executed ones, and of each C function; ``tool`` made the estimate."""

    cycles: int
    instructions: int
    functions: dict[str, int]
    tool: str


# --- blocks -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Instruction:
    """One line of the disassembly."""

    address: int
    mnemonic: str
    operands: str


_CONDITIONS: Final = "eq|ne|hs|lo|cs|cc|mi|pl|vs|vc|hi|ls|ge|lt|gt|le"
_LINE: Final = re.compile(r" *([0-9a-f]+): +\t([a-z][a-z0-9_.]*)(?:\t([^@]*))?")
_JUMP: Final = re.compile(rf"b({_CONDITIONS})?|bx|blx?|cbn?z|tb[bh]")
_TARGET: Final = re.compile(r"0x([0-9a-f]+)")
_IT: Final = re.compile(r"it[te]{0,3}")
_CONDITIONAL: Final = re.compile(rf"([a-z0-9]+?)(?:{_CONDITIONS})((?:\.[a-z0-9]+)*)")


def disassemble(elf: Path, mca: str) -> list[Instruction]:
    """The code of an ELF by address; tables within it are left out."""
    command = [objdump_beside(mca), "-d", "--no-show-raw-insn", f"--triple={_TRIPLE}", f"--mcpu={CORE}", str(elf)]
    lines = (_LINE.match(line) for line in _run(command).splitlines())
    return [Instruction(int(m[1], 16), _narrow(m[2]), (m[3] or "").strip()) for m in lines if m]


def _narrow(mnemonic: str) -> str:
    """Without the width of the encoding, which does not matter here and which LLVM refuses for some operands."""
    return mnemonic.removesuffix(".w").removesuffix(".n")


def _jumps(i: Instruction) -> bool:
    """Whether a basic block ends with it."""
    return bool(_JUMP.fullmatch(i.mnemonic)) or re.search(r"\bpc\b(?!\])", i.operands.split("[")[0]) is not None


def basic_blocks(code: Sequence[Instruction], executions: Sequence[int]) -> list[tuple[int, list[Instruction]]]:
    """(executions, instructions) of every block that was executed. ``executions``: of each instruction in ``code``. A
    block ends with a jump, before the target of one, and where the count changes."""
    targets = {int(m[1], 16) for i in code if _jumps(i) and (m := _TARGET.search(i.operands))}
    found: list[tuple[int, list[Instruction]]] = []
    open_block = False
    for i, count in zip(code, executions, strict=True):
        if not open_block or i.address in targets or found[-1][0] != count:
            found.append((count, []))
        found[-1][1].append(i)
        open_block = not _jumps(i)
    return [b for b in found if b[0]]


# --- what llvm-mca reads ----------------------------------------------------------------------------------------

# All of its versions crash on `it`, older ones on post-indexed loads; none knows how long a
# call or some comparisons take; and they charge for updating a base register, which the core does beside the access.
_REWRITES: Final = tuple((re.compile(a), b) for a, b in (
    (rf"b({_CONDITIONS})?\b.*", r"b\1 .Lx"),
    (r"(?:bx|blx?)\b.*|(?:mov|add) pc, .*", "b .Lx"),
    (r"(cbn?z) (\w+),.*", r"\1 \2, .Lx"),
    (r"tb[bh] .*", "ldr r12, [sp]"),
    (r"(?:bkpt|it[te]{0,3})\b.*", "nop"),
    (r"adr (\w+),.*", r"add.w \1, sp, #4"),
    (r"vcmpe?(\S* \w+), .*", r"vcmp\1, s0"),
    (r"((?:pop|ldm)\S* .*)\bpc\}", r"\1lr}"),
    (r"(ldr\S* )pc(, .*)", r"\1r12\2"),
    (r"(v?(?:ldr|str)\S* .*)\[pc[^]]*\]", r"\1[sp, #4]"),
    (r"((?:ldr|str)\S* .*\[[^]]*\])(?:!|, #.*)", r"\1"),
))  # fmt: skip


def plain_text(block: Sequence[Instruction]) -> list[str]:
    """A block as llvm-mca reads it without a crash: no conditions, no calls, no written-back addresses."""
    lines, conditional = [], 0
    for i in block:
        mnemonic = i.mnemonic
        if conditional and (m := _CONDITIONAL.fullmatch(mnemonic)):
            mnemonic = m[1] + m[2]
        conditional = len(mnemonic) - 1 if _IT.fullmatch(i.mnemonic) else max(0, conditional - 1)
        lines.append(_rewritten(f"{mnemonic} {i.operands}".strip()))
    return lines


def _rewritten(text: str) -> str:
    for pattern, to in _REWRITES:
        text = pattern.sub(to, text) if pattern.fullmatch(text) else text
    return text


def _cycles(blocks: Sequence[Sequence[Instruction]], mca: str) -> list[float]:
    """Cycles of one execution of each block."""
    text = [".syntax unified", ".thumb", ".Lx:"]
    for n, block in enumerate(blocks):
        text += [f"@ LLVM-MCA-BEGIN {n}", *plain_text(block), f"@ LLVM-MCA-END {n}"]
    command = [mca, f"-mtriple={_TRIPLE}", f"-mcpu={CORE}", f"-iterations={_ITERATIONS}", *_VIEWS, "-"]
    out = _run(command, "\n".join((*text, "")))
    regions = json.loads(out[out.index("{") :])["CodeRegions"]
    by_name = {r["Name"]: r["SummaryView"]["TotalCycles"] / _ITERATIONS for r in regions}
    return [by_name[str(n)] for n in range(len(blocks))]


def _run(command: Sequence[str], text: str | None = None) -> str:
    done = subprocess.run(list(command), input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = "\n".join(done.stderr.splitlines()[:10])
        raise ToolMissingError(
            f"{command[0]} failed with status {done.returncode}, so there is no estimate: {lines}\n"
            f"Another version may do: pip install {MCA_WHEEL}"
        )
    return done.stdout


# --- the estimate -----------------------------------------------------------------------------------------------


def estimate(firmware: Firmware, executions: NDArray[np.int64], instructions: int) -> CycleEstimate:
    """Cycles of what ``executions`` counted by halfword of flash; ``instructions`` is what was executed in all.
    ToolMissingError without llvm-mca; MismatchError where the disassembly does not hold all that was executed."""
    mca = find_mca()
    base = firmware.target.flash_base
    code = [i for i in disassemble(firmware.path, mca) if 0 <= (i.address - base) // 2 < len(executions)]
    counts = [int(executions[(i.address - base) // 2]) for i in code]
    if sum(counts) != instructions:
        raise MismatchError(
            f"{instructions} instructions were executed, the disassembly of {firmware.path} accounts for "
            f"{sum(counts)}: no estimate of cycles can be made from it; report this"
        )
    blocks = basic_blocks(code, counts)
    found: dict[str, float] = {}
    for (count, block), cycles in zip(blocks, _cycles([b for _, b in blocks], mca), strict=True):
        name = firmware.function_at(block[0].address)
        found[name] = found.get(name, 0.0) + count * cycles
    functions = {k: round(v) for k, v in found.items()}
    return CycleEstimate(sum(functions.values()), instructions, functions, mca_version(mca))
