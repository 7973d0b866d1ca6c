# SPDX-License-Identifier: Apache-2.0
"""Gradients of the inputs of convolutions, as sums and rounded at once."""

from __future__ import annotations

from ops.conv2d import models
from ops.family import Family

FAMILY = Family(models(), ("conv2d_dx", "conv2d_dx_round"))
