# SPDX-License-Identifier: Apache-2.0
"""What the frozen prefix makes of images, in files that all runs behind the same cut share. A file is the checksum of
the rest and of what it is for, then the rows; one that is not as it was written is as good as none."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from trainlet.select.folder import writing

_HEAD: Final = hashlib.sha256().digest_size
_PIECE: Final = 1 << 20
_checked: dict[Path, object] = {}
"""Files that this process has read through, as they were then."""

Rows = NDArray[np.uint8]


def shared(folder: Path, key: str, shape: tuple[int, int], rows: Callable[[], Iterable[bytes]]) -> Rows:
    """The (N, bytes) ``rows`` of this key: from the file in ``folder``, or made and kept there. UsageError naming the
    file where it cannot be written; what ``rows`` raises leaves none behind."""
    path = folder / f"prefix-{key[:32]}.bin"
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # who comes second waits instead of computing it too
        if not _is_whole(path, key, shape):
            _write(path, key, shape, rows())
    return np.memmap(path, np.uint8, "r", _HEAD, shape)


def _begin(key: str, shape: tuple[int, int]) -> hashlib._Hash:
    return hashlib.sha256(f"{key} {shape[0]} {shape[1]}\n".encode())


def _is_whole(path: Path, key: str, shape: tuple[int, int]) -> bool:
    try:
        with path.open("rb") as f:
            stat = os.fstat(f.fileno())
            now = (key, shape, stat.st_ino, stat.st_size, stat.st_mtime_ns)
            if _checked.get(path) == now:
                return True
            found, h = f.read(_HEAD), _begin(key, shape)
            while stat.st_size == _HEAD + shape[0] * shape[1] and (piece := f.read(_PIECE)):
                h.update(piece)
    except OSError:
        return False
    if found != h.digest():
        return False
    _checked[path] = now
    return True


def _write(path: Path, key: str, shape: tuple[int, int], rows: Iterable[bytes]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    h = _begin(key, shape)
    try:
        with writing(path), temporary.open("wb") as f:
            f.write(bytes(_HEAD))
            for row in rows:
                h.update(row)
                f.write(row)
            f.seek(0)
            f.write(h.digest())
            f.flush()
            os.fsync(f.fileno())
            temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
