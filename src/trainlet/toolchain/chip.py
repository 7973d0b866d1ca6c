# SPDX-License-Identifier: Apache-2.0
"""Builds a compiled model for a chip: an ELF with start-up code, linker script and a mailbox, and what is in it."""

from __future__ import annotations

import os
import re
import subprocess
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, Final

from trainlet.emit import Compiled, NodeLines
from trainlet.errors import OverBudgetError, ToolMissingError
from trainlet.plan.arena import largest_alive
from trainlet.toolchain.armcc import ArmCompiler, find_arm_compiler
from trainlet.toolchain.cache import digest, entry, workplace
from trainlet.toolchain.find import M7_HINT
from trainlet.toolchain.host import STRICT, compiler_failed, kernel_sources, run_compiler
from trainlet.toolchain.sizes import RAM_PURPOSES, Section, Symbol, ram_purpose, spread
from trainlet.toolchain.stack import stack_reserve
from trainlet.toolchain.targets import Pool, Target

FLAGS: Final = (
    "-std=c99", "-O2", "-g", "-ffreestanding", "-fno-common", "-ffp-contract=off", "-fno-math-errno",
    "-fno-tree-loop-distribute-patterns", "-ffunction-sections", "-fdata-sections", "-Wall", "-Wextra",
    *STRICT,
)  # fmt: skip
"""Of every build for a chip. Without loop distribution a loop stays one: no memcpy that calls itself, and none for a
few bytes within the loops of a kernel."""
_ARM: Final = "Arm compiler"
_OVERFLOW: Final = "region `(FLASH|SRAM)' overflowed by|will not fit in region"
_STATIC: Final = (".data", ".bss")
_UNLIMITED: Final = 1 << 28  # the sizes of a program that did not fit are those of one linked into this
_NODE_FUNCTIONS: Final = "prefix|forward|gradient|head|backward"
_ROW_FUNCTIONS: Final = "row_.*"
_POINTERS: Final = {"tl_depth_first_.*": _ROW_FUNCTIONS, ".*": _NODE_FUNCTIONS}  # who calls whom through a pointer


@dataclass(frozen=True)
class Firmware:
    """A linked program. ``layout``: its allocated sections, debug information left out; ``nodes``: which lines of
    NAME.c run which node; ``sized``: what its functions and variables are, by address; ``symbols``: all its names."""

    path: Path
    target: Target
    nodes: tuple[NodeLines, ...] = field(repr=False)
    layout: tuple[Section, ...] = field(repr=False)
    segments: tuple[tuple[int, bytes], ...] = field(repr=False)
    symbols: Mapping[str, Symbol] = field(repr=False)
    sized: tuple[Symbol, ...] = field(repr=False)
    functions: tuple[Symbol, ...] = field(repr=False)

    @property
    def sections(self) -> dict[str, int]:
        """Bytes of the allocated sections by name."""
        return {s.name: s.size for s in self.layout}

    @property
    def static_bytes(self) -> int:
        """SRAM that is taken from the start: .data and .bss."""
        return sum(s.size for s in self.layout if s.name in _STATIC)

    @property
    def stack_bytes(self) -> int:
        """SRAM that is reserved for the stack."""
        return self.sections.get(".stack", 0)

    @property
    def sram_bytes(self) -> int:
        """SRAM that has to be there: what is taken from the start, and all that the stack may grow to."""
        return self.static_bytes + self.stack_bytes

    @property
    def flash_bytes(self) -> int:
        """Flash: all that is loaded, the initial values of .data included."""
        return sum(len(data) for _, data in self.segments)

    @property
    def purposes(self) -> dict[str, int]:
        """SRAM by purpose (RAM_PURPOSES), in bytes; together with the stack all of it."""
        found = sum((spread(s, self.sized, ram_purpose) for s in self.layout if s.name in _STATIC), Counter[str]())
        return {k: found[k] for k in RAM_PURPOSES}

    def function_at(self, address: int) -> str:
        """The function that holds ``address``, or "?"."""
        i = bisect_right(self.functions, address, key=lambda s: s.address) - 1
        if i < 0 or address >= self.functions[i].address + self.functions[i].size:
            return "?"
        return self.functions[i].name

    @cached_property
    def _lines(self) -> tuple[list[int], list[int]]:
        """Addresses of the emitted functions and the lines of model.c they come from."""
        low, high = self.symbols["tl_port_model"].address, self.symbols["tl_port_model_end"].address
        rows = []
        with self.path.open("rb") as f:
            for unit in _elf(f).get_dwarf_info().iter_CUs():
                if not unit.get_top_DIE().attributes["DW_AT_name"].value.endswith(self.path.stem.encode() + b".c"):
                    continue
                program = unit.dwarfinfo.line_program_for_CU(unit)
                states = [e.state for e in program.get_entries() if e.state is not None]
                rows += [(s.address, s.line) for s in states if low <= s.address < high and not s.end_sequence]
        rows.sort(key=lambda r: r[0])
        return [a for a, _ in rows], [line for _, line in rows]

    def node_at(self, address: int) -> str:
        """The node, as "layer: operator", whose call is at ``address``; "" outside the emitted sequences of calls."""
        if not re.fullmatch(f"{_NODE_FUNCTIONS}|{_ROW_FUNCTIONS}", self.function_at(address)):
            return ""
        addresses, lines = self._lines
        line = lines[bisect_right(addresses, address) - 1]
        i = bisect_right(self.nodes, line, key=lambda n: n.first) - 1
        return self.nodes[i].label if i >= 0 else ""


def _elf(stream: Any) -> Any:
    try:
        from elftools.elf.elffile import ELFFile
    except ImportError:
        raise ToolMissingError(f"pyelftools is not installed; {M7_HINT}") from None
    return ELFFile(stream)


def read_elf(path: Path, target: Target, nodes: tuple[NodeLines, ...]) -> Firmware:
    """Sections, segments and symbols of a linked program."""
    with path.open("rb") as f:
        elf = _elf(f)
        layout = tuple(
            Section(s.name, int(s["sh_addr"]), int(s["sh_size"]), s["sh_type"] != "SHT_NOBITS")
            for s in elf.iter_sections() if s["sh_flags"] & 2 and s["sh_size"]
        )  # fmt: skip
        segments = tuple(
            (int(s["p_paddr"]), bytes(s.data())) for s in elf.iter_segments("PT_LOAD") if s["p_filesz"]
        )  # fmt: skip
        table = sorted(_symbols(elf.get_section_by_name(".symtab")), key=lambda s: s[1].address)
    sized = tuple(s for kind, s in table if kind in ("STT_FUNC", "STT_OBJECT"))
    functions = tuple(s for kind, s in table if kind == "STT_FUNC")
    symbols = {s.name: s for _, s in table}
    return Firmware(path, target, nodes, layout, segments, symbols, sized, functions)


def _symbols(table: Any) -> Iterator[tuple[str, Symbol]]:
    """Type and symbol; before the local names of a file stands the file's."""
    file = ""
    for s in table.iter_symbols():
        kind = s["st_info"]["type"]
        if kind == "STT_FILE":
            file = s.name
        elif s.name and s.name[0] != "$":
            local = file if s["st_info"]["bind"] == "STB_LOCAL" else ""
            yield kind, Symbol(s.name, int(s["st_value"]) & ~1, int(s["st_size"]), local)


# --- building ---------------------------------------------------------------------------------------------------


def port_sources() -> dict[str, str]:
    """Start-up code, linker script and main as templates, by file name."""
    folder = resources.files("trainlet") / "csrc" / "port"
    return {f.name: f.read_text() for f in sorted(folder.iterdir(), key=lambda f: f.name) if f.name[-2:] in _KINDS}


_KINDS: Final = (".c", ".h", "ld")


def link_script(target: Target, stack_bytes: int, model_object: str, runtime_object: str) -> str:
    """The linker script for exactly the target's memory; objects by file name: of the emitted C and of model.c."""
    values = {
        "TARGET": target.name,
        "FLASH_BASE": f"{target.flash_base:#010x}",
        "FLASH_BYTES": f"{target.flash_bytes}",
        "SRAM_BASE": f"{target.sram_base:#010x}",
        "SRAM_BYTES": f"{target.sram_bytes}",
        "STACK_BYTES": f"{stack_bytes}",
        "MODEL_OBJECT": model_object,
        "RUNTIME_OBJECT": runtime_object,
    }
    return re.sub(r"@(\w+)@", lambda m: values[m[1]], port_sources()["link.ld"])


def build_device(
    compiled: Compiled, target: Target, *, stack_bytes: int | None = None, startup: str = "", main: str = ""
) -> Firmware:
    """Compiles and links ``compiled`` for ``target``; the ELF is cached by all that determines it. ``stack_bytes``, a
    multiple of 8, is that of ``stack_reserve`` if not given; ``startup`` is a line put before startup.c; ``main`` is
    the text of a main.c other than the one that serves the mailbox. OverBudgetError where the linker says that it does
    not fit, ToolMissingError without a compiler."""
    if stack_bytes is not None and (stack_bytes <= 0 or stack_bytes % 8):
        raise ValueError(f"stack_bytes {stack_bytes}: a positive multiple of 8")
    compiler = find_arm_compiler()
    prefix = compiled.sources.prefix
    nodes = compiled.sources.nodes
    texts = {**kernel_sources(), **port_sources(), **compiled.sources.files}
    texts["main.c"] = (main or texts["main.c"]).replace("@NAME@", prefix).replace("@UPPER@", prefix.upper())
    if not any(n.writes for n in compiled.graph.nodes):
        texts["main.c"] = f"#define TL_PORT_INFERENCE\n{texts['main.c']}"
    if startup:
        texts["startup.c"] = f"{startup}\n{texts['startup.c']}"
    objects = _compile(compiler, target.flags, texts)
    linker = _Linker(compiler, target.flags, tuple(objects.values()))
    if stack_bytes is None:
        graphs = (o.with_suffix(".graph").read_text() for o in objects.values())
        stack_bytes = stack_reserve(graphs, "tl_port_start", _POINTERS, compiler.helper_bytes)
    names = (objects[f"{prefix}.c"].name, objects["model.c"].name)
    script = link_script(target, stack_bytes, *names)

    def link(out: Path) -> None:
        if linker.link(script, out / f"{prefix}.elf"):
            room = replace(target, flash_bytes=_UNLIMITED, pools=(Pool("SRAM", _UNLIMITED),))
            linker.link(link_script(room, stack_bytes, *names), out / f"{prefix}.elf")
            raise OverBudgetError(_too_large(compiled, target, read_elf(out / f"{prefix}.elf", target, nodes)))

    return read_elf(entry(linker.digest(script), link) / f"{prefix}.elf", target, nodes)


def _compile(compiler: ArmCompiler, core: Sequence[str], texts: Mapping[str, str]) -> dict[str, Path]:
    """Objects by source name, cached by the hash of all that determines them; beside each its call graph."""
    headers = {k: v for k, v in texts.items() if k.endswith(".h")}
    sources = [k for k in texts if k.endswith(".c")]

    def compile_one(name: str, folder: Path) -> Path:
        parts = (f"{k}\n{v}" for k, v in sorted({**headers, name: texts[name]}.items()))
        command = compiler.compile(core, FLAGS, Path("work") / name, Path("out"))
        key = digest(compiler.version, *command, name, *parts)

        def make(out: Path) -> None:
            made = folder / f"{name}.o"
            run_compiler(compiler.compile(core, FLAGS, folder / name, made), _ARM)
            (out / f"{key}.graph").write_text(compiler.call_graph(made))
            made.rename(out / f"{key}.o")

        return entry(key, make) / f"{key}.o"

    with workplace() as work, ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for name, text in texts.items():
            (work / name).write_text(text)
        return dict(zip(sources, pool.map(compile_one, sources, [work] * len(sources)), strict=True))


@dataclass(frozen=True)
class _Linker:
    """Links the same objects by one script or another."""

    compiler: ArmCompiler
    core: tuple[str, ...]
    objects: tuple[Path, ...]

    def digest(self, script: str) -> str:
        command = self.compiler.link(self.core, Path("script"), (), Path("out"))
        return digest(script, self.compiler.version, *command, *(o.name for o in self.objects))

    def link(self, script: str, out: Path) -> bool:
        """Whether a region overflowed; then there is no file. ToolMissingError where the linker failed otherwise."""
        where = out.with_name("link.ld")
        where.write_text(script)
        command = self.compiler.link(self.core, where, self.objects, out)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode and not re.search(_OVERFLOW, done.stderr):
            raise compiler_failed(command, done.stderr, _ARM)
        return done.returncode != 0


def _too_large(compiled: Compiled, target: Target, large: Firmware) -> str:
    sram, flash = large.sram_bytes, large.flash_bytes
    kinds = (("SRAM", sram, target.sram_bytes), ("flash", flash, target.flash_bytes))
    short = [f"{n} bytes of {kind} are needed, {has} are there" for kind, n, has in kinds if n > has]
    sizes = ", ".join(f"{name} {n}" for name, n in large.sections.items())
    parts = ", ".join(f"{name} {n}" for name, n in large.purposes.items() if n)
    tensors = ", ".join(f"{name} ({n})" for name, n in largest_alive(compiled.graph, compiled.plan, 3))
    return (
        f"{compiled.graph.name}, scheme {compiled.scheme.name}, does not fit {target.name}: {'; '.join(short)}. "
        f"Sections: {sizes}. Of them in SRAM: {parts}, stack {large.stack_bytes}. Largest tensors at the peak: "
        f"{tensors}. Choose a scheme that updates less, fewer --bits, or a target with more memory"
    )
