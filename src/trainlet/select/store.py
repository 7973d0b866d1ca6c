# SPDX-License-Identifier: Apache-2.0
"""The file that keeps finished jobs: one SQLite table, a transaction for each job, a checksum in each row."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from trainlet.errors import UsageError

FILE: Final = "jobs.sqlite"
APPLICATION_ID: Final = 0x544C4A42  # TLJB, in the header of the file
VERSION: Final = 1

Spec = Mapping[str, Any]
"""What determines a job, as JSON."""
Result = Mapping[str, Any]
"""What it gave, as JSON."""

_MAGIC: Final = b"SQLite format 3\0"
_VERSION_AT, _APPLICATION_AT = 60, 68  # in the header of every SQLite file, big-endian
_ANOTHER: Final = "give another --out, or remove the file to measure everything again"
_KEPT: Final = "finished runs are kept:"
_WRITABLE: Final = "make the file and its folder writable"
_OBSTACLES: Final = {  # how SQLite's name of an error begins -> what is in the way, and how it goes; all else is damage
    "SQLITE_BUSY": ("another program has it locked", "wait until that ends"),
    "SQLITE_FULL": ("the disk is full", "make room there"),
    "SQLITE_READONLY": ("it cannot be written", _WRITABLE),
    "SQLITE_PERM": ("it cannot be written", _WRITABLE),
    "SQLITE_CANTOPEN": ("it cannot be opened", _WRITABLE),
    "SQLITE_IOERR": ("the disk fails", "see to it"),
}
WAIT: Final = 60.0
"""Seconds that a finished job waits for another program's lock; opening waits a sixth of it."""
_TABLE: Final = (
    "CREATE TABLE jobs (key TEXT PRIMARY KEY, spec TEXT NOT NULL, result TEXT NOT NULL, seconds REAL NOT NULL,"
    " checksum TEXT NOT NULL)"
)
_SCHEMA: Final = (
    "PRAGMA journal_mode = MEMORY",  # in a file beside the temporary one it would be left by whoever is killed here
    f"PRAGMA application_id = {APPLICATION_ID}",
    f"PRAGMA user_version = {VERSION}",
    _TABLE,
)


def canonical(content: Mapping[str, Any]) -> str:
    """JSON that is the same text for the same content. Raises ValueError for numbers that are not finite."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)


def job_key(spec: Spec) -> str:
    """The SHA-256 of all that determines a job."""
    return hashlib.sha256(canonical(spec).encode()).hexdigest()


def _checksum(key: str, spec: str, result: str) -> str:
    return hashlib.sha256("\n".join((key, spec, result)).encode()).hexdigest()


def _is_own(key: str, spec: str, result: str, seconds: float, checksum: str) -> bool:
    return checksum == _checksum(key, spec, result) and key == hashlib.sha256(spec.encode()).hexdigest()


@contextlib.contextmanager
def _explaining(path: Path) -> Iterator[None]:
    """UsageError for what SQLite cannot do with the file meanwhile: what is in the way is told from damage."""
    try:
        yield
    except sqlite3.Error as e:
        name = getattr(e, "sqlite_errorname", "")
        what = next((v for k, v in _OBSTACLES.items() if name.startswith(k)), None)
        if what is None:
            raise UsageError(f"{path}: damaged ({e}); {_ANOTHER}") from None
        raise UsageError(f"{path}: {what[0]} ({e}); {_KEPT} {what[1]}, then start the same command again") from None


class JobStore:
    """The finished jobs of a folder. Opening makes the file where there is none; UsageError, and not a byte is written,
    where it is another kind of file, of another version or damaged, or cannot be written now."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._done: dict[str, tuple[Result, float]] = {}
        if not path.exists():
            _create(path)
        _check_header(path)
        with _explaining(path):
            self._db = sqlite3.connect(path, timeout=WAIT / 6)
        try:
            with _explaining(path):
                self._read()
                self._db.execute("BEGIN IMMEDIATE")  # what cannot be written is better known before the first run
                self._db.execute(f"PRAGMA user_version = {VERSION}")
                self._db.rollback()
                self._db.execute(f"PRAGMA busy_timeout = {int(1000 * WAIT)}")
        except BaseException:
            self._db.close()
            raise

    def _read(self) -> None:
        found = self._db.execute("PRAGMA quick_check").fetchone()[0]
        if found != "ok":
            raise self._damaged(str(found).splitlines()[-1])
        if self._db.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall() != [(_TABLE,)]:
            raise self._damaged("it has not the one table of jobs")
        for row in self._db.execute("SELECT key, spec, result, seconds, checksum FROM jobs"):
            key = str(row[0])
            if tuple(map(type, row)) != (str, str, str, float, str) or not _is_own(*row):
                raise self._damaged(f"job {key[:12]} has not its own checksum")
            try:
                self._done[key] = (dict(json.loads(row[2])), row[3])
            except (ValueError, TypeError, RecursionError):
                raise self._damaged(f"job {key[:12]} has no result") from None

    def _damaged(self, how: str) -> UsageError:
        return UsageError(f"{self.path}: damaged, {how}; {_ANOTHER}")

    def __len__(self) -> int:
        return len(self._done)

    def __contains__(self, key: str) -> bool:
        return key in self._done

    def result(self, key: str) -> Result:
        """What the job gave; KeyError where it is not finished."""
        return self._done[key][0]

    def seconds(self, key: str) -> float:
        """How long it took, in seconds; KeyError where it is not finished."""
        return self._done[key][1]

    def put(self, spec: Spec, result: Result, seconds: float) -> None:
        """Keeps a finished job; on return it is on the disk. UsageError where it cannot be."""
        key, text, given = job_key(spec), canonical(spec), canonical(result)
        row = (key, text, given, seconds, _checksum(key, text, given))
        with _explaining(self.path), self._db:
            self._db.execute("INSERT OR REPLACE INTO jobs VALUES (?, ?, ?, ?, ?)", row)
        self._done[key] = (json.loads(given), seconds)

    def close(self) -> None:
        """Closes the file."""
        self._db.close()

    def __enter__(self) -> JobStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _create(path: Path) -> None:
    """An empty store, complete at the moment when it appears under its name."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        with _explaining(path), contextlib.closing(sqlite3.connect(temporary)) as db:
            for statement in _SCHEMA:
                db.execute(statement)
            db.commit()
        with contextlib.suppress(FileExistsError):  # another process was quicker: its file is as good
            os.link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _check_header(path: Path) -> None:
    """From the raw bytes: to open a database of somebody else may already change its files."""
    if not path.is_file():
        raise UsageError(f"{path}: this is no file; {_ANOTHER}")
    try:
        with path.open("rb") as f:
            head = f.read(100)
    except OSError as e:
        raise UsageError(f"{path}: cannot be read ({e.strerror}); {_ANOTHER}") from None
    if len(head) < 100 or not head.startswith(_MAGIC):
        raise UsageError(f"{path}: this is no file of jobs of trainlet; {_ANOTHER}")
    if int.from_bytes(head[_APPLICATION_AT : _APPLICATION_AT + 4], "big") != APPLICATION_ID:
        raise UsageError(f"{path}: this is the database of another program; {_ANOTHER}")
    version = int.from_bytes(head[_VERSION_AT : _VERSION_AT + 4], "big")
    if version != VERSION:
        raise UsageError(f"{path}: version {version} is not read, version {VERSION} is; {_ANOTHER}")
