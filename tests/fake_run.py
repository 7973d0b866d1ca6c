# SPDX-License-Identifier: Apache-2.0
"""A session that needs no compiler, its data, and a run over both: for the tests of runs and their folders."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainlet.errors import UsageError
from trainlet.ir import Image
from trainlet.session import StepInfo
from trainlet.train.data import Dataset, Transform, load_data
from trainlet.train.loop import TrainConfig, cross_entropy
from trainlet.train.run import Run
from trainlet.train.statefile import StateMeta

SHAPE = (4, 4, 3)
CLASSES = 3
META = StateMeta("tiny", "ab" * 32, '{"name": "head", "bits": 8}', ("a", "b", "c"), 8, "crop")


class FakeSession:
    """Softmax regression on the pixels. Its updates carry noise from (seed, step), like the real ones, so any step that
    is left out, done twice or moved changes the bytes."""

    def __init__(self, prefix: bool = True) -> None:
        self.arena_bytes = 100
        self.state_bytes = 20
        self.classes = CLASSES
        self.model_hash = META.model_hash
        self.calls: list[str] = []
        self.steps: list[tuple[bytes, int, float]] = []
        self.before_step: Callable[[int], None] = lambda step: None
        self._has_prefix = prefix

    def reset(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self._w = rng.standard_normal((CLASSES, math.prod(SHAPE))).astype(np.float32) * np.float32(0.01)
        self._seed, self._step = seed, 0

    def infer(self, image: Image) -> NDArray[np.float32]:
        self.calls.append("infer")
        return self._logits(image)

    def _logits(self, image: Image) -> NDArray[np.float32]:
        found: NDArray[np.float32] = (self._w @ (image.reshape(-1).astype(np.float32) / 128)).astype(np.float32)
        return found

    def train_step(self, image: Image, label: int, lr: float) -> StepInfo:
        self.calls.append("train")
        return self._train(image, label, lr)

    def _train(self, image: Image, label: int, lr: float) -> StepInfo:
        self.before_step(self._step)
        self.steps.append((image.tobytes(), label, lr))
        z = self._logits(image).astype(np.float64)
        p = np.exp(z - z.max())
        p /= p.sum()
        g = p - np.eye(CLASSES)[label]
        noise = np.random.default_rng([self._seed, self._step]).standard_normal(self._w.shape) * 1e-4
        self._w = (self._w - lr * np.outer(g, image.reshape(-1) / 128) + noise).astype(np.float32)
        self._step += 1
        return StepInfo(cross_entropy(z, label), int(z.argmax()), 0.25)

    def prefix(self, image: Image) -> bytes:
        self.calls.append("prefix")
        return image.tobytes() if self._has_prefix else b""

    def infer_cached(self, prefix: bytes) -> NDArray[np.float32]:
        self.calls.append("infer_cached")
        return self._logits(np.frombuffer(prefix, np.int8))

    def train_step_cached(self, prefix: bytes, label: int, lr: float) -> StepInfo:
        self.calls.append("train_cached")
        return self._train(np.frombuffer(prefix, np.int8), label, lr)

    def state(self) -> dict[str, NDArray[np.generic]]:
        return {
            "head.weight": self._w,
            "rho": np.zeros(0, np.int8),
            "seed": np.array(self._seed, np.uint32),
            "step": np.array(self._step, np.uint32),
        }

    def load_state(self, state: Mapping[str, NDArray[np.generic]]) -> None:
        if state["head.weight"].shape != (CLASSES, math.prod(SHAPE)):
            raise UsageError("head.weight: another shape")
        self._w = state["head.weight"].astype(np.float32)
        self._seed, self._step = int(state["seed"]), int(state["step"])


def make_dataset(folder: Path) -> Dataset:
    """30 + 12 images whose class is their brightest channel."""
    rng = np.random.default_rng(0)
    y = np.arange(42) % CLASSES
    x = rng.integers(0, 180, (42, *SHAPE))
    x[np.arange(42), :, :, y] += 70
    path = folder / "set.npz"
    names = np.array(["a", "b", "c"])
    np.savez(
        path,
        x_train=x[:30].astype(np.uint8),
        y_train=y[:30],
        x_val=x[30:].astype(np.uint8),
        y_val=y[30:],
        classes=names,
    )
    return load_data(path, Transform(SHAPE, "crop", ("flip",)))


def run(
    dataset: Dataset, out: Path, session: FakeSession | None = None, *, meta: StateMeta = META, resume: bool = False,
    overwrite: bool = False, **config: Any,
) -> dict[str, Any]:  # fmt: skip
    settings = {"epochs": 3, "lr": 0.05, "seed": 7} | config
    mine = Run(session or FakeSession(), dataset, TrainConfig(**settings), out, meta, facts={"extra": 1})
    return mine.start(resume=resume, overwrite=overwrite)


def interrupt(session: FakeSession, at: int, number: signal.Signals = signal.SIGINT) -> None:
    session.before_step = lambda step: signal.raise_signal(number) if step == at else None
