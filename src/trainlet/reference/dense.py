# SPDX-License-Identifier: Apache-2.0
"""The head, section 3 of docs/arithmetic.md."""

from __future__ import annotations

import numpy as np

from trainlet.ir import Bound, Node
from trainlet.reference.arithmetic import Tensor
from trainlet.reference.run import Run


def features(run: Run, name: str, x: Tensor, size: int) -> Tensor:
    """f: the head's input in real units, (N, size)."""
    real, q = run.rounding.real, run.q(name)
    whole = x.reshape(-1, size) - np.asarray(q.zero, np.int64)
    return np.asarray(whole.astype(real) * real.type(q.scale))


def ref_dense(run: Run, node: Node, ins: Bound[Tensor]) -> tuple[Tensor, ...]:
    """(x, weight, bias) -> logits."""
    x, weight = ins["x"], ins["weight"]
    f = features(run, node["x"], x, weight.shape[1])
    a = np.zeros((f.shape[0], weight.shape[0]), run.rounding.real)
    for c in range(weight.shape[1]):  # single precision: the order of the sum is part of the result
        a = a + weight[:, c] * f[:, c : c + 1]
    a = a + ins["bias"]
    return (a if x.ndim > len(run.graph.values[node["x"]].shape) else a[0],)


def ref_dense_dx(run: Run, node: Node, ins: Bound[Tensor]) -> tuple[Tensor, ...]:
    """(g, weight) -> the feature gradient."""
    g, weight = ins["g"], ins["weight"]
    gf = np.zeros(weight.shape[1], run.rounding.real)
    for k in range(g.size):
        gf = gf + weight[k] * g[k]
    return (gf,)


def ref_dense_sgd(run: Run, node: Node, ins: Bound[Tensor]) -> tuple[Tensor, ...]:
    """(g, x, lr); writes weight and bias of the head."""
    (w,), (b,) = node.stores["weight"], node.stores["bias"]
    weight = run.values[w]
    f = features(run, node["x"], ins["x"], weight.shape[1])
    step = run.rounding.flush(ins["lr"] * ins["g"], -100)
    run.values[w] = weight - step[:, None] * f
    run.values[b] = run.values[b] - step
    return ()
