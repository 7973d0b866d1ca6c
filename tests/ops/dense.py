# SPDX-License-Identifier: Apache-2.0
"""Heads: over a pooled vector, and over a map that is flattened."""

from __future__ import annotations

from hypothesis import strategies as st
from ops.family import Family, nets
from random_nets import Case, flattened, full


@st.composite
def models(draw: st.DrawFn) -> Case:
    """A convolution with a head."""
    net = draw(nets())
    x = net.conv(net.input, 3, stride=(2, 2), activation=draw(st.booleans()))
    model = draw(st.sampled_from((net.finish, lambda x, classes: flattened(net, x, classes))))(x, 5)
    return Case(model, full(net))


FAMILY = Family(models(), ("dense", "dense_dx", "dense_sgd"))
