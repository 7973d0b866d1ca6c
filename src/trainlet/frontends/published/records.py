# SPDX-License-Identifier: Apache-2.0
"""The records of a published checkpoint, checked field by field. What passes here has the types, shapes and ranges
that the graph needs; every error names the layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from trainlet.errors import UnsupportedError, UsageError
from trainlet.ir.graph import QParams

MAX_BLOCKS: Final = 512
MAX_SIDE: Final = 4096
MAX_CHANNELS: Final = 65535
MAX_KERNEL: Final = 255

_PARAMS: Final = ("weight", "bias", "x_scale", "x_zero", "y_scale", "y_zero", "w_scales")
_LITE: Final = ("in_channel", "out_channel", "kernel_size", "stride", "groups", "params")
_CONV: Final = (*_LITE, "in_shape", "out_shape", "depthwise", "act")
_BLOCK: Final = ("pointwise1", "depthwise", "pointwise2", "residual", "se")
_MODEL: Final = ("first_conv", "blocks", "feature_mix", "classifier")

Record = dict[str, object]


@dataclass(frozen=True, slots=True, eq=False)
class Conv:
    """One convolution; ``weight`` is OIHW as in the file, ``in_side`` and ``out_side`` are None for the classifier."""

    layer: str
    in_c: int
    out_c: int
    in_side: int | None
    out_side: int | None
    kernel: tuple[int, int]
    stride: int
    groups: int
    weight: NDArray[np.int8]
    bias: NDArray[np.int32]
    scales: NDArray[np.float32]
    x: QParams
    y: QParams


@dataclass(frozen=True, slots=True, eq=False)
class Residual:
    """The addition that ends a block: block input + pointwise2 output."""

    layer: str
    channels: int
    side: int
    x: QParams
    y: QParams


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """An inverted bottleneck; only a first block may lack ``pointwise1``."""

    pointwise1: Conv | None
    depthwise: Conv
    pointwise2: Conv
    residual: Residual | None


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """A whole checkpoint."""

    first_conv: Conv
    blocks: tuple[Block, ...]
    classifier: Conv


def fail(layer: str, rule: str) -> UsageError:
    """The error for a layer that breaks ``rule``."""
    return UsageError(f"{layer}: {rule}")


def need(ok: bool, layer: str, rule: str) -> None:
    """Raises UsageError naming ``layer`` unless ``ok``."""
    if not ok:
        raise fail(layer, rule)


def _shown(value: object) -> str:
    """A short text for a value from the file; containers are never printed, they may be shared a million times."""
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    return repr(value[:40]) if isinstance(value, str) else type(value).__name__


def _record(value: object, layer: str, fields: Sequence[str]) -> Record:
    if not isinstance(value, dict):
        raise fail(layer, f"a dict with {', '.join(fields)} is expected here, not {_shown(value)}")
    missing = [f for f in fields if f not in value]
    extra = [_shown(k) for k in value if k not in fields]
    need(not missing, layer, f"field {', '.join(missing)} is missing")
    need(not extra, layer, f"unknown field {', '.join(extra[:3])}")
    return value


def _int(r: Record, field: str, layer: str, low: int, high: int) -> int:
    value = r[field]
    if type(value) is not int or not low <= value <= high:
        raise fail(layer, f"{field} is a whole number from {low} to {high}, not {_shown(value)}")
    return value


def _array(r: Record, field: str, layer: str, dtype: type[np.generic], shape: tuple[int, ...]) -> np.ndarray:
    value = r[field]
    if not isinstance(value, np.ndarray):
        raise fail(layer, f"{field} is a numpy array, not {_shown(value)}")
    need(value.dtype == dtype, layer, f"{field} is {np.dtype(dtype)}, not {value.dtype}")
    need(value.shape == shape, layer, f"{field} has shape {shape}, not {value.shape}")
    return value


def _qparams(r: Record, side: str, layer: str) -> QParams:
    scale = r[f"{side}_scale"]
    # below 2^-126 a scale is no normal float32 any more, and the training step works in float32
    if type(scale) is not float or not math.isfinite(scale) or not 2.0**-126 <= scale <= 2.0**126:
        raise fail(layer, f"{side}_scale is a finite number above 0, not {_shown(scale)}")
    return QParams(scale, _int(r, f"{side}_zero", layer, -128, 127))


def _absent(r: Record, field: str, layer: str, what: str) -> None:
    if r[field] is not None:
        raise UnsupportedError(f"{layer}: it has {what}, which is not supported; use a model without it")


def _kernel(r: Record, layer: str) -> tuple[int, int]:
    k = r["kernel_size"]
    if not isinstance(k, tuple) or len(k) != 2 or any(type(n) is not int or not 0 < n <= MAX_KERNEL for n in k):
        raise fail(layer, f"kernel_size is a pair of whole numbers from 1 to {MAX_KERNEL}")
    return int(k[0]), int(k[1])


def _conv(value: object, layer: str, *, lite: bool = False) -> Conv:
    r = _record(value, layer, _LITE if lite else _CONV)
    in_c = _int(r, "in_channel", layer, 1, MAX_CHANNELS)
    out_c = _int(r, "out_channel", layer, 1, MAX_CHANNELS)
    kernel = _kernel(r, layer)
    groups = _int(r, "groups", layer, 1, MAX_CHANNELS)
    need(in_c % groups == 0 and out_c % groups == 0, layer, f"{groups} groups do not divide {in_c} -> {out_c} channels")
    p = _record(r["params"], layer, _PARAMS)
    weight = _array(p, "weight", layer, np.int8, (out_c, in_c // groups, *kernel))
    need(int(weight.min()) >= -127, layer, "weights lie within -127..127")
    scales = _array(p, "w_scales", layer, np.float32, (out_c,))
    need(bool(np.isfinite(scales).all()) and float(scales.min()) > 0, layer, "w_scales are finite and above 0")
    if not lite:
        _absent(r, "act", layer, "an explicit activation (act)")
        need(type(r["depthwise"]) is bool, layer, f"depthwise is True or False, not {_shown(r['depthwise'])}")
        need(
            r["depthwise"] is (groups == in_c == out_c > 1),
            layer,
            f"depthwise is {r['depthwise']} with {groups} groups",
        )
    return Conv(
        layer,
        in_c,
        out_c,
        None if lite else _int(r, "in_shape", layer, 1, MAX_SIDE),
        None if lite else _int(r, "out_shape", layer, 1, MAX_SIDE),
        kernel,
        _int(r, "stride", layer, 1, MAX_SIDE),
        groups,
        weight,
        _array(p, "bias", layer, np.int32, (out_c,)),
        scales,
        _qparams(p, "x", layer),
        _qparams(p, "y", layer),
    )


def _residual(value: object, layer: str) -> Residual | None:
    if value is None:
        return None
    r = _record(value, layer, ("in_channel", "in_shape", "params"))
    p = _record(r["params"], layer, ("x_scale", "x_zero", "y_scale", "y_zero"))
    channels = _int(r, "in_channel", layer, 1, MAX_CHANNELS)
    side = _int(r, "in_shape", layer, 1, MAX_SIDE)
    return Residual(layer, channels, side, _qparams(p, "x", layer), _qparams(p, "y", layer))


def _block(value: object, index: int) -> Block:
    name = f"blocks.{index}"
    r = _record(value, name, _BLOCK)
    _absent(r, "se", f"{name}.se", "squeeze-and-excitation")
    expand = r["pointwise1"]
    need(expand is not None or index == 0, f"{name}.pointwise1", "only the first block may lack it")
    depthwise = _conv(r["depthwise"], f"{name}.depthwise")
    need(
        depthwise.groups == depthwise.in_c == depthwise.out_c,
        depthwise.layer,
        f"a depthwise convolution has as many groups as channels, not {depthwise.groups} for "
        f"{depthwise.in_c} -> {depthwise.out_c}",
    )
    return Block(
        None if expand is None else _conv(expand, f"{name}.pointwise1"),
        depthwise,
        _conv(r["pointwise2"], f"{name}.pointwise2"),
        _residual(r["residual"], f"{name}.add"),
    )


def read_model(value: object) -> Model:
    """Checks the object of a checkpoint and returns its records. Raises UsageError (or UnsupportedError for parts that
    the format allows and trainlet does not), naming the layer; how layers fit together is checked by the caller."""
    r = _record(value, "checkpoint", _MODEL)
    _absent(r, "feature_mix", "feature_mix", "a feature mixing layer")
    blocks = r["blocks"]
    if not isinstance(blocks, list) or not 1 <= len(blocks) <= MAX_BLOCKS:
        raise fail("blocks", f"a list of 1 to {MAX_BLOCKS} blocks is expected, not {_shown(blocks)}")
    return Model(
        _conv(r["first_conv"], "first_conv"),
        tuple(_block(b, i) for i, b in enumerate(blocks)),
        _conv(r["classifier"], "classifier", lite=True),
    )
