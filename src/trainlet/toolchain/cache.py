# SPDX-License-Identifier: Apache-2.0
"""Where built things are kept: an entry is a folder under the hash of all that determines it. It appears at once and
complete, carries a checksum, and is made again where it is damaged. What is in it will run, so nobody else may write
there."""

from __future__ import annotations

import atexit
import contextlib
import errno
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Final

from trainlet.errors import UsageError
from trainlet.files import locked, sync

CACHE_VARIABLE: Final = "TRAINLET_CACHE"
_SEAL: Final = "sha256"
_WORK: Final = "work-"
_WRITABLE: Final = stat.S_IWGRP | stat.S_IWOTH
_OPEN: Final = stat.S_IRWXG | stat.S_IRWXO
_IN_THE_WAY: Final = frozenset((errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR))


def digest(*parts: str) -> str:
    """The key of what ``parts`` determine."""
    h = hashlib.sha256()
    for p in parts:
        h.update(f"{len(p)}:{p}".encode())
    return h.hexdigest()[:32]


# --- the folder of all entries ----------------------------------------------------------------------------------


def cache_dir() -> Path:
    """$TRAINLET_CACHE, else the user's cache folder, else one among the temporary files; where neither is this user's
    alone, one that goes with this process. UsageError where the first is named and cannot be used."""
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return _named(Path(named))
    shared = Path(tempfile.gettempdir()) / f"trainlet-{os.geteuid()}"
    with contextlib.suppress(OSError, RuntimeError):  # neither a home nor a name of the user
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trainlet"
        if _is_own(base.resolve(), _WRITABLE):
            return base
    return shared if _is_own(shared, _OPEN) else _private()


def _named(folder: Path) -> Path:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{CACHE_VARIABLE}={folder}: the folder cannot be made: {error.strerror}") from None
    if not _is_own(folder.resolve(), _WRITABLE):
        raise UsageError(
            f"{CACHE_VARIABLE}={folder}: code that lies there is run, so it must be this user's, who can write there, "
            "and nobody else's (chmod go-w); name a folder of your own"
        )
    return folder


def _is_own(folder: Path, others: int) -> bool:
    """Whether the folder, made if need be, is no link, is this user's, can be written, and grants none of the rights
    ``others``."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return False
    mine = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
    return mine and not found.st_mode & others and os.access(folder, os.W_OK)


@cache
def _private() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="trainlet-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


# --- entries ----------------------------------------------------------------------------------------------------


def entry(key: str, make: Callable[[Path], object]) -> Path:
    """The folder of ``key``, undamaged. Where there is none ``make`` writes its files into the one that it is given;
    what it raises is raised here, and nothing stays."""
    folder = cache_dir() / key
    if _is_whole(folder):
        return folder
    with workplace() as work:
        made = work / key
        made.mkdir()
        make(made)
        _seal(made)
        _publish(made, folder)
    return folder


def _checksum(folder: Path) -> str:
    """Over names and content of all files of an entry."""
    h = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.name != _SEAL:
            data = file.read_bytes()
            h.update(f"{file.name}:{len(data)}:".encode())
            h.update(data)
    return h.hexdigest()


def _seal(folder: Path) -> None:
    (folder / _SEAL).write_text(_checksum(folder))
    for file in folder.iterdir():
        sync(file)
    sync(folder)


def _is_whole(folder: Path) -> bool:
    try:
        return (folder / _SEAL).read_text() == _checksum(folder)
    except (OSError, UnicodeDecodeError):
        return False


def _publish(made: Path, folder: Path) -> None:
    """Gives an entry its name. Where another process was quicker its entry is as good; a damaged one makes room."""
    while not _renamed(made, folder):
        if _is_whole(folder):
            return
        with contextlib.suppress(FileNotFoundError):
            folder.rename(made.with_name(f"damaged-{os.urandom(4).hex()}"))
    sync(folder.parent)


def _renamed(made: Path, folder: Path) -> bool:
    """Whether nothing was in the way."""
    try:
        made.rename(folder)
    except OSError as error:
        if error.errno not in _IN_THE_WAY:
            raise
        return False
    return True


# --- where things are made --------------------------------------------------------------------------------------


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    """An empty folder beside the entries, which goes at the end; where this process is killed, with a later build."""
    base = cache_dir()
    _sweep(base)
    with contextlib.ExitStack() as held:
        yield _claim(base, held)


def _claim(base: Path, held: contextlib.ExitStack) -> Path:
    """A new folder that this process holds."""
    while True:
        work = Path(tempfile.mkdtemp(prefix=_WORK, dir=base))
        held.callback(shutil.rmtree, work, ignore_errors=True)
        with contextlib.suppress(OSError):  # a file system without locks is never swept
            held.enter_context(locked(work))
        if work.exists():
            return work  # else another process took it for one that was left


@cache
def _sweep(base: Path) -> None:
    """Removes what processes that have ended left, once in the life of this one."""
    for left in base.glob(f"{_WORK}*"):
        with contextlib.suppress(OSError), locked(left, wait=False):
            shutil.rmtree(left, ignore_errors=True)
