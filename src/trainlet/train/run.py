# SPDX-License-Identifier: Apache-2.0
"""A training run in a folder: epochs, metrics, checkpoint and resume.

A run is a function of the model, the scheme, the data and the settings; one that was interrupted, at any step, ends in
the same bytes as one that was not."""

from __future__ import annotations

import contextlib
import json
import math
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from trainlet._version import __version__
from trainlet.errors import MismatchError, UsageError
from trainlet.session import Session
from trainlet.train import checkpoint, statefile, watch
from trainlet.train.checkpoint import Position
from trainlet.train.data import Dataset, Draw, Split
from trainlet.train.folder import locked, open_regular, write_atomic
from trainlet.train.loop import (
    Evaluation,
    PrefixFeed,
    Progress,
    Silent,
    TrainConfig,
    cross_entropy,
    epoch_order,
    evaluate,
    learning_rate,
)
from trainlet.train.statefile import Arrays, StateMeta, TrainedState, state_sha256
from trainlet.train.stop import Interrupted, Stop
from trainlet.train.watch import Start

METRICS_VERSION: Final = 2

CHECKPOINT_FILE: Final = "checkpoint.safetensors"
STATE_FILE: Final = "state.safetensors"
METRICS_FILE: Final = "metrics.jsonl"


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
        self._stop = Stop()
        room = [config.cache_bytes if config.cache else 0]
        self._feeds = {"train": PrefixFeed(session, data.train, room), "val": PrefixFeed(session, data.val, room)}
        self._at = Position()
        self._good: tuple[Arrays, Position] = ({}, self._at)  # of the latest look that found nothing wrong
        self._before = 0.0  # seconds of earlier parts of a run that is resumed
        self._steps = min(config.limit or len(data.train.labels), len(data.train.labels))
        self._total = config.epochs * self._steps
        self._chance = math.log(session.classes)
        self._clamped = ""  # for the bar
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
        """Trains to the end and returns the result. ``resume`` goes on from the checkpoint in the folder; without it
        another run there is refused, unless ``overwrite``; a finished one with these settings is left as it is. Raises
        UsageError, also where a file cannot be written, MismatchError, also where the run has diverged and is to stop
        then, and, after the checkpoint was written, Interrupted."""
        with self._stop.installed():
            self._out.mkdir(parents=True, exist_ok=True)
            with locked(self._out):
                return self._run(resume, overwrite)

    def _run(self, resume: bool, overwrite: bool) -> dict[str, Any]:
        self._enter(resume, overwrite)
        self._before = self._at.seconds
        if self._at.epoch == self._config.epochs and not self._lost():
            self._progress.line(f"{self._out}: this run has already finished with these settings; nothing has changed")
            return {**self._result(), "already_finished": True}
        try:
            self._train(overwrite)
        except Interrupted:
            raise Interrupted(self._interrupted()) from None
        except MismatchError as e:
            raise MismatchError(self._fall_back(str(e))) from None
        return {**self._result(), "already_finished": False}

    def _train(self, overwrite: bool) -> None:
        """All epochs that are left. What the folder had before goes when the first step is due, no sooner."""
        self._decode("val", range(len(self._data.val.labels)))
        if self._at.epoch < self._config.epochs:
            self._decode("train", self._order())
        if overwrite:
            self._discard()
        if self._at.start is None:
            self._look()
        self._keep(self._session.state())
        self._write_metrics()
        while self._at.epoch < self._config.epochs:
            self._epoch()
        self._save()

    def _order(self) -> list[int]:
        found: list[int] = epoch_order(
            self._data.train.labels, self._config.seed, self._at.epoch, self._config.limit
        ).tolist()
        return found

    def _epoch(self) -> None:
        at, config = self._at, self._config
        order = self._order()
        self._decode("train", order)
        title = f"epoch {at.epoch + 1}/{config.epochs}"
        with self._progress.bar(title, self._steps, at.step) as advance:
            while at.step < self._steps:
                self._stop.check()
                self._step(order[at.step])
                advance(f"loss {at.loss / at.step:.3f}  accuracy {at.correct / at.step:.3f}{self._clamped}")
                if at.step % config.checkpoint_steps == 0 or at.step == self._steps:
                    self._save()
        check = self._stop.check
        found = evaluate(self._session, self._data.val, self._progress, feed=self._feeds["val"], check=check)
        self._finish_epoch(found)

    def _step(self, index: int) -> None:
        at, config = self._at, self._config
        lr = learning_rate(at.epoch * self._steps + at.step, self._total, config.lr)
        draw = Draw(config.seed, at.epoch) if config.augment else None
        began = time.perf_counter()
        try:
            info = self._feeds["train"].step(index, lr, draw)
            if not math.isfinite(info.loss):
                raise MismatchError("the loss is not a finite number")
        except MismatchError as e:
            where = f"epoch {at.epoch + 1}, step {at.step + 1}, {self._data.train.name(index)}"
            raise MismatchError(f"{where}: {e}; {self._advice()}") from None
        taken = time.perf_counter() - began
        at.step += 1
        at.steps += 1
        at.epoch_seconds += taken
        at.step_seconds += taken
        at.loss += info.loss
        at.correct += info.prediction == int(self._data.train.labels[index])
        at.saturated += info.saturated
        at.window_loss += info.loss
        at.window_steps += 1
        if at.window_steps >= watch.window(self._steps, self._total):
            self._watch()

    def _finish_epoch(self, val: Evaluation) -> None:
        at, n = self._at, self._steps
        state = self._session.state()
        record: dict[str, Any] = {
            "type": "epoch",
            "epoch": at.epoch + 1,
            "steps": n,
            "train_loss": at.loss / n,
            "train_accuracy": at.correct / n,
            "saturated": at.saturated / n,
            "clamped": watch.clamped_share(state, self._meta.bits),
            "val_loss": val.loss,
            "val_accuracy": val.accuracy,
            "images_per_second": round(n / max(at.epoch_seconds, 1e-9), 2),
            "seconds": round(self._elapsed(), 3),
            "state_sha256": state_sha256(state),
        }
        before = at.epochs()
        at.history.append(record)
        self._progress.line(
            f"epoch {record['epoch']}/{self._config.epochs}: loss {record['train_loss']:.4f}, accuracy "
            f"{record['train_accuracy']:.4f}; validation loss {val.loss:.4f}, accuracy {val.accuracy:.4f}; "
            f"{record['clamped']:.1%} of weights at the clamp; {record['images_per_second']:.0f} images/s"
        )
        self._compare(before[-1]["train_loss"] if before else None, record["train_loss"], val.spread)
        at.epoch += 1
        at.step, at.loss, at.correct, at.saturated, at.epoch_seconds = 0, 0.0, 0, 0.0, 0.0
        self._save()
        self._write_metrics()

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

    # --- whether it learns

    def _start(self) -> Start:
        assert self._at.start is not None
        return self._at.start

    def _advice(self) -> str:
        return f"start again with a lower --lr than {self._config.lr:.3g}"

    def _look(self) -> None:
        """What the first steps will find, before the first one."""
        indices = self._order()[: watch.LOOK]
        feed = PrefixFeed(self._session, self._data.train, [0]) if self._config.augment else self._feeds["train"]
        logits = np.array([feed.logits(i) for i in indices], np.float64)
        labels = self._data.train.labels[indices].tolist()
        loss = sum(cross_entropy(z, label) for z, label in zip(logits, labels, strict=True)) / len(indices)
        if not math.isfinite(loss):
            raise MismatchError(f"{self._data.train.name(indices[0])}: a logit of the untrained model is not finite")
        state = self._session.state()
        clamped = watch.clamped_share(state, self._meta.bits)
        self._at.start = Start(loss, clamped, watch.mean_square(state, logits))
        features = state["head.weight"].shape[1] if "head.weight" in state else 0
        self._warn("weak", watch.weakness(self._at.start, features, self._config.lr, self._total))

    def _keep(self, state: Arrays) -> None:
        """In memory, as the last good one."""
        self._good = state, replace(self._at, history=list(self._at.history))

    def _watch(self) -> None:
        """Judges the steps of a window. MismatchError where the run has diverged and is to stop then."""
        at = self._at
        loss, state = at.window_loss / at.window_steps, self._session.state()
        at.window_loss, at.window_steps = 0.0, 0
        clamped = watch.clamped_share(state, self._meta.bits)
        self._clamped = f"  {clamped:.1%} clamped"
        found = watch.divergence(self._start(), self._chance, loss, clamped)
        if not found:
            self._keep(state)
            return
        text = f"epoch {at.epoch + 1}, step {at.step}: training has diverged: {found}; {self._advice()}"
        if self._config.on_divergence == "stop":
            raise MismatchError(text)
        self._warn("divergence", text)

    def _compare(self, before: float | None, now: float, spread: float) -> None:
        """Judges an epoch by the one before; the first one, much of which is warm-up, only where it is the last."""
        if self._diverged() or (before is None and self._config.epochs > 1):
            return
        loss = self._start().loss if before is None else before
        self._warn("standstill", watch.standstill(loss, now, self._chance, spread, self._config.lr))

    def _diverged(self) -> bool:
        return any(r["kind"] == "divergence" for r in self._at.warnings())

    def _warn(self, kind: str, text: str) -> None:
        """Says it once of each kind; nothing where ``text`` is empty."""
        if text and all(r["kind"] != kind for r in self._at.warnings()):
            self._progress.line(f"warning: {text}")
            self._note(kind, text)

    def _note(self, kind: str, text: str) -> None:
        """Into the metrics."""
        at = self._at
        at.history.append({"type": "warning", "kind": kind, "epoch": at.epoch + 1, "steps": at.steps, "text": text})
        self._write_metrics()

    def _fall_back(self, reason: str) -> str:
        """Leaves the last good state in the folder, and says so."""
        if self._at.start is None:
            return reason
        self._note("stopped", reason)
        state, self._at = self._good
        if not self._at.steps:
            self._discard(keep=METRICS_FILE)
            return f"{reason}. No state was good enough to be kept"
        self._session.load_state(state)
        self._save(plain=True)
        return (
            f"{reason}. {self._out / STATE_FILE} is the last good state, of step {self._at.steps}; "
            "--resume --on-divergence warn would go on from there"
        )

    # --- files

    def _elapsed(self) -> float:
        return self._before + time.perf_counter() - self._started

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """A full disk ends the run, not what it has reached."""
        try:
            yield
        except OSError as e:
            kept = (self._out / CHECKPOINT_FILE).exists()
            further = "with --resume, from the last checkpoint" if kept else "from the beginning"
            raise UsageError(
                f"{e.filename or self._out}: cannot be written ({e.strerror}); make room there, and the same command "
                f"goes on {further}"
            ) from None

    def _save(self, *, plain: bool = False) -> None:
        """The checkpoint, from which alone a run resumes, and the plain state beside it."""
        self._at.seconds = self._elapsed()
        arrays = self._session.state()
        progress = checkpoint.progress(self._at, self._settings())
        with self._writing():
            statefile.save(TrainedState(self._meta, arrays, progress), self._out / CHECKPOINT_FILE)
            if plain or self._at.step == 0 or self._stop.asked:
                statefile.save(TrainedState(self._meta, arrays), self._out / STATE_FILE)

    def _interrupted(self) -> str:
        at = self._at
        if at.start is None:
            return "interrupted before the first step; nothing has changed, start the same command again"
        self._save()
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
            "chance_loss": self._chance,
            "start": asdict(self._start()),
            "versions": versions,
        }
        lines = [json.dumps(d, allow_nan=False) + "\n" for d in (header, *self._at.history)]
        with self._writing():
            write_atomic(self._out / METRICS_FILE, "".join(lines).encode())

    def _lost(self) -> bool:
        """Whether a file of a finished run is gone."""
        return not all((self._out / name).exists() for name in (STATE_FILE, METRICS_FILE))

    def _discard(self, keep: str = "") -> None:
        for name in {CHECKPOINT_FILE, STATE_FILE, METRICS_FILE} - {keep}:
            (self._out / name).unlink(missing_ok=True)

    def _enter(self, resume: bool, overwrite: bool) -> None:
        """Takes up what the folder holds, or begins anew. UsageError where something would be lost."""
        path = self._out / CHECKPOINT_FILE
        if path.exists() and not overwrite:
            self._take_up(path, resume)
            return
        if resume:
            raise UsageError(f"{self._out}: there is no {CHECKPOINT_FILE} to resume from; leave out --resume to begin")
        stray = [f for f in (self._out / STATE_FILE, self._out / METRICS_FILE) if f.exists() and not _is_begun(f)]
        if stray and not overwrite:
            raise UsageError(
                f"{stray[0]}: there is no {CHECKPOINT_FILE} that it belongs to; discard it with --overwrite, or give "
                "another --out"
            )
        self._session.reset(self._config.seed)

    def _take_up(self, path: Path, resume: bool) -> None:
        found = checkpoint.load(path)
        if not resume and not found.finished:
            done, wanted = found.position.epoch, found.settings["epochs"]
            raise UsageError(
                f"{self._out}: holds a run that stopped after {done} of {wanted} epochs; go on with --resume, "
                "discard it with --overwrite, or give another --out"
            )
        other = found.differences(self._settings())
        if other and resume:
            raise UsageError(
                f"{path}: the run has other settings: {other}. Resume with the same, or give another --out"
            )
        if other:
            raise UsageError(
                f"{self._out}: holds a finished run with other settings: {other}. Discard it with --overwrite, or give "
                "another --out"
            )
        try:
            self._session.load_state(found.arrays)
        except UsageError as e:
            raise UsageError(f"{path}: {e}") from None
        self._at = found.position

    def _result(self) -> dict[str, Any]:
        at = self._at
        epochs = at.epochs()
        last = epochs[-1]
        best = max(epochs, key=lambda r: r["val_accuracy"])  # the earliest of equals
        return {
            "val_accuracy": last["val_accuracy"],
            "val_loss": last["val_loss"],
            "best_val_accuracy": best["val_accuracy"],
            "best_epoch": best["epoch"],
            "train_loss": last["train_loss"],
            "train_accuracy": last["train_accuracy"],
            "chance_loss": self._chance,
            "saturated": last["saturated"],
            "clamped": last["clamped"],
            "feature_mean_square": self._start().feature_mean_square,
            "diverged": self._diverged(),
            "warnings": [r["text"] for r in at.warnings()],
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


def _is_begun(path: Path) -> bool:
    """Whether a file is the metrics of a run that ended before it had anything to keep."""
    with open_regular(path) as f:
        return b'"format": "trainlet.metrics"' in f.read(1000)
