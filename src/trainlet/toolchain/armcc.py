# SPDX-License-Identifier: Apache-2.0
"""The compilers for chips: GCC, or the clang and lld of the ziglang wheel where there is none. Each says how it is
called, and what its objects need of the stack."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from trainlet.errors import ToolMissingError
from trainlet.toolchain.find import ARM_GCC_VARIABLE, M7_HINT, ZIG, find_arm_gcc, find_zig, libgcc, zig_version
from trainlet.toolchain.host import compiler_version
from trainlet.toolchain.stack import HELPER_BYTES, INDIRECT, split_arguments
from trainlet.toolchain.thumb import call_target, instructions, is_call, is_register_call, is_register_jump


class ArmCompiler(Protocol):
    """Compiles and links C for a core; ``core`` are a target's flags, as GCC knows them."""

    @property
    def version(self) -> str:
        """What determines its output, beside its arguments."""

    @property
    def helper_bytes(self) -> int:
        """What a function of its own library is charged for on the stack, callees included."""

    def helpers(self, core: Sequence[str]) -> str:
        """Path of that library; empty where it links it by itself."""

    def compile(self, core: Sequence[str], flags: Sequence[str], source: Path, out: Path) -> list[str]:
        """The command that makes the object ``out``; headers lie beside ``source``."""

    def link(self, core: Sequence[str], script: Path, objects: Iterable[Path], out: Path) -> list[str]:
        """The command that makes the program ``out``."""

    def call_graph(self, made: Path) -> str:
        """The frames and calls of an object that has just been compiled, as ``stack_bound`` reads them."""


def find_arm_compiler() -> ArmCompiler:
    """GCC if it is there, else ziglang; $TRAINLET_ARM_GCC=ziglang asks for the latter. ToolMissingError naming the
    commands that install one."""
    if os.environ.get(ARM_GCC_VARIABLE) == ZIG:
        return Zig(find_zig())
    try:
        return Gcc(find_arm_gcc())
    except ToolMissingError:
        if os.environ.get(ARM_GCC_VARIABLE) or not zig_version():
            raise
    return Zig(find_zig())


@dataclass(frozen=True, slots=True)
class Gcc:
    """arm-none-eabi-gcc."""

    path: str

    @property
    def version(self) -> str:
        return compiler_version(self.path)

    @property
    def helper_bytes(self) -> int:
        return HELPER_BYTES

    def helpers(self, core: Sequence[str]) -> str:
        return libgcc(self.path, tuple(core))

    def compile(self, core: Sequence[str], flags: Sequence[str], source: Path, out: Path) -> list[str]:
        reports = ("-fcallgraph-info=su", "-save-temps=obj")
        return [self.path, *flags, *core, *reports, *_places(source), "-c", str(source), "-o", str(out)]

    def link(self, core: Sequence[str], script: Path, objects: Iterable[Path], out: Path) -> list[str]:
        options = ("-nostdlib", "-static", "-Wl,--gc-sections", "-Wl,--no-warn-rwx-segments", "-T", str(script))
        return [self.path, *core, *options, *map(str, objects), self.helpers(core), "-o", str(out)]

    def call_graph(self, made: Path) -> str:
        return made.with_suffix(".ci").read_text() + split_arguments(made.with_suffix(".s").read_text())


_ZIG_CORES: Final[Mapping[tuple[str, str], tuple[str, str]]] = {
    ("-mcpu=cortex-m7", "-mfpu=fpv5-sp-d16"): ("thumb-freestanding-eabihf", "cortex_m7+fp_armv8d16sp"),
    ("-mcpu=cortex-m4", "-mfpu=fpv4-sp-d16"): ("thumb-freestanding-eabihf", "cortex_m4+vfp4d16sp"),
    ("-mcpu=cortex-m0plus", ""): ("thumb-freestanding-eabi", "cortex_m0plus"),
}
"""Target and core by what GCC calls core and FPU. A core of clang has no FPU unless one is named, whatever -mfpu is."""

_GCC_ONLY: Final = frozenset(("-fno-tree-loop-distribute-patterns",))
_CLANG_ONLY: Final = (
    "-fomit-frame-pointer", "-fno-sanitize=all", "-fno-stack-protector", "-fno-unwind-tables",
    "-fno-asynchronous-unwind-tables", "-fstack-size-section",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Zig:
    """``zig cc``: clang and lld, with a helper library of its own. It tells the sizes of frames, but no calls: those
    are read from the objects."""

    path: str

    @property
    def version(self) -> str:
        return f"{ZIG} {zig_version()}"

    @property
    def helper_bytes(self) -> int:
        return 2 * HELPER_BYTES  # its helpers call each other

    def helpers(self, core: Sequence[str]) -> str:
        return ""

    def compile(self, core: Sequence[str], flags: Sequence[str], source: Path, out: Path) -> list[str]:
        known = (f for f in flags if f not in _GCC_ONLY)
        return [*self._begin(core), *known, *_CLANG_ONLY, *_places(source), "-c", str(source), "-o", str(out)]

    def link(self, core: Sequence[str], script: Path, objects: Iterable[Path], out: Path) -> list[str]:
        options = ("-static", "-Wl,--gc-sections", "-Wl,-e,Reset_Handler", "-T", str(script))
        return [*self._begin(core), *options, *map(str, objects), "-o", str(out)]

    def _begin(self, core: Sequence[str]) -> tuple[str, ...]:
        cpu, fpu = (next((f for f in core if f.startswith(k)), "") for k in ("-mcpu=", "-mfpu="))
        if (cpu, fpu) not in _ZIG_CORES:
            raise ToolMissingError(f"{ZIG} is not known to build for {cpu} {fpu}; install GCC: see `trainlet doctor`")
        triple, name = _ZIG_CORES[cpu, fpu]
        return self.path, "cc", "-target", triple, f"-mcpu={name}"

    def call_graph(self, made: Path) -> str:
        return object_call_graph(made)


def _places(source: Path) -> tuple[str, ...]:
    """Where headers are; and the same bytes wherever it is built."""
    return f"-fdebug-prefix-map={source.parent}=.", "-I", str(source.parent)


# --- calls and frames of an object ------------------------------------------------------------------------------

_CALLS: Final = frozenset((10, 30, 51, 102))  # R_ARM_THM_CALL, _JUMP24, _JUMP19, _JUMP11
_EXECUTED: Final = 4


def object_call_graph(path: Path) -> str:
    """Frames and calls of an object that was compiled with -ffunction-sections and -fstack-size-section, in GCC's form.
    Every call out of a section is a relocation; one without can only be to the function itself."""
    try:
        from elftools.elf.elffile import ELFFile
    except ImportError:
        raise ToolMissingError(f"pyelftools is not installed; {M7_HINT}") from None
    with path.open("rb") as f:
        sections = list(ELFFile(f).iter_sections())
        symbols = next(list(s.iter_symbols()) for s in sections if s["sh_type"] == "SHT_SYMTAB")
        functions = {s["st_shndx"]: _title(s, path) for s in symbols if s["st_info"]["type"] == "STT_FUNC"}
        titles = [functions.get(s["st_shndx"], s.name) for s in symbols]
        frames = {s["sh_link"]: _uleb(s.data()[4:]) for s in sections if s.name == ".stack_sizes"}
        tables = {s["sh_info"]: list(s.iter_relocations()) for s in sections if s["sh_type"] == "SHT_REL"}
        lines = []
        for i, title in functions.items():
            if not (isinstance(i, int) and sections[i]["sh_flags"] & _EXECUTED):
                continue
            kind = f"{frames[i]} bytes (static)" if i in frames else "0 bytes (dynamic)"
            lines.append(f'node: {{ title: "{title}" label: "{title}\\n{kind}" }}\n')
            calls = {r["r_offset"]: titles[r["r_info_sym"]] for r in tables.get(i, ()) if r["r_info_type"] in _CALLS}
            here = (s for s in symbols if s["st_shndx"] == i and s.name[:1] == "$")
            marks = sorted((int(s["st_value"]), s.name[:2] == "$t") for s in here)
            reached = {*calls.values(), *_others(sections[i].data(), marks, calls, title)}
            lines += [f'edge: {{ sourcename: "{title}" targetname: "{to}" }}\n' for to in sorted(reached)]
    return "".join(lines)


def _title(symbol: Any, path: Path) -> str:
    """Its name; with the file for one that is local to it."""
    return f"{path.name}:{symbol.name}" if symbol["st_info"]["bind"] == "STB_LOCAL" else str(symbol.name)


def _others(code: bytes, marks: Sequence[tuple[int, bool]], calls: Mapping[int, str], title: str) -> Iterator[str]:
    """What is called without a relocation: the function itself, or something through a register."""
    for at, first, second in instructions(code, marks):
        if is_call(first, second) and at not in calls and call_target(at, first, second) == 0:
            yield title  # other targets within a function are far jumps, which Armv6-M has no other instruction for
        if not second and (is_register_call(first) or is_register_jump(first)):
            yield INDIRECT


def _uleb(data: bytes) -> int:
    """A number in groups of seven bits, the lowest first."""
    value = 0
    for i, byte in enumerate(data):
        value |= (byte & 0x7F) << (7 * i)
        if byte < 0x80:
            break
    return value
