# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: what is in it is not lost, one process at a time writes there, and nothing is half-written."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_run import META, FakeSession, interrupt, make_dataset, run

from trainlet.errors import UsageError
from trainlet.train import statefile
from trainlet.train.data import Dataset
from trainlet.train.folder import locked, open_regular, write_atomic
from trainlet.train.loop import TrainConfig
from trainlet.train.run import CHECKPOINT_FILE, METRICS_FILE, STATE_FILE, Run
from trainlet.train.stop import Interrupted

FILES = (CHECKPOINT_FILE, METRICS_FILE, STATE_FILE)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(tmp_path_factory.mktemp("data"))


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {f.name: (f.read_bytes(), f.stat().st_mtime_ns) for f in folder.iterdir()}


# --- what is there --------------------------------------------------------------------------------------------


class Heard:
    """Keeps the lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    @contextmanager
    def bar(self, title: str, total: int, done: int = 0) -> Iterator[Any]:
        yield lambda text: None

    def line(self, text: str) -> None:
        self.lines.append(text)


def test_a_finished_run_is_not_begun_again(dataset: Dataset, tmp_path: Path) -> None:
    first = run(dataset, tmp_path)
    before = contents(tmp_path)
    assert sorted(before) == sorted(FILES)
    session, heard = FakeSession(), Heard()
    config = TrainConfig(3, 0.05, 7)
    again = Run(session, dataset, config, tmp_path, META, facts={"extra": 1}, progress=heard).start()
    assert contents(tmp_path) == before
    assert not session.calls
    assert heard.lines == [f"{tmp_path}: this run has already finished with these settings; nothing has changed"]
    assert again.pop("already_finished")
    assert not first.pop("already_finished")
    assert {k: v for k, v in again.items() if k != "cache_bytes"} == {
        k: v for k, v in first.items() if k != "cache_bytes"
    }


def test_a_finished_run_is_not_overwritten_by_other_settings(dataset: Dataset, tmp_path: Path) -> None:
    run(dataset, tmp_path)
    before = contents(tmp_path)
    with pytest.raises(UsageError, match=r"holds a finished run with other settings: lr was 0\.05, now 0\.06.*--overw"):
        run(dataset, tmp_path, lr=0.06)
    with pytest.raises(
        UsageError, match=r"data was .*, now \"other\" \(images, labels or names of classes have changed"
    ):
        run(replace(dataset, fingerprint="other"), tmp_path)
    assert contents(tmp_path) == before
    assert run(dataset, tmp_path, lr=0.06, overwrite=True)["lr"] == 0.06


def test_what_is_overwritten_goes_when_the_first_step_is_due(dataset: Dataset, tmp_path: Path) -> None:
    """An image that cannot be read ends the new run before the old one is gone."""

    class Broken:
        labels = dataset.train.labels

        def missing(self, indices: Any) -> list[int]:
            return list(indices)

        def image(self, index: int, draw: object = None) -> Any:
            raise UsageError("this image is damaged")

        def name(self, index: int) -> str:
            return "image"

    run(dataset, tmp_path)
    before = contents(tmp_path)
    with pytest.raises(UsageError, match="this image is damaged"):
        run(replace(dataset, train=Broken()), tmp_path, seed=9, overwrite=True)  # type: ignore[arg-type]
    assert contents(tmp_path) == before


def test_a_lost_file_of_a_finished_run_comes_back(dataset: Dataset, tmp_path: Path) -> None:
    run(dataset, tmp_path)
    state = (tmp_path / STATE_FILE).read_bytes()
    (tmp_path / STATE_FILE).unlink()
    run(dataset, tmp_path)
    assert (tmp_path / STATE_FILE).read_bytes() == state


@pytest.mark.parametrize("name", [STATE_FILE, METRICS_FILE])
def test_files_of_something_else_stay(dataset: Dataset, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"loss": 1}\n')
    with pytest.raises(UsageError, match=rf"{name}: there is no checkpoint\.safetensors that it belongs to"):
        run(dataset, tmp_path)
    assert (tmp_path / name).read_text() == '{"loss": 1}\n'


def test_a_run_that_ended_before_it_had_anything_is_begun_again(dataset: Dataset, tmp_path: Path) -> None:
    session = FakeSession()
    session.before_step = lambda step: (_ for _ in ()).throw(MemoryError)
    with pytest.raises(MemoryError):
        run(dataset, tmp_path, session)
    assert [f.name for f in tmp_path.iterdir()] == [METRICS_FILE]
    assert run(dataset, tmp_path)["epochs"] == 3


def test_an_interruption_before_the_first_step_changes_nothing(dataset: Dataset, tmp_path: Path) -> None:
    class Slow:
        labels = dataset.val.labels

        def missing(self, indices: Any) -> list[int]:
            return list(indices)

        def image(self, index: int, draw: object = None) -> Any:
            signal.raise_signal(signal.SIGTERM)

    run(dataset, tmp_path)
    before = contents(tmp_path)
    with pytest.raises(Interrupted, match="before the first step; nothing has changed"):
        run(replace(dataset, val=Slow()), tmp_path, seed=9, overwrite=True)  # type: ignore[arg-type]
    assert contents(tmp_path) == before


# --- one process at a time ------------------------------------------------------------------------------------


def test_a_second_run_in_a_folder_is_refused_by_name(dataset: Dataset, tmp_path: Path) -> None:
    refused: list[str] = []

    def second(step: int) -> None:
        if step in (3, 50):
            with pytest.raises(UsageError) as e:
                run(dataset, tmp_path / "run", seed=8, overwrite=True)
            refused.append(str(e.value))

    session = FakeSession()
    session.before_step = second
    result = run(dataset, tmp_path / "run", session)
    assert len(refused) == 2
    assert re.search(rf"run: process {os.getpid()} on \S+ is at work there; wait until it ends, or give", refused[0])
    assert sorted(f.name for f in (tmp_path / "run").iterdir()) == sorted(FILES)
    assert result["state_sha256"] == run(dataset, tmp_path / "alone")["state_sha256"]


HOLDER = """
import sys, time
from pathlib import Path
from trainlet.train import folder
def stuck(fd):
    print("locked", flush=True)
    time.sleep(60)
with folder.locked(Path(sys.argv[1])):
    folder.os.fsync = stuck
    folder.write_atomic(Path(sys.argv[1]) / "state", b"half")
"""


def test_a_lock_and_half_a_file_do_not_outlive_a_kill(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(UsageError, match=f"process {holder.pid} on"), locked(tmp_path):
            pass
    finally:
        holder.kill()
        holder.communicate()
    assert len(list(tmp_path.iterdir())) == 2
    (tmp_path / ".mine.tmp").write_bytes(b"somebody else's")
    with locked(tmp_path):
        assert {f.name for f in tmp_path.iterdir()} == {".lock", ".mine.tmp"}
    assert [f.name for f in tmp_path.iterdir()] == [".mine.tmp"]


def test_a_lock_is_let_go_however_the_work_ends(dataset: Dataset, tmp_path: Path) -> None:
    session = FakeSession()
    interrupt(session, 5)
    with pytest.raises(Interrupted):
        run(dataset, tmp_path, session)
    with pytest.raises(UsageError, match="stopped after 0 of 3 epochs"):
        run(dataset, tmp_path)
    assert not (tmp_path / ".lock").exists()


# --- disks and odd files --------------------------------------------------------------------------------------


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """Files end at ``room`` bytes: a write fails after that, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_names_the_file_and_the_way_on(dataset: Dataset, tmp_path: Path) -> None:
    expected = run(dataset, tmp_path / "whole")
    session = FakeSession()
    limit = full_disk(500)
    session.before_step = lambda step: limit.__enter__() if step == 70 else None
    try:
        with pytest.raises(
            UsageError, match=r"checkpoint\.safetensors: cannot be written \(File too large\); .*--resume"
        ):
            run(dataset, tmp_path / "parts", session)
    finally:
        limit.__exit__(None, None, None)
    assert sorted(f.name for f in (tmp_path / "parts").iterdir()) == sorted(FILES)
    result = run(dataset, tmp_path / "parts", resume=True)
    assert result["state_sha256"] == expected["state_sha256"]


def test_a_disk_that_was_full_from_the_start(dataset: Dataset, tmp_path: Path) -> None:
    with full_disk(500), pytest.raises(UsageError, match=r"metrics\.jsonl: cannot be written .* from the beginning"):
        run(dataset, tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo", Path("/dev/zero")):
        with pytest.raises(UsageError, match=f"{path}: this is no regular file"):
            open_regular(path)
    with pytest.raises(UsageError, match="this is no regular file"):
        statefile.load(tmp_path / "fifo")
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "nothing")


def test_a_write_that_fails_names_the_file(tmp_path: Path) -> None:
    with full_disk(2), pytest.raises(OSError, match="File too large") as e:
        write_atomic(tmp_path / "state", b"0123")
    assert e.value.filename == str(tmp_path / "state")
    assert not list(tmp_path.iterdir())


# --- checkpoints from elsewhere -------------------------------------------------------------------------------


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a JSON value: what holds it, and the key or index."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


def test_a_forged_checkpoint_is_refused_or_trains(dataset: Dataset, tmp_path: Path) -> None:
    """Every value of the position is replaced by odd ones, under a right checksum: nothing but UsageError comes out."""
    session = FakeSession()
    interrupt(session, 45)
    with pytest.raises(Interrupted):
        run(dataset, tmp_path, session, epochs=2)
    path = tmp_path / CHECKPOINT_FILE
    good = statefile.load(path)
    text = json.dumps(good.progress)
    count, refused = len(list(places(json.loads(text)))), 0
    assert count > 40
    for n in range(count):
        for odd in (None, -1, 1 << 70, []):
            progress = json.loads(text)
            holder, key = list(places(progress))[n]
            holder[key] = odd
            statefile.save(replace(good, progress=progress), path)
            try:
                run(dataset, tmp_path, resume=True, epochs=2)
            except UsageError:
                refused += 1
    assert refused > 2 * count


def test_numbers_that_are_none_are_refused(dataset: Dataset, tmp_path: Path) -> None:
    run(dataset, tmp_path, epochs=1)
    path = tmp_path / CHECKPOINT_FILE
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = re.sub(rb'(\\"train_loss\\": )[0-9.]+', rb"\g<1>1e999", raw[8 : 8 + length], count=1)
    header += b" " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])
    with pytest.raises(UsageError):
        run(dataset, tmp_path, epochs=1, resume=True)
