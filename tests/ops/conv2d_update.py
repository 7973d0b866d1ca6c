# SPDX-License-Identifier: Apache-2.0
"""Gradients and updates of weights and biases, as two nodes and as one."""

from __future__ import annotations

from ops.conv2d import models
from ops.family import Family

FAMILY = Family(models(), ("conv2d_dw", "conv2d_db", "sgd_weight", "sgd_bias", "conv2d_dw_sgd", "conv2d_db_sgd"))
