# SPDX-License-Identifier: Apache-2.0
"""The folder of a selection: one process at a time works in it, and what a killed one left half-written goes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from trainlet.errors import UsageError

LOCK_FILE: Final = ".lock"
_TEMPORARY: Final = re.compile(r"\..+\.(\d{1,9})\.tmp")  # with the process that writes it


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes out of ``folder``, which exists. The kernel lets go of the lock when this process ends,
    however it ends. UsageError naming the process that is at work there."""
    path = folder / LOCK_FILE
    opened = _lock(path)
    try:
        for file in folder.iterdir():
            found = _TEMPORARY.fullmatch(file.name)
            if found and not _lives(int(found[1])):
                file.unlink(missing_ok=True)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(opened)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _lock(path: Path) -> int:
    opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        there = path.exists() and os.path.samestat(path.stat(), os.fstat(opened))
    except BlockingIOError:
        holder = os.read(opened, 100).decode(errors="replace")
        os.close(opened)
        raise UsageError(
            f"{path.parent}: process {holder or 'of unknown number'} is at work there; wait until it ends, or give "
            "another --out"
        ) from None
    if not there:  # whoever had it has removed it since
        os.close(opened)
        return _lock(path)
    os.truncate(opened, 0)
    os.write(opened, f"{os.getpid()} on {platform.node()}".encode())
    return opened


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """UsageError naming ``path`` where the disk refuses what is written meanwhile."""
    try:
        yield
    except OSError as e:
        raise UsageError(
            f"{path}: cannot be written ({e.strerror or e}); finished runs are kept: make room there, then start the "
            "same command again"
        ) from None
