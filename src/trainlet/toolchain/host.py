# SPDX-License-Identifier: Apache-2.0
"""Finds a C compiler and builds the host library. Objects are cached by the hash of all that determines them."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import resources
from pathlib import Path

from trainlet.errors import ToolMissingError, UsageError

FLAGS = ("-std=c99", "-O3", "-ffp-contract=off", "-fPIC", "-Wall", "-Wextra")
NATIVE = ("-march=native", "-mtune=native")
CACHE_VARIABLE = "TRAINLET_CACHE"


def find_compiler(cc: str | None = None) -> str:
    """The path of the host's C compiler: ``cc``, else $CC, else cc, gcc or clang. ToolMissingError if there is none."""
    wanted = cc or os.environ.get("CC")
    for name in (wanted,) if wanted else ("cc", "gcc", "clang"):
        path = shutil.which(name)
        if path:
            return path
    none = "no C compiler was found (looked for cc, gcc, clang)"
    what = f"the C compiler {wanted!r} was not found" if wanted else none
    raise ToolMissingError(f"{what}; install one, on Debian with: apt-get install gcc libc6-dev")


@cache
def compiler_version(cc: str) -> str:
    """First line of ``cc --version``."""
    done = subprocess.run([cc, "--version"], capture_output=True, text=True, check=False)
    return (done.stdout or done.stderr).split("\n", 1)[0]


def cache_dir() -> Path:
    """Where objects are kept: $TRAINLET_CACHE, else the user's cache folder, else a temporary one."""
    named = os.environ.get(CACHE_VARIABLE)
    base = Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trainlet"
    try:
        base.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if named:
            raise UsageError(f"{CACHE_VARIABLE}={named}: the folder cannot be made: {error.strerror}") from None
        base = Path(tempfile.gettempdir()) / f"trainlet-{os.getuid()}"
        base.mkdir(parents=True, exist_ok=True)
    return base


def kernel_sources() -> dict[str, str]:
    """All kernel files by name, headers included."""
    folder = resources.files("trainlet") / "csrc" / "kernels"
    files = sorted(folder.iterdir(), key=lambda f: f.name)
    return {f.name: f.read_text() for f in files if f.name[-2:] in (".c", ".h")}


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(list(command), capture_output=True, text=True, check=False)
    if done.returncode:
        lines = "\n".join((done.stderr or done.stdout).splitlines()[:20])
        raise ToolMissingError(f"the C compiler failed: {' '.join(command)}\n{lines}")


def build_library(sources: Mapping[str, str], *, cc: str | None = None, extra: Sequence[str] = NATIVE) -> Path:
    """Compiles the emitted ``sources`` and all kernels into a shared library; returns its path in the cache."""
    cc = find_compiler(cc)
    kernels = kernel_sources()
    headers = {k: v for k, v in kernels.items() if k.endswith(".h")}
    base = cache_dir()
    flags = (*FLAGS, *extra)
    key = _digest(compiler_version(cc), *flags, *(f"{k}\n{v}" for k, v in sorted({**kernels, **sources}.items())))
    library = base / f"{key}.so"
    if library.exists():
        return library
    with tempfile.TemporaryDirectory(dir=base) as work:
        folder = Path(work)
        for name, text in {**kernels, **sources}.items():
            (folder / name).write_text(text)
        jobs = [n for n in (*sources, *kernels) if n.endswith(".c")]

        def compile_one(name: str) -> str:
            text = sources if name in sources else {name: kernels[name]}
            parts = (f"{k}\n{v}" for k, v in sorted({**headers, **text}.items()))
            made = base / f"{_digest(compiler_version(cc), *flags, name, *parts)}.o"
            if not made.exists():
                temporary = folder / f"{name}.o"
                _run([cc, *flags, "-c", str(folder / name), "-I", work, "-o", str(temporary)])
                os.replace(temporary, made)
            return str(made)

        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            objects = list(pool.map(compile_one, jobs))
        temporary = folder / "library.so"
        _run([cc, *flags, "-shared", *objects, "-o", str(temporary)])
        os.replace(temporary, library)
    return library


def _digest(*parts: str) -> str:
    h = hashlib.sha256()
    for p in parts:
        h.update(f"{len(p)}:{p}".encode())
    return h.hexdigest()[:32]
