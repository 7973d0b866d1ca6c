# SPDX-License-Identifier: Apache-2.0
"""What layers share on their way to integers: ranges, clamps, weights by output channel, dead channels, the limits of
32-bit sums."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from trainlet.errors import UnsupportedError, UsageError
from trainlet.ir import QParams

DEAD_RATIO: Final = 2.0**-16  # a channel whose scale is below this share of the layer's largest has no usable scale
MAX_BIAS: Final = 1 << 30
_ROOM: Final = float(1 << 29)  # biases stay below it, so that 32-bit sums have room
_MAX_MULTIPLIER: Final = 2.0**30  # beyond, every output would saturate

Range = tuple[float, float]
Floats = NDArray[np.float64]


def range_qparams(layer: str, found: Range) -> QParams:
    """Scale and zero point that reach over ``found`` and hold 0 exactly, as padding and activations need it.
    UsageError where the range is nothing but 0."""
    low, high = min(found[0], 0.0), max(found[1], 0.0)
    scale = (high - low) / 255
    if not scale > 0:
        raise UsageError(
            f"{layer}: its output is 0 for all calibration images, so it has no range; give more varied images, or "
            "remove the layer"
        )
    return QParams(scale, max(-128, min(127, round(-128 - low / scale))))


def integer_clamp(clamp: Range | None, q: QParams) -> Range:
    """The same bounds in integers; those of int8 where there are none."""
    low, high = clamp or (-math.inf, math.inf)
    return max(-128, _near(low, q)), min(127, _near(high, q))


def _near(real: float, q: QParams) -> int:
    return q.zero + round(max(-512.0, min(512.0, real / q.scale)))


@dataclass(frozen=True)
class QuantizedWeights:
    """Integers of a convolution, output channels first."""

    weight: NDArray[np.int8]
    bias: NDArray[np.int32]
    scale: NDArray[np.float32]
    dead: tuple[int, ...]

    def check(self, layer: str, x: QParams, y: QParams) -> None:
        """UsageError where an output would always saturate."""
        if not x.scale * float(self.scale.max()) / y.scale < _MAX_MULTIPLIER:
            raise UsageError(f"{layer}: its weights are so large that every output saturates; train the model again")


def quantize_weights(layer: str, w: Floats, b: Floats, x_scale: float, per_channel: bool) -> QuantizedWeights:
    """Weights within -127..127 with a scale for each output channel, or one for all; biases in units of that times
    ``x_scale``. UsageError where all weights are 0."""
    largest = np.abs(w).reshape(len(w), -1).max(axis=1)
    if not largest.max() > 0:
        raise UsageError(f"{layer}: all its weights are 0, so they have no scale; remove the layer")
    scale = largest / 127 if per_channel else np.full(len(w), largest.max() / 127)
    dead = np.flatnonzero(scale < DEAD_RATIO * scale.max())
    scale[dead] = scale.max()
    # a channel with tiny weights and a large bias gives up the weights' precision, which the bias drowns anyway
    scale = np.maximum(scale, np.abs(b) / (x_scale * _ROOM)).astype(np.float32)
    wide = scale.astype(np.float64)
    q = np.clip(np.rint(w / wide.reshape(-1, *[1] * (w.ndim - 1))), -127, 127).astype(np.int8)
    q[dead] = 0
    bias = np.rint(b / (wide * x_scale)).astype(np.int32)
    return QuantizedWeights(q, bias, scale, tuple(map(int, dead)))


def canonicalize_dead(
    w: NDArray[np.int8], b: NDArray[np.int32], scale: NDArray[np.float32]
) -> tuple[NDArray[np.int8], NDArray[np.int32], NDArray[np.float32], tuple[int, ...]]:
    """Gives dead output channels (s_w[o] < 2^-16 max(s_w)) zero weights, the layer's largest scale and a bias of the
    same real value, rounded. ``w`` has output channels first; ``scale`` is finite and > 0. Returns the new arrays (the
    given ones where nothing is dead) and the dead channels, ascending."""
    wide = scale.astype(np.float64)
    largest = wide.max()
    dead = np.flatnonzero(wide < DEAD_RATIO * largest)
    if not dead.size:
        return w, b, scale, ()
    w, b, scale = w.copy(), b.copy(), scale.copy()
    w[dead] = 0
    b[dead] = np.floor(b[dead] * wide[dead] / largest + 0.5).astype(np.int32)
    scale[dead] = np.float32(largest)
    return w, b, scale, tuple(int(o) for o in dead)


def check_sums(layer: str, b: NDArray[np.int32], fan_in: int) -> None:
    """Raises UnsupportedError where the 32-bit sums of a convolution could overflow; ``b`` after
    ``canonicalize_dead``, ``fan_in`` = C_in/groups kh kw."""
    worst = int(np.abs(b.astype(np.int64)).max())
    if worst > MAX_BIAS:
        raise UnsupportedError(
            f"{layer}: a bias of {worst} is above the limit of 2^30, so its 32-bit sums could overflow; "
            "quantize the model again with a larger weight scale for that channel"
        )
    if 127 * 255 * fan_in + MAX_BIAS >= 1 << 31:
        limit = ((1 << 31) - 1 - MAX_BIAS) // (127 * 255)
        raise UnsupportedError(
            f"{layer}: each output sums {fan_in} products, more than the {limit} that fit 32 bits; "
            "split the layer or use groups"
        )
