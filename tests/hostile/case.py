# SPDX-License-Identifier: Apache-2.0
"""What a case is: a kind of hostile input, the folders it has, its limits, and what came of it."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

LOG: Final = "log"
"""In the root of a case: what it printed."""

FAULTS: Final = ("tracebacks", "crashes", "hangs", "memory", "outside", "programs", "mismatches")
"""What is counted: an error that is not one of the project's, or an exit code that it does not document; a signal that
ended the child; no end; more memory than allowed; files written elsewhere than in ``--out``; programs started by what
only reads; bytes that differ from those of the reference."""


class MismatchFound(Exception):  # noqa: N818  it is what an attack looks for, not an error of the harness
    """What ran gave other bytes than the reference."""


class RefusedError(PermissionError):
    """The harness did not let it happen."""


@dataclass(frozen=True)
class Limits:
    """Of one case: wall-clock seconds, and bytes that it may take beyond what the process had. What was only asked for
    counts too, but where that is much by design: in emulators and sanitizers only what is ``resident``."""

    seconds: float = 30.0
    nbytes: int = 1 << 30
    resident: bool = False


@dataclass(frozen=True)
class Place:
    """The folders of a case. ``base`` holds sound files, which nobody writes; ``work`` the hostile ones; ``out`` is for
    ``--out``."""

    base: Path
    root: Path

    @property
    def work(self) -> Path:
        return self.root / "up" / "work"

    @property
    def out(self) -> Path:
        return self.work / "out"

    @property
    def tmp(self) -> Path:
        return self.root / "tmp"

    def make(self) -> None:
        """Makes the folders."""
        for folder in (self.work, self.tmp):
            folder.mkdir(parents=True)

    def copy(self, *names: str) -> list[Path]:
        """Copies sound files into ``work``; returns where they are then."""
        return [Path(shutil.copyfile(self.base / n, self.work / n)) for n in names]


Attack = Callable[[], str]
"""Runs what is attacked; says in a word what came of it, such as ``exit 2``."""


@dataclass(frozen=True)
class Kind:
    """One kind of hostile input. ``prepare`` writes sound files into a folder, once; ``make`` writes a hostile input
    and returns the attack. ``compiles``: what is attacked may call a C compiler, and may load what that made.
    ``batch``: how many cases one child may get."""

    name: str
    prepare: Callable[[Path], None]
    make: Callable[[random.Random, Place], Attack]
    compiles: bool = False
    limits: Limits = field(default_factory=Limits)
    batch: int = 25


@dataclass(frozen=True)
class Verdict:
    """``faults`` maps each of FAULTS that was found to what is known about it."""

    kind: str
    seed: int
    outcome: str
    faults: Mapping[str, str]
    seconds: float
    nbytes: int
