# SPDX-License-Identifier: Apache-2.0
"""The file that keeps finished jobs: one SQLite table, a transaction for each job, a checksum in each row."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
from collections.abc import Mapping
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
_SCHEMA: Final = (
    f"PRAGMA application_id = {APPLICATION_ID}",
    f"PRAGMA user_version = {VERSION}",
    "CREATE TABLE jobs (key TEXT PRIMARY KEY, spec TEXT NOT NULL, result TEXT NOT NULL, seconds REAL NOT NULL,"
    " checksum TEXT NOT NULL)",
)


def canonical(content: Mapping[str, Any]) -> str:
    """JSON that is the same text for the same content. Raises ValueError for numbers that are not finite."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)


def job_key(spec: Spec) -> str:
    """The SHA-256 of all that determines a job."""
    return hashlib.sha256(canonical(spec).encode()).hexdigest()


def _checksum(key: str, spec: str, result: str) -> str:
    return hashlib.sha256("\n".join((key, spec, result)).encode()).hexdigest()


class JobStore:
    """The finished jobs of a folder. Opening makes the file where there is none; UsageError, and not a byte is written,
    where it is another kind of file, of another version or damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._done: dict[str, tuple[Result, float]] = {}
        if not path.exists():
            _create(path)
        _check_header(path)
        self._db = sqlite3.connect(path, timeout=60)
        try:
            self._read()
        except sqlite3.DatabaseError as e:
            self._db.close()
            raise UsageError(f"{path}: damaged ({e}); {_ANOTHER}") from None
        except UsageError:
            self._db.close()
            raise

    def _read(self) -> None:
        found = self._db.execute("PRAGMA quick_check").fetchone()[0]
        if found != "ok":
            raise UsageError(f"{self.path}: damaged ({str(found).splitlines()[-1]}); {_ANOTHER}")
        for key, spec, result, seconds, checksum in self._db.execute(
            "SELECT key, spec, result, seconds, checksum FROM jobs"
        ):
            if checksum != _checksum(key, spec, result) or key != hashlib.sha256(spec.encode()).hexdigest():
                raise UsageError(f"{self.path}: damaged, job {str(key)[:12]} has not its own checksum; {_ANOTHER}")
            self._done[key] = (json.loads(result), float(seconds))

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
        """Keeps a finished job; on return it is on the disk."""
        key, text, given = job_key(spec), canonical(spec), canonical(result)
        row = (key, text, given, seconds, _checksum(key, text, given))
        with self._db:
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
        db = sqlite3.connect(temporary)
        try:
            for statement in _SCHEMA:
                db.execute(statement)
            db.commit()
        finally:
            db.close()
        with contextlib.suppress(FileExistsError):  # another process was quicker: its file is as good
            os.link(temporary, path)
    except sqlite3.Error as e:
        raise UsageError(f"{path}: cannot be written ({e}); give a folder that can") from None
    finally:
        temporary.unlink(missing_ok=True)


def _check_header(path: Path) -> None:
    """From the raw bytes: to open a database of somebody else may already change its files."""
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
