# SPDX-License-Identifier: Apache-2.0
"""A folder of files that may be written again. Only what an earlier call wrote, and nobody has changed since, is
replaced; what was stopped at any moment, the same call completes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

from trainlet.errors import UsageError
from trainlet.files import locked, sync

MANIFEST: Final = "manifest.json"
FORMAT: Final = "trainlet.folder"
VERSION: Final = 1
_NEW: Final = ".trainlet-new"  # where files are, until all of them are on the disk
_MOST: Final = 1 << 22
_SHA256: Final = re.compile("[0-9a-f]{64}")
_OTHER: Final = "name an empty or a new folder"

Known = Mapping[str, frozenset[str]]
"""By name the SHA-256 of what was written there: one, or two where a call was stopped."""


@dataclass(frozen=True, slots=True)
class Written:
    """``files`` are there as they were to be written; ``kept`` as their owner has changed them."""

    files: tuple[Path, ...]
    kept: tuple[str, ...]


def check_folder(out: Path) -> None:
    """UsageError where ``out`` holds files, and ``write_folder`` did not write its manifest."""
    _known(out)


def write_folder(
    out: Path, files: Mapping[str, bytes], facts: Mapping[str, Any], own: Sequence[str], *, overwrite: bool
) -> Written:
    """Writes ``files``, by relative path, and a manifest with ``facts``. What an earlier call wrote and this one does
    not goes, unless it was changed since. Of ``own``, files and folders (``examples/``) that their reader is meant to
    change, what was changed is kept; any other change is refused by name. To ``overwrite`` is to lose all changes.
    UsageError, and nothing has changed, where something is refused."""
    out.mkdir(parents=True, exist_ok=True)
    with locked(out.resolve()):
        before = _known(out)
        sums = {n: hashlib.sha256(data).hexdigest() for n, data in sorted(files.items())}
        there = {n: _sha256(out / n) for n in {*files, *before}}
        changed = [n for n in files if there[n] not in {"", sums[n], *before.get(n, ())}]
        kept = () if overwrite else tuple(n for n in changed if n in before and n.startswith(tuple(own)))
        lost = [] if overwrite else [n for n in changed if n not in kept]
        _refuse(out, [n for n in files if _in_the_way(out, n)], "not a file, or behind a link", "move it away")
        _refuse(out, lost, "not as trainlet wrote it", "move it away, or lose it with --overwrite")
        new = {n: data for n, data in files.items() if n not in kept and there[n] != sums[n]}
        gone = [n for n in sorted(before.keys() - files) if there[n] in before[n] and not _in_the_way(out, n)]
        _replace(out, new, gone, *_manifests({"format": FORMAT, "version": VERSION, **facts}, sums, before))
    return Written(tuple(out / n for n in files if n not in kept), kept)


# --- what is there ----------------------------------------------------------------------------------------------


def _known(out: Path) -> Known:
    """What earlier calls wrote; nothing where the folder is empty, or not there."""
    if not out.exists() or not any(p for p in out.iterdir() if not _is_left(p)):
        return {}
    found = _read_manifest(out / MANIFEST)
    if found is None:
        raise UsageError(f"{out}: the folder holds files that trainlet did not write; {_OTHER}")
    if found["version"] != VERSION:
        raise UsageError(f"{out}: written by a trainlet whose folders are not of version {VERSION}; {_OTHER}")
    names = {*found["sha256"], *found["before"]}
    return {n: frozenset((found["sha256"].get(n, ""), *found["before"].get(n, ()))) - {""} for n in names}


def _is_left(path: Path) -> bool:
    """Whether it is what a stopped call left."""
    return path.name == _NEW and path.is_dir() and not path.is_symlink()


def _read_manifest(path: Path) -> dict[str, Any] | None:
    """What ``_manifest`` wrote; None for anything else."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return None
        with path.open("rb") as f:
            found = json.loads(f.read(_MOST))
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or found.get("format") != FORMAT or type(found.get("version")) is not int:
        return None
    written, before = found.get("sha256"), found.setdefault("before", {})
    if not isinstance(written, dict) or not isinstance(before, dict):
        return None
    rows = [*((n, [s]) for n, s in written.items()), *before.items()]
    return found if all(_stays_inside(n) and _are_sums(s) for n, s in rows) else None


def _stays_inside(name: str) -> bool:
    return name.isprintable() and "\\" not in name and not {"", ".", ".."} & set(name.split("/"))


def _are_sums(sums: object) -> bool:
    return isinstance(sums, list) and all(isinstance(s, str) and _SHA256.fullmatch(s) for s in sums)


def _sha256(path: Path) -> str:
    """Of a file; empty where there is none."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return ""
        with path.open("rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    except (FileNotFoundError, NotADirectoryError):
        return ""


def _in_the_way(out: Path, name: str) -> bool:
    """Whether a link or something that is no folder is above the file, or something that is no file in its place."""
    path, *above = (out / p for p in (PurePosixPath(name), *PurePosixPath(name).parents[:-1]))
    return _is_other(path, stat.S_ISREG) or any(_is_other(p, stat.S_ISDIR) for p in above)


def _is_other(path: Path, kind: Callable[[int], bool]) -> bool:
    try:
        return not kind(path.lstat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def _refuse(out: Path, names: Sequence[str], why: str, then: str) -> None:
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise UsageError(f"{out}: {', '.join(names[:5])}{more}: {why}; {then}, or give another --out")


# --- writing ----------------------------------------------------------------------------------------------------


def _manifests(facts: Mapping[str, Any], sums: Mapping[str, str], before: Known) -> tuple[bytes, bytes]:
    """The one while files are replaced, which knows both those of before and the new ones, and the last."""
    last = {**facts, "sha256": sums}
    first = {**last, "before": {n: sorted(s) for n, s in sorted(before.items())}}
    return (json.dumps(first, indent=2) + "\n").encode(), (json.dumps(last, indent=2) + "\n").encode()


def _replace(out: Path, files: Mapping[str, bytes], gone: Sequence[str], first: bytes, last: bytes) -> None:
    """All bytes are on the disk before the first file of before is touched."""
    with _staging(out) as new:
        staged = [_stage(new / str(i), data) for i, data in enumerate((first, *files.values(), last))]
        staged[0].replace(out / MANIFEST)
        sync(out)
        for path, name in zip(staged[1:-1], files, strict=True):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            path.replace(out / name)
        _remove(out, gone)
        for folder in {(out / name).parent for name in files}:
            sync(folder)
        staged[-1].replace(out / MANIFEST)
        sync(out)


def _stage(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    sync(path)
    return path


@contextlib.contextmanager
def _staging(out: Path) -> Iterator[Path]:
    new = out / _NEW
    if new.exists():
        shutil.rmtree(new)
    new.mkdir()
    try:
        yield new
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _remove(out: Path, names: Sequence[str]) -> None:
    """The files, and the folders that are then empty."""
    for name in names:
        (out / name).unlink()
    for folder in sorted({p for n in names for p in PurePosixPath(n).parents[:-1]}, reverse=True):
        with contextlib.suppress(OSError):
            os.rmdir(out / folder)
