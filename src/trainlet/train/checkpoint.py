# SPDX-License-Identifier: Apache-2.0
"""Where a run stands, as its checkpoint holds it. The file may come from anywhere: what is read is checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Final

from trainlet.errors import UsageError
from trainlet.train import statefile
from trainlet.train.statefile import Arrays
from trainlet.train.watch import Start

_EPOCH: Final = ("train_loss", "train_accuracy", "saturated", "clamped", "val_loss", "val_accuracy")
_WORDS: Final = {
    "data": "images, labels or names of classes have changed since",
    "model_hash": "the model or what trains is another",
}


@dataclass(slots=True)
class Position:
    """Finished epochs, steps of the current one, its sums and those of the current window, and what was measured so
    far: ``history`` has one record for each epoch and each warning."""

    epoch: int = 0
    step: int = 0
    loss: float = 0.0
    correct: int = 0
    saturated: float = 0.0
    epoch_seconds: float = 0.0  # in training steps of this epoch
    steps: int = 0
    step_seconds: float = 0.0  # in training steps of the run
    seconds: float = 0.0  # of the run
    window_loss: float = 0.0
    window_steps: int = 0
    start: Start | None = None
    history: list[dict[str, Any]] = field(default_factory=list)

    def epochs(self) -> list[dict[str, Any]]:
        """The records of epochs."""
        return [r for r in self.history if r["type"] == "epoch"]

    def warnings(self) -> list[dict[str, Any]]:
        """The records of warnings."""
        return [r for r in self.history if r["type"] == "warning"]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory. ``settings`` are those that its bytes depend on."""

    position: Position
    settings: Mapping[str, Any]
    arrays: Arrays

    @property
    def finished(self) -> bool:
        """Whether all epochs are done."""
        return bool(self.position.epoch == self.settings["epochs"])

    def differences(self, now: Mapping[str, Any]) -> str:
        """The settings that are others ``now``, in words; empty where none is."""
        then = self.settings
        return "; ".join(_difference(k, then.get(k), now[k]) for k in now if then.get(k) != now[k])


def progress(position: Position, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint holds beside the state."""
    return {"settings": dict(settings), "position": asdict(position)}


def load(path: Path) -> Checkpoint:
    """Reads a checkpoint. UsageError where it is damaged, or the state of something else."""
    state = statefile.load(path)
    found = state.progress or {}
    raw, settings = found.get("position"), found.get("settings")
    if not isinstance(settings, dict) or not isinstance(raw, dict) or not _is_position(raw, settings.get("epochs")):
        raise UsageError(f"{path}: not the checkpoint of a run; leave out --resume and give --overwrite to begin again")
    start = None if raw["start"] is None else Start(**raw["start"])
    return Checkpoint(Position(**{**raw, "start": start}), settings, state.arrays)


def _is_position(raw: Mapping[str, Any], epochs: object) -> bool:
    blank = asdict(Position())
    if raw.keys() != blank.keys() or type(epochs) is not int or not _is_start(raw["start"]):
        return False
    if raw["start"] is None and raw["steps"] != raw["epoch"]:  # only before the first step
        return False
    if not all(_like(raw[name], value) for name, value in blank.items() if name != "start"):
        return False
    done = [r for r in raw["history"] if isinstance(r, dict) and r.get("type") == "epoch"]
    told = [r for r in raw["history"] if isinstance(r, dict) and r.get("type") == "warning"]
    return (
        len(done) + len(told) == len(raw["history"])
        and len(done) == raw["epoch"] <= epochs
        and [r.get("epoch") for r in done] == list(range(1, raw["epoch"] + 1))
        and all(_is_number(r.get(k)) for r in done for k in _EPOCH)
        and all(isinstance(r.get(k), str) for r in told for k in ("kind", "text"))
    )


def _is_start(raw: object) -> bool:
    if raw is None:
        return True
    if not isinstance(raw, dict) or raw.keys() != {f.name for f in fields(Start)}:
        return False
    known = {k: v for k, v in raw.items() if v is not None or k != "feature_mean_square"}
    return all(map(_is_number, known.values()))


def _is_number(value: object) -> bool:
    """A finite double, not negative."""
    return type(value) in (int, float) and 0 <= value <= 1e300  # type: ignore[operator]


def _like(value: object, blank: object) -> bool:
    """Of the same type, and no number that a run cannot have."""
    return type(value) is type(blank) and (not isinstance(value, int | float) or _is_number(value))


def _difference(name: str, then: object, now: object) -> str:
    words = f" ({_WORDS[name]})" if name in _WORDS else ""
    return f"{name} was {_short(then)}, now {_short(now)}{words}"


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
