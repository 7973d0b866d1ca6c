# SPDX-License-Identifier: Apache-2.0
"""A name that comes out of a file is data. What it becomes where a file system, C or a build wants a name."""

from __future__ import annotations

import hashlib
import re
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Final

MOST: Final = 48
"""Characters of a name that stays as it is; a longer one is cut."""

_DEVICES: Final = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
_HEADERS: Final = frozenset((
    "assert", "complex", "ctype", "errno", "fenv", "float", "inttypes", "iso646", "limits", "locale", "math", "setjmp",
    "signal", "stdarg", "stdbool", "stddef", "stdint", "stdio", "stdlib", "string", "tgmath", "time", "wchar", "wctype",
    "alloca", "endian", "features", "malloc", "newlib", "picolibc", "reent", "strings", "threads", "uchar", "unistd",
))  # fmt: skip
"""Of C and of what they include; a model's header of that name would be found in their place."""
_BUILD: Final = frozenset((
    "all", "all_build", "clean", "continuous", "default_target", "depend", "edit_cache", "experimental", "help",
    "install", "list_install_components", "nightly", "package", "package_source", "preinstall", "project",
    "rebuild_cache", "run_tests", "test", "zero_check",
    "debug", "general", "interface", "link_interface_libraries", "link_private", "link_public", "optimized", "private",
    "public",
    "example", "expected", "firmware", "gcc",
))  # fmt: skip
"""Targets of CMake and of what it writes for make, ninja and others, words of target_link_libraries, and what is a
compiled folder's own."""
_C_NAMES: Final = re.compile(
    r"bool|(s|u|w)?char|short|u?shrt|(u|l|ul)?long|u?llong|size|ptrdiff|wint|sig_atomic"
    r"|u?int(ptr|max|(_least|_fast)?\d+)?"  # with _WIDTH, as C23 has it
    r"|aio|cnd|mtx|sem|(ino|fano)tify|(pthread|posix|inet6)_.*"  # with _init, functions of the library
    r"|c(make|pack|test)(_.*)?",  # variables of a project of that name
    re.IGNORECASE,
)


def file_name(name: str) -> str:
    """A file's name, without its ending, for any text: letters, digits and ``._-`` of ASCII, at most 60 of them,
    beginning with a letter or a digit, no device of any system. What is such a name and not long stays; anything else
    gets a hash of its own, so that two texts do not share a name."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._-")
    plain = f"m_{plain}" if _DEVICES.fullmatch(plain) else plain
    if plain == name and 0 < len(name) <= MOST:
        return name
    return f"{plain[: MOST - 9] or 'model'}-{_hash(name)}"


def shortened(ident: str) -> str:
    """An identifier of at most ``MOST`` characters; a longer one is cut, and gets a hash of its own."""
    return ident if len(ident) <= MOST else f"{ident[: MOST - 9]}_{_hash(ident)}"


def is_reserved(ident: str) -> bool:
    """Whether files, targets or C names that begin with the identifier would take the place of the engine's, of C's or
    of those of a build, on a file system that tells capitals apart or not."""
    return ident.lower() in _HEADERS | _BUILD | _engine() or _C_NAMES.fullmatch(ident) is not None


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]


@cache
def _engine() -> frozenset[str]:
    """All names of C files that may lie beside a model's."""
    folders = [f for f in (resources.files("trainlet") / "csrc").iterdir() if f.is_dir()]
    return frozenset(Path(f.name).stem.lower() for folder in folders for f in folder.iterdir())
