# SPDX-License-Identifier: Apache-2.0
"""Runs that are made row by row; chosen where a map in the middle is the widest."""

from __future__ import annotations

from hypothesis import strategies as st
from ops.family import Family, seeds, trained
from random_nets import Case, Net


@st.composite
def models(draw: st.DrawFn) -> Case:
    """A wide map between two narrow ones; only the last layer trains."""
    net = Net((31, draw(st.sampled_from((5, 31))), 3), draw(seeds))
    x = net.conv(net.input, 16, (3, 3), activation=True)
    kernel = draw(st.sampled_from(((2, 2), (3, 3))))
    x = net.max_pool(x, kernel, (2, draw(st.integers(1, 2))), (0, 1, 1, 0))
    x = net.conv(x, 4, (3, 3), stride=(2, 1))
    net.layers = []
    return trained(net, net.conv(x, 6))


FAMILY = Family(models(), ("depth_first",))
