# SPDX-License-Identifier: Apache-2.0
"""No row of the operator table has a hole; shape rules accept what they should and refuse the rest."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from dataclasses import replace

import pytest
from graphs import float_chain, int8_chain

import trainlet.emit
import trainlet.reference
import trainlet.vjp
from trainlet.attrs import Attrs, AvgPool, Conv2d, Conv2dDx
from trainlet.ir.graph import Node, Stage, Value
from trainlet.ops import DTYPE_BITS, OPS, RuleError, conv_out_hw, dtype_bits, fan_in, fan_out, is_depthwise

ALL = sorted(OPS)
MADE_OF_NODES = {"stream"}  # its meaning is theirs: the reference runs a graph that is flat
LOWERED = sorted(name for name, op in OPS.items() if "lowered" in op.stages)


def _reference_functions() -> set[str]:
    """The names of all functions of the package ``trainlet.reference``."""
    found = set(vars(trainlet.reference))
    for info in pkgutil.iter_modules(trainlet.reference.__path__):
        found |= set(vars(importlib.import_module(f"trainlet.reference.{info.name}")))
    return found


@pytest.mark.parametrize("op", ALL)
def test_row_has_attributes_rule_cost_and_stages(op: str) -> None:
    row = OPS[op]
    assert issubclass(row.attrs, Attrs)
    assert row.attrs.__doc__
    assert list(inspect.signature(row.rule).parameters) == ["node", "ins"]
    assert list(inspect.signature(row.macs).parameters) == ["node", "ins", "outs"]
    assert row.stages
    assert set(row.stages) <= {s.value for s in Stage}


@pytest.mark.parametrize("op", sorted({*ALL} - MADE_OF_NODES))
def test_row_has_a_meaning(op: str) -> None:
    assert f"ref_{op}" in _reference_functions()


def test_no_meaning_without_a_row() -> None:
    refs = {name.removeprefix("ref_") for name in _reference_functions() if name.startswith("ref_")}
    assert refs == set(OPS) - MADE_OF_NODES


@pytest.mark.parametrize("op", ALL)
def test_row_has_a_gradient_or_says_that_it_has_none(op: str) -> None:
    assert (op in trainlet.vjp.VJP) != (op in trainlet.vjp.NOT_DIFFERENTIABLE)


def test_no_gradient_without_a_row() -> None:
    assert set(trainlet.vjp.VJP) | set(trainlet.vjp.NOT_DIFFERENTIABLE) == set(OPS)


def test_rows_of_the_lowered_stage_are_the_ones_with_a_c_call() -> None:
    assert sorted(trainlet.emit.EMIT) == LOWERED


def test_every_attribute_class_belongs_to_a_row() -> None:
    """A class that nothing uses is a leftover. Compared by name, since slots make a second class of each."""
    used = {op.attrs.__name__ for op in OPS.values()}
    assert used == {cls.__name__ for cls in (Attrs, *Attrs.__subclasses__())}


def test_dtypes() -> None:
    assert {name: dtype_bits(name) for name in DTYPE_BITS} == {
        "b1": 1, "s4": 4, "s8": 8, "s16": 16, "u16": 16, "s32": 32, "f32": 32,
    }  # fmt: skip
    assert Value("m", (3, 3, 1), "b1").nbytes == 2
    assert Value("l", (3,), "s4").nbytes == 2
    assert Value("w", (3, 5), "f32").nbytes == 60


@pytest.mark.parametrize("kernel", [1, 2, 3, 5])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("pads", [(0, 0), (0, 1), (2, 1)])
def test_output_size_counts_the_windows(kernel: int, stride: int, dilation: int, pads: tuple[int, int]) -> None:
    conv = Conv2d((kernel, 1), (stride, 1), (*pads, 0, 0), (dilation, 1))
    for size in range(1, 12):
        padded = size + sum(pads)
        starts = range(0, padded - (kernel - 1) * dilation, stride)
        if len(starts):
            assert conv_out_hw(conv, size, 4) == (len(starts), 4)


def test_depthwise_is_more_than_one_channel_alone() -> None:
    assert is_depthwise(3, 3, 3)
    assert not is_depthwise(1, 1, 1)
    assert not is_depthwise(3, 3, 6)


def test_fan_in_and_fan_out() -> None:
    conv = Conv2d((3, 5), groups=2)
    assert fan_in(conv, 8) == 60
    assert fan_out(conv, 12) == 90


def test_macs_of_the_chain() -> None:
    graph = int8_chain()

    def macs(name: str) -> int:
        node = graph.node(name)
        ins, outs = ([graph.values[v] for v in names] for names in (node.inputs, node.outputs))
        return OPS[node.op].macs(node, ins, outs)

    assert {n.name: macs(n.name) for n in graph.nodes} == {
        "conv.0": 4 * 4 * 6 * 27, "conv.1": 4 * 4 * 6 * 9, "conv.2": 4 * 4 * 36, "add.0": 0, "pool": 0, "head": 24,
    }  # fmt: skip


def _conv_inputs(*changes: tuple[int, Value]) -> list[Value]:
    graph = int8_chain()
    ins = [graph.values[name] for name in graph.node("conv.0").inputs]
    for i, v in changes:
        ins[i] = v
    return ins


STEM = int8_chain().node("conv.0")
CONV = STEM.attrs
assert isinstance(CONV, Conv2d)


@pytest.mark.parametrize(
    ("attrs", "change", "message"),
    [
        (replace(CONV, kernel=(0, 3)), (), "at least 1"),
        (replace(CONV, stride=(0, 1)), (), "at least 1"),
        (replace(CONV, pads=(0, -1, 0, 0)), (), "not negative"),
        (replace(CONV, groups=0), (), "groups is at least 1"),
        (replace(CONV, groups=2), (), "divides both"),
        (replace(CONV, depthwise=True), (), "groups = C_in = C_out > 1"),
        (replace(CONV, clamp=None), (), "-128..127"),
        (replace(CONV, clamp=(-129, 127)), (), "-128..127"),
        (replace(CONV, dilation=(9, 9)), (), "fits into the padded input"),
        (CONV, (0, Value("x", (8, 3), "s8")), "x is"),
        (CONV, (1, Value("w", (6, 3, 3, 2), "s8")), "weight is"),
        (CONV, (1, Value("w", (6, 3, 3, 3), "s16")), "weights are s8"),
        (CONV, (2, Value("b", (5,), "s32")), "bias has one"),
        (CONV, (2, Value("b", (6,), "f32")), "biases s32"),
        (CONV, (3, Value("s", (5,), "f32")), "scale is f32"),
        (CONV, (0, Value("x", (8, 8, 3), "s8")), "scale and a zero point"),
    ],
)
def test_conv2d_refuses(attrs: Conv2d, change: tuple[int, Value] | tuple[()], message: str) -> None:
    ins = _conv_inputs(*([change] if change else []))
    with pytest.raises(RuleError, match=message):
        OPS["conv2d"].rule(replace(STEM, attrs=attrs), ins)


def test_conv2d_trained_channels() -> None:
    rule = OPS["conv2d"].rule
    trained, channels = Value("t", (6, 3, 3, 2), "s8"), Value("c", (2,), "u16")
    assert rule(STEM, [*_conv_inputs(), trained, channels]) == (((4, 4, 6), "s8"),)
    with pytest.raises(RuleError, match="trained weights are"):
        rule(STEM, [*_conv_inputs(), Value("t", (6, 3, 3, 1), "s8"), channels])
    with pytest.raises(RuleError, match="table of u16"):
        rule(STEM, [*_conv_inputs(), trained, Value("c", (2,), "s32")])


def test_other_rules_refuse() -> None:
    x, y = Value("x", (4, 4, 2), "s8"), Value("y", (4, 4, 3), "s8")
    pool = Node("avg_pool", "p", "p", ("x",), ("z",), AvgPool((2, 2), (2, 2), (2, 0, 0, 0)))
    with pytest.raises(RuleError, match="smaller than the window"):
        OPS["avg_pool"].rule(pool, [x])
    with pytest.raises(RuleError, match="one shape"):
        OPS["add"].rule(replace(pool, op="add"), [x, y])
    dx = Node("conv2d_dx", "d", "d", (), (), Conv2dDx(Conv2d((3, 3)), (4, 4)))
    weight, scale = Value("w", (3, 3, 3, 2), "s8"), Value("s", (3,), "f32")
    assert OPS["conv2d_dx"].rule(dx, [Value("g", (2, 2, 3), "s8"), weight, scale]) == (((4, 4, 2), "s32"),)
    assert OPS["conv2d_dx"].rule(dx, [Value("g", (1, 1, 3), "s8"), weight, scale]) == (((4, 4, 2), "s32"),)
    with pytest.raises(RuleError, match="shape of the output"):
        OPS["conv2d_dx"].rule(dx, [y, weight, scale])


def test_float_rules_keep_the_dtype() -> None:
    graph = float_chain()
    for node in graph.nodes:
        types = OPS[node.op].rule(node, [graph.values[v] for v in node.inputs])
        assert [(graph.values[v].shape, "f32") for v in node.outputs] == list(types)
