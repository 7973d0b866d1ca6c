# SPDX-License-Identifier: Apache-2.0
"""The life of a child: cases of one kind, one after the other, until one of them finds a fault. What it finds goes
through a pipe, a JSON object a line: ``ready`` once the hostile files are there, then what came of the attack."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import sys
import tempfile
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from hostile.case import LOG, Kind, MismatchFound, Place, RefusedError
from hostile.watch import Watch, changes, snapshot

ROOM: Final = 3  # the address space of a child ends at so many times the memory that is allowed
MARK: Final = "Traceback (most recent call last)"


def live(kind: Kind, seeds: Sequence[int], base: Path, root: Path, pipe: int) -> None:
    """Never returns."""
    os.setpgid(0, 0)
    try:
        _confine(kind)
        watch = Watch(kind.compiles)
        sys.addaudithook(watch)
        for seed in seeds:
            if _case(kind, seed, Place(base, root / str(seed)), watch, pipe):
                break
    except BaseException:
        watch.on = False
        _say(pipe, broken=traceback.format_exc())
    os._exit(0)


def _say(pipe: int, **found: Any) -> None:
    data = (json.dumps(found) + "\n").encode()
    while data:
        data = data[os.write(pipe, data) :]


def _confine(kind: Kind) -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.fsync = lambda handle: None  # nobody pulls the plug here
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 31, 1 << 31))
    warnings.filterwarnings("error", category=RuntimeWarning, module=r"trainlet\.")  # a number that nobody looked at
    if not kind.limits.resident:
        end = _virtual("VmSize") + ROOM * kind.limits.nbytes
        resource.setrlimit(resource.RLIMIT_AS, (end, end))


def _enter(place: Place) -> None:
    os.environ |= {"TMPDIR": str(place.tmp), "HOME": str(place.root)}
    tempfile.tempdir = None
    os.chdir(place.work)
    log = os.open(place.root / LOG, os.O_WRONLY | os.O_CREAT)
    for to in (1, 2):
        os.dup2(log, to)
    os.close(log)


def _case(kind: Kind, seed: int, place: Place, watch: Watch, pipe: int) -> bool:
    """Whether there was a fault."""
    place.make()
    attack = kind.make(random.Random(f"{kind.name}:{seed}"), place)
    _enter(place)
    before = snapshot(place)
    _say(pipe, ready=seed)
    start = _virtual("VmSize"), _resident()
    watch.start(place.out, place.tmp, Path(os.environ.get("TRAINLET_CACHE") or place.tmp))
    found: dict[str, Any] = {}
    try:
        found["outcome"] = attack()
    except MismatchFound as e:
        found |= {"outcome": "mismatch", "mismatches": str(e)}
    except RefusedError:
        found["outcome"] = "refused"
    except BaseException as e:
        found |= {"outcome": type(e).__name__, "tracebacks": traceback.format_exc()[-4000:]}
        if isinstance(e, MemoryError):
            found["memory"] = "more was asked for than there is"
    with contextlib.suppress(BaseException):
        sys.stdout.flush()
        sys.stderr.flush()
    watch.on = False
    found = {**_seen(kind, place, watch, before, start), **found}
    _say(pipe, seed=seed, **found)
    return found.keys() > {"outcome", "nbytes"}


def _seen(kind: Kind, place: Place, watch: Watch, before: dict[str, str], start: tuple[int, int]) -> dict[str, Any]:
    """Faults beside what the attack itself said, and the largest memory in bytes."""
    found: dict[str, Any] = {}
    log = (place.root / LOG).read_text(errors="replace")
    if MARK in log:
        found["tracebacks"] = log[log.index(MARK) :][-4000:]
    changed = changes(before, snapshot(place))
    outside = [*watch.outside, *([f"changed beside --out: {changed}"] if changed else [])]
    if outside:
        found["outside"] = "; ".join(outside[:5])
    programs = [*watch.programs, *(["a process is left running"] if _has_children() else [])]
    if programs:
        found["programs"] = "; ".join(programs[:5])
    usage = [resource.getrusage(w).ru_maxrss << 10 for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    asked = 0 if kind.limits.resident else _virtual("VmPeak") - start[0]
    found["nbytes"] = max(asked, usage[0] - start[1], usage[1] - start[1])
    if found["nbytes"] > kind.limits.nbytes:
        found["memory"] = f"more than {kind.limits.nbytes} bytes beyond what there was before"
    return found


def _has_children() -> bool:
    """Whether processes that it started still run."""
    with contextlib.suppress(ChildProcessError):
        while True:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                return True
    return False


def _virtual(name: str) -> int:
    """VmSize or VmPeak of this process in bytes."""
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith(f"{name}:"))
    return int(line.split()[1]) << 10


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
