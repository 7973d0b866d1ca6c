# SPDX-License-Identifier: Apache-2.0
"""Which compiler builds for a chip, what it is asked, and what its objects need of the stack."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from graphs import int8_chain

from trainlet.autodiff.scheme import UpdateScheme
from trainlet.compiler import Compiled, compile_model
from trainlet.errors import OverBudgetError, ToolMissingError, UnsupportedError
from trainlet.frontends import attach_head
from trainlet.session.emulator import EmulatorSession
from trainlet.session.host import HostSession
from trainlet.toolchain import armcc
from trainlet.toolchain.armcc import Gcc, Zig, find_arm_compiler, object_call_graph
from trainlet.toolchain.chip import FLAGS
from trainlet.toolchain.find import ARM_GCC, ARM_GCC_VARIABLE, doctor, find_arm_gcc, find_zig
from trainlet.toolchain.stack import INTERRUPT_BYTES, stack_bound
from trainlet.toolchain.targets import TARGETS, Target, with_limits
from trainlet.toolchain.thumb import call_before, call_target, instructions, is_register_call, is_register_jump
from trainlet.toolchain.vectors import synthetic_image

ZIG_IS_THERE = importlib.util.find_spec("ziglang") is not None


@pytest.fixture(scope="module")
def gcc() -> str:
    """Path of the Arm compiler; skips where it is missing."""
    try:
        path = find_arm_gcc()
    except ToolMissingError as e:
        pytest.skip(str(e))
    pytest.importorskip("elftools", reason="pyelftools is not installed: pip install 'trainlet[m7]'")
    return path


# --- which one --------------------------------------------------------------------------------------------------


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder that is all of the PATH and the first place for packages."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(ARM_GCC_VARIABLE, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def program(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\necho 1.0\n")
    path.chmod(0o755)
    return path


def wheel(root: Path) -> Path:
    """A ziglang wheel, installed in ``root``; its program."""
    path = program(root / "ziglang" / "zig")
    (root / "ziglang" / "__init__.py").touch()
    info = root / "ziglang-9.8.7.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ziglang\nVersion: 9.8.7\n")
    return path


def test_gcc_comes_before_zig(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zig = wheel(bare)
    assert find_arm_compiler() == Zig(str(zig))
    assert find_arm_compiler().version == "ziglang 9.8.7"
    path = program(bare / ARM_GCC)
    assert find_arm_compiler() == Gcc(str(path))
    monkeypatch.setenv(ARM_GCC_VARIABLE, "ziglang")
    assert find_arm_compiler() == Zig(str(zig))


def test_a_compiler_that_is_named_and_missing_has_no_stand_in(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel(bare)
    monkeypatch.setenv(ARM_GCC_VARIABLE, "/nowhere/gcc")
    with pytest.raises(ToolMissingError, match="/nowhere/gcc: no such program"):
        find_arm_compiler()


def test_without_any_compiler_all_commands_are_named(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ziglang", None)
    program(bare / "zig")  # some other zig on the PATH is not the wheel's
    with pytest.raises(ToolMissingError, match=r"apt-get install .*; else: pip install .*, or pip install ziglang"):
        find_arm_compiler()
    with pytest.raises(ToolMissingError, match="ziglang is not installed; pip install ziglang"):
        find_zig()


def test_doctor_lists_every_tool_with_a_command(bare: Path) -> None:
    wheel(bare)
    rows = {r.tool: r for r in doctor()}
    assert list(rows)[:6] == ["cc", ARM_GCC, "ziglang", "unicorn", "pyelftools", "qemu-system-arm"]
    assert {t for t, r in rows.items() if not r.found} >= {"cc", ARM_GCC, "qemu-system-arm"}
    assert rows["ziglang"].version == "9.8.7"
    assert all(re.match(r"(apt-get|pip) install \S", r.install) for r in rows.values())
    assert rows["qemu-system-arm"].install == "apt-get install --no-install-recommends qemu-system-arm"


# --- how it is called -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda t: t.name)
def test_zig_is_told_of_the_fpu(target: Target) -> None:
    """A core without one named would be soft-float, one with doubles would not run on the chip."""
    command = Zig("zig").compile(target.flags, FLAGS, Path("work/a.c"), Path("a.o"))
    named = [f for f in command if f.startswith("-mcpu=")]
    assert len(named) == 1
    assert named[0].endswith(("+fp_armv8d16sp", "+vfp4d16sp")) == target.fpu
    assert "-fno-tree-loop-distribute-patterns" not in command
    assert {"-ffp-contract=off", "-fomit-frame-pointer", "-fstack-size-section"} <= set(command)
    link = Zig("zig").link(target.flags, Path("link.ld"), [Path("a.o")], Path("a.elf"))
    assert "-Wl,-e,Reset_Handler" in link
    assert not any("defsym" in f for f in link)


def test_a_core_that_zig_is_not_known_for_is_refused() -> None:
    with pytest.raises(ToolMissingError, match="not known to build for -mcpu=cortex-m33 -mfpu=fpv5-sp-d16"):
        Zig("zig").compile(("-mcpu=cortex-m33", "-mfpu=fpv5-sp-d16"), FLAGS, Path("a.c"), Path("a.o"))


# --- frames and calls of an object ------------------------------------------------------------------------------


def function(name: str, frame: int | None, *code: str, scope: str = ".global") -> str:
    size = f'.section .stack_sizes,"o",%progbits,.text.{name}\n.4byte {name}\n.uleb128 {frame}\n'
    head = f'.section .text.{name},"ax",%progbits\n{scope} {name}\n.thumb_func\n.type {name}, %function\n{name}:\n'
    return head + "".join(f"    {c}\n" for c in code) + ("" if frame is None else size)


def graph(gcc: str, folder: Path, *functions: str) -> str:
    source, made = folder / "a.s", folder / "a.o"
    source.write_text(".syntax unified\n.thumb\n" + "".join(functions))
    subprocess.run([gcc, "-mcpu=cortex-m7", "-mthumb", "-c", str(source), "-o", str(made)], check=True)
    return object_call_graph(made)


def edges(text: str) -> set[tuple[str, str]]:
    return {(a, b) for a, b in re.findall(r'sourcename: "([^"]*)" targetname: "([^"]*)"', text)}


def test_frames_and_calls_are_read_from_an_object(gcc: str, tmp_path: Path) -> None:
    text = graph(
        gcc,
        tmp_path,
        function("root", 16, "push {r4, lr}", "bl middle", "bl outside", "pop {r4, pc}"),
        function("middle", 300, "blx r3", "bx lr", "b.w leaf"),
        function("leaf", 40, "nop", "bx lr", scope=".local"),
        function("jumps", 8, "bx r3"),
        function("lonely", 24, "ldr r0, 1f", "bx lr", ".align 2", "1: .2byte 0x4798, 0x4798"),
    )
    assert edges(text) == {
        ("root", "middle"), ("root", "outside"), ("middle", "__indirect_call"), ("middle", "a.o:leaf"),
        ("jumps", "__indirect_call"),
    }  # fmt: skip
    assert stack_bound([text], "root", {".*": "lonely"}, 100) == 16 + 300 + 40 + 4
    assert stack_bound([text], "root", {".*": "lonely"}, 400) == 16 + 400
    assert stack_bound([text], "jumps", {".*": "lonely"}) == 8 + 24


def test_a_function_that_calls_itself_has_no_bound(gcc: str, tmp_path: Path) -> None:
    """A far jump within a function looks the same but for where it goes."""
    far = function("far", 8, "nop", "bl 1f", "nop", "1: bx lr")
    assert edges(graph(gcc, tmp_path, far)) == set()
    again = graph(gcc, tmp_path, function("again", 8, "nop", ".inst.w 0xf7fffffd", "bx lr"))
    with pytest.raises(UnsupportedError, match="again calls itself"):
        stack_bound([again], "again", {})


def test_a_frame_without_a_size_has_no_bound(gcc: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="its stack frame is dynamic"):
        stack_bound([graph(gcc, tmp_path, function("grows", None, "bx lr"))], "grows", {})


def test_calls_are_told_from_other_instructions() -> None:
    assert call_target(0x10, 0xF7FF, 0xFFFE) == 0x10
    assert call_target(0x100, 0xF000, 0xF801) == 0x106
    assert call_target(0, 0xF400, 0xD000) == 4 - (1 << 24)
    assert call_before(b"\xff\xf7\xfe\xff") == 4
    assert call_before(b"\x00\xbf\x98\x47") == 2
    assert call_before(b"\x00\xbf\x00\xbf") == 0
    assert is_register_call(0x4798)
    assert not is_register_call(0x4718)
    assert is_register_jump(0x4718)
    assert not is_register_jump(0x4770)
    code = b"\x00\xbf" + b"\xff\xf7\xfe\xff" + b"\x98\x47\x98\x47" + b"\x70\x47"
    assert list(instructions(code, [(0, True), (6, False), (10, True)])) == [
        (0, 0xBF00, 0), (2, 0xF7FF, 0xFFFE), (10, 0x4770, 0),
    ]  # fmt: skip


def test_a_number_of_several_bytes() -> None:
    assert armcc._uleb(b"\x28") == 40
    assert armcc._uleb(b"\xac\x02\xff") == 300


# --- zig itself -------------------------------------------------------------------------------------------------

if ZIG_IS_THERE:

    @pytest.fixture
    def chain(monkeypatch: pytest.MonkeyPatch) -> Compiled:
        monkeypatch.setenv(ARM_GCC_VARIABLE, "ziglang")
        weights = {"block.depthwise": 1.0, "block.project": 0.5}
        return compile_model(attach_head(int8_chain(), 4), UpdateScheme("chain", tuple(weights), weights, 12))

    @pytest.mark.parametrize("target", ["stm32f746", "nrf52840", "rp2040"])
    def test_zig_gives_the_hosts_bytes(chain: Compiled, target: str) -> None:
        device, host = EmulatorSession(chain, TARGETS[target], seed=3), HostSession(chain, seed=3)
        for t in range(3):
            image = synthetic_image((8, 8, 3), t)
            assert device.train_step(image, t, 0.01) == host.train_step(image, t, 0.01)
            assert device.state_block() == host._state.tobytes()
            assert device.infer(image).tobytes() == host.infer(image).tobytes()
        bound = device.firmware.stack_bytes - INTERRUPT_BYTES
        assert 0.9 * bound < device.stack_used <= bound
        assert set(device.profile()) - {""} == {f"{n.layer}: {n.op}" for n in chain.graph.flat().nodes}

    def test_zig_says_what_does_not_fit(chain: Compiled) -> None:
        with pytest.raises(OverBudgetError, match=r"bytes of SRAM are needed, 2048 are there"):
            EmulatorSession(chain, with_limits(TARGETS["stm32f746"], 2048))
