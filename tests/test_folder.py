# SPDX-License-Identifier: Apache-2.0
"""A folder that is written again: stopped at any moment it is completed by the same call, and nothing in it that
somebody else wrote is lost."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from graphs import int8_chain

from trainlet.cli import main
from trainlet.errors import UsageError
from trainlet.frontends import graph_file as irfile
from trainlet.toolchain import folder
from trainlet.toolchain.folder import MANIFEST, write_folder

FIRST = {"README.md": b"read", "src/a.c": b"a", "src/b.c": b"b", "port/link.ld": b"link", "examples/main.c": b"main"}
SECOND = {**FIRST, "src/a.c": b"another a", "src/new.c": b"new"}
del SECOND["port/link.ld"]
FACTS = {"model": "x"}
OWN = ("README.md", "examples/")


def write(out: Path, files: Mapping[str, bytes], *, overwrite: bool = False) -> tuple[str, ...]:
    return write_folder(out, files, FACTS, OWN, overwrite=overwrite).kept


def content(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


# --- stopped at any moment --------------------------------------------------------------------------------------


class Killed(BaseException):
    """From then on nothing on the disk changes, as after a kill."""


@dataclass
class Stop:
    """Raises ``error`` once ``left`` files were changed; ``killed`` at every later change too. A full disk refuses only
    what fills it."""

    left: int
    error: BaseException
    killed: bool
    met: bool = False

    def count(self) -> None:
        if self.met and not self.killed:
            return
        self.met = self.met or self.left == 0
        self.left -= 1
        if self.met:
            raise self.error


STOPS: list[Stop] = []
FILLS = frozenset(("open", "os.mkdir", "os.rename"))
CHANGES = FILLS | {"os.remove", "os.rmdir", "shutil.rmtree"}


def _hook(event: str, args: tuple[Any, ...]) -> None:
    counted = STOPS and event in (CHANGES if STOPS[-1].killed else FILLS)
    if counted and (event != "open" or args[2] & (os.O_WRONLY | os.O_RDWR)):
        STOPS[-1].count()


sys.addaudithook(_hook)


@contextmanager
def stopped_after(changes: int, error: BaseException) -> Iterator[Stop]:
    stop = Stop(changes, error, isinstance(error, Killed))
    STOPS.append(stop)
    try:
        with suppress(type(error)):
            yield stop
    finally:
        STOPS.clear()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "sync", lambda path: None)


def empty(out: Path) -> None:
    out.mkdir()


def earlier(out: Path) -> None:
    write(out, FIRST)
    (out / "mine.txt").write_bytes(b"mine")
    (out / "examples" / "main.c").write_bytes(b"my example")


@pytest.mark.parametrize("before", [empty, earlier])
@pytest.mark.parametrize("error", [Killed(), OSError(errno.ENOSPC, "no space")], ids=["killed", "full"])
def test_a_call_that_is_stopped_is_completed_by_the_same_call(
    quick: None, tmp_path: Path, before: Callable[[Path], None], error: BaseException
) -> None:
    before(tmp_path / "whole")
    write(tmp_path / "whole", SECOND)
    want = content(tmp_path / "whole")
    for n in range(1000):
        out = tmp_path / str(n)
        before(out)
        with stopped_after(n, error) as stop:
            write(out, SECOND)
        assert stop.killed or not (out / ".trainlet-new").exists(), "a full disk leaves nothing"
        write(out, SECOND)
        assert content(out) == want, f"after {n} changes"
        if not stop.met:
            break
    assert n > 10


def test_what_was_stopped_is_completed_by_another_call_too(quick: None, tmp_path: Path) -> None:
    """The names and bytes of both calls are known until one has ended."""
    for n in range(1000):
        out = tmp_path / str(n)
        write(out, FIRST)
        with stopped_after(n, Killed()) as stop:
            write(out, SECOND)
        with stopped_after(n, Killed()):
            write(out, {**FIRST, "src/b.c": b"third", "src/other.c": b""})
        write(out, FIRST)
        assert content(out).keys() == {*FIRST, MANIFEST}
        if not stop.met:
            break
    assert n > 10


def test_a_full_disk_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, FIRST)
    before = content(tmp_path)

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "no space left on device", str(path))

    monkeypatch.setattr(folder, "sync", full)
    with pytest.raises(OSError, match="no space"):
        write(tmp_path, SECOND)
    assert content(tmp_path) == before
    assert not (tmp_path / ".trainlet-new").exists()


COMPILE = """
import signal, sys
changes = 0
def hook(event, args):
    global changes
    if event == "os.rename" and str(args[1]).startswith({out!r}):
        changes += 1
        if changes == 20:
            signal.raise_signal(signal.SIGKILL)
sys.addaudithook(hook)
from trainlet.cli import main
sys.exit(main({args!r}))
"""


def test_a_compile_that_is_killed_is_completed_by_the_same_command(tmp_path: Path) -> None:
    irfile.save(int8_chain(), tmp_path / "chain.json")
    out = tmp_path / "out"
    args = ["compile", "--model", str(tmp_path / "chain.json"), "--scheme", "head", "--classes", "3", "--out", str(out)]
    code = COMPILE.format(out=str(out), args=args)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert main(args) == 0
    sums = json.loads((out / MANIFEST).read_text())["sha256"]
    assert content(out).keys() == {*sums, MANIFEST}
    assert {n: folder._sha256(out / n) for n in sums} == sums


# --- what somebody else wrote -----------------------------------------------------------------------------------

FOREIGN = {
    "no manifest": None,
    "not JSON": "{",
    "deep": "[" * 100_000,
    "a list": "[]",
    "of an extension": '{"manifest_version": 3, "name": "x", "version": "1.0", "sha256": {}}',
    "keys of before": '{"trainlet": "0.1", "command": "compile", "model": "x", "sha256": {"src/a.c": "0"}}',
    "no hash": json.dumps({"format": "trainlet.folder", "version": 1, "sha256": {"src/a.c": "0"}}),
    "outside": json.dumps({"format": "trainlet.folder", "version": 1, "sha256": {"../a.c": "0" * 64}}),
    "absolute": json.dumps({"format": "trainlet.folder", "version": 1, "sha256": {"/etc/passwd": "0" * 64}}),
    "another version": json.dumps({"format": "trainlet.folder", "version": 2, "sha256": {}}),
}


@pytest.mark.parametrize("manifest", FOREIGN.values(), ids=FOREIGN)
def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path, manifest: str | None) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "README.md").write_text("theirs")
    (tmp_path / "src" / "a.c").write_text("theirs")
    if manifest is not None:
        (tmp_path / MANIFEST).write_text(manifest)
    before = content(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="name an empty or a new folder"):
            write(tmp_path, FIRST, overwrite=overwrite)
    assert content(tmp_path) == before


def test_a_forged_manifest_takes_no_file_with_it(tmp_path: Path) -> None:
    """It has our keys, but not the hashes of the files."""
    (tmp_path / "README.md").write_text("theirs")
    (tmp_path / "gone.c").write_text("theirs")
    sums = {"README.md": "0" * 64, "gone.c": "0" * 64}
    (tmp_path / MANIFEST).write_text(json.dumps({"format": "trainlet.folder", "version": 1, "sha256": sums}))
    assert write(tmp_path, FIRST) == ("README.md",)
    assert (tmp_path / "README.md").read_text() == (tmp_path / "gone.c").read_text() == "theirs"


def to_link(path: Path, elsewhere: Path) -> None:
    path.unlink()
    path.symlink_to(elsewhere / "file")


def to_folder(path: Path, elsewhere: Path) -> None:
    path.unlink()
    path.mkdir()


def to_pipe(path: Path, elsewhere: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def to_link_above(path: Path, elsewhere: Path) -> None:
    (path.parent).rename(elsewhere / "src")
    path.parent.symlink_to(elsewhere / "src")


def to_file_above(path: Path, elsewhere: Path) -> None:
    path.parent.rename(elsewhere / "src")
    path.parent.write_text("")


@pytest.mark.parametrize("change", [to_link, to_folder, to_pipe, to_link_above, to_file_above])
def test_nothing_is_written_through_what_is_no_file(tmp_path: Path, change: Callable[[Path, Path], None]) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").write_bytes(FIRST["src/a.c"])
    write(out, FIRST)
    change(out / "src" / "a.c", elsewhere)
    before = content(elsewhere)
    with pytest.raises(UsageError, match=r"src/a\.c.*: not a file, or behind a link; move it away"):
        write(out, SECOND, overwrite=True)
    assert content(elsewhere) == before


def test_nothing_is_removed_through_a_link(tmp_path: Path) -> None:
    """Although it has the bytes that were written in its place."""
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    write(out, FIRST)
    elsewhere.mkdir()
    (out / "port").rename(elsewhere / "port")
    (out / "port").symlink_to(elsewhere / "port")
    write(out, SECOND)
    assert content(elsewhere) == {"port/link.ld": b"link"}


HOLDS = """
import sys
from pathlib import Path
from trainlet.files import locked
with locked(Path(sys.argv[1]), wait=False): pass
"""


def test_two_calls_wait_for_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    met = []

    def sync(path: Path) -> None:
        done = subprocess.run([sys.executable, "-c", HOLDS, str(tmp_path)], capture_output=True, text=True, check=False)
        met.append("BlockingIOError" in done.stderr)
        monkeypatch.setattr(folder, "sync", lambda path: None)

    monkeypatch.setattr(folder, "sync", sync)
    write(tmp_path, FIRST)
    assert met == [True]
