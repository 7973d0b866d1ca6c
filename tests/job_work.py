# SPDX-License-Identifier: Apache-2.0
"""Work for tests of jobs: functions that another process can import; as a program it does jobs until all are done."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from trainlet.errors import UsageError
from trainlet.select.jobs import LocalExecutor, run_jobs
from trainlet.select.store import JobStore

COUNT = 30


def square(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The square of n, and who computed it."""
    return {"square": spec["n"] ** 2, "pid": os.getpid()}


def slow_square(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The same after a while, so that both workers get some."""
    time.sleep(0.2)
    return square(spec)


def refuse(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Refuses 3."""
    if spec["n"] == 3:
        raise UsageError("3 is refused; give another")
    return square(spec)


def die(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Ends its process as the kernel does when memory is short."""
    os.kill(os.getpid(), 9)
    return {}


def logged(log: str, spec: Mapping[str, Any]) -> dict[str, Any]:
    """Appends n to a log, then takes its time."""
    with Path(log).open("a") as f:
        f.write(f"{spec['n']}\n")
    time.sleep(0.02)
    return {"square": spec["n"] ** 2}


def specs(count: int = COUNT) -> list[dict[str, Any]]:
    """Jobs with a number each."""
    return [{"kind": "square", "n": n} for n in range(count)]


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    with JobStore(folder / "jobs.sqlite") as store:
        executor = LocalExecutor(2)
        run_jobs(store, executor, partial(logged, str(folder / "log")), specs())
        executor.close()
