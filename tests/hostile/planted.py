# SPDX-License-Identifier: Apache-2.0
"""Faults that the harness must find: for each of its counters readers that are wrong in one way."""

from __future__ import annotations

import ctypes
import mmap
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np

from hostile.case import Attack, Kind, Limits, MismatchFound, Place
from hostile.commands import UndocumentedError

Body = Callable[[Place], object]


def _nothing(base: Path) -> None:
    """No sound file is needed."""


def _kind(name: str, body: Body, *, compiles: bool = False, seconds: float = 20.0, nbytes: int = Limits.nbytes) -> Kind:
    def make(rng: random.Random, place: Place) -> Attack:
        place.out.mkdir()
        return lambda: str(body(place))

    return Kind(f"planted-{name}", _nothing, make, compiles, Limits(seconds, nbytes))


def _nothing_wrong(place: Place) -> str:
    (place.out / "result").write_text("x")
    return "exit 0"


def _key_error(place: Place) -> object:
    return {}["scale"]


def _thread(place: Place) -> None:
    thread = threading.Thread(target=lambda: {}["scale"])
    thread.start()
    thread.join()


def _exit_code(place: Place) -> None:
    raise UndocumentedError("exit code 1")


def _segfault(place: Place) -> None:
    ctypes.string_at(8)


def _abort(place: Place) -> None:
    os.kill(os.getpid(), signal.SIGABRT)


def _quits(place: Place) -> None:
    os._exit(0)


def _sleep(place: Place) -> None:
    time.sleep(60)


def _spins(place: Place) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    while True:
        pass


def _fifo(place: Place) -> None:
    os.mkfifo(place.out / "x.png")
    (place.out / "x.png").read_bytes()


_SOME: Final = 1 << 25


def _fills(place: Place) -> None:
    np.ones(2 * _SOME, np.uint8)


def _fills_a_child(place: Place) -> None:
    """Its own memory stays small."""
    subprocess.run([sys.executable, "-c", f"bytes(b'x') * {6 * _SOME}"], check=True)


def _asks(place: Place) -> None:
    """Memory that is asked for and never touched; it is let go again before the end."""
    mmap.mmap(-1, 2 << 30).close()


def _asks_for_all(place: Place) -> None:
    np.empty(1 << 50, np.uint8)


def _above(place: Place) -> None:
    (place.work.parent / "x.json").write_text("{}")


def _absolute(place: Place) -> None:
    Path("/var/tmp/hostile-planted").write_text("x")


def _beside(place: Place) -> None:
    Path("x").mkdir()


def _through_a_link(place: Place) -> None:
    (place.out / "link").symlink_to("..")
    (place.out / "link" / "x").write_text("x")


def _renames(place: Place) -> None:
    (place.out / "x").write_text("x")
    (place.out / "x").rename(place.work / "x")


def _below_python(place: Place) -> None:
    """No audit hook sees it."""
    ctypes.CDLL(None).mkdir(os.fsencode(place.work / "x"), 0o700)


def _leaves_a_file(place: Place) -> None:
    (place.tmp / "half-written").write_text("x")


class _Runs:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("true",)


def _unpickles(place: Place) -> None:
    pickle.loads(pickle.dumps(_Runs()))


def _starts(place: Place) -> None:
    subprocess.run(["true"], check=False)


def _leaves_a_process(place: Place) -> None:
    subprocess.Popen(["sleep", "60"])


def _differs(place: Place) -> None:
    raise MismatchFound("step 3: state ['conv.1.bias']")


SOUND: Final = _kind("nothing", _nothing_wrong)
WRONG: Final = {
    "tracebacks": (_kind("key-error", _key_error), _kind("thread", _thread), _kind("exit-code", _exit_code)),
    "crashes": (_kind("segfault", _segfault, compiles=True), _kind("abort", _abort), _kind("quits", _quits)),
    "hangs": (
        _kind("sleep", _sleep, seconds=0.15),
        _kind("spins", _spins, seconds=0.15),
        _kind("fifo", _fifo, seconds=0.15),
    ),
    "memory": (
        _kind("fills", _fills, nbytes=_SOME),
        _kind("fills-a-child", _fills_a_child, nbytes=3 * _SOME, compiles=True),
        _kind("asks", _asks),
        _kind("asks-for-all", _asks_for_all),
    ),
    "outside": (
        _kind("above", _above),
        _kind("absolute", _absolute),
        _kind("beside", _beside),
        _kind("through-a-link", _through_a_link),
        _kind("renames", _renames),
        _kind("below-python", _below_python, compiles=True),
        _kind("leaves-a-file", _leaves_a_file),
    ),
    "programs": (
        _kind("unpickles", _unpickles),
        _kind("starts", _starts),
        _kind("leaves-a-process", _leaves_a_process, compiles=True),
    ),
    "mismatches": (_kind("differs", _differs),),
}
"""For each counter the readers that it must count."""

KINDS: Final = (SOUND, *(k for kinds in WRONG.values() for k in kinds))
