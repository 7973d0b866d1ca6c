# SPDX-License-Identifier: Apache-2.0
"""Commands that are killed and started again. ``python bench/hostile.py --kills 200`` does far more of it."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest

from hostile import kills
from hostile.kills import COMMANDS, Command, Killer

pytestmark = pytest.mark.slow
PLANTED: Final = ("differs", "refused", "files", "processes")


@pytest.mark.parametrize("name", ["compile", "quantise"])
def test_a_killed_command_ends_in_the_same_bytes(name: str, tmp_path: Path) -> None:
    killer = Killer(tmp_path, [name])
    killer.live(name, seed=0, kills=1)
    assert killer.found.to_json()["commands"] == {name: {"kills": 1, "lives": 1}}
    assert killer.found.failures == []


def _plant(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setitem(COMMANDS, how, Command(how, (how,), module="hostile.planted_kills"))
    monkeypatch.setattr(kills, "write_inputs", lambda folder: None)


@pytest.mark.parametrize("how", ["sound", *PLANTED])
def test_every_counter_of_kills_counts(how: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Killed when it has written everything, so that what it does wrongly has been done."""
    _plant(monkeypatch, how)
    killer = Killer(tmp_path, [how])
    monkeypatch.setattr(kills.Life, "kill", _kill_late)
    killer.live(how, seed=0, kills=1)
    found = killer.found.to_json()
    assert found["faults"] == {k: int(k == how) for k in PLANTED}, found["failures"]


def _kill_late(life: kills.Life, rng: object, usual: float) -> str:
    process = life.start()
    process.wait()
    return kills.left_running(process.pid, 0.3)
