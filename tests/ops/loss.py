# SPDX-License-Identifier: Apache-2.0
"""The loss and the check of the learning rate, which every step has."""

from __future__ import annotations

from ops.dense import models
from ops.family import Family

FAMILY = Family(models(), ("softmax_xent", "check_lr"))
