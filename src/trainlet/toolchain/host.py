# SPDX-License-Identifier: Apache-2.0
"""Finds a C compiler and builds the host library. Objects are cached by the hash of all that determines them."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Final

from trainlet.errors import ToolMissingError
from trainlet.toolchain.cache import digest, entry, workplace

STRICT: Final = tuple(
    f"-Werror={w}" for w in ("incompatible-pointer-types", "int-conversion", "implicit-function-declaration")
)
"""What C no longer allows and older compilers only warn of: it would run, and compute something else."""
FLAGS: Final = ("-std=c99", "-O3", "-ffp-contract=off", "-fPIC", "-Wall", "-Wextra", *STRICT)
NATIVE: Final = ("-march=native", "-mtune=native")
_CPU_FILE: Final = Path("/proc/cpuinfo")
_CPU_KEYS: Final = ("model name", "flags", "Features", "CPU implementer", "CPU part", "isa")


def find_compiler(cc: str | None = None) -> tuple[str, ...]:
    """The command of the host's C compiler: ``cc``, else $CC, which may have several words, else cc, gcc or clang.
    ToolMissingError if there is none."""
    wanted = cc or os.environ.get("CC")
    for words in _words(wanted) if wanted else (("cc",), ("gcc",), ("clang",)):
        path = shutil.which(words[0])
        if path:
            return path, *words[1:]
    none = "no C compiler was found (looked for cc, gcc, clang)"
    what = f"the C compiler {wanted!r} was not found" if wanted else none
    raise ToolMissingError(f"{what}; install one, on Debian with: apt-get install gcc libc6-dev")


def _words(command: str) -> Sequence[tuple[str, ...]]:
    """A program whose path may have spaces, or one with arguments."""
    try:
        words = tuple(shlex.split(command))
    except ValueError:  # a quote without its other half
        words = ()
    return [(command,), words] if words else [(command,)]


@cache
def compiler_version(*command: str) -> str:
    """First line of what the compiler says with --version."""
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    return (done.stdout or done.stderr).split("\n", 1)[0]


@cache
def compiler_identity(command: tuple[str, ...], flags: tuple[str, ...]) -> tuple[str, ...]:
    """What determines the compiler's output beside the sources: its version, the flags, what they stand for, and the
    processor where they ask for the one that is here."""
    asked = [*command, *flags, "-###", "-E", "-x", "c", os.devnull]
    done = subprocess.run(asked, cwd="/", capture_output=True, text=True, check=False)
    here = _processor() if any("native" in f for f in (*command, *flags)) else ""
    return compiler_version(*command), *command[1:], *flags, done.stdout, done.stderr, here


def _processor() -> str:
    """What the system says of the processor, the same at each call."""
    try:
        lines = _CPU_FILE.read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(sorted({line for line in lines if line.split(":")[0].strip() in _CPU_KEYS}))


def kernel_sources() -> dict[str, str]:
    """All kernel files by name, headers included."""
    folder = resources.files("trainlet") / "csrc" / "kernels"
    files = sorted(folder.iterdir(), key=lambda f: f.name)
    return {f.name: f.read_text() for f in files if f.name[-2:] in (".c", ".h")}


def run_compiler(command: Sequence[str], what: str = "C compiler") -> None:
    """ToolMissingError where it fails."""
    done = subprocess.run(list(command), capture_output=True, text=True, check=False)
    if done.returncode:
        raise compiler_failed(command, done.stderr or done.stdout, what)


def compiler_failed(command: Sequence[str], said: str, what: str) -> ToolMissingError:
    """The error that says how a compiler was called, and how it began to complain."""
    lines = "\n".join(said.splitlines()[:20])
    return ToolMissingError(f"the {what} failed: {' '.join(command)}\n{lines}")


def build_library(sources: Mapping[str, str], *, cc: str | None = None, extra: Sequence[str] = NATIVE) -> Path:
    """Compiles the emitted ``sources`` and all kernels into a shared library; returns its path in the cache."""
    command, flags = find_compiler(cc), (*FLAGS, *extra)
    identity = compiler_identity(command, flags)
    kernels = kernel_sources()
    headers = {k: v for k, v in kernels.items() if k.endswith(".h")}
    texts = {**kernels, **sources}
    jobs = [n for n in (*sources, *kernels) if n.endswith(".c")]

    def compile_one(name: str, folder: Path) -> Path:
        read = {**headers, **(sources if name in sources else {name: kernels[name]})}
        start = (*command, *flags, "-c", str(folder / name), "-I", str(folder), "-o")
        key = digest(*identity, name, *_parts(read))
        return entry(key, lambda out: run_compiler([*start, str(out / "made.o")])) / "made.o"

    def link(out: Path) -> None:
        with workplace() as folder, ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            for name, text in texts.items():
                (folder / name).write_text(text)
            objects = pool.map(compile_one, jobs, [folder] * len(jobs))
            run_compiler([*command, *flags, "-shared", *map(str, objects), "-o", str(out / "library.so")])

    return entry(digest(*identity, *_parts(texts)), link) / "library.so"


def _parts(texts: Mapping[str, str]) -> list[str]:
    return [f"{name}\n{text}" for name, text in sorted(texts.items())]
