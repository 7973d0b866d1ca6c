# SPDX-License-Identifier: Apache-2.0
"""Channels kept for updates of a part of the weights."""

from __future__ import annotations

from hypothesis import strategies as st
from ops.family import Family, nets, trained
from random_nets import Case


@st.composite
def models(draw: st.DrawFn) -> Case:
    """Two layers of which a part trains, the second one in groups, or depthwise."""
    net = draw(nets())
    x = net.conv(net.input, 6, activation=True)
    groups = draw(st.sampled_from((1, 2, 6)))
    return trained(net, net.conv(x, 6, (1, 1), groups=groups), ratio=draw(st.sampled_from((0.34, 0.5))))


FAMILY = Family(models(), ("select_channels",))
