# SPDX-License-Identifier: Apache-2.0
"""Host against device: the same images, the same steps, every byte compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from trainlet.errors import MismatchError, TrainletError, UsageError
from trainlet.ir import Image
from trainlet.session import Session
from trainlet.toolchain.vectors import LR, synthetic_image
from trainlet.train.statefile import state_sha256

SEED: Final = 17


@dataclass(frozen=True, slots=True)
class Validation:
    """``changed_weights``: trained values that differ from the factory's; seed, step and rho are no weights."""

    steps: int
    compared_bytes: int
    mismatching_bytes: int
    changed_weights: int
    state_sha256: str


Arrays = dict[str, NDArray[np.generic]]


def synthetic_step(shape: tuple[int, ...], step: int, classes: int) -> tuple[Image, int]:
    """Image and label of a step."""
    return synthetic_image(shape, step), step % classes


def run_step(session: Session, image: Image, label: int) -> Arrays:
    """All that one training step and an inference after it leave, in the order in which it comes about."""
    info = session.train_step(image, label, LR)
    found = {
        "loss": np.array([info.loss], np.float32),
        "prediction": np.array([info.prediction], np.int32),
        "saturated": np.array([info.saturated], np.float32),
    }
    return {**found, **session.state(), "logits": session.infer(image)}


def _differing(a: NDArray[np.generic], b: NDArray[np.generic]) -> int:
    """Bytes that differ; all of the longer one where the sizes do."""
    x, y = a.tobytes(), b.tobytes()
    if len(x) != len(y):
        return max(len(x), len(y))
    return int(np.count_nonzero(np.frombuffer(x, np.uint8) != np.frombuffer(y, np.uint8)))


Locate = Callable[[int], str]


def validate(
    host: Session, device: Session, shape: tuple[int, ...], steps: int, locate: Locate | None = None
) -> Validation:
    """Runs ``steps`` training steps on synthetic images of ``shape`` in both sessions and compares loss, prediction,
    logits and the whole trained state after each. MismatchError naming the first array that differs, and the node that
    ``locate`` finds for the step it happened in; or where nothing was compared or nothing changed. UsageError for less
    than one step."""
    if steps < 1:
        raise UsageError(f"--steps {steps}: nothing would be compared; give 1 or more")
    if host.model_hash != device.model_hash:
        raise MismatchError("host and device run different models; build both from one compilation")
    for session in (host, device):
        session.reset(SEED)
    start = host.state()
    compared = 0
    for t in range(steps):
        image, label = synthetic_step(shape, t, host.classes)
        mine, other = run_step(host, image, label), run_step(device, image, label)
        compared += _compare(mine, other, t, compared, locate)
    end = host.state()
    weights = [k for k in end if k.endswith((".weight", ".bias"))]
    changed = sum(int(np.count_nonzero(start[k] != end[k])) for k in weights)
    if not compared or not changed:
        raise MismatchError(f"{compared} bytes compared, {changed} weights changed: this proves nothing; train more")
    return Validation(steps, compared, 0, changed, state_sha256(end))


def _compare(mine: Arrays, other: Arrays, step: int, before: int, locate: Locate | None) -> int:
    """Bytes compared. MismatchError where one differs."""
    if mine.keys() != other.keys():
        raise MismatchError(f"step {step}: host and device have different arrays: {sorted(mine.keys() ^ other.keys())}")
    total = sum(v.nbytes for v in mine.values())
    wrong = {k: n for k in mine if (n := _differing(mine[k], other[k]))}
    if wrong:
        first = next(iter(wrong))
        raise MismatchError(
            f"step {step}: {sum(wrong.values())} of {total} bytes differ between host and device, first in {first} "
            f"({wrong[first]} bytes); {before} bytes before it were equal{_located(locate, step)}"
        )
    return total


def _located(locate: Locate | None, step: int) -> str:
    """What to say about the node. That it cannot be found must not hide the difference itself."""
    if locate is None:
        return ""
    try:
        node = locate(step)
    except TrainletError as e:
        return f". The first node that differs cannot be named: {e}"
    return f". The first node whose output differs is {node}" if node else ". No node's output differs by itself"
