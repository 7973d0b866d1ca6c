# SPDX-License-Identifier: Apache-2.0
"""Epochs over a session at batch 1: learning rate, order, evaluation, metrics, checkpoint and resume.

A run is a function of the model, the scheme, the data and the settings. Learning rate and order follow from the number
of the step alone, so a run that was interrupted, at any step, ends in the same bytes as one that was not."""

from __future__ import annotations

import contextlib
import json
import math
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import FrameType
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from trainlet._version import __version__
from trainlet.autodiff.scheme import UpdateScheme
from trainlet.errors import MismatchError, UsageError
from trainlet.session import Session, StepInfo
from trainlet.train import statefile
from trainlet.train.data import Dataset, Draw, Split
from trainlet.train.statefile import StateMeta, TrainedState, state_sha256

DEFAULT_LR: Final = 0.5 / 256  # best or near it on three models and three data sets: bench/rates.py
HEAD_LR: Final = 1 / 256  # a head alone learns faster from features that stand still: bench/README.md
WARMUP_SHARE: Final = 0.1
CACHE_BYTES: Final = 2 << 30
METRICS_VERSION: Final = 1

CHECKPOINT_FILE: Final = "checkpoint.safetensors"
STATE_FILE: Final = "state.safetensors"
METRICS_FILE: Final = "metrics.jsonl"

Advance = Callable[[str], None]


class Progress(Protocol):
    """Shows how far a run is."""

    def bar(self, title: str, total: int, done: int = 0) -> AbstractContextManager[Advance]:
        """A bar of ``total`` steps; what it hands out is called once a step with a short text."""

    def line(self, text: str) -> None:
        """One line that stays."""


class Silent:
    """Shows nothing."""

    @contextlib.contextmanager
    def bar(self, title: str, total: int, done: int = 0) -> Iterator[Advance]:
        """Nothing to advance."""
        yield lambda text: None

    def line(self, text: str) -> None:
        """Dropped."""


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop; the text says what was saved and how to go on."""


def default_lr(scheme: UpdateScheme) -> float:
    """The peak learning rate that suits a scheme at batch 1."""
    return DEFAULT_LR if scheme.biases or scheme.weights else HEAD_LR


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """Settings of a run. ``lr`` is the peak, in float32 units at batch 1; ``limit`` images per epoch, balanced over the
    classes. The last three change no byte of the result: ``cache`` keeps what the frozen prefix computed, up to
    ``cache_bytes``; a checkpoint is written every ``checkpoint_steps`` and after each epoch."""

    epochs: int
    lr: float = DEFAULT_LR
    seed: int = 0
    limit: int | None = None
    augment: tuple[str, ...] = ()
    cache: bool = True
    cache_bytes: int = CACHE_BYTES
    checkpoint_steps: int = 500

    def __post_init__(self) -> None:
        rules = (
            (1 <= self.epochs <= 1_000_000, f"epochs {self.epochs}: give 1 to 1000000"),
            (math.isfinite(self.lr) and 0 < self.lr <= 1e30, f"learning rate {self.lr}: give a finite number above 0"),
            (0 <= self.seed < 1 << 32, f"seed {self.seed}: give a whole number from 0 to 4294967295"),
            (self.limit is None or self.limit >= 1, f"limit {self.limit}: give at least 1 image per epoch"),
            (self.checkpoint_steps >= 1, f"checkpoint every {self.checkpoint_steps} steps: give at least 1"),
        )
        for ok, rule in rules:
            if not ok:
                raise UsageError(rule)


def learning_rate(step: int, total: int, peak: float) -> float:
    """The rate of ``step`` (0 .. total - 1), computed in double and rounded once to fp32: linear from 0 to ``peak``
    over the first tenth of all steps, then a half cosine to 0. Both are taken in the middle of the step, so no step
    is wasted at 0."""
    warmup = max(1, round(WARMUP_SHARE * total))
    at = step + 0.5
    if step < warmup:
        return float(np.float32(peak * at / warmup))
    return float(np.float32(0.5 * peak * (1 + math.cos(math.pi * (at - warmup) / (total - warmup)))))


def epoch_order(labels: NDArray[np.int64], seed: int, epoch: int, limit: int | None) -> NDArray[np.int64]:
    """The images of an epoch (counted from 0), in order: all, or ``limit`` of them, as many of each class as possible
    where a class has too few. Drawn from the raw words of PCG64(seed, epoch), which no release of numpy changes."""
    n = len(labels)
    words = np.random.PCG64([seed, epoch]).random_raw(2 * n)
    choice, order = words[:n], words[n:]
    chosen = np.arange(n)
    if limit is not None and limit < n:
        by_class = np.lexsort((choice, labels))
        ordered = labels[by_class]
        rank = np.arange(n) - np.searchsorted(ordered, ordered)  # of an image within its class
        chosen = np.sort(by_class[np.lexsort((choice[by_class], rank))[:limit]])
    result: NDArray[np.int64] = chosen[np.argsort(order[chosen], kind="stable")]
    return result


# --- the frozen prefix, computed once an image --------------------------------------------------------------


class _Feed:
    """Gives the images of one split to a session, and keeps what the frozen prefix made of them while ``room`` lasts
    (a list of one number, shared by the splits); what does not fit is computed again. The bytes are the same."""

    def __init__(self, session: Session, split: Split, room: list[int]) -> None:
        self._session = session
        self._split = split
        self._room = room
        self._kept: dict[int, bytes] = {}
        self.kept_bytes = 0

    def missing(self, indices: Sequence[int]) -> list[int]:
        """Images that have to be decoded yet."""
        return self._split.missing(i for i in indices if i not in self._kept)

    def _prefix(self, index: int) -> bytes:
        """Empty where the session has no frozen prefix or there is no room."""
        kept = self._kept.get(index)
        if kept is not None or self._room[0] <= 0:
            return kept or b""
        prefix = self._session.prefix(self._split.image(index))
        if not prefix:
            self._room[0] = 0
            return b""
        self._room[0] -= len(prefix)
        self.kept_bytes += len(prefix)
        self._kept[index] = prefix
        return prefix

    def step(self, index: int, lr: float, draw: Draw | None) -> StepInfo:
        """One training step."""
        label = int(self._split.labels[index])
        prefix = b"" if draw else self._prefix(index)
        if prefix:
            return self._session.train_step_cached(prefix, label, lr)
        return self._session.train_step(self._split.image(index, draw), label, lr)

    def logits(self, index: int) -> NDArray[np.float32]:
        """Inference."""
        prefix = self._prefix(index)
        return self._session.infer_cached(prefix) if prefix else self._session.infer(self._split.image(index))


# --- evaluation ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Over one split: share of images with the right class, mean cross entropy, and both counts of each class."""

    accuracy: float
    loss: float
    correct: tuple[int, ...]
    images: tuple[int, ...]


class Feed(Protocol):
    """Infers the images of one split, from wherever it has them."""

    def logits(self, index: int) -> NDArray[np.float32]:
        """Of image ``index`` of the split."""


def evaluate(
    session: Session,
    split: Split,
    progress: Progress | None = None,
    *,
    feed: Feed | None = None,
    check: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Runs ``split`` through ``session``; equal logits go to the lower class. ``check`` is called before each image and
    may raise. MismatchError where a logit is not finite."""
    progress = progress or Silent()
    feed = feed or _Feed(session, split, [0])
    labels = split.labels
    correct, images, loss = [0] * session.classes, [0] * session.classes, 0.0
    with progress.bar("validating", len(labels)) as advance:
        for i, label in enumerate(labels.tolist()):
            check()
            z = feed.logits(i).astype(np.float64)
            if not np.isfinite(z).all():
                raise MismatchError(f"{split.name(i)}: a logit is not finite; train with a lower learning rate")
            top = int(z.argmax())
            loss += math.log(np.exp(z - z[top]).sum()) - (z[label] - z[top])
            images[label] += 1
            correct[label] += top == label
            advance(f"{sum(correct) / (i + 1):.3f}")
    return Evaluation(sum(correct) / len(labels), float(loss) / len(labels), tuple(correct), tuple(images))


# --- a run --------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Position:
    """Where a run stands: finished epochs, steps of the current one, its sums, and what was measured so far."""

    epoch: int = 0
    step: int = 0
    loss: float = 0.0
    correct: int = 0
    saturated: float = 0.0
    epoch_seconds: float = 0.0  # in training steps of this epoch
    steps: int = 0
    step_seconds: float = 0.0  # in training steps of the run
    seconds: float = 0.0  # of the run
    history: list[dict[str, Any]] = field(default_factory=list)


class _Stop:
    """Ctrl-C and SIGTERM between two steps instead of in the middle of one; a second one stops at once."""

    def __init__(self) -> None:
        self.asked = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """While the run lasts; a thread other than the main one cannot take signals."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)

    def check(self) -> None:
        """Raises Interrupted if it was asked for."""
        if self.asked:
            raise Interrupted


class Run:
    """One training run that writes into a folder. ``meta`` says what is trained and with which classes;
    ``facts`` are further entries of the metrics' header and of the result."""

    def __init__(
        self,
        session: Session,
        data: Dataset,
        config: TrainConfig,
        out: Path,
        meta: StateMeta,
        *,
        facts: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
    ) -> None:
        if session.classes != len(data.classes):
            raise UsageError(f"the data has {len(data.classes)} classes, the compiled model {session.classes}")
        self._session = session
        self._data = data
        self._config = config
        self._out = out
        self._meta = meta
        self._facts = dict(facts or {})
        self._progress = progress or Silent()
        self._stop = _Stop()
        room = [config.cache_bytes if config.cache else 0]
        self._feeds = {"train": _Feed(session, data.train, room), "val": _Feed(session, data.val, room)}
        self._at = _Position()
        self._before = 0.0  # seconds of earlier parts of a run that is resumed
        self._steps = min(config.limit or len(data.train.labels), len(data.train.labels))
        self._started = time.perf_counter()

    # what the result depends on, besides the versions
    def _settings(self) -> dict[str, Any]:
        c = self._config
        return {
            "model": self._meta.model,
            "model_hash": self._meta.model_hash,
            "scheme": json.loads(self._meta.scheme),
            "bits": self._meta.bits,
            "classes": list(self._meta.classes),
            "data": self._data.fingerprint,
            "resize": self._meta.resize,
            "augment": list(c.augment),
            "epochs": c.epochs,
            "lr": c.lr,
            "seed": c.seed,
            "limit": c.limit,
        }

    def start(self, *, resume: bool = False, overwrite: bool = False) -> dict[str, Any]:
        """Trains to the end and returns the result. ``resume`` goes on from the checkpoint in the folder; without it an
        unfinished run there is refused, unless ``overwrite``. Raises UsageError, MismatchError, OSError, and, after the
        checkpoint was written, Interrupted."""
        with self._stop.installed():
            return self._run(resume, overwrite)

    def _run(self, resume: bool, overwrite: bool) -> dict[str, Any]:
        self._out.mkdir(parents=True, exist_ok=True)
        if resume:
            self._resume()
        else:
            self._refuse_unfinished(overwrite)
            self._session.reset(self._config.seed)
        self._before = self._at.seconds
        self._write_metrics()
        try:
            self._decode("val", range(len(self._data.val.labels)))
            while self._at.epoch < self._config.epochs:
                self._epoch()
        except Interrupted:
            raise Interrupted(self._interrupted()) from None
        self._save()
        return self._result()

    def _epoch(self) -> None:
        at, config = self._at, self._config
        order = epoch_order(self._data.train.labels, config.seed, at.epoch, config.limit).tolist()
        self._decode("train", order)
        title = f"epoch {at.epoch + 1}/{config.epochs}"
        with self._progress.bar(title, self._steps, at.step) as advance:
            while at.step < self._steps:
                self._stop.check()
                self._step(order[at.step])
                advance(f"loss {at.loss / at.step:.3f}  accuracy {at.correct / at.step:.3f}")
                if at.step % config.checkpoint_steps == 0 or at.step == self._steps:
                    self._save()
        check = self._stop.check
        found = evaluate(self._session, self._data.val, self._progress, feed=self._feeds["val"], check=check)
        self._finish_epoch(found)

    def _step(self, index: int) -> None:
        at, config = self._at, self._config
        lr = learning_rate(at.epoch * self._steps + at.step, config.epochs * self._steps, config.lr)
        draw = Draw(config.seed, at.epoch) if config.augment else None
        began = time.perf_counter()
        try:
            info = self._feeds["train"].step(index, lr, draw)
        except MismatchError as e:
            where = f"epoch {at.epoch + 1}, step {at.step + 1}, {self._data.train.name(index)}"
            raise MismatchError(f"{where}: {e}; start again with a lower --lr than {config.lr:.3g}") from None
        taken = time.perf_counter() - began
        at.step += 1
        at.steps += 1
        at.epoch_seconds += taken
        at.step_seconds += taken
        at.loss += info.loss
        at.correct += info.prediction == int(self._data.train.labels[index])
        at.saturated += info.saturated

    def _finish_epoch(self, val: Evaluation) -> None:
        at, n = self._at, self._steps
        record = {
            "type": "epoch",
            "epoch": at.epoch + 1,
            "steps": n,
            "train_loss": at.loss / n,
            "train_accuracy": at.correct / n,
            "saturated": at.saturated / n,
            "val_loss": val.loss,
            "val_accuracy": val.accuracy,
            "images_per_second": round(n / max(at.epoch_seconds, 1e-9), 2),
            "seconds": round(self._elapsed(), 3),
            "state_sha256": state_sha256(self._session.state()),
        }
        at.history.append(record)
        at.epoch += 1
        at.step, at.loss, at.correct, at.saturated, at.epoch_seconds = 0, 0.0, 0, 0.0, 0.0
        self._save()
        with (self._out / METRICS_FILE).open("a", encoding="utf-8") as f:
            f.write(json.dumps(record, allow_nan=False) + "\n")
        self._progress.line(
            f"epoch {record['epoch']}/{self._config.epochs}: loss {record['train_loss']:.4f}, accuracy "
            f"{record['train_accuracy']:.4f}; validation loss {val.loss:.4f}, accuracy {val.accuracy:.4f}; "
            f"{record['images_per_second']:.0f} images/s"
        )

    def _decode(self, split: str, indices: Sequence[int]) -> None:
        """Decodes what is needed now: a bad file stops the run before it begins, and the speed is that of steps."""
        missing = self._feeds[split].missing(indices)
        if not missing:
            return
        images: Split = getattr(self._data, split)
        with self._progress.bar(f"decoding {split}", len(missing)) as advance:
            for i in missing:
                self._stop.check()
                images.image(i)
                advance("")

    # --- files

    def _elapsed(self) -> float:
        return self._before + time.perf_counter() - self._started

    def _save(self) -> None:
        """The checkpoint, from which alone a run resumes, and the plain state beside it."""
        self._at.seconds = self._elapsed()
        arrays = self._session.state()
        progress = {"settings": self._settings(), "position": _fields(self._at)}
        statefile.save(TrainedState(self._meta, arrays, progress), self._out / CHECKPOINT_FILE)
        if self._at.step == 0 or self._stop.asked:
            statefile.save(TrainedState(self._meta, arrays), self._out / STATE_FILE)

    def _interrupted(self) -> str:
        self._save()
        at = self._at
        return (
            f"interrupted in epoch {at.epoch + 1} after {at.step} of {self._steps} steps; everything is saved in "
            f"{self._out}, the same command with --resume goes on from there"
        )

    def _write_metrics(self) -> None:
        versions = {"trainlet": __version__, "numpy": np.__version__, "python": platform.python_version()}
        header = {
            "type": "run",
            "format": "trainlet.metrics",
            "version": METRICS_VERSION,
            **self._settings(),
            **self._facts,
            "arena_bytes": self._session.arena_bytes,
            "state_bytes": self._session.state_bytes,
            "images": {"train": len(self._data.train.labels), "val": len(self._data.val.labels)},
            "versions": versions,
        }
        lines = [json.dumps(d, allow_nan=False) + "\n" for d in (header, *self._at.history)]
        statefile.write_atomic(self._out / METRICS_FILE, "".join(lines).encode())

    def _refuse_unfinished(self, overwrite: bool) -> None:
        path = self._out / CHECKPOINT_FILE
        if overwrite or not path.exists():
            return
        at, settings = _read_progress(path, statefile.load(path))
        wanted = settings.get("epochs")
        if at.epoch != wanted:
            raise UsageError(
                f"{self._out}: holds a run that stopped after {at.epoch} of {wanted} epochs; go on with --resume, "
                "discard it with --overwrite, or give another --out"
            )

    def _resume(self) -> None:
        path = self._out / CHECKPOINT_FILE
        if not path.exists():
            raise UsageError(f"{self._out}: there is no {CHECKPOINT_FILE} to resume from; leave out --resume to begin")
        state = statefile.load(path)
        at, then = _read_progress(path, state)
        now = self._settings()
        other = [f"{k} was {_short(then.get(k))}, now {_short(now[k])}" for k in now if then.get(k) != now[k]]
        if other:
            raise UsageError(
                f"{path}: the run has other settings: {'; '.join(other)}. Resume with the same, or give another --out"
            )
        try:
            self._session.load_state(state.arrays)
        except UsageError as e:
            raise UsageError(f"{path}: {e}") from None
        self._at = at

    def _result(self) -> dict[str, Any]:
        at = self._at
        last = at.history[-1]
        best = max(at.history, key=lambda r: r["val_accuracy"])  # the earliest of equals
        return {
            "val_accuracy": last["val_accuracy"],
            "val_loss": last["val_loss"],
            "best_val_accuracy": best["val_accuracy"],
            "best_epoch": best["epoch"],
            "train_loss": last["train_loss"],
            "train_accuracy": last["train_accuracy"],
            "saturated": last["saturated"],
            "images_per_second": round(at.steps / max(at.step_seconds, 1e-9), 2),
            "seconds": round(at.seconds, 3),
            "epochs": at.epoch,
            "steps": at.steps,
            "arena_bytes": self._session.arena_bytes,
            "state_bytes": self._session.state_bytes,
            "state_sha256": state_sha256(self._session.state()),
            "cache_bytes": sum(f.kept_bytes for f in self._feeds.values()),
            **self._facts,
            **{k: v for k, v in self._settings().items() if k != "scheme"},
            "scheme": json.loads(self._meta.scheme)["name"],
            "out": str(self._out),
            "state": str(self._out / STATE_FILE),
            "metrics": str(self._out / METRICS_FILE),
        }


def _fields(at: _Position) -> dict[str, Any]:
    return {f.name: getattr(at, f.name) for f in fields(at)}


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _read_progress(path: Path, state: TrainedState) -> tuple[_Position, dict[str, Any]]:
    """Position and settings in a checkpoint. UsageError where it has none."""
    progress = state.progress or {}
    raw: Any = progress.get("position")
    settings: Any = progress.get("settings")
    blank = _fields(_Position())
    usable = isinstance(raw, dict) and isinstance(settings, dict) and raw.keys() == blank.keys()
    if not usable or not all(_like(raw[name], value) for name, value in blank.items()):
        raise UsageError(f"{path}: not the checkpoint of a run; leave out --resume and give --overwrite to begin again")
    return _Position(**raw), settings


def _like(value: object, blank: object) -> bool:
    """Of the same type, and no negative number."""
    return type(value) is type(blank) and not (isinstance(value, int | float) and value < 0)
