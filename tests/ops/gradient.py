# SPDX-License-Identifier: Apache-2.0
"""The entry of gradients, their rounding and their masks, by packed bits and by the stored output."""

from __future__ import annotations

from hypothesis import strategies as st
from ops.family import Family, nets, trained
from random_nets import Case


@st.composite
def models(draw: st.DrawFn) -> Case:
    """A tensor with an activation that two layers read; the last layer has one too."""
    net = draw(nets())
    x = net.conv(net.input, 5, activation=True, tight=draw(st.booleans()))
    y = net.add(x, net.same(x, draw(st.sampled_from((1, 3)))))
    return trained(net, net.same(y, 1, activation=True), ratio=draw(st.sampled_from((0.4, 1.0))))


FAMILY = Family(models(), ("enter_grad", "round_grad", "mask_grad", "clip_mask"))
