# SPDX-License-Identifier: Apache-2.0
"""The folder that `trainlet compile` writes: it builds with CMake, here and for a chip, and says whether its bytes are
right."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from graphs import int8_chain

from trainlet.cli import main
from trainlet.cli.prepare import resolve_scheme
from trainlet.compiler import Compiled, compile_model
from trainlet.errors import OverBudgetError, UsageError
from trainlet.frontends import attach_head
from trainlet.frontends import graph_file as irfile
from trainlet.select.limits import PlannedLimit
from trainlet.select.problem import Choice
from trainlet.toolchain import package
from trainlet.toolchain.chip import Firmware, build_device, read_elf
from trainlet.toolchain.find import ARM_GCC_VARIABLE, find_arm_gcc
from trainlet.toolchain.package import UNMEASURED_STACK, link_example, write_package
from trainlet.toolchain.stack import INTERRUPT_BYTES
from trainlet.toolchain.targets import GRAIN, TARGETS, find_target, with_limits

M7 = TARGETS["stm32f746"]
HERE = ("-DHOST=ON", "-DCMAKE_BUILD_TYPE=Debug")  # compiles in a third of the time
RUNNING, EQUAL, DIFFERENT, REFUSED = range(4)
BAD_LR = 5
FRAME = 112  # of an exception, the FPU's registers included, aligned


@pytest.fixture(scope="module")
def chain() -> Compiled:
    graph = attach_head(int8_chain(), 4)
    return compile_model(graph, resolve_scheme("full", graph, 12))


@pytest.fixture(scope="module")
def cmake() -> str:
    """Path of CMake: of this Python environment, else the system's."""
    path = shutil.which("cmake", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])))
    if path is None:
        pytest.skip("cmake is missing: pip install cmake")
    return path


def call(*command: object) -> subprocess.CompletedProcess[str]:
    """Runs it, both outputs in one; nothing may warn."""
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run([*map(str, command)], **both, text=True, check=False)
    assert "warning" not in done.stdout.lower(), done.stdout
    return done


def make(cmake: str, folder: Path, *options: str, build: str = "build") -> subprocess.CompletedProcess[str]:
    """Configures, where that is still to be done, and builds."""
    if not (folder / build).exists():
        gcc = [] if "-DHOST=ON" in options else [f"-DARM_GCC={find_arm_gcc()}"]
        done = call(cmake, "-S", folder, "-B", folder / build, *gcc, *options)
        assert done.returncode == 0, done.stdout
    return call(cmake, "--build", folder / build, "--parallel", "2")


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, chain: Compiled) -> Path:
    """A folder for each chip."""
    root = tmp_path_factory.mktemp("chips")
    for name in ("stm32f746", "nrf52832", "rp2040"):
        write_package(chain, root / name, "a command", TARGETS[name])
    return root


# --- on a chip --------------------------------------------------------------------------------------------------


def firmware(folder: Path, compiled: Compiled) -> Firmware:
    source = compiled.sources.files[f"{compiled.sources.prefix}.c"]
    return read_elf(folder / "build" / "firmware.elf", TARGETS[folder.name], source)


def run(program: Firmware) -> tuple[int, int]:
    """Verdict and status of the example in the emulator."""
    from trainlet.session.emulator import Machine

    machine = Machine(program)
    assert 512 < machine.stack_used() <= program.stack_bytes - FRAME
    verdict, status = (machine.word(program.symbols[k].address) for k in ("verdict", "status"))
    return verdict, status


@pytest.mark.parametrize("name", ["stm32f746", "nrf52832", "rp2040"])
def test_the_folder_builds_and_runs_on_a_chip(
    tools: str, cmake: str, folders: Path, chain: Compiled, name: str
) -> None:
    done = make(cmake, folders / name)
    assert done.returncode == 0, done.stdout
    program, linked = firmware(folders / name, chain), link_example(chain, TARGETS[name])
    assert run(program) == (EQUAL, 0)
    assert program.stack_bytes == linked.stack_bytes == build_device(chain, TARGETS[name]).stack_bytes
    assert program.static_bytes == linked.static_bytes
    assert abs(program.flash_bytes - linked.flash_bytes) < 64, "another order, another padding"
    used = re.search(r"SRAM: +(\d+) B", done.stdout)
    assert used
    assert int(used[1]) == program.sram_bytes


def changed(program: Firmware, address: int) -> Firmware:
    """The same program with one bit of the byte at ``address`` flipped in flash."""
    segments = []
    for begin, data in program.segments:
        at = address - begin
        inside = 0 <= at < len(data)
        segments.append((begin, data[:at] + bytes([data[at] ^ 64]) + data[at + 1 :] if inside else data))
    assert segments != list(program.segments)
    return replace(program, segments=tuple(segments))


@pytest.mark.parametrize("name", ["stm32f746", "rp2040"])
def test_a_changed_weight_is_noticed(tools: str, cmake: str, folders: Path, chain: Compiled, name: str) -> None:
    make(cmake, folders / name)
    program = firmware(folders / name, chain)
    symbols = chain.sources.symbols
    starts = [symbols[k] for k in symbols if k.endswith(".trained.start")]
    assert len(starts) == 3
    for weights in (*starts, "expected_state"):
        assert run(changed(program, program.symbols[weights].address)) == (DIFFERENT, 0)


def test_a_call_that_is_refused_is_noticed(tools: str, cmake: str, folders: Path, chain: Compiled) -> None:
    folder = folders / "stm32f746"
    vectors = folder / "test_vectors" / "expected.h"
    before = vectors.read_text()
    make(cmake, folder)
    edit(vectors, "#define EXPECTED_LR ", "#define EXPECTED_LR -")
    try:
        assert make(cmake, folder).returncode == 0
        assert run(firmware(folder, chain)) == (REFUSED, BAD_LR)
    finally:
        vectors.write_text(before)
        make(cmake, folder)


def test_what_does_not_fit_is_said_by_the_linker(tools: str, cmake: str, folders: Path) -> None:
    folder = folders / "stm32f746"
    script = folder / "port" / "link.ld"
    before = script.read_text()
    make(cmake, folder)
    edit(script, "LENGTH = 327680", "LENGTH = 3072")
    try:
        done = make(cmake, folder)
        assert done.returncode != 0
        assert "region `SRAM' overflowed by" in done.stdout
    finally:
        script.write_text(before)


def test_a_chip_without_a_compiler_is_said_by_cmake(cmake: str, folders: Path, tmp_path: Path) -> None:
    options = ("-DCMAKE_FIND_USE_CMAKE_SYSTEM_PATH=OFF", "-DCMAKE_FIND_USE_SYSTEM_ENVIRONMENT_PATH=OFF")
    done = call(cmake, "-S", folders / "rp2040", "-B", tmp_path, *options)
    assert done.returncode != 0
    assert "apt-get install --no-install-recommends gcc-arm-none-eabi" in re.sub(r"\s+", " ", done.stdout)


def test_the_stack_of_the_example_has_room_for_an_interrupt(
    tools: str, chain: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its own main takes above what the mailbox's does."""
    linked = {t: link_example(chain, t).stack_bytes for t in TARGETS.values()}
    monkeypatch.setattr(package, "build_device", lambda *args, main="", **_: build_device(*args, main=main))
    for target, nbytes in linked.items():
        deepest = link_example(chain, target).stack_bytes - INTERRUPT_BYTES
        assert deepest + FRAME <= nbytes


# --- on this machine --------------------------------------------------------------------------------------------


def test_the_folder_of_a_chip_builds_here(cmake: str, folders: Path) -> None:
    folder = folders / "stm32f746"
    assert make(cmake, folder, *HERE, build="host").returncode == 0
    done = call(folder / "host" / "example")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "equal to the expected bytes")


def test_the_folder_builds_here_and_notices_a_changed_byte(cmake: str, chain: Compiled, tmp_path: Path) -> None:
    write_package(chain, tmp_path, "a command")
    assert make(cmake, tmp_path, *HERE).returncode == 0
    example = tmp_path / "build" / "example"
    assert call(example).returncode == 0
    header = tmp_path / "src" / f"{chain.sources.prefix}_data.h"
    table = re.search(rf"{chain.sources.symbols['conv.1.trained.start']}\[\d*\] = {{\s*(-?\d+)", header.read_text())
    assert table
    edit(header, table[0], f"{table[0][: -len(table[1])]}{int(table[1]) ^ 1}")
    assert make(cmake, tmp_path).returncode == 0
    done = call(example)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (1, "MISMATCH with the expected bytes")


def test_a_folder_is_written_anew(chain: Compiled, tmp_path: Path) -> None:
    """What only the chip needed goes, but not what was changed since, and nothing of the user's."""
    out = tmp_path / "out"
    write_package(chain, out, "a command", M7)
    assert json.loads((out / "manifest.json").read_text())["target"] == "stm32f746"
    edit(out / "port" / "link.ld", "SRAM", "RAM")
    (out / "mine.c").write_text("mine")
    written = write_package(chain, out, "a command").files
    left = {p for p in out.rglob("*") if p.is_file()} - set(written)
    assert left == {out / "port" / "link.ld", out / "mine.c", out / "manifest.json"}
    fresh = write_package(chain, tmp_path / "fresh", "a command").files
    assert [p.read_bytes() for p in written] == [p.read_bytes() for p in fresh]


def test_what_was_changed_is_kept_or_refused_by_name(chain: Compiled, tmp_path: Path) -> None:
    """Examples and README are there to be changed; with --overwrite all changes go."""
    written = write_package(chain, tmp_path, "a command").files
    before = {p: p.read_bytes() for p in written}
    for name in ("README.md", "examples/host/main.c"):
        edit(tmp_path / name, "a", "b")
    found = write_package(chain, tmp_path, "another command")
    assert found.kept == ("examples/host/main.c", "README.md")
    assert set(written) - set(found.files) == {tmp_path / n for n in found.kept}
    header = tmp_path / "src" / "int8_chain.h"
    edit(header, "typedef", "/* mine */ typedef")
    (tmp_path / "CMakeLists.txt").write_text("")
    with pytest.raises(UsageError, match=r"src/int8_chain\.h, CMakeLists\.txt: not as trainlet wrote it.*--overwrite"):
        write_package(chain, tmp_path, "a command")
    assert "/* mine */" in header.read_text()
    assert write_package(chain, tmp_path, "a command", overwrite=True).kept == ()
    assert {p: p.read_bytes() for p in written} == before


# --- the command ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "chain.json"
    irfile.save(int8_chain(), path)
    return path


def compile_(
    capsys: pytest.CaptureFixture[str], model: Path, out: Path, *args: object
) -> tuple[int, Mapping[str, object]]:
    words = ["compile", "--model", model, "--scheme", "full", "--bits", 12, "--classes", 4, "--out", out, *args]
    code = main([*map(str, words), "--json"])
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


def test_compile_for_a_chip_links_it(
    tools: str, chain: Compiled, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = compile_(capsys, model, tmp_path, "--target", "stm32f746", "--sram", "64K", "--flash", "128K")
    assert code == 0
    linked = link_example(chain, with_limits(M7, 64 << 10, 128 << 10))
    want = {
        "target": "stm32f746", "linked": True, "sram_bytes": 65536, "stack_reserved_bytes": linked.stack_bytes,
        "example_flash_bytes": linked.flash_bytes, "kept": [],
    }  # fmt: skip
    assert want.items() <= found.items()
    script = (tmp_path / "port" / "link.ld").read_text()
    assert "ORIGIN = 0x20000000, LENGTH = 65536" in script
    assert "ORIGIN = 0x08000000, LENGTH = 131072" in script
    assert "@" not in "".join(p.read_text() for p in tmp_path.rglob("*") if p.suffix in (".c", ".ld", ".cmake", ".txt"))
    command = json.loads((tmp_path / "manifest.json").read_text())["command"]
    assert " --classes 4 --bits 12 " in command
    assert command.endswith(" --target stm32f746 --sram 65536 --flash 131072")


def test_compile_refuses_what_does_not_fit(
    tools: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = compile_(capsys, model, tmp_path, "--target", "rp2040", "--sram", "3K")
    assert code == OverBudgetError.exit_code
    assert re.search(r"bytes of SRAM are needed, 3072 are there.*stack \d{4}\. ", str(found["error"]))
    assert list(tmp_path.iterdir()) == []


def test_compile_without_a_compiler_says_so(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ARM_GCC_VARIABLE, "/nowhere/gcc")
    code, found = compile_(capsys, model, tmp_path, "--target", "nrf52840")
    assert code == 0
    assert (found["linked"], "flash_bytes" in found) == (False, False)
    assert f". += {UNMEASURED_STACK};" in (tmp_path / "port" / "link.ld").read_text()
    assert "a guess" in (tmp_path / "README.md").read_text()
    words = ["compile", "--model", model, "--scheme", "head", "--classes", 4, "--target", "nrf52840", "--out", tmp_path]
    assert main([*map(str, words)]) == 0
    assert "whether it fits nrf52840 was not checked" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--flash", "64K"], "--flash"),
        (["--target", "stm32"], "choose one of stm32f746"),
        (["--target", "nrf52832", "--sram", "65K"], "65536 bytes"),
        (["--target", "nrf52832", "--flash", "1000"], "multiple of 1024"),
    ],
)
def test_compile_refuses_chips_that_do_not_exist(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    code, found = compile_(capsys, model, tmp_path / "out", *args)
    assert code == UsageError.exit_code
    assert message in str(found["error"])
    assert not (tmp_path / "out").exists()


def test_every_chip_has_its_files(chain: Compiled, tmp_path: Path) -> None:
    for name in TARGETS:
        write_package(chain, tmp_path / name, "a command", find_target(name))
        assert f"{TARGETS[name].sram_bytes} bytes of SRAM" in (tmp_path / name / "README.md").read_text()


def test_what_fits_one_command_fits_the_others(
    tools: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """plan, compile, train, validate and select ask for the same bytes, and where one KiB is missing all refuse."""
    x = np.zeros((4, 8, 8, 3), np.uint8)
    y = np.arange(4)
    np.savez(tmp_path / "images.npz", x_train=x, y_train=y, x_val=x, y_val=y)
    what = ("--model", model, "--scheme", "bias:2", "--on", "cortex-m7")
    limit = PlannedLimit(attach_head(int8_chain(), 4), M7)
    need = limit.link(Choice(2)).ram
    commands = (
        ("plan", *what, "--classes", 4, "--measure"),
        ("validate", *what, "--classes", 4, "--steps", 1),
        ("train", *what, "--data", tmp_path / "images.npz", "--epochs", 1, "--overwrite", "--out", tmp_path / "run"),
        ("compile", *what[:4], "--classes", 4, "--target", "stm32f746", "--out", tmp_path / "out"),
    )
    enough = -(-need // GRAIN) * GRAIN
    for sram, want in ((enough, 0), (enough - GRAIN, OverBudgetError.exit_code)):
        for words in commands:
            assert main([*map(str, words), "--sram", str(sram), "--json"]) == want, words[0]
            found = json.loads(capsys.readouterr().out.splitlines()[-1])
            assert want or found["sram_needed_bytes"] == need, words[0]
        assert limit.narrowed(sram).confirm(Choice(2)) == (want == 0)


def test_an_example_that_does_not_fit_is_said_and_the_model_compiled(
    tools: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its test vectors come on top of what `plan` knows."""

    def too_large(*_: object) -> None:
        raise OverBudgetError("flash is short")

    monkeypatch.setattr(package, "link_example", too_large)
    words = ["compile", "--model", model, "--scheme", "full", "--bits", 12, "--classes", 4, "--target", "stm32f746"]
    assert main([*map(str, words), "--out", str(tmp_path)]) == 0
    assert "its example with the test vectors in flash does not: flash is short" in capsys.readouterr().out
