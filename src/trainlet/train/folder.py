# SPDX-License-Identifier: Apache-2.0
"""Files of a folder that commands share: read where they are files, replaced as a whole, written by one process at a
time. Needs the standard library alone."""

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
from trainlet.files import open_regular as open_regular

LOCK_FILE: Final = ".lock"
_TEMPORARY: Final = re.compile(r"\..+\.([1-9][0-9]{0,9})\.tmp")  # of write_atomic, with the process that writes it


def write_atomic(path: Path, content: bytes) -> None:
    """Writes a file so that it has either its old bytes or the new ones, whenever the machine stops. Raises OSError
    naming the file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with _naming(path), temporary.open("wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """An open file does not know its name when it tells of a full disk."""
    try:
        yield
    except OSError as e:
        raise OSError(e.errno, e.strerror or str(e), str(path)) from None


@contextlib.contextmanager
def locked(folder: Path, name: str = LOCK_FILE) -> Iterator[None]:
    """Keeps other processes out of ``folder``, which exists, and removes what killed ones left half-written. The kernel
    lets go of the lock when this process ends, however it ends. Raises UsageError naming the process that is at work
    there, OSError where nothing can be written."""
    path = folder / name
    lock = _lock(path)
    try:
        _sweep(folder)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(lock)


def _lock(path: Path) -> int:
    """An open file that has the lock, and the name of this process in it."""
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_there(path, lock):
                with _naming(path):
                    os.truncate(lock, 0)
                    os.write(lock, f"{os.getpid()} on {platform.node()}".encode())
                return lock
        except BlockingIOError:
            holder = os.read(lock, 200).decode(errors="replace")
            os.close(lock)
            raise UsageError(
                f"{path.parent}: process {holder or 'of unknown number'} is at work there; wait until it ends, or give "
                "another --out"
            ) from None
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)  # whoever had it has removed it since


def _is_there(path: Path, lock: int) -> bool:
    """Whether the open file is still the one of that name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(lock))
    except FileNotFoundError:
        return False


def _sweep(folder: Path) -> None:
    """Temporary files of processes that are no more."""
    for file in folder.iterdir():
        found = _TEMPORARY.fullmatch(file.name)
        if found and not _lives(int(found[1])):
            with contextlib.suppress(OSError):
                file.unlink()


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
