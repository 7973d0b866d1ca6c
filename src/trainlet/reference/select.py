# SPDX-License-Identifier: Apache-2.0
"""Channels that are kept for an update; exact."""

from __future__ import annotations

from trainlet.ir import Bound, Node
from trainlet.ops import SelectChannels
from trainlet.reference.arithmetic import Tensor
from trainlet.reference.run import Run


def ref_select_channels(run: Run, node: Node, ins: Bound[Tensor]) -> tuple[Tensor, ...]:
    """(x, channels) -> those channels of every group."""
    assert isinstance(node.attrs, SelectChannels)
    x, groups = ins["x"], node.attrs.groups
    chosen = x.reshape(*x.shape[:-1], groups, -1)[..., ins["channels"]]
    return (chosen.reshape(*x.shape[:-1], -1),)
