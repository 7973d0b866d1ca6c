# SPDX-License-Identifier: Apache-2.0
"""What everything that writes files needs: bytes that are on the disk, and folders that one process has to itself."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_NO_LOCKS: Final = frozenset((errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP))


def sync(path: Path) -> None:
    """Waits until a file, or the list of the files in a folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that has no such thing for folders
            raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def locked(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """Holds the folder: whoever else asks for it waits for the end, which comes with the end of this process too; on a
    file system without locks nobody waits. Not to ``wait`` raises OSError where the folder cannot be had."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        _lock(handle, wait)
        yield
    finally:
        os.close(handle)


def _lock(handle: int, wait: bool) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if not (wait and error.errno in _NO_LOCKS):
            raise
