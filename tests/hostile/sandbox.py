# SPDX-License-Identifier: Apache-2.0
"""Runs cases in children, under limits of time and memory, and judges what came of them. A child that found a fault, or
died of it, has run its last case; another one goes on."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hostile.case import FAULTS, LOG, Kind, Verdict
from hostile.child import live


def run_cases(kind: Kind, seeds: Sequence[int], base: Path, keep: Path | None = None) -> Iterator[Verdict]:
    """One verdict for each of ``seeds``, over the sound files in ``base``. ``keep``: a folder in which everything is
    left; the files of a case lie in its folder of the seed's name."""
    root = Path(tempfile.mkdtemp(prefix="hostile-")) if keep is None else keep
    left = list(seeds)
    try:
        while left:
            for verdict in _one_child(kind, tuple(left), base, root):
                left.remove(verdict.seed)
                if keep is None:
                    shutil.rmtree(root / str(verdict.seed), ignore_errors=True)
                yield verdict
    finally:
        if keep is None:
            shutil.rmtree(root, ignore_errors=True)


def _one_child(kind: Kind, seeds: Sequence[int], base: Path, root: Path) -> Iterator[Verdict]:
    """The verdicts of one child: one at least."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(ours)
        live(kind, seeds, base, root, theirs)
    os.close(theirs)
    with contextlib.suppress(OSError):  # the child does it too, and one of both is first
        os.setpgid(pid, pid)
    try:
        yield from _listen(kind, seeds, pid, ours, root)
    finally:
        os.close(ours)
        with contextlib.suppress(ProcessLookupError):  # what it left behind, and itself where nobody listens any more
            os.killpg(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


def _listen(kind: Kind, seeds: Sequence[int], pid: int, pipe: int, root: Path) -> Iterator[Verdict]:
    began, done = time.monotonic(), 0
    for said in _lines(pipe, kind.limits.seconds):
        now = time.monotonic()
        if "broken" in said:
            raise RuntimeError(f"{kind.name}, seed {seeds[done]}: the harness itself failed\n{said['broken']}")
        if "ready" in said:
            began = now
            continue
        done += 1
        faults = {k: said[k] for k in FAULTS if k in said}
        yield Verdict(kind.name, said["seed"], said["outcome"], faults, now - began, said["nbytes"])
        if faults:
            return
    if done == len(seeds):
        return
    seconds = time.monotonic() - began
    if seconds >= kind.limits.seconds:
        faults = {"hangs": f"no end after {kind.limits.seconds:g} s"}
    else:
        faults = {"crashes": f"{_log(root / str(seeds[done]) / LOG)}\n{_ended(pid)}".strip()}
    yield Verdict(kind.name, seeds[done], *faults, faults, seconds, 0)


def _lines(pipe: int, seconds: float) -> Iterator[dict[str, Any]]:
    """What the child says, until it ends or is silent for so long."""
    text = b""
    while select.select([pipe], [], [], seconds)[0]:
        data = os.read(pipe, 1 << 16)
        if not data:
            return
        *lines, text = (text + data).split(b"\n")
        for line in lines:
            yield json.loads(line)


def _ended(pid: int) -> str:
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        return signal.Signals(os.WTERMSIG(status)).name
    return f"ended itself with {os.WEXITSTATUS(status)}"


def _log(path: Path) -> str:
    """The end of what a case printed; from the first words of a sanitizer on, where there are any."""
    text = path.read_text(errors="replace") if path.exists() else ""
    lines = text.splitlines()
    first = next((i for i, line in enumerate(lines) if "runtime error:" in line or "ERROR:" in line), None)
    return text[-2000:] if first is None else "\n".join(lines[first : first + 12])
