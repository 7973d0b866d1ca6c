# SPDX-License-Identifier: Apache-2.0
"""Jobs: the file that keeps them, what it refuses, both executors; nothing is lost or repeated, however it ends."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import re
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from job_work import COUNT, die, refuse, slow_square, specs, square

from trainlet.errors import DeviceError, UsageError
from trainlet.select import store as store_module
from trainlet.select.jobs import (
    Clock,
    DaskExecutor,
    Executor,
    LocalExecutor,
    duration,
    open_executor,
    run_jobs,
)
from trainlet.select.store import APPLICATION_ID, JobStore, canonical, job_key
from trainlet.train.loop import Silent

# --- keys and the file --------------------------------------------------------------------------------------


def test_the_key_is_of_the_content_alone() -> None:
    spec = {"a": 1, "b": {"x": 0.1, "y": [1, 2]}}
    assert job_key(spec) == job_key({"b": {"y": [1, 2], "x": 0.1}, "a": 1})
    changed = [{**spec, "a": 2}, {**spec, "a": 1.5}, {**spec, "c": None}, {**spec, "b": {"x": 0.1, "y": [2, 1]}}]
    assert len({job_key(s) for s in [spec, *changed]}) == 5
    with pytest.raises(ValueError, match="JSON"):
        job_key({"lr": float("nan")})


def test_a_store_keeps_what_was_put(tmp_path: Path) -> None:
    path = tmp_path / "jobs.sqlite"
    with JobStore(path) as store:
        assert len(store) == 0
        store.put({"n": 1}, {"loss": 0.1}, 2.5)
    with JobStore(path) as store:
        key = job_key({"n": 1})
        assert key in store
        assert job_key({"n": 2}) not in store
        assert (store.result(key), store.seconds(key), len(store)) == ({"loss": 0.1}, 2.5, 1)
    assert [f.name for f in tmp_path.iterdir()] == ["jobs.sqlite"]


def test_a_store_is_made_without_a_file_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is killed meanwhile leaves nothing that nobody knows."""
    seen: set[str] = set()

    def look() -> None:
        seen.update(f.name for f in tmp_path.iterdir())

    def watched(path: Path, **options: Any) -> sqlite3.Connection:
        db = connect(path, **options)
        db.set_progress_handler(look, 1)
        return db

    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", watched)
    JobStore(tmp_path / "jobs.sqlite").close()
    assert {name for name in seen if name.startswith(".")} == {f".jobs.sqlite.{os.getpid()}.tmp"}


def _text(path: Path) -> None:
    path.write_text("results of another program, " * 40)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _other_database(path: Path) -> None:
    path.unlink()
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE jobs (key TEXT PRIMARY KEY, spec TEXT, result TEXT, seconds REAL, checksum TEXT)")
    db.commit()
    db.close()


def _sql(statement: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        db = sqlite3.connect(path)
        db.execute(statement)
        db.commit()
        db.close()

    return change


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:6000])


def _overwritten_page(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[4096:4200] = b"\xff" * 104
    path.write_bytes(raw)


def _view(path: Path) -> None:
    _sql("DROP TABLE jobs")(path)
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i, i, i, i, i FROM n"
    _sql(f"CREATE VIEW jobs (key, spec, result, seconds, checksum) AS {endless}")(path)


def _forged(result: str) -> Callable[[Path], None]:
    """A job with a checksum that is right, and such a result."""

    def change(path: Path) -> None:
        spec = canonical({"n": 1})
        key = job_key({"n": 1})
        checksum = hashlib.sha256("\n".join((key, spec, result)).encode()).hexdigest()
        with contextlib.closing(sqlite3.connect(path)) as db, db:
            db.execute("UPDATE jobs SET result = ?, checksum = ? WHERE key = ?", (result, checksum, key))

    return change


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "text": (_text, "no file of jobs"),
    "empty": (_empty, "no file of jobs"),
    "another database": (_other_database, "another program"),
    "another version": (_sql("PRAGMA user_version = 99"), "version 99"),
    "no table": (_sql("DROP TABLE jobs"), "damaged"),
    "cut off": (_cut, "damaged"),
    "a page overwritten": (_overwritten_page, "damaged"),
    "a result changed": (_sql("UPDATE jobs SET result = replace(result, '49', '50')"), "checksum"),
    "a job under another's key": (_sql("UPDATE jobs SET key = replace(key, 'a', 'b')"), "checksum"),
    "bytes for a text": (_sql("UPDATE jobs SET spec = CAST(spec AS BLOB)"), "checksum"),
    "a view in its place": (_view, "the one table of jobs"),
    "a trigger": (_sql("CREATE TRIGGER t AFTER INSERT ON jobs BEGIN DELETE FROM jobs; END"), "the one table of jobs"),
    "a list for a result": (_forged("[1]"), "has no result"),
    "a result without end": (_forged("[" * 100_000), "has no result"),
    "no JSON": (_forged("{"), "has no result"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_foreign_or_damaged_file_is_refused_and_left_alone(tmp_path: Path, fault: str) -> None:
    path = tmp_path / "jobs.sqlite"
    with JobStore(path) as store:
        for n in range(40):
            store.put({"n": n}, square({"n": n}), 0.1)
    change, text = FAULTS[fault]
    change(path)
    before = path.read_bytes()
    with pytest.raises(UsageError, match=text) as refused:
        JobStore(path)
    assert str(path) in str(refused.value)
    assert "--out" in str(refused.value)
    assert path.read_bytes() == before
    assert [f.name for f in tmp_path.iterdir()] == ["jobs.sqlite"]


def test_a_fifo_is_refused_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "jobs.sqlite")
    with pytest.raises(UsageError, match="this is no file"):
        JobStore(tmp_path / "jobs.sqlite")


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with one job; nobody waits long for a lock."""
    monkeypatch.setattr(store_module, "WAIT", 0.3)
    with JobStore(tmp_path / "jobs.sqlite") as store:
        store.put({"n": 1}, {"loss": 0.1}, 2.5)
    return tmp_path / "jobs.sqlite"


def _refused(kept: Path, what: str) -> Any:
    return pytest.raises(UsageError, match=rf"{re.escape(str(kept))}: {what}.*finished runs are kept: .* same command")


def test_a_locked_file_is_not_called_damaged(kept: Path) -> None:
    with contextlib.closing(sqlite3.connect(kept)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with _refused(kept, "another program has it locked"):
            JobStore(kept)
        other.rollback()
        with JobStore(kept) as store:
            other.execute("BEGIN EXCLUSIVE")
            with _refused(kept, "another program has it locked"):
                store.put({"n": 2}, {"loss": 0.2}, 2.5)
            other.rollback()
            store.put({"n": 2}, {"loss": 0.2}, 2.5)
    with JobStore(kept) as store:
        assert len(store) == 2


def test_a_full_disk_is_told_and_loses_nothing(kept: Path) -> None:
    with JobStore(kept) as store:
        store._db.execute("PRAGMA max_page_count = 4")
        with _refused(kept, "the disk is full"):
            store.put({"n": 2}, {"text": "x" * 20_000}, 1.0)
        assert job_key({"n": 2}) not in store
    with JobStore(kept) as store:
        assert store.result(job_key({"n": 1})) == {"loss": 0.1}


def test_what_cannot_be_written_is_known_before_the_first_run(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(path: Path, timeout: float) -> sqlite3.Connection:
        return sqlite3.connect(f"file:{path}?mode=ro", uri=True)

    monkeypatch.setattr(store_module, "sqlite3", SimpleNamespace(**{**vars(sqlite3), "connect": read_only}))
    with _refused(kept, "it cannot be written"):
        JobStore(kept)


def test_the_file_says_whose_it_is(tmp_path: Path) -> None:
    with JobStore(tmp_path / "jobs.sqlite"):
        pass
    head = (tmp_path / "jobs.sqlite").read_bytes()[:100]
    assert int.from_bytes(head[68:72], "big") == APPLICATION_ID


# --- doing them ---------------------------------------------------------------------------------------------


class Inline:
    """Does jobs here, the last one first."""

    workers = 1

    def __init__(self) -> None:
        self.done: list[Any] = []

    def run(self, work: Any, specs: Any) -> Iterator[Any]:
        for i in reversed(range(len(specs))):
            self.done.append(specs[i]["n"])
            yield i, work(specs[i]), 2.0

    def close(self) -> None:
        pass


class Spy(Silent):
    """Remembers bars and their texts."""

    def __init__(self) -> None:
        self.bars: list[tuple[str, int, int]] = []
        self.texts: list[str] = []

    @contextlib.contextmanager
    def bar(self, title: str, total: int, done: int = 0) -> Iterator[Callable[[str], None]]:
        self.bars.append((title, total, done))
        yield self.texts.append


def test_finished_jobs_are_not_done_again_and_equal_ones_once(tmp_path: Path) -> None:
    with JobStore(tmp_path / "jobs.sqlite") as store:
        executor, spy = Inline(), Spy()
        run_jobs(store, executor, square, specs(2))
        wanted = [*specs(4), *specs(2)]
        found = run_jobs(store, executor, square, wanted, title="runs", progress=spy)
        assert [r["square"] for r in found] == [0, 1, 4, 9, 0, 1]
        assert executor.done == [1, 0, 3, 2]
        assert spy.bars == [("runs", 4, 2)]
        assert spy.texts == ["about 2 s left", "about 1 s left"]
        run_jobs(store, executor, refuse, specs(4))  # all are there: nobody is asked


def test_the_time_left_counts_workers_and_later_jobs() -> None:
    clock = Clock(2)
    assert clock.left(5) == ""
    clock.done(10.0)
    clock.done(30.0)
    clock.later = 90
    assert clock.left(6) == "about 16 min left"
    assert [duration(s) for s in (0.2, 89, 91, 3000, 7200)] == ["1 s", "89 s", "2 min", "50 min", "2.0 h"]


@pytest.fixture(scope="module")
def scheduler() -> Iterator[str]:
    """The address of a Dask cluster with two local worker processes."""
    distributed = pytest.importorskip("distributed", reason="the extra `cluster` is not installed")
    # workers import the work from this folder
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=50
    ) as cluster:
        yield cluster.scheduler_address


@pytest.mark.parametrize("kind", ["local", "dask"])
def test_both_executors_do_the_same(tmp_path: Path, kind: str, request: pytest.FixtureRequest) -> None:
    address = request.getfixturevalue("scheduler") if kind == "dask" else None
    executor = open_executor(2, address)
    try:
        assert executor.workers == 2
        with JobStore(tmp_path / "jobs.sqlite") as store:
            found = run_jobs(store, executor, slow_square, specs(6))
            assert [r["square"] for r in found] == [n * n for n in range(6)]
            assert len({r["pid"] for r in found}) == 2, "both workers took part"
            assert all(0.15 < store.seconds(job_key(s)) < 5 for s in specs(6))
            with pytest.raises(UsageError, match="3 is refused"):
                run_jobs(store, executor, refuse, [{"n": n} for n in range(4)])
            assert run_jobs(store, executor, square, [{"n": 9}])[0]["square"] == 81, "it still works"
    finally:
        executor.close()


def test_a_worker_that_dies_is_an_error_that_names_the_job(tmp_path: Path) -> None:
    executor: Executor = LocalExecutor(2)
    with JobStore(tmp_path / "jobs.sqlite") as store:
        with pytest.raises(DeviceError, match=r"exit code -9.*fewer --jobs"):
            run_jobs(store, executor, die, specs(1))
        assert len(store) == 0
    executor.close()


def test_what_is_left_early_ends_its_workers() -> None:
    executor = LocalExecutor(2)
    for _ in executor.run(slow_square, specs(6)):
        break
    assert not executor._workers
    assert [r["square"] for _, r, _ in executor.run(square, [{"n": 5}])] == [25]
    executor.close()


def test_no_process_and_no_scheduler_are_refused() -> None:
    with pytest.raises(UsageError, match="--jobs 0"):
        LocalExecutor(0)
    pytest.importorskip("distributed", reason="the extra `cluster` is not installed")
    with pytest.raises(UsageError, match=r"--scheduler tcp://127.0.0.1:9.*dask scheduler"):
        DaskExecutor("tcp://127.0.0.1:9", timeout=0.5)


# --- kill -9 ------------------------------------------------------------------------------------------------


def _start(folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, str(Path(__file__).with_name("job_work.py")), str(folder)])


def test_killed_at_random_moments_it_loses_and_repeats_nothing(tmp_path: Path) -> None:
    rng = random.Random(1)
    log = tmp_path / "log"
    kept: set[str] = set()
    kills = 0
    while True:
        before = log.read_text().split() if log.exists() else []
        process = _start(tmp_path)
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            more = len(log.read_text().split()) - len(before) if log.exists() else 0
            if kills < 4 and more >= 2:
                time.sleep(rng.uniform(0, 0.05))
                process.kill()
                kills += 1
                break
            time.sleep(0.002)
        process.wait(10)
        time.sleep(0.1)  # what a worker has begun it ends, and then finds nobody to give it to
        again = log.read_text().split()[len(before) :]
        assert not kept.intersection(again), "a job that was kept is done again"
        with JobStore(tmp_path / "jobs.sqlite") as store:
            kept = {str(s["n"]) for s in specs() if job_key(s) in store}
            results = [store.result(job_key(s))["square"] for s in specs() if job_key(s) in store]
            assert results == [n * n for n in range(COUNT) if str(n) in kept]
        if process.returncode == 0:
            break
        assert process.returncode == -9
    assert kills == 4
    assert len(kept) == COUNT
    done = Counter(log.read_text().split())
    # at most the two jobs that were under way at each kill, and the ones whose answers were on the way
    assert sum(done.values()) - COUNT <= 4 * kills
