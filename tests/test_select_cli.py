# SPDX-License-Identifier: Apache-2.0
"""``trainlet select`` from end to end: what it writes and refuses, and that a killed one goes on where it was."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
import random
import sqlite3
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from cli_run import Run
from graphs import int8_chain
from separable import write_separable

from trainlet.autodiff.scheme import UpdateScheme, load_scheme
from trainlet.cli import main
from trainlet.errors import ToolMissingError, UsageError
from trainlet.frontends import graph_file as irfile
from trainlet.select import report
from trainlet.select.analyze import QUICK, Analysis
from trainlet.select.folder import locked
from trainlet.select.problem import Choice, Contributions, Selection
from trainlet.select.report import selection_json, write_report
from trainlet.select.store import JobStore
from trainlet.toolchain.find import find_arm_gcc

PICTURES = ("contributions.svg", "search.svg", "memory.svg")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """chain.json, the small model; data.npz, 120 images that it can learn."""
    root = tmp_path_factory.mktemp("select")
    irfile.save(int8_chain(), root / "chain.json")
    write_separable(root / "data.npz", 120)
    return root


def words(files: Path, out: Path, *more: object) -> list[str]:
    given = ("--model", files / "chain.json", "--data", files / "data.npz", "--out", out)
    return ["select", *map(str, given), "--quick", "--lr", "0.03", "--jobs", "2", *map(str, more)]


def test_it_ends_with_a_scheme_that_fits_and_is_worth_it(files: Path, tmp_path: Path, run: Run) -> None:
    args = words(files, tmp_path, "--sram", "2K", "--no-measure")
    code, found, _ = run(*args)
    assert code == 0
    assert found["weights"]
    assert found["planned_bytes"] <= found["limit_bytes"] == 2048
    assert found["held_out_loss"] < found["bias_only_loss"]
    assert found["held_out_loss"] < found["head_only_loss"]
    assert found["best_sum"]["gap"] == 0
    finals = {p["scheme"]: p["loss"] for p in found["finalists"]}
    assert len(finals) > 2
    assert min(finals, key=lambda n: finals[n]) == f"depth {found['depth']}"
    assert "head" in finals

    scheme = load_scheme(found["scheme"], int8_chain())
    assert dict(scheme.weights) == found["weights"]
    assert len(scheme.biases) == found["depth"]
    code, plan, _ = run("plan", "--model", files / "chain.json", "--scheme", found["scheme"], "--classes", 4)
    assert code == 0
    assert plan["arena_bytes"] + plan["state_bytes"] == found["planned_bytes"]

    written = json.loads((tmp_path / "report.json").read_text())
    assert {p["series"] for p in written["points"]} == {"selected", "head", "biases"}
    assert written["contributions"][0]["rank_correlation"]["descent"].keys() == {"biases", "weights", "weights_whole"}
    for name in PICTURES:
        assert ET.parse(tmp_path / name).getroot().tag.endswith("svg")

    before = {f.name: f.read_bytes() for f in tmp_path.iterdir() if f.is_file() and f.name != "report.json"}
    code, again, _ = run(*args)
    assert (code, again["jobs"], again["weights"]) == (0, found["jobs"], found["weights"])
    assert {name: (tmp_path / name).read_bytes() for name in before} == before, "nothing was done again"


def test_the_measured_memory_is_under_the_limit(files: Path, tmp_path: Path, run: Run) -> None:
    try:
        find_arm_gcc()
    except ToolMissingError as e:
        pytest.skip(str(e))
    code, found, _ = run(*words(files, tmp_path, "--sram", "4K"))
    assert code == 0
    assert found["weights"]
    assert found["ram_bytes"] <= found["planned_bytes"] <= found["limit_bytes"] == 4096
    assert found["instructions_per_step"] > 0
    measure = ("--classes", 4, "--measure", "--target", found["target"])
    code, plan, _ = run("plan", "--model", files / "chain.json", "--scheme", found["scheme"], *measure)
    assert (code, plan["ram_bytes"]) == (0, found["ram_bytes"])

    most = found["instructions_per_step"] - 1
    code, faster, _ = run(*words(files, tmp_path, "--sram", "4K", "--instructions", most))
    assert code == 0
    assert faster["instructions_per_step"] <= most
    assert faster["best_sum"]["value"] <= found["best_sum"]["value"]

    code, refused, err = run(*words(files, tmp_path / "small", "--sram", "1K"))
    assert (code, refused["exit_code"]) == (4, 4)
    assert "Largest tensors at the peak" in err
    assert not (tmp_path / "small" / "scheme.json").exists()


REFUSED = {
    "a limit of nothing": (("--sram", "0K"), 2, "--sram"),
    "more than the chip has": (("--sram", "1M"), 2, "stm32f746 has"),
    "an unknown chip": (("--sram", "8K", "--target", "z80"), 2, "z80"),
    "an unknown method": (("--sram", "8K", "--method", "luck"), 2, "luck"),
    "a width that there is not": (("--sram", "8K", "--bits", "8,9"), 2, "'9' is no width"),
    "a drop without freezing": (("--sram", "8K", "--max-drop", "0.1"), 2, "leave it out of exact"),
    "a drop in percent": (("--sram", "8K", "--method", "freeze", "--max-drop", "1"), 2, "such as 0.01 for one image"),
    "a drop below 0": (("--sram", "8K", "--method", "freeze", "--max-drop", "-0.1"), 2, "from 0 to below 1"),
    "a drop that is no number": (("--sram", "8K", "--method", "freeze", "--max-drop", "nan"), 2, "from 0 to below 1"),
    "finalists of freezing": (("--sram", "8K", "--finalists", "3", "--method", "freeze"), 2, "leave it out of freeze"),
    "instructions that are no number": (("--sram", "8K", "--instructions", "few"), 2, "--instructions 'few'"),
    "flash without a compiler": (("--sram", "8K", "--flash", "64K", "--no-measure"), 2, "leave --no-measure out"),
    "finalists of a baseline": (("--sram", "8K", "--finalists", "3", "--method", "last"), 2, "leave it out"),
    "too many instructions": (("--sram", "8K", "--instructions", "9999G"), 2, "at most"),
    "an empty option": (("--sram", "8K", "--flash", ""), 2, "--flash"),
    "no finalist": (("--sram", "8K", "--finalists", "0"), 2, "--finalists 0"),
    "no process": (("--sram", "8K", "--jobs", "0"), 2, "--jobs 0"),
    "a seed below 0": (("--sram", "8K", "--seed", "-1"), 2, "--seed"),
    "a rate that is none": (("--sram", "8K", "--lr", "0"), 2, "learning rate"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(files: Path, tmp_path: Path, run: Run, name: str) -> None:
    args, code, text = REFUSED[name]
    found, data, err = run(*words(files, tmp_path, *args))
    assert (found, data["exit_code"]) == (code, code)
    assert text in err
    assert not (tmp_path / "scheme.json").exists()


def test_a_foreign_file_of_jobs_is_left_alone(files: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "jobs.sqlite").write_text("mine")
    code, _, err = run(*words(files, tmp_path, "--sram", "8K", "--no-measure"))
    assert code == 2
    assert "jobs.sqlite: this is no file of jobs" in err
    assert (tmp_path / "jobs.sqlite").read_text() == "mine"
    assert [f.name for f in tmp_path.iterdir()] == ["jobs.sqlite"]


def test_killed_at_random_moments_it_ends_with_the_same_scheme(files: Path, tmp_path: Path, run: Run) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    more = ("--sram", "2K", "--no-measure")
    code, found, _ = run(*words(files, whole, *more))
    assert code == 0
    rng = random.Random(0)
    kept = 0
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-m", "trainlet", *words(files, parts, *more)])
        deadline = time.monotonic() + 60
        while _count(parts) < kept + 2 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.2))
        process.kill()
        assert process.wait() == -9, "it was killed before its end"
        now = _count(parts)
        assert now >= kept + 2
        kept = now
    # what kills at other moments leave behind
    left = [".jobs.sqlite.999999999.tmp", ".report.json.999999999.tmp", "cache/.prefix-0123.bin.999999999.tmp", ".lock"]
    for name in left:
        (parts / name).write_bytes(b"half")
    code, again, _ = run(*words(files, parts, *more))
    assert (code, again["jobs"]) == (0, found["jobs"])
    assert (parts / "scheme.json").read_bytes() == (whole / "scheme.json").read_bytes()
    for name in PICTURES:
        assert (parts / name).read_bytes() == (whole / name).read_bytes()
    names = [sorted(f.relative_to(out) for f in out.rglob("*")) for out in (whole, parts)]
    assert names[0] == names[1]


def test_two_in_one_folder_name_each_other(files: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with locked(out):
        code, _, err = run(*words(files, out, "--sram", "2K", "--no-measure"))
        assert code == 2
        assert f"{out}: process {os.getpid()} on {platform.node()} is at work there; wait" in err
        assert [f.name for f in out.iterdir()] == [".lock"], "nothing was touched"
    assert list(out.iterdir()) == []
    mine = out / f".report.json.{os.getpid()}.tmp"
    mine.touch()
    with locked(out), pytest.raises(UsageError, match="is at work there"), locked(out):
        pass
    assert mine.exists(), "a living process may be writing it"


def test_a_lock_that_was_removed_meanwhile_is_none(tmp_path: Path) -> None:
    """Another process opens the file, and its owner removes it before the lock is taken."""
    flock = fcntl.flock
    removed: list[Path] = []

    def late(opened: int, how: int) -> None:
        if not removed:
            removed.append(tmp_path / ".lock")
            removed[0].unlink()
        flock(opened, how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fcntl, "flock", late)
        with locked(tmp_path), pytest.raises(UsageError, match="is at work there"), locked(tmp_path):
            pass
    assert removed
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_names_the_file_of_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(report, "write_atomic", full)
    found = selection_json(Selection(Choice(0), 1, "exact", 1), ())
    contributions = Contributions("m", 8, ("a",), {0: 0.0, 1: 1.0}, {})
    analysis = Analysis(contributions, (), 0, {}, {})
    facts = {"model": "m", "limit_bytes": 2048}
    with pytest.raises(UsageError, match=r"scheme\.json: cannot be written \(No space .* kept: make room"):
        write_report(tmp_path, UpdateScheme("head"), [analysis], found, [], facts)


def test_ctrl_c_says_what_is_kept(files: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("trainlet.select.choose.choose", stop)
    code, _, err = run(*words(files, tmp_path, "--sram", "2K", "--no-measure"))
    assert code == 130
    assert f"interrupted; 0 finished runs are kept in {tmp_path}, the same command goes on from there" in err
    assert not (tmp_path / ".lock").exists()


FREEZE = ("--sram", "2K", "--no-measure", "--method", "freeze", "--max-drop", "0.1", "--jobs", "1")


def test_frozen_layer_by_layer_and_killed_meanwhile_it_ends_with_the_same_scheme(
    files: Path, tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    code, found, err = run(*words(files, whole, *FREEZE))
    assert (code, found["method"], found["finalists"], found["max_drop"]) == (0, "freeze", [], 0.1)
    assert found["planned_bytes"] <= found["limit_bytes"] == 2048
    written = json.loads((whole / "report.json").read_text())
    course = written["selection"]["course"]
    accuracies = [step["accuracy"] for step in course]
    assert found["parts_frozen"] == len(course) - 1 > 0
    assert (found["first_accuracy"], found["accuracy"]) == (accuracies[0], accuracies[-1])
    assert found["accuracy_drop"] == max(accuracies) - accuracies[-1] <= 0.1
    counts = [a * found["images_that_judge"] * QUICK.final_seeds for a in accuracies]
    assert counts == pytest.approx([round(n) for n in counts]), "shares of the images that judge"
    assert (course[-1]["depth"], course[-1]["weights"]) == (found["depth"], found["weights"])
    assert err.count(" frozen: accuracy ") == len(course)
    assert "nothing frozen" in {p["scheme"] for p in written["points"]}

    process = subprocess.Popen([sys.executable, "-m", "trainlet", *words(files, parts, *FREEZE)])
    deadline = time.monotonic() + 60
    while _frozen(parts) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -9, "it was killed before its end"
    assert 3 <= _frozen(parts) < _frozen(whole)
    capsys.readouterr()
    assert main(words(files, parts, *FREEZE)) == 0
    shown = capsys.readouterr().out
    assert "frozen in this order; 32 images judge, one is 0.0312 of accuracy" in shown
    assert all(step["frozen"] in shown for step in course)
    assert json.loads((parts / "report.json").read_text())["jobs"] == found["jobs"]
    for name in ("scheme.json", *PICTURES):
        assert (parts / name).read_bytes() == (whole / name).read_bytes()


def _frozen(out: Path) -> int:
    """How many runs of freezing are done; those that compare schemes have other seeds, those before fewer epochs."""
    path = out / "jobs.sqlite"
    if not path.exists():
        return 0
    with contextlib.closing(sqlite3.connect(path)) as db:
        specs = [json.loads(text) for (text,) in db.execute("SELECT spec FROM jobs")]
    return sum(s["seed"] < QUICK.final_seeds and s["epochs"] == QUICK.final.epochs for s in specs)


def _count(out: Path) -> int:
    path = out / "jobs.sqlite"
    if not path.exists():
        return 0
    with JobStore(path) as store:
        return len(store)
