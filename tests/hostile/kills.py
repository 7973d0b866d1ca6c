# SPDX-License-Identifier: Apache-2.0
"""Commands that write, killed at random moments and started again: in the end there are the bytes of a run that nobody
stopped, and nothing besides: no file, no process."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from hostile import tensors
from hostile.tally import SHOWN

MOST_IN_A_ROW: Final = 3  # kills before a run may end
PATIENCE: Final = 600.0  # seconds for a run that nobody stops
GRACE: Final = 10.0  # seconds after a kill in which whoever was started may end
VOLATILE: Final = frozenset(("seconds", "images_per_second", "epoch_seconds", "step_seconds", "checksum"))
"""What is measured anew in every run, wherever it stands in a JSON object."""


@dataclass(frozen=True)
class Command:
    """A command that writes into ``out`` of the folder that it runs in. ``again`` gives the words that a user adds
    after it was stopped. ``cold``: it has to build a library, whose objects are there."""

    name: str
    words: tuple[str, ...]
    again: Callable[[Path], tuple[str, ...]] = lambda out: ()
    cold: bool = False
    module: str = "trainlet"


def _resume(out: Path) -> tuple[str, ...]:
    return ("--resume",) if any(out.rglob("checkpoint.safetensors")) else ()


_MODEL: Final = ("--model", "../../model.json")
_DATA: Final = ("--data", "../../data.npz")
COMMANDS: Final = {
    c.name: c
    for c in (
        Command("compile", ("compile", *_MODEL, "--scheme", "last:2", "--classes", "4", "--out", "out")),
        Command("quantise", ("../../float.json", "../../data.npz", "out"), module="hostile.quantise"),
        Command("train", ("train", *_MODEL, *_DATA, "--scheme", "last:2", "--epochs", "12", "--out", "out"),
                _resume, cold=True),
        Command("select", ("select", *_MODEL, *_DATA, "--sram", "64K", "--quick", "--no-measure", "--finalists", "1",
                           "--out", "out")),
        Command("demo", ("demo", "--on", "host", "--out", "out"), _resume),
    )
}  # fmt: skip


def write_inputs(folder: Path) -> None:
    """What all commands read."""
    from graphs import float_chain, int8_chain
    from separable import write_separable

    from trainlet.frontends import graph_file

    graph_file.save(int8_chain(), folder / "model.json")
    graph_file.save(float_chain(), folder / "float.json")
    write_separable(folder / "data.npz", 160)


# --- running ----------------------------------------------------------------------------------------------------


@dataclass
class Life:
    """One folder, in which a command is stopped and started until it has ended by itself."""

    command: Command
    root: Path
    warm: Path

    def __post_init__(self) -> None:
        for name in ("tmp", "home"):
            (self.root / name).mkdir(parents=True)
        shutil.copytree(self.warm, self.root / "cache")
        if self.command.cold:
            for library in (self.root / "cache").glob("*.so"):
                library.unlink()

    @property
    def out(self) -> Path:
        return self.root / "out"

    def start(self) -> subprocess.Popen[bytes]:
        """In a session of its own, so that whoever is left can be found."""
        more = self.command.again(self.out)
        where = {"TMPDIR": "tmp", "HOME": "home", "TRAINLET_CACHE": "cache"}
        env = {**os.environ, **{k: str(self.root / v) for k, v in where.items()}, "PYTHONPATH": _path()}
        with (self.root / "log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", self.command.module, *self.command.words, *more],
                cwd=self.root, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def finish(self) -> float:
        """Runs to the end; seconds. AssertionError where that fails."""
        began = time.monotonic()
        process = self.start()
        code = process.wait(PATIENCE)
        log = (self.root / "log").read_text(errors="replace")
        assert code == 0, f"exit code {code} when it was started again: {log[-1500:]}"
        return time.monotonic() - began

    def kill(self, rng: random.Random, usual: float) -> str:
        """Stops one run. Half of the kills are aimed at the time right after something was written."""
        process = self.start()
        before, delay = self._written(), rng.uniform(0, usual)
        if rng.random() < 0.5:
            deadline = time.monotonic() + usual
            while self._written() == before and time.monotonic() < deadline and process.poll() is None:
                time.sleep(0.0005)
            delay = rng.choice((0.0, rng.uniform(0, 0.01), rng.uniform(0, usual / 4)))
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(delay)
        process.kill()
        process.wait()
        return left_running(process.pid, GRACE)

    def _written(self) -> tuple[int, int]:
        """Changes with every file that is made below ``out`` and in the cache."""
        folders = [self.out, *(p for p in self.out.rglob("*") if p.is_dir())] if self.out.exists() else []
        with contextlib.suppress(OSError):  # a file may go while we look
            return len(folders), sum(len(os.listdir(f)) for f in (*folders, self.root / "cache"))
        return -1, -1


def _path() -> str:
    here = str(Path(__file__).parents[1])
    return os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])


def left_running(session: int, seconds: float) -> str:
    """What still runs of a session after a while; it is ended."""
    deadline = time.monotonic() + seconds
    while (found := list(_members(session))) and time.monotonic() < deadline:
        time.sleep(0.02)
    for pid, _ in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return ", ".join(name for _, name in found)


def _members(session: int) -> Iterator[tuple[int, str]]:
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            name, rest = re.fullmatch(r"\d+ \((.*)\) (.*)\n?", (folder / "stat").read_text(), re.DOTALL).groups()  # type: ignore[union-attr]
            state, _, _, sid = rest.split()[:4]
            if int(sid) == session and state != "Z":
                yield int(folder.name), name


# --- what is there in the end -----------------------------------------------------------------------------------


def _settled(value: Any) -> Any:
    """JSON without what is measured."""
    if isinstance(value, dict):
        return {k: _settled(v) for k, v in value.items() if k not in VOLATILE}
    return [_settled(v) for v in value] if isinstance(value, list) else value


def _json(raw: bytes) -> Any:
    return [_settled(json.loads(line)) for line in raw.splitlines()] if raw.count(b"\n{") else _settled(json.loads(raw))


def _tensors(raw: bytes) -> Any:
    header, arrays = tensors.read(raw)
    metadata = (header.pop("__metadata__", None) or {}).get("trainlet", "{}")
    return _settled(json.loads(metadata)), header, {k: a.tobytes() for k, a in arrays.items()}


def _rows(raw: bytes) -> Any:
    """Of a database, as far as it is the same in every run."""
    with tempfile.NamedTemporaryFile(suffix=".sqlite") as f:
        Path(f.name).write_bytes(raw)
        with contextlib.closing(sqlite3.connect(f.name)) as db:
            return sorted(db.execute("SELECT key, spec, result FROM jobs").fetchall())


_READ: Final[Mapping[str, Callable[[bytes], Any]]] = {
    ".json": _json, ".jsonl": _json, ".safetensors": _tensors, ".sqlite": _rows,
}  # fmt: skip


def final(out: Path) -> dict[str, Any]:
    """Every file below ``out``, without what is measured anew in each run."""
    found = {}
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        read = _READ.get(path.suffix, lambda raw: raw)
        found[str(path.relative_to(out))] = read(path.read_bytes())
    return found


def left_behind(life: Life) -> list[str]:
    """Temporary files and folders beside what a command is to write."""
    found = list((life.root / "tmp").iterdir())
    cache = life.root / "cache"
    found += [p for p in cache.rglob("*") if p.name.startswith((".", "tmp")) or ".tmp" in p.name]
    known = {p.name for p in (*life.root.iterdir(),)} - {"tmp", "home", "cache", "out", "log"}
    return sorted({*(str(p.relative_to(life.root)) for p in found), *known})


# --- many of them -----------------------------------------------------------------------------------------------


@dataclass
class Kills:
    """Counts of kills and of what was wrong afterwards."""

    commands: dict[str, dict[str, int]] = field(default_factory=dict)
    failures: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """``faults`` counts lives that did not end in the bytes of a run that nobody stopped, or left something."""
        names = ("differs", "refused", "files", "processes")
        faults = {n: sum(f["fault"] == n for f in self.failures) for n in names}
        kills = sum(c["kills"] for c in self.commands.values())
        return {"kills": kills, "commands": self.commands, "faults": faults, "failures": self.failures}


class Killer:
    """Kills one command after the other. ``folder`` holds inputs, a warm cache and one folder for each command."""

    def __init__(self, folder: Path, commands: Sequence[str] = tuple(COMMANDS)) -> None:
        self.folder = folder
        self.found = Kills()
        write_inputs(folder)
        self._warm = folder / "warm"
        self._warm.mkdir()
        self._sound = {name: self._reference(COMMANDS[name]) for name in commands}

    def _reference(self, command: Command) -> tuple[dict[str, Any], float]:
        """What a run leaves that nobody stops, and how long it takes with a warm cache."""
        life = Life(command, self.folder / command.name / "sound", self._warm)
        seconds = life.finish()
        made = [f for f in (life.root / "cache").iterdir() if f.is_file() and not (self._warm / f.name).exists()]
        if made:
            for file in made:
                shutil.copy(file, self._warm)
            life = Life(command, self.folder / command.name / "warm", self._warm)
            seconds = life.finish()
        assert not left_behind(life), f"{command.name} leaves {left_behind(life)} where nobody stops it"
        return final(life.out), seconds

    def live(self, name: str, seed: int, kills: int) -> None:
        """One life with so many kills; ``found`` counts it."""
        rng = random.Random(f"{name}:{seed}")
        sound, usual = self._sound[name]
        life = Life(COMMANDS[name], self.folder / name / f"life{seed}", self._warm)
        counts = self.found.commands.setdefault(name, {"kills": 0, "lives": 0})
        counts["lives"] += 1
        running = ""
        for _ in range(kills):
            running = running or life.kill(rng, usual)
            counts["kills"] += 1
        problems = list(self._problems(life, sound, running))
        for fault, detail in problems:
            again = f"python bench/hostile.py --kills {kills} --command {name} --first {seed}"
            self.found.failures.append(
                {"fault": fault, "command": name, "seed": seed, "kills": kills, "detail": detail, "repeat": again}
            )
        if not problems:
            shutil.rmtree(life.root)

    def _problems(self, life: Life, sound: Mapping[str, Any], running: str) -> Iterator[tuple[str, str]]:
        if running:
            yield "processes", f"still there 10 s after the kill: {running}"
        try:
            life.finish()
        except (AssertionError, subprocess.TimeoutExpired) as e:
            yield "refused", str(e)
            return
        got = final(life.out)
        wrong = sorted(n for n in sound if n not in got or got[n] != sound[n])
        if wrong:
            yield "differs", ", ".join(wrong[:SHOWN])
        left = [*left_behind(life), *(f"out/{n}" for n in sorted(got.keys() - sound.keys()))]
        if left:
            yield "files", ", ".join(left[:SHOWN])


def kill_many(folder: Path, count: int, first: int, commands: Sequence[str], most: int = MOST_IN_A_ROW) -> Kills:
    """``count`` kills, in turns over the commands."""
    killer = Killer(folder, commands)
    rng, seed, left = random.Random(first), first, count
    while left:
        for name in commands:
            kills = min(left, rng.randint(1, most))
            if kills:
                killer.live(name, seed, kills)
            left -= kills
        seed += 1
    return killer.found
