# SPDX-License-Identifier: Apache-2.0
"""Hostile inputs, a few of each kind, and faults that are planted for each counter. ``python bench/hostile.py`` runs
far more of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import pytest

from hostile import kernels, planted_calls
from hostile.case import FAULTS
from hostile.planted import SOUND, WRONG
from hostile.tally import merged
from hostile.worker import SHARES

pytestmark = pytest.mark.slow
ROOT: Final = Path(__file__).parents[2]
EACH: Final = 10
QUICK: Final = tuple(k for k in SHARES if k not in ("chip", "numbers"))
PLANTED: Final = [(fault, kind.name) for fault, kinds in WRONG.items() for kind in kinds]

Result = Mapping[str, Any]


def _run(*args: str, code: int = 0) -> str:
    path = os.pathsep.join([str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *args], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def _work(each: int, *names: str) -> Result:
    kinds = [w for name in names for w in ("--kind", name)]
    found: Result = json.loads(_run("-m", "hostile.worker", "--each", str(each), *kinds))
    return found


# --- what is attacked -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def attacked() -> Result:
    return _work(EACH, *QUICK)


@pytest.mark.parametrize("kind", QUICK)
def test_nothing_is_found(attacked: Result, kind: str) -> None:
    assert attacked["kinds"][kind]["inputs"] == EACH
    assert [(f["fault"], f["repeat"], f["detail"]) for f in attacked["failures"] if f["kind"] == kind] == []


def test_models_on_a_chip_agree_with_the_reference(tools: str) -> None:
    seen = []

    def visit(case: Any) -> None:
        seen.append(kernels.difference(case, "stm32f746"))

    kernels.random_cases(12, 2, visit)
    assert seen == ["", ""]


# --- what is planted --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted() -> Result:
    return _work(2, SOUND.name, *(name for _, name in PLANTED))


@pytest.mark.parametrize(("fault", "kind"), PLANTED)
def test_every_counter_counts(planted: Result, fault: str, kind: str) -> None:
    """In each of two cases, and from one case to the next."""
    found = [f for f in planted["failures"] if f["kind"] == kind]
    assert [(f["times"], f["seeds"]) for f in found if f["fault"] == fault] == [(2, [0, 1])], found
    assert planted["faults"][fault] > 0


def test_a_sound_reader_is_not_counted(planted: Result) -> None:
    assert planted["kinds"][SOUND.name]["outcomes"] == {"exit 0": 2}
    assert not [f for f in planted["failures"] if f["kind"] == SOUND.name]


def test_all_counters_are_planted() -> None:
    assert tuple(WRONG) == FAULTS


def test_tallies_add_up(planted: Result) -> None:
    both = merged([planted, planted]).to_json()
    assert both["inputs"] == 2 * planted["inputs"]
    assert both["faults"] == {k: 2 * n for k, n in planted["faults"].items()}
    assert len(both["failures"]) == len(planted["failures"])
    assert all(f["times"] == 4 for f in both["failures"])


def test_a_failure_says_how_to_repeat_it(planted: Result, tmp_path: Path) -> None:
    failure = next(f for f in planted["failures"] if f["kind"] == "planted-leaves-a-file")
    words = failure["repeat"].split()[1:]
    words[0], words[-1] = str(ROOT / words[0]), str(tmp_path / "kept")
    out = _run(*words, "--json", str(tmp_path / "found.json"), code=1)
    assert failure["detail"] in out
    assert json.loads((tmp_path / "found.json").read_text())["faults"]["outside"] == 1
    assert (tmp_path / "kept" / "0" / "tmp" / "half-written").exists()


# --- calls of C -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def miscalled() -> Result:
    return _work(1, *(k.name for k in planted_calls.KINDS))


@pytest.mark.parametrize("kind", [k.name for k in planted_calls.KINDS])
def test_a_caller_notices(miscalled: Result, kind: str) -> None:
    found = {f["fault"] for f in miscalled["failures"] if f["kind"] == kind}
    assert found, miscalled["kinds"][kind]
    assert found <= {"mismatches", "crashes"}
