# SPDX-License-Identifier: Apache-2.0
"""Entry into the integers, the rounding of a gradient, masks: section 3 and 4 of docs/arithmetic.md."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from trainlet.ir import Bound, Node
from trainlet.ops import EnterGrad, Mask, RoundGrad
from trainlet.reference.arithmetic import Tensor
from trainlet.reference.rounding import Site, Sums
from trainlet.reference.run import Run, mask_of, need_finite


def ref_enter_grad(run: Run, node: Node, ins: Bound[Tensor]) -> tuple[Tensor, ...]:
    """g -> r; sets the anchor, or ``zero_gradient``. MismatchError where g is not finite."""
    a = node.attrs
    assert isinstance(a, EnterGrad)
    v = ins["g"] * run.rounding.real.type(a.factor)
    need_finite(node, "the gradient of the features", v)
    entry = run.rounding.enter(run.rounding.flush(v, -100), run.key(a.site))
    run.anchor, run.zero_gradient = entry.anchor, entry.zero
    run.set_exponent(node.output, entry.e)
    run.count(0 if entry.zero else v.size, entry.saturated)
    one_vector = v.size == a.shape[2]
    return (np.broadcast_to(entry.r, a.shape) if one_vector else entry.r.reshape(a.shape),)


def ref_mask_grad(run: Run, node: Node, ins: Bound[Tensor]) -> tuple[Tensor, ...]:
    """(g, mask source) -> g where the mask is 1, else 0."""
    a, g = node.attrs, ins["g"]
    assert isinstance(a, Mask)
    return (np.where(mask_of(ins["mask"], a.source, a.clamp), g, g.dtype.type(0)),)


def ref_clip_mask(run: Run, node: Node, ins: Bound[Tensor]) -> tuple[Tensor, ...]:
    """y -> a bool per element: strictly within the clamp."""
    assert isinstance(node.attrs, Mask)
    return (mask_of(ins["x"], "value", node.attrs.clamp),)


def ref_round_grad(run: Run, node: Node, ins: Bound[Tensor]) -> tuple[Tensor, ...]:
    """([acc], [mask source,] further...) -> r; writes rho. What sums are worth, their maker has said."""
    a = node.attrs
    assert isinstance(a, RoundGrad)
    sums = replace(run.sums[node["acc"]], acc=ins["acc"]) if "acc" in ins else None
    return (round_gradient(run, a, node, ins, sums),)


def round_gradient(run: Run, a: RoundGrad, node: Node, ins: Bound[Tensor], sums: Sums | None) -> Tensor:
    """Rounds a gradient, writes its exponent and its rho."""
    declared = run.graph.values[node.output].shape
    one_vector = declared[:2] == (1, 1)
    further = [(r, run.exponent(name)) for r, name in zip(ins.all("further"), node.all("further"), strict=True)]
    mask = ins.get("mask")
    whole = max((r.shape for r in _present(sums, mask, further)), key=np.prod)
    if one_vector:
        further = [(r[:1, :1], e) for r, e in further]
    written = node.updated("rho")
    rho = int(run.values[written][0]) if written else 0
    given = None if mask is None else mask_of(mask, a.mask, a.clamp)
    done = run.rounding.gradient(declared, sums, further, given, Site(run.key(a.site), run.anchor, rho))
    run.set_exponent(node.output, done.e)
    run.count(done.r.size, done.saturated)
    if written:
        run.values[written] = np.full(1, done.rho, run.values[written].dtype)
    return np.broadcast_to(done.r, whole) if one_vector else done.r


def _present(sums: Sums | None, mask: Tensor | None, further: list[tuple[Tensor, int]]) -> list[Tensor]:
    made = [] if sums is None else [sums.acc]
    return made + ([] if mask is None else [mask]) + [r for r, _ in further]
