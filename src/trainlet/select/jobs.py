# SPDX-License-Identifier: Apache-2.0
"""Jobs: runs keyed by the hash of all that determines them, done once, kept in one SQLite file, executed by processes
here or by the workers of a Dask cluster.

Only the process that asks writes the file, one transaction for each finished job, so that a stop at any moment loses no
more than the jobs that were under way."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, Final, Protocol

from trainlet.errors import DeviceError, ToolMissingError, UsageError
from trainlet.select.store import JobStore, Result, Spec, job_key
from trainlet.train.loop import Progress, Silent

Work = Callable[[Spec], Result]
"""Does a job. A function of a module, or a functools.partial of one, so that another process can find it."""

# --- who does them ----------------------------------------------------------------------------------------------


class Executor(Protocol):
    """Does jobs, several at a time."""

    @property
    def workers(self) -> int:
        """How many at a time."""

    def run(self, work: Work, specs: Sequence[Spec]) -> Iterator[tuple[int, Result, float]]:
        """Index, result and seconds of each job, in the order in which they finish. What ``work`` raises is raised
        here; jobs that have not begun are then dropped."""

    def close(self) -> None:
        """Ends the workers."""


def timed(work: Work, spec: Spec) -> tuple[Result, float]:
    """The result and how many seconds it took."""
    began = time.perf_counter()
    result = work(spec)
    return result, time.perf_counter() - began


def _serve(connection: Connection) -> None:
    """A worker's life: jobs come through the connection until it is closed, also by the death of the other side."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the one that asks ends us
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            work, spec = connection.recv()
            answer: object
            try:
                answer = timed(work, spec)
            except Exception as e:
                answer = e
            connection.send(answer)


_THREADS: Final = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class LocalExecutor:
    """``jobs`` processes on this machine, one thread each; they start with the first job."""

    def __init__(self, jobs: int) -> None:
        if jobs < 1:
            raise UsageError(f"--jobs {jobs}: give at least 1 process")
        self._count = jobs
        self._workers: list[tuple[multiprocessing.process.BaseProcess, Connection]] = []

    @property
    def workers(self) -> int:
        return self._count

    def _start(self, wanted: int) -> None:
        context = multiprocessing.get_context("spawn")
        before = {k: os.environ.get(k) for k in _THREADS}
        os.environ.update(dict.fromkeys(_THREADS, "1"))
        try:
            while len(self._workers) < min(wanted, self._count):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs,), daemon=True)
                process.start()
                theirs.close()
                self._workers.append((process, ours))
        finally:
            for k, v in before.items():
                os.environ.pop(k) if v is None else os.environ.update({k: v})

    def run(self, work: Work, specs: Sequence[Spec]) -> Iterator[tuple[int, Result, float]]:
        self._start(len(specs))
        waiting = list(reversed(range(len(specs))))
        idle = [c for _, c in self._workers]
        at: dict[Connection, int] = {}
        try:
            while waiting or at:
                while waiting and idle:
                    connection, i = idle.pop(), waiting.pop()
                    at[connection] = i
                    self._send(connection, (work, dict(specs[i])))
                for ready in wait(list(at)):
                    assert isinstance(ready, Connection)
                    i = at[ready]
                    answer = self._answer(ready, specs[i])
                    del at[ready]
                    idle.append(ready)
                    if isinstance(answer, Exception):
                        raise answer
                    yield (i, *answer)
        finally:
            if at:  # left early: what is under way would answer a later question
                self.close()

    def _send(self, connection: Connection, job: object) -> None:
        with contextlib.suppress(BrokenPipeError):  # the answer will be that the worker has gone
            connection.send(job)

    def _answer(self, connection: Connection, spec: Spec) -> Any:
        try:
            return connection.recv()
        except (EOFError, ConnectionResetError):
            process = next(p for p, c in self._workers if c is connection)
            process.join(5)
            raise DeviceError(
                f"a worker process ended by itself (exit code {process.exitcode}) during job {job_key(spec)[:12]}; "
                "finished jobs are kept: start the same command again, with fewer --jobs if memory was short"
            ) from None

    def close(self) -> None:
        for process, connection in self._workers:
            connection.close()
            process.terminate()
        for process, _ in self._workers:
            process.join()
        self._workers.clear()


class DaskExecutor:
    """The workers of a Dask cluster. They need the same trainlet, and see model, data and --out under the same paths.
    ``scheduler`` is an address such as tcp://10.0.0.1:8786. UsageError where nobody answers there, ToolMissingError
    without the library."""

    def __init__(self, scheduler: str, timeout: float = 10.0) -> None:
        try:
            self._dask: Any = importlib.import_module("distributed")  # most of it has no types
        except ImportError:
            raise ToolMissingError(
                "--scheduler: the library distributed is not installed: pip install 'trainlet[cluster]'"
            ) from None
        try:
            self._client = self._dask.Client(scheduler, timeout=timeout, set_as_default=False)
        except (OSError, ValueError) as e:
            raise UsageError(
                f"--scheduler {scheduler}: no Dask scheduler answers there ({e}); start one with `dask scheduler` and "
                "give its address"
            ) from None
        if not self.workers:
            self.close()
            raise UsageError(f"--scheduler {scheduler}: it has no worker; start some with `dask worker {scheduler}`")

    @property
    def workers(self) -> int:
        return int(sum(self._client.nthreads().values()))

    def run(self, work: Work, specs: Sequence[Spec]) -> Iterator[tuple[int, Result, float]]:
        futures = [self._client.submit(timed, work, dict(s), pure=False) for s in specs]
        index = {f.key: i for i, f in enumerate(futures)}
        try:
            for future in self._dask.as_completed(futures, loop=self._client.loop):
                yield (index[future.key], *future.result())
        finally:
            self._client.cancel(futures)

    def close(self) -> None:
        self._client.close()


def open_executor(jobs: int, scheduler: str | None) -> Executor:
    """Processes on this machine, or a cluster where an address is given."""
    return LocalExecutor(jobs) if scheduler is None else DaskExecutor(scheduler)


# --- doing them -------------------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """In words, rounded up to what matters."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Clock:
    """Estimates the time that is left from the jobs done so far. ``later``: how many more jobs will follow, as far as
    is known when a batch begins; ``word``: how sure that is."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._seconds = 0.0
        self._jobs = 0
        self.later = 0
        self.word = "about"

    def done(self, seconds: float) -> None:
        """A job has finished."""
        self._seconds += seconds
        self._jobs += 1

    def left(self, jobs: int) -> str:
        """How long ``jobs`` more and all later ones will take; empty while nothing is known."""
        if not self._jobs:
            return ""
        return f"{self.word} {duration((jobs + self.later) * self._seconds / self._jobs / self._workers)} left"


def run_jobs(
    store: JobStore,
    executor: Executor,
    work: Work,
    specs: Sequence[Spec],
    *,
    title: str = "runs",
    progress: Progress | None = None,
    clock: Clock | None = None,
) -> list[Result]:
    """The results, in the order of ``specs``. Jobs that the store has are not done again, equal ones only once."""
    progress, clock = progress or Silent(), clock or Clock(executor.workers)
    keys = [job_key(s) for s in specs]
    missing = {k: s for k, s in zip(keys, specs, strict=True) if k not in store}
    todo = list(missing.values())
    total = len(set(keys))
    with progress.bar(title, total, total - len(todo)) as advance:
        for n, (i, result, seconds) in enumerate(executor.run(work, todo) if todo else (), 1):
            store.put(todo[i], result, seconds)
            clock.done(seconds)
            advance(clock.left(len(todo) - n))
    return [store.result(k) for k in keys]
