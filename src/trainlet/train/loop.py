# SPDX-License-Identifier: Apache-2.0
"""What epochs over a session at batch 1 are made of: settings, learning rate, order of the images, evaluation.

Learning rate and order follow from the number of the step alone, so a run that was interrupted, at any step, ends in
the same bytes as one that was not."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from trainlet.autodiff.scheme import UpdateScheme
from trainlet.errors import MismatchError, UsageError
from trainlet.session import Session, StepInfo
from trainlet.train.data import Draw, Split

DEFAULT_LR: Final = 0.5 / 256  # best or near it on three models and three data sets: bench/rates.py
HEAD_LR: Final = 1 / 256  # a head alone learns faster from features that stand still: bench/README.md
SMALLEST_LR: Final = 1.2e-38  # above it float32 keeps all its digits
WARMUP_SHARE: Final = 0.1
CACHE_BYTES: Final = 2 << 30
ON_DIVERGENCE: Final = ("stop", "warn")

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


def default_lr(scheme: UpdateScheme) -> float:
    """The peak learning rate that suits a scheme at batch 1."""
    return DEFAULT_LR if scheme.biases or scheme.weights else HEAD_LR


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """Settings of a run. ``lr`` is the peak, in float32 units at batch 1; ``limit`` images per epoch, balanced over the
    classes. The last four change no byte of the result: ``cache`` keeps what the frozen prefix computed, up to
    ``cache_bytes``; a checkpoint is written every ``checkpoint_steps`` and after each epoch; ``on_divergence`` says
    whether a run that has diverged stops at the last good state, or warns and goes on."""

    epochs: int
    lr: float = DEFAULT_LR
    seed: int = 0
    limit: int | None = None
    augment: tuple[str, ...] = ()
    cache: bool = True
    cache_bytes: int = CACHE_BYTES
    checkpoint_steps: int = 500
    on_divergence: str = "stop"

    def __post_init__(self) -> None:
        rules = (
            (1 <= self.epochs <= 1_000_000, f"epochs {self.epochs}: give 1 to 1000000"),
            (math.isfinite(self.lr) and 0 < self.lr <= 1e30, f"learning rate {self.lr}: give a finite number above 0"),
            (self.lr >= SMALLEST_LR, f"learning rate {self.lr}: too small for float32; give at least {SMALLEST_LR}"),
            (0 <= self.seed < 1 << 32, f"seed {self.seed}: give a whole number from 0 to 4294967295"),
            (self.limit is None or self.limit >= 1, f"limit {self.limit}: give at least 1 image per epoch"),
            (self.checkpoint_steps >= 1, f"checkpoint every {self.checkpoint_steps} steps: give at least 1"),
            (
                self.on_divergence in ON_DIVERGENCE,
                f"on divergence {self.on_divergence!r}: give {' or '.join(ON_DIVERGENCE)}",
            ),
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


class PrefixFeed:
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
    """Over one split: share of images with the right class, mean cross entropy, both counts of each class, and the
    spread of logits over images: the standard deviation of a class, as a mean over classes."""

    accuracy: float
    loss: float
    correct: tuple[int, ...]
    images: tuple[int, ...]
    spread: float


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
    feed = feed or PrefixFeed(session, split, [0])
    labels = split.labels
    correct, images, loss = [0] * session.classes, [0] * session.classes, 0.0
    first, shift, square = np.zeros(session.classes), np.zeros(session.classes), np.zeros(session.classes)
    with progress.bar("validating", len(labels)) as advance:
        for i, label in enumerate(labels.tolist()):
            check()
            z = feed.logits(i).astype(np.float64)
            if not np.isfinite(z).all():
                raise MismatchError(f"{split.name(i)}: a logit is not finite; train with a lower learning rate")
            top = int(z.argmax())
            loss += cross_entropy(z, label)
            images[label] += 1
            correct[label] += top == label
            first = z if i == 0 else first  # logits minus those of the first image lose no digits in the sums
            shift += z - first
            square += np.square(z - first)
            advance(f"{sum(correct) / (i + 1):.3f}")
    n = len(labels)
    spread = np.sqrt(np.maximum(square / n - np.square(shift / n), 0)).mean()
    return Evaluation(sum(correct) / n, loss / n, tuple(correct), tuple(images), float(spread))


def cross_entropy(logits: NDArray[np.float64], label: int) -> float:
    """-log softmax(logits)[label]."""
    top = logits.max()
    return float(math.log(np.exp(logits - top).sum()) - (logits[label] - top))
