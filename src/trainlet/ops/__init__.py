# SPDX-License-Identifier: Apache-2.0
"""Operators: one file per family holds everything that the compiler knows about it. What they mean is in
``reference/``, what runs them in ``csrc/kernels``."""

from trainlet.ops import add, conv2d, conv2d_dx, conv2d_update, dense, depth_first, gradient, loss, pool, select
from trainlet.ops.add import Add
from trainlet.ops.conv2d_dx import Conv2dDx, FusedDx
from trainlet.ops.conv2d_update import Conv2dDb, Conv2dDw, FusedDb, FusedDw, SgdBias, SgdWeight, sums_biases
from trainlet.ops.depth_first import window
from trainlet.ops.geometry import Conv2d, conv_out_hw, fan_in, fan_out, is_depthwise
from trainlet.ops.gradient import EnterGrad, Mask, MaskFrom, RoundGrad
from trainlet.ops.loss import CheckLr
from trainlet.ops.op import FIRST_PARAM, Kernel, No, Op, Param, RuleError, Window
from trainlet.ops.pool import AvgPool, MaxPool, MaxPoolDx
from trainlet.ops.registry import KERNELS, OPS, register
from trainlet.ops.select import SelectChannels

for _family in (conv2d, add, pool, dense, loss, gradient, select, conv2d_dx, conv2d_update, depth_first):
    register(_family.ROWS)

__all__ = [
    "FIRST_PARAM",
    "KERNELS",
    "OPS",
    "Add",
    "AvgPool",
    "CheckLr",
    "Conv2d",
    "Conv2dDb",
    "Conv2dDw",
    "Conv2dDx",
    "EnterGrad",
    "FusedDb",
    "FusedDw",
    "FusedDx",
    "Kernel",
    "Mask",
    "MaskFrom",
    "MaxPool",
    "MaxPoolDx",
    "No",
    "Op",
    "Param",
    "RoundGrad",
    "RuleError",
    "SelectChannels",
    "SgdBias",
    "SgdWeight",
    "Window",
    "conv_out_hw",
    "fan_in",
    "fan_out",
    "is_depthwise",
    "sums_biases",
    "window",
]
