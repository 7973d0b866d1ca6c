# SPDX-License-Identifier: Apache-2.0
"""Says when training does not train: it diverges, its loss stands still, or what it learns from is too weak to move it.

The limits leave room on both sides of what ``bench/divergence.py`` found with seven pairs of model and data. At up to 4
times the default rate no loss over 100 steps was above 1.3 times its start, and no share of weights at the clamp above
its own; from 512 times on, every run passed a limit within 100 steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from trainlet.autodiff.scheme import FRACTION_BITS

WINDOW: Final = 100  # steps whose mean loss is judged, if an epoch has as many
SHORTEST: Final = 20  # if not, an epoch; the loss of fewer steps than these is noise
LOOK: Final = 32  # images that are looked at before the first step
RISEN: Final = 4.0  # a loss of so many times that of the start has diverged
CLAMPED: Final = 0.1  # so has a run with this share of weights more at the clamp
MOVED: Final = 0.95  # of the loss before: a higher one has not moved
IGNORANT: Final = 0.98  # of ln(classes): a higher loss knows nothing yet
ALIKE: Final = 0.01  # the spread of logits over images that a model does not tell apart
ZERO: Final = 1e-12  # features of this mean square are zero

Arrays = Mapping[str, NDArray[np.generic]]


@dataclass(frozen=True, slots=True)
class Start:
    """Before the first step: mean loss over ``LOOK`` images, share of trained weights at the clamp, and the mean square
    of the features before the head, None where it cannot be told."""

    loss: float
    clamped: float
    feature_mean_square: float | None


def window(epoch: int, total: int) -> int:
    """Steps whose mean loss is judged, in a run of ``total`` with ``epoch`` in each."""
    return min(max(epoch, SHORTEST), WINDOW, total)


def clamped_share(arrays: Arrays, bits: int) -> float:
    """Of all trained weights of ``Session.state``, those at +-127 x 2^L; 0 where none trains."""
    limit = 127 << FRACTION_BITS[bits]
    layers = [name.removesuffix(".channels") for name in arrays if name.endswith(".channels")]
    trained = [np.abs(arrays[f"{layer}.weight"].astype(np.int64)) for layer in layers]
    return sum(int((w >= limit).sum()) for w in trained) / max(sum(w.size for w in trained), 1)


def mean_square(arrays: Arrays, logits: NDArray[np.float64]) -> float | None:
    """Of the features, estimated from ``logits`` (N, classes): over the directions that a head of random weights W has,
    the mean of |W f|^2 is |W|^2 times that of f^2. None without a head, or with one of zeros."""
    if "head.weight" not in arrays or not arrays["head.weight"].any():
        return None
    weight = arrays["head.weight"].astype(np.float64)
    bias = arrays["head.bias"].astype(np.float64) if "head.bias" in arrays else np.zeros(len(weight))
    return float(np.square(logits - bias).sum(axis=1).mean() / np.square(weight).sum())


def divergence(start: Start, chance: float, loss: float, clamped: float) -> str:
    """What shows that a run has diverged; empty where nothing does. ``chance`` is ln(classes)."""
    signs = []
    if loss > RISEN * max(chance, start.loss):
        signs.append(f"the mean loss is {loss:.4g}, {loss / chance:.3g} times ln(classes)")
    if clamped > start.clamped + CLAMPED:
        signs.append(f"{clamped:.0%} of the trained weights sit at the clamp, {start.clamped:.0%} at the start")
    return " and ".join(signs)


def weakness(start: Start, features: int, lr: float, steps: int) -> str:
    """Why ``steps`` of training can move nothing, and what to do; empty where they can. A step moves its own logit by
    rate x |features|^2 of its error, and the mean rate of a run is half of its peak ``lr``."""
    if start.feature_mean_square is None or lr * steps * features * start.feature_mean_square >= 2:
        return ""
    if start.feature_mean_square < ZERO:
        return (
            "the features before the head are zero, and nothing can be learned from them: the images are not what the "
            "model was made for, or its layers are dead; look at `trainlet import`, or take another model"
        )
    better = 0.25 / (features * start.feature_mean_square)
    advice = f"a higher --lr, about {better:.2g}" if better > lr else "more --epochs"
    return (
        f"features with a mean square of {start.feature_mean_square:.2g} move the logits by less than their error in "
        f"{steps} steps at a rate of {lr:.3g}; give {advice}"
    )


def standstill(before: float, now: float, chance: float, spread: float, lr: float) -> str:
    """Why an epoch of loss ``now`` after ``before`` has not learned, and what to do; empty where it has. ``spread`` is
    the standard deviation of a logit over images."""
    if now < IGNORANT * chance or now < MOVED * before:
        return ""
    found = f"the loss stands still: {now:.4g} after {before:.4g}, where ln(classes) is {chance:.4g}"
    if spread < ALIKE:
        return f"{found}, and all images give the same logits: the features are dead; start again with a lower --lr"
    return (
        f"{found}; give another --lr than {lr:.3g} (a higher one, if this is low), train more layers, or check labels"
    )
