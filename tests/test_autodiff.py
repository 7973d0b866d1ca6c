# SPDX-License-Identifier: Apache-2.0
"""Differentiation: every parameter's gradient against central differences on the FLOAT graph, the test of that test,
and what the walk puts into the graph."""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
import pytest
from graphs import ChainBuilder, float_chain, int8_chain

from trainlet.autodiff.scheme import UpdateScheme, resolve, trainable_layers
from trainlet.autodiff.walk import differentiate
from trainlet.errors import UnsupportedError, UsageError
from trainlet.frontends.common import attach_head
from trainlet.ir import Array, Bound, Graph, Node, Stage
from trainlet.ops import Conv2d
from trainlet.passes.fuse import fuse
from trainlet.reference import initial_state, run
from trainlet.reference.executor import REFERENCE
from trainlet.reference.run import Run

EPS = 1e-6
TOLERANCE = 2e-5  # relative; a rule wrong by 5e-4 must not pass


def fan_out() -> Graph:
    """A tensor read by a convolution, an addition and a later convolution, all differently padded and strided."""
    c = ChainBuilder("fan_out", integer=False, seed=1, shape=(7, 5, 3))
    stem = c.conv("conv.0", "stem", c.input, Conv2d((3, 3), pads=(1, 1, 1, 1), clamp=(0.0, 6.0), activation=True), 4)
    a = c.conv("conv.1", "a", stem, Conv2d((3, 3), pads=(2, 2, 2, 2), dilation=(2, 2), groups=2), 4)
    b = c.add("add.0", stem, a)
    late = c.conv("conv.2", "late", stem, Conv2d((1, 1)), 4)
    return c.g.build(Stage.FLOAT, [c.head("head", c.pool("pool", c.add("add.1", b, late)))])


def gradient_errors(model: Graph, scheme: UpdateScheme) -> dict[str, float]:
    """Relative error of the directional derivative along a random direction of each trained parameter, by name."""
    graph = differentiate(model, scheme)
    rng = np.random.default_rng(5)
    image = rng.standard_normal(model.values[model.inputs[0]].shape)
    given: dict[str, Array] = {model.inputs[0]: image, "label": np.array([1], np.int32), "lr": np.ones(1)}
    state = initial_state(graph, 0)
    state.arrays = {n: a.astype(np.float64) for n, a in state.arrays.items()}
    after = run(graph, given, state)

    def loss(name: str, moved: Array) -> float:
        other = state.copy()
        other.arrays[name] = moved
        return float(run(graph, given, other)["loss"][0])

    errors = {}
    for name, value in state.arrays.items():
        gradient = value - after[name]  # the learning rate is 1
        v = rng.standard_normal(value.shape)
        numeric = (loss(name, value + EPS * v) - loss(name, value - EPS * v)) / (2 * EPS)
        analytic = float((gradient * v).sum())
        errors[name] = abs(numeric - analytic) / max(abs(numeric), abs(analytic), 1e-4)
    return errors


@pytest.mark.parametrize("make", [float_chain, fan_out])
def test_gradients_are_central_differences(make: Callable[[], Graph]) -> None:
    model = make()
    errors = gradient_errors(model, resolve("full", model))
    assert len(errors) == 2 * len(trainable_layers(model)) + 2
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize("op", ["conv2d_dx", "conv2d_dw", "conv2d_db", "enter_grad", "dense_dx", "round_grad"])
def test_a_rule_wrong_by_five_in_ten_thousand_is_rejected(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = REFERENCE[op]
    table = {**REFERENCE, op: lambda r, node, ins: tuple(1.0005 * a for a in right(r, node, ins))}
    monkeypatch.setattr(sys.modules["trainlet.reference.executor"], "REFERENCE", table)
    model = fan_out()
    assert max(gradient_errors(model, resolve("full", model)).values()) > 10 * TOLERANCE


def test_a_fan_out_that_overwrites_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    right = REFERENCE["round_grad"]

    def first_only(r: Run, node: Node, ins: Bound[Array]) -> tuple[Array, ...]:
        return right(r, kept := node.reading(further=None), kept.bind(r.values))

    lost = {**REFERENCE, "round_grad": first_only}
    monkeypatch.setattr(sys.modules["trainlet.reference.executor"], "REFERENCE", lost)
    model = fan_out()
    assert max(gradient_errors(model, resolve("full", model)).values()) > 10 * TOLERANCE


def test_only_what_leads_to_a_trained_parameter_is_differentiated() -> None:
    model = int8_chain()
    step = differentiate(model, UpdateScheme("last", ("block.project",), {}))
    assert not step.find("conv2d_dx")  # the last convolution's bias needs no input gradient
    assert [n.name for n in step.find("conv2d_db")] == ["conv.2.db"]
    assert not step.find("clip_mask")
    head = differentiate(model, UpdateScheme("head", (), {}))
    assert {n.op for n in head.nodes} - {n.op for n in model.nodes} == {"check_lr", "softmax_xent", "dense_sgd"}


def test_weights_without_their_bias_train() -> None:
    step = differentiate(int8_chain(), UpdateScheme("w", (), {"block.project": 0.5}))
    assert len(step.find("sgd_weight")) == 1
    assert not step.find("sgd_bias")
    assert len(step.find("select_channels")) == 1


def test_fusion_leaves_no_sums_and_every_rounding() -> None:
    model = int8_chain()
    step = differentiate(model, resolve("full", model))
    lowered = fuse(step)
    assert not any(v.dtype == "s32" and v.exponent is not None for v in lowered.values.values())
    assert len(lowered.find("conv2d_dx_round")) == len(step.find("conv2d_dx"))
    assert len(lowered.find("conv2d_dw_sgd")) == len(step.find("sgd_weight"))
    assert len(lowered.find("conv2d_db_sgd")) == len(step.find("sgd_bias"))


def test_refusals_name_the_layer_and_the_rule() -> None:
    model = int8_chain()
    with pytest.raises(UsageError, match="no_such_layer"):
        differentiate(model, UpdateScheme("x", ("no_such_layer",), {}))
    with pytest.raises(UsageError, match="only a model is differentiated"):
        differentiate(differentiate(model, UpdateScheme("head", (), {})), UpdateScheme("head", (), {}))
    c = ChainBuilder("wide", integer=True, shape=(300, 300, 2))
    y = c.conv("conv.0", "wide", c.input, Conv2d((1, 1)), 2)
    big = attach_head(c.g.build(Stage.INT8, [c.pool("pool", y)]), 2)
    with pytest.raises(UnsupportedError, match=r"wide: it has 90000 output pixels, more than the 66311"):
        differentiate(big, UpdateScheme("x", ("wide",), {"wide": 1.0}))


def test_a_layer_that_nothing_reads_is_refused_and_not_counted() -> None:
    """It would own the rounding of its input's gradient and never make it: all before it would learn nothing."""
    c = ChainBuilder("dead", integer=False, seed=1, shape=(5, 5, 3))
    x = c.conv("conv.0", "stem", c.input, Conv2d((3, 3)), 4)
    c.conv("conv.1", "unread", x, Conv2d((1, 1)), 4)
    live = c.conv("conv.2", "live", x, Conv2d((1, 1)), 4)
    model = c.g.build(Stage.FLOAT, [c.head("head", c.pool("pool", live))])
    with pytest.raises(UnsupportedError, match="nothing reads what unread gives; leave that layer out"):
        differentiate(model, resolve("full", model))
