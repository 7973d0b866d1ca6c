# SPDX-License-Identifier: Apache-2.0
"""What the machine code of a chip may not contain: functions, their loops and calls, from the text of objdump."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

from trainlet.errors import ToolMissingError
from trainlet.toolchain.chip import FLAGS, port_sources
from trainlet.toolchain.find import find_arm_gcc, libgcc
from trainlet.toolchain.targets import Target

OBJDUMP = "arm-none-eabi-objdump"
MEMORY = re.compile(r"(?:__aeabi_)?mem(?:cpy|move|set|cmp|clr)[48]?")
DIVISION = re.compile(r"__aeabi_(?:u?idiv(?:mod)?|u?ldivmod)|__u?(?:div|mod)[sd]i3")
DOUBLE = re.compile(
    r"\.f64\b|\tv(?!ldr|str|push|pop|ldm|stm|mov)\S*\t.*\bd\d+|<(?:__aeabi_(?:d\w+|\w*2d)|__\w+df[23]?)>"
)
SOFT_FLOAT = re.compile(r"<(?:__aeabi_(?:f\w+|u?[il]2f)|__\w+sf[23]?)>")

_CONDITIONS = "eq|ne|hs|lo|cs|cc|mi|pl|vs|vc|hi|ls|ge|lt|gt|le"
_HEADER = re.compile(r"([0-9a-f]+) <([^>]+)>:")
_LINE = re.compile(r" *([0-9a-f]+):\t(\S+)\t?([^;@]*)")
_TARGET = re.compile(r"(?:^|[ ,])([0-9a-f]+) <")
_CONDITIONAL = re.compile(rf"b(?:{_CONDITIONS})(?:\.[nw])?|cbn?z")
_LEAVES = re.compile(r"b(?:\.[nw])?|bx|udf|bkpt")
_RETURN = re.compile(r"bx\tlr|(?:pop|ldmia(?:\.w)?)\t.*\bpc\}|ldr(?:\.w)?\tpc, \[sp\], #\d+")
_COMPUTED = re.compile(r"tb[bh]\t|(?:ldr|mov|add)\S*\tpc,|bx\tr|blx\tr|bl\t.*<__gnu_thumb1_case")


@dataclass(frozen=True)
class Instruction:
    """``target``: where a branch or call goes, else None."""

    address: int
    mnemonic: str
    operands: str

    @property
    def text(self) -> str:
        """As objdump wrote it."""
        return f"{self.mnemonic}\t{self.operands}"

    @cached_property
    def target(self) -> int | None:
        """Where a branch or call goes."""
        found = _TARGET.search(self.operands) if self.mnemonic[0] in "bc" else None
        return int(found[1], 16) if found else None


@dataclass(frozen=True)
class Function:
    """The code of a function by address, tables and constants left out."""

    name: str
    code: Mapping[int, Instruction]

    @cached_property
    def computed(self) -> list[Instruction]:
        """Jumps and calls whose target the text does not tell; not the returns by a register that was just popped."""
        code = list(self.code.values())
        found = [(n, i) for n, i in enumerate(code) if _COMPUTED.match(i.text) and not _RETURN.match(i.text)]
        return [i for n, i in found if f"pop\t{{{i.operands}}}" not in (b.text for b in code[max(0, n - 2) : n])]

    @cached_property
    def calls(self) -> list[Instruction]:
        """Branches that leave the function, as calls or for good. A bl to within it is a far jump."""
        return [i for i in self.code.values() if i.target is not None and i.target not in self.code]

    @cached_property
    def _next(self) -> dict[int, set[int]]:
        found: dict[int, set[int]] = {a: set() for a in self.code}
        for i, after in zip(self.code.values(), [*list(self.code)[1:], None], strict=True):
            inside = i.target in self.code
            falls = not (_LEAVES.fullmatch(i.mnemonic) or _RETURN.match(i.text) or (i.mnemonic == "bl" and inside))
            follow = (i.target if inside else None, after if falls else None)
            found[i.address] = {a for a in follow if a is not None}
        return found

    @cached_property
    def loops(self) -> list[Set[int]]:
        """The addresses of each loop, outer ones first."""
        return list(_loops(set(self.code), self._next))


def _loops(nodes: set[int], edges: Mapping[int, set[int]]) -> Iterator[set[int]]:
    """Strongly connected parts, and within each those that are left without the edges back to its head, where it is
    entered first."""
    for part in _components(nodes, edges):
        if len(part) == 1 and not part & edges[next(iter(part))]:
            continue
        yield part
        head = min((to for a in nodes - part for to in edges[a] & part), default=min(part))
        yield from _loops(part, {a: (edges[a] & part) - {head} for a in part})


def _components(nodes: set[int], edges: Mapping[int, set[int]]) -> list[set[int]]:
    """Strongly connected parts: a walk that notes when it leaves a node, then walks against the edges."""
    left: list[int] = []
    seen: set[int] = set()
    for root in sorted(nodes):
        stack = [] if root in seen else [(root, iter(sorted(edges[root] & nodes)))]
        seen.add(root)
        while stack:
            node, rest = stack[-1]
            to = next((n for n in rest if n not in seen), None)
            if to is None:
                left.append(stack.pop()[0])
            else:
                seen.add(to)
                stack.append((to, iter(sorted(edges[to] & nodes))))
    back: dict[int, list[int]] = {a: [] for a in nodes}
    for a in nodes:
        for to in edges[a] & nodes:
            back[to].append(a)
    parts: list[set[int]] = []
    taken: set[int] = set()
    for root in reversed(left):
        part, todo = set(), [] if root in taken else [root]
        while todo:
            node = todo.pop()
            if node not in taken:
                taken.add(node)
                part.add(node)
                todo += back[node]
        parts += [part] if part else []
    return parts


def build(folder: Path, target: Target, texts: Mapping[str, str], *flags: str) -> Path:
    """All C of ``texts`` with the functions that a compiler may call, compiled as for ``target``; nothing is left out.
    Skips where a tool is missing."""
    try:
        gcc = find_arm_gcc()
        helpers = libgcc(gcc, target.flags)
    except ToolMissingError as e:
        pytest.skip(str(e))
    port = port_sources()
    for name, text in {**{k: port[k] for k in ("memory.c", "string.h")}, **texts}.items():
        (folder / name).write_text(text)
    command = [gcc, *FLAGS, *target.flags, *flags, "-g0", "-I", folder, *sorted(folder.glob("*.c")), helpers]
    subprocess.run([*command, "-nostdlib", "-static", "-Wl,--entry=0", "-o", folder / "program.elf"], check=True)
    return folder / "program.elf"


def disassembly(path: Path) -> str:
    """The text of a program; skips where there is no objdump."""
    objdump = shutil.which(OBJDUMP)
    if objdump is None:
        pytest.skip(f"{OBJDUMP} is missing: apt-get install binutils-arm-none-eabi")
    done = subprocess.run([objdump, "-d", "--no-show-raw-insn", path], capture_output=True, text=True, check=True)
    return done.stdout


def parse(text: str) -> dict[int, Function]:
    """The functions of a program by address; several may have the same name."""
    found: dict[int, tuple[str, dict[int, Instruction]]] = {}
    code: dict[int, Instruction] = {}
    for line in text.splitlines():
        if m := _HEADER.match(line):
            code = {}
            found[int(m[1], 16)] = (m[2], code)
        elif (m := _LINE.match(line)) and m[2][0] != ".":
            code[int(m[1], 16)] = Instruction(int(m[1], 16), m[2], m[3].strip())
    return {address: Function(name, code) for address, (name, code) in found.items()}


@dataclass(frozen=True)
class LoopCall:
    """A call in a loop: ``path`` are the functions on the way, the callee last; ``innermost``: that loop holds no other
    one."""

    path: tuple[str, ...]
    innermost: bool


def calls_in_loops(program: Mapping[int, Function], roots: Iterable[int], banned: re.Pattern[str]) -> list[LoopCall]:
    """Calls of ``banned`` names in loops of the functions at ``roots`` and of what they call; a function that is called
    in a loop counts as part of it. Helpers of the compiler and banned functions are not looked into. AssertionError for
    a jump or call that cannot be followed."""
    found: list[LoopCall] = []
    seen: set[tuple[int, bool]] = set()

    def visit(address: int, path: tuple[str, ...], looped: bool) -> None:
        f = program[address]
        if (address, looped) in seen:
            return
        seen.add((address, looped))
        assert not f.computed, f"{f.name}: cannot follow {f.computed[0].text}"
        for call in f.calls:
            assert call.target is not None
            inside = [loop for loop in f.loops if call.address in loop]
            to = program[call.target].name
            if banned.fullmatch(to) and (inside or looped):
                smallest = min(inside, key=len, default=set(f.code))
                innermost = not any(loop < smallest for loop in f.loops)
                found.append(LoopCall((*path, f.name, to), innermost))
            if not (banned.fullmatch(to) or MEMORY.fullmatch(to) or to.startswith("__")):
                visit(call.target, (*path, f.name), looped or bool(inside))

    for root in roots:
        visit(root, (), False)
    return found
