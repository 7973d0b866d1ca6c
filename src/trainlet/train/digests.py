# SPDX-License-Identifier: Apache-2.0
"""The SHA-256 of files. Those of a large folder are kept in the cache folder, and one is not computed again while the
file has its size, inode and times."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from trainlet.errors import UsageError
from trainlet.files import open_regular, read_regular
from trainlet.toolchain.cache import cache_dir
from trainlet.train.folder import write_atomic

MAX_FILE: Final = 512 << 20  # bytes; an image of 50 million pixels has less in every format
CACHED_FROM: Final = 32 << 20  # bytes of a folder: what is smaller is read as fast as the cache
MAX_CACHES: Final = 64  # folders that are remembered
FRESH: Final = 2 * 10**9  # ns: a file this young may change once more within one tick of its clock

Stamp = list[int]
"""Size, inode, and the nanoseconds of the last change of content and of the inode."""


def read_file(path: Path) -> bytes:
    """The content of an image file. UsageError where it cannot be read, is no regular file or larger than
    ``MAX_FILE``."""
    try:
        content = read_regular(path, MAX_FILE)
    except OSError as e:
        raise UsageError(f"{path}: cannot be read ({e.strerror}); mend or remove this file") from None
    if len(content) > MAX_FILE:
        raise UsageError(f"{path}: more than {MAX_FILE >> 20} MiB, which no image has; make it smaller or remove it")
    return content


def file_digests(root: Path, files: Sequence[Path]) -> list[bytes]:
    """The SHA-256 of each of ``files``, all below ``root``, 32 bytes each. UsageError as in ``read_file``."""
    stamps = [_stamp(f) for f in files]
    names = [str(f.relative_to(root)) for f in files]
    if sum(size for size, *_ in stamps) < CACHED_FROM:
        return [_digest(f) for f in files]
    with _cache(root) as known:
        for file, name, stamp in zip(files, names, stamps, strict=True):
            if known.get(name, (None, ""))[0] != stamp:
                known[name] = stamp, _digest(file).hex()
        found = [bytes.fromhex(known[name][1]) for name in names]
        for name in known.keys() - set(names):
            del known[name]
    return found


def _digest(path: Path) -> bytes:
    return hashlib.sha256(read_file(path)).digest()


def _stamp(path: Path) -> Stamp:
    try:
        s = path.stat()
    except OSError as e:
        raise UsageError(f"{path}: cannot be read ({e.strerror}); mend or remove this file") from None
    if not stat.S_ISREG(s.st_mode):
        raise UsageError(f"{path}: this is no regular file; remove it")
    return [s.st_size, s.st_ino, s.st_mtime_ns, s.st_ctime_ns]


Known = dict[str, tuple[Stamp, str]]


@contextlib.contextmanager
def _cache(root: Path) -> Iterator[Known]:
    """What is known of the files of ``root`` by name; what is known afterwards is written. No cache is no error."""
    try:
        folder = cache_dir()
    except (OSError, UsageError):
        yield {}
        return
    key = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()
    path = folder / f"digests-{key[:32]}.json"
    before = _read(path)
    known = dict(before)
    yield known
    began = time.time_ns() - FRESH
    settled = {name: entry for name, entry in known.items() if max(entry[0][2:]) < began}
    if settled != before:
        with contextlib.suppress(OSError):
            write_atomic(path, json.dumps(settled).encode())
            _forget(folder)


def _read(path: Path) -> Known:
    """Empty where the file is missing or anything in it is odd."""
    try:
        with open_regular(path) as f:
            found = json.loads(f.read())
    except (OSError, UsageError, ValueError, RecursionError):
        return {}
    if not isinstance(found, dict) or not all(map(_is_entry, found.values())):
        return {}
    return {name: (entry[0], entry[1]) for name, entry in found.items()}


def _is_entry(entry: object) -> bool:
    if not isinstance(entry, list) or len(entry) != 2:
        return False
    stamp, digest = entry
    numbers = isinstance(stamp, list) and len(stamp) == 4 and all(type(v) is int for v in stamp)
    return numbers and isinstance(digest, str) and len(digest) == 64 and set(digest) <= set("0123456789abcdef")


def _forget(folder: Path) -> None:
    """Keeps the caches of the latest folders."""
    files = sorted(folder.glob("digests-*.json"), key=lambda f: f.stat().st_mtime_ns)
    for file in files[:-MAX_CACHES]:
        file.unlink(missing_ok=True)
