# SPDX-License-Identifier: Apache-2.0
"""Watches what a case writes and starts, twice: an audit hook refuses, and notes, every attempt to write outside of
what the case was given, and what lies in its folders is compared with what lay there before."""

from __future__ import annotations

import os
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from hostile.case import LOG, Place, RefusedError

_WRITES: Final = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_PATHS: Final = {  # of an event: which arguments are paths that change, and which the folders that they lie in
    "os.mkdir": ((0, 2),), "os.rmdir": ((0, 1),), "os.remove": ((0, 1),), "os.rename": ((0, 2), (1, 3)),
    "os.link": ((1, 3),), "os.symlink": ((1, 2),), "os.truncate": ((0, None),), "os.chmod": ((0, 2),),
    "os.chown": ((0, 3),), "os.utime": ((0, 3),), "sqlite3.connect": ((0, None),),
}  # fmt: skip
_PROGRAMS: Final = frozenset(
    ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pickle.find_class", "socket.connect",
     "ctypes.dlopen")
)  # fmt: skip
_COMPILING: Final = frozenset(("subprocess.Popen", "ctypes.dlopen", "os.posix_spawn"))


class Watch:
    """An audit hook, off at first. It cannot be taken away again; the process ends with it."""

    def __init__(self, compiles: bool) -> None:
        self._refused = _PROGRAMS - _COMPILING if compiles else _PROGRAMS
        self._writable: tuple[str, ...] = ()
        self.on = False
        self.outside: list[str] = []
        self.programs: list[str] = []

    def start(self, *writable: Path) -> None:
        """From here on only what lies in these folders may change."""
        self._writable = tuple(os.path.realpath(p) for p in writable)
        self.outside, self.programs, self.on = [], [], True

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open" and isinstance(args[2], int) and args[2] & _WRITES:
            self._check(event, args[0], None, os.path.realpath)
        for path, folder in _PATHS.get(event, ()):
            self._check(event, args[path], None if folder is None else args[folder], _parent_resolved)
        if event in self._refused:
            self.programs.append(f"{event} {args!r:.200}")
            raise RefusedError(13, "refused by the harness")

    def _check(self, event: str, path: Any, folder: int | None, resolve: Any) -> None:
        if isinstance(path, int) or path is None:
            return
        text = os.fsdecode(path)
        base = "" if folder in (None, -1) else os.readlink(f"/proc/self/fd/{folder}")
        real = resolve(os.path.join(base, text))
        inside = any(real == w or real.startswith(w + os.sep) for w in self._writable)
        if inside or real == os.devnull or text == ":memory:":
            return
        self.outside.append(f"{event} {text!r:.200}")
        raise RefusedError(13, "refused by the harness", text)


def _parent_resolved(path: str) -> str:
    """What is removed or renamed may be a link itself."""
    folder, name = os.path.split(path)
    return os.path.join(os.path.realpath(folder or "."), name)


def snapshot(place: Place) -> dict[str, str]:
    """What lies in the folders of a case, but for ``out`` and the log: path -> digest."""
    found = {}
    for folder, names, files in os.walk(place.root):
        if folder == str(place.work) and place.out.name in names:
            names.remove(place.out.name)
        for name in (*names, *files):
            path = os.path.join(folder, name)
            key = os.path.relpath(path, place.root).encode("utf-8", "backslashreplace").decode()
            found[key] = _digest(path)
    found.pop(LOG, None)
    return found


def _digest(path: str) -> str:
    """Empty for what is no plain file, or may not be read."""
    plain = os.path.isfile(path) and not os.path.islink(path) and os.access(path, os.R_OK)
    return sha256(Path(path).read_bytes()).hexdigest() if plain else ""


def changes(before: Mapping[str, str], after: Mapping[str, str]) -> str:
    """The first few paths that differ."""
    names = sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))
    return ", ".join(names[:5])
