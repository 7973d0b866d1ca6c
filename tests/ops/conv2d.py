# SPDX-License-Identifier: Apache-2.0
"""Convolutions: general, grouped, depthwise; strides, dilation, padding on one side."""

from __future__ import annotations

from hypothesis import strategies as st
from ops.family import Family, nets, pairs, trained
from random_nets import Case


@st.composite
def models(draw: st.DrawFn) -> Case:
    """Two convolutions."""
    net = draw(nets())
    first = draw(st.sampled_from((1, 4, 6)))
    x = net.conv(net.input, first, draw(pairs), stride=draw(pairs), activation=True)
    groups = draw(st.sampled_from((1, 2, first)))
    groups = groups if first % groups == 0 else 1
    pads = draw(st.tuples(*[st.integers(0, 1)] * 4))
    dilation = draw(st.tuples(*[st.integers(1, 2)] * 2))
    out = first if groups == first else 2 * groups
    return trained(net, net.conv(x, out, draw(pairs), stride=draw(pairs), pads=pads, dilation=dilation, groups=groups))


FAMILY = Family(models(), ("conv2d",))
