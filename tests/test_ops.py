# SPDX-License-Identifier: Apache-2.0
"""No row of the operator table has a hole; shape rules accept what they should and refuse the rest."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from graphs import float_chain, int8_chain

import trainlet
from trainlet.ir import DTYPES, Attrs, Bound, DepthFirst, Node, Operands, Stage, Value, dtype_bits
from trainlet.ops import (
    KERNELS,
    OPS,
    Conv2d,
    Conv2dDx,
    No,
    Op,
    RuleError,
    conv_out_hw,
    fan_in,
    fan_out,
    is_depthwise,
    registry,
)
from trainlet.ops.op import operands
from trainlet.ops.pool import AvgPool
from trainlet.reference import REFERENCE

SOURCE = Path(trainlet.__file__).parent
ALL = sorted(OPS)


@pytest.mark.parametrize("op", ALL)
def test_row_is_whole(op: str) -> None:
    """No fact is left out: what an operator lacks is a reason in words."""
    row = OPS[op]
    assert row.name == op
    assert issubclass(row.attrs, Attrs)
    assert row.attrs.__doc__
    for f in fields(row):
        fact = getattr(row, f.name)
        assert fact is not None, f.name
        if isinstance(fact, No):
            assert len(fact.why) > 8, f.name
    assert all(isinstance(s, Stage) for s in row.stages)


def test_a_fact_that_is_left_out_is_an_error() -> None:
    assert not [f.name for f in fields(Op) if f.default is not f.default_factory]  # both are MISSING: no defaults
    facts = {f.name: getattr(OPS["add"], f.name) for f in fields(Op)}
    for name in facts:
        with pytest.raises(TypeError, match=name):
            Op(**{k: v for k, v in facts.items() if k != name})


HOLES: dict[str, tuple[str, dict[str, Any], str]] = {
    "a name twice": ("add", {}, "its name is its own"),
    "an operand twice": ("add", {"name": "x", "operands": operands("a", "a")}, "operands have different names"),
    "a parameter that is no operand": ("dense", {"name": "x", "operands": operands("x", "weight")}, "are operands"),
    "no stage": ("add", {"name": "x", "stages": ()}, "admitted to a stage"),
    "no kernel": ("add", {"name": "x", "kernels": No("forgotten")}, "kernels exactly where stage lowered"),
    "kernels of another operator": ("add", {"name": "x"}, "names of their own"),
    "a layer that cannot be quantized": (
        "add", {"name": "x", "quantize": No("forgotten"), "kernels": ()}, "kernels exactly where"
    ),
    "a layer without quantization": (
        "add",
        {"name": "x", "quantize": No("forgotten"), "kernels": (replace(OPS["add"].kernels[0], name="k"),)},
        "can be quantized",
    ),
    "a kernel that writes over nothing": (
        "add",
        {"name": "x", "kernels": (replace(OPS["add"].kernels[0], name="k", in_place=No("forgotten")),)},
        "writes over operands exactly where",
    ),
}  # fmt: skip


@pytest.mark.parametrize("hole", HOLES)
def test_a_row_that_contradicts_itself_is_an_error(hole: str) -> None:
    op, change, message = HOLES[hole]
    with pytest.raises(ValueError, match=message):
        registry.register([replace(OPS[op], **change)])
    assert sorted(OPS) == ALL


def test_every_operator_has_one_meaning() -> None:
    """A depth-first run means what its nodes mean; the reference runs a graph that is flat."""
    assert set(REFERENCE) == {n for n, op in OPS.items() if op.attrs is not DepthFirst}


def test_every_kernel_is_a_function_of_the_engine() -> None:
    contracts = "".join(f.read_text() for f in (SOURCE / "csrc" / "kernels").glob("*.h"))
    for name in KERNELS:
        assert re.search(rf"\b{name.split('.')[0]}\(", contracts), name


def test_every_attribute_class_belongs_to_a_row() -> None:
    """A class that nothing uses is a leftover. Compared by name, since slots make a second class of each."""
    used = {op.attrs.__name__ for op in OPS.values()}
    assert used == {cls.__name__ for cls in (Attrs, *Attrs.__subclasses__())}


def test_no_other_file_lists_operators() -> None:
    """What a name would say, the row says; a list of names elsewhere is one that an operator can be missing from."""
    names = "|".join(sorted(set(OPS) - {"add", "dense", "depth_first"}))
    listing = re.compile(rf"[\"'](?P<one>{names})[\"'],\s*[\"'](?!(?P=one))({names})[\"']|[\"']({names})[\"']: ")
    allowed = {"ops", "reference", "csrc"}
    found = [
        f"{p.relative_to(SOURCE)}: {m[0]}"
        for p in SOURCE.rglob("*.py")
        if p.relative_to(SOURCE).parts[0] not in allowed
        for m in listing.finditer(p.read_text())
    ]
    assert [f for f in found if not f.startswith("frontends/graph_file.py")] == []  # the positions of file version 1


def test_operands_are_read_by_name() -> None:
    """A position says nothing about what stands there, and an operand less moves all behind it."""
    subscript = re.compile(r"\b(node|n|first|update|layer|conv|head)\.(inputs|writes)\[(?!:)|\bins\[[0-9-]")
    found = [f"{p.name}: {m[0]}" for p in SOURCE.rglob("*.py") for m in subscript.finditer(p.read_text())]
    assert found == []


def test_dtypes() -> None:
    assert {name: dtype_bits(name) for name in DTYPES} == {
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
        return OPS[node.op].macs(node, node.bind(graph.values))

    assert {n.name: macs(n.name) for n in graph.nodes} == {
        "conv.0": 4 * 4 * 6 * 27, "conv.1": 4 * 4 * 6 * 9, "conv.2": 4 * 4 * 36, "add.0": 0, "pool": 0, "head": 24,
    }  # fmt: skip


def _conv_inputs(**changes: Value) -> Bound[Value]:
    graph = int8_chain()
    known = {k: graph.values[v] for k, (v,) in graph.node("conv.0").operands.items()}
    return bound(**{**known, **changes})


def bound(**values: Value) -> Bound[Value]:
    """Values at operands."""
    return Bound({k: (k,) for k in values}, values)


STEM = int8_chain().node("conv.0")
CONV = STEM.attrs
assert isinstance(CONV, Conv2d)


@pytest.mark.parametrize(
    ("attrs", "change", "message"),
    [
        (replace(CONV, kernel=(0, 3)), {}, "at least 1"),
        (replace(CONV, stride=(0, 1)), {}, "at least 1"),
        (replace(CONV, pads=(0, -1, 0, 0)), {}, "not negative"),
        (replace(CONV, groups=0), {}, "groups is at least 1"),
        (replace(CONV, groups=2), {}, "divides both"),
        (replace(CONV, depthwise=True), {}, "groups = C_in = C_out > 1"),
        (replace(CONV, clamp=None), {}, "-128..127"),
        (replace(CONV, clamp=(-129, 127)), {}, "-128..127"),
        (replace(CONV, dilation=(9, 9)), {}, "fits into the padded input"),
        (CONV, {"x": Value("x", (8, 3), "s8")}, "x is"),
        (CONV, {"weight": Value("w", (6, 3, 3, 2), "s8")}, "weight is"),
        (CONV, {"weight": Value("w", (6, 3, 3, 3), "s16")}, "weights are s8"),
        (CONV, {"bias": Value("b", (5,), "s32")}, "bias has one"),
        (CONV, {"bias": Value("b", (6,), "f32")}, "biases s32"),
        (CONV, {"scale": Value("s", (5,), "f32")}, "scale is f32"),
        (CONV, {"x": Value("x", (8, 8, 3), "s8")}, "scale and a zero point"),
    ],
)
def test_conv2d_refuses(attrs: Conv2d, change: dict[str, Value], message: str) -> None:
    ins = _conv_inputs(**change)
    with pytest.raises(RuleError, match=message):
        OPS["conv2d"].rule(replace(STEM, attrs=attrs), ins)


def test_conv2d_trained_channels() -> None:
    rule = OPS["conv2d"].rule
    trained, channels = Value("t", (6, 3, 3, 2), "s8"), Value("c", (2,), "u16")
    assert rule(STEM, _conv_inputs(trained=trained, channels=channels)) == (((4, 4, 6), "s8"),)
    with pytest.raises(RuleError, match="trained weights are"):
        rule(STEM, _conv_inputs(trained=Value("t", (6, 3, 3, 1), "s8"), channels=channels))
    with pytest.raises(RuleError, match="table of u16"):
        rule(STEM, _conv_inputs(trained=trained, channels=Value("c", (2,), "s32")))


def test_other_rules_refuse() -> None:
    x, y = Value("x", (4, 4, 2), "s8"), Value("y", (4, 4, 3), "s8")
    pool = Node("avg_pool", "p", "p", Operands(x="x"), ("z",), AvgPool((2, 2), (2, 2), (2, 0, 0, 0)))
    with pytest.raises(RuleError, match="smaller than the window"):
        OPS["avg_pool"].rule(pool, bound(x=x))
    with pytest.raises(RuleError, match="one shape"):
        OPS["add"].rule(replace(pool, op="add"), bound(a=x, b=y))
    dx = Node("conv2d_dx", "d", "d", Operands(g="g", weight="w", scale="s"), (), Conv2dDx(Conv2d((3, 3)), (4, 4)))
    weight, scale = Value("w", (3, 3, 3, 2), "s8"), Value("s", (3,), "f32")
    assert OPS["conv2d_dx"].rule(dx, bound(g=Value("g", (2, 2, 3), "s8"), weight=weight, scale=scale)) == (
        ((4, 4, 2), "s32"),
    )
    assert OPS["conv2d_dx"].rule(dx, bound(g=Value("g", (1, 1, 3), "s8"), weight=weight, scale=scale)) == (
        ((4, 4, 2), "s32"),
    )
    with pytest.raises(RuleError, match="shape of the output"):
        OPS["conv2d_dx"].rule(dx, bound(g=y, weight=weight, scale=scale))


def test_float_rules_keep_the_dtype() -> None:
    graph = float_chain()
    for node in graph.nodes:
        types = OPS[node.op].rule(node, node.bind(graph.values))
        assert [(graph.values[v].shape, "f32") for v in node.outputs] == list(types)
