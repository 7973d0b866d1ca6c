# SPDX-License-Identifier: Apache-2.0
"""Residual addition, section 1 of docs/arithmetic.md."""

from __future__ import annotations

import numpy as np

from trainlet.ir import Bound, Node
from trainlet.ops import Add
from trainlet.reference.arithmetic import Tensor
from trainlet.reference.run import Run


def ref_add(run: Run, node: Node, ins: Bound[Tensor]) -> tuple[Tensor, ...]:
    """(a, b) -> a + b."""
    attrs = node.attrs
    assert isinstance(attrs, Add)
    a, b, y = (run.q(name) for name in (node["a"], node["b"], node.output))
    wide = [ins[name] - np.asarray(q.zero, np.int64) for name, q in (("a", a), ("b", b))]
    return (run.rounding.add(wide[0], wide[1], (a.scale, b.scale, y.scale), y.zero, attrs.clamp),)
