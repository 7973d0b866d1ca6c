# SPDX-License-Identifier: Apache-2.0
"""Pools: windows that overlap, side by side, apart; padding smaller than the window."""

from __future__ import annotations

from hypothesis import strategies as st
from ops.family import Family, nets, pairs, trained
from random_nets import Case


@st.composite
def models(draw: st.DrawFn) -> Case:
    """A maximum between two convolutions; at the end an average over the whole map."""
    net = draw(nets())
    x = net.conv(net.input, 5, activation=draw(st.booleans()))
    h, w, _ = net.shape(x)
    kernel = tuple(min(k, side) for k, side in zip(draw(pairs), (h, w), strict=True))
    top, bottom, left, right = (draw(st.integers(0, kernel[i // 2] - 1)) for i in range(4))
    x = net.max_pool(x, (kernel[0], kernel[1]), draw(pairs), (top, bottom, left, right))
    return trained(net, net.same(x, 3, depthwise=True))


FAMILY = Family(models(), ("avg_pool", "max_pool", "max_pool_winners", "max_pool_dx"))
