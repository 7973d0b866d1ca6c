# SPDX-License-Identifier: Apache-2.0
"""Additions, with and without an activation, of different tensors and of one with itself."""

from __future__ import annotations

from hypothesis import strategies as st
from ops.family import Family, nets, trained
from random_nets import Case


@st.composite
def models(draw: st.DrawFn) -> Case:
    """A residual block."""
    net = draw(nets())
    activation = draw(st.booleans())
    x = net.conv(net.input, 5, activation=activation)
    y = x if activation and draw(st.booleans()) else net.same(x, 3, depthwise=True)
    return trained(net, net.add(x, y, activation=draw(st.booleans()), tight=draw(st.booleans())))


FAMILY = Family(models(), ("add",))
