# SPDX-License-Identifier: Apache-2.0
"""What everything that reads and writes files needs: files that are none other than files, bytes that are on the disk,
and folders that one process has to itself."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

from trainlet.errors import UsageError

_NO_LOCKS: Final = frozenset((errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP))


def open_regular(path: Path) -> BinaryIO:
    """Opens a file for reading. Raises OSError, and UsageError for a folder, FIFO, socket or device, none of which is
    waited for."""
    opened = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if stat.S_ISREG(os.fstat(opened).st_mode):
        return os.fdopen(opened, "rb")
    os.close(opened)
    raise UsageError(f"{path}: this is no regular file; give one, or remove it")


def read_regular(path: Path, limit: int) -> bytes:
    """The bytes of a file, of a larger one ``limit`` + 1, in memory that follows from its size. Raises what
    ``open_regular`` does."""
    with open_regular(path) as f:
        size = os.fstat(f.fileno()).st_size  # reading asks for its memory before it looks at the file
        return f.read(min(size, limit) + 1)


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
