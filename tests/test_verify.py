# SPDX-License-Identifier: Apache-2.0
"""The verifier lets valid graphs and plans through and names node, layer and rule where a fault is planted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from graphs import float_chain, int8_chain, train_tail

from trainlet.errors import UnsupportedError
from trainlet.ir import Array, Attrs, Graph, Interface, Kind, Operands, QParams, Stage
from trainlet.ops import Add, SelectChannels
from trainlet.verify import VerifyError, verify_graph, verify_plan

# --- graphs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [float_chain, int8_chain, train_tail])
def test_valid_graphs_pass(make: Callable[[], Graph]) -> None:
    verify_graph(make())


def _node(graph: Graph, name: str, /, **change: Any) -> Graph:
    """``graph`` with fields of one node replaced; ``inputs`` and ``writes`` by position, behind the operands it has."""
    node = graph.node(name)
    for field, given in (("operands", "inputs"), ("stores", "writes")):
        if given in change:
            names = dict(zip(getattr(node, field), change.pop(given), strict=False))
            change[field] = Operands(**names)
    return replace(graph, nodes=tuple(replace(n, **change) if n.name == name else n for n in graph.nodes))


def _operands(graph: Graph, name: str, /, **operands: str | tuple[str, ...]) -> Graph:
    return _node(graph, name, operands=Operands(**operands))


def _twice_entered() -> Graph:
    entry = TR.node("pool.enter")
    again = replace(entry, name="again", outputs=("r.again",), attrs=replace(entry.attrs, site=999))  # type: ignore[type-var]
    at = TR.nodes.index(entry) + 1
    values = {**TR.values, "r.again": replace(TR.values["r"], name="r.again", exponent=7)}
    return replace(TR, nodes=(*TR.nodes[:at], again, *TR.nodes[at:]), values=values)


def _attrs(graph: Graph, name: str, **change: Any) -> Graph:
    return _node(graph, name, attrs=replace(graph.node(name).attrs, **change))


def _value(graph: Graph, name: str, /, **change: Any) -> Graph:
    return replace(graph, values={**graph.values, name: replace(graph.values[name], **change)})


def _data(graph: Graph, name: str, array: Array | None) -> Graph:
    data = {k: v for k, v in graph.data.items() if k != name}
    return replace(graph, data=data if array is None else {**data, name: array})


def _changed(graph: Graph, name: str, index: Any, value: float) -> Graph:
    """``graph`` with one element of its data replaced."""
    array = graph.data[name].copy()
    array[index] = value
    return _data(graph, name, array)


def _order(graph: Graph, first: str, then: str) -> Graph:
    """``graph`` with node ``first`` moved to just before node ``then``."""
    moved = graph.node(first)
    nodes = [n for n in graph.nodes if n is not moved]
    nodes.insert(nodes.index(graph.node(then)), moved)
    return replace(graph, nodes=tuple(nodes))


def _outputs(graph: Graph, result: str, /, **outputs: str) -> Graph:
    """``graph`` with other outputs of itself and of some nodes; values that nothing names are dropped."""
    for name, text in outputs.items():
        graph = _node(graph, name, outputs=tuple(text.split()))
    return graph.with_interface(outputs=(result,)).with_nodes(graph.nodes)


def _deadly(graph: Graph) -> Graph:
    return _attrs(graph, "conv.0", dead=(2,))


I8, TR, FL = int8_chain(), train_tail(), float_chain()

FAULTS: dict[str, tuple[Graph, str, str]] = {
    # the table, the stage
    "unknown operator": (_node(I8, "pool", op="max_pool"), "'pool'", "is in the table"),
    "operator of another stage": (replace(TR, stage=Stage.INT8), "'check'", "stage train, lowered, not int8"),
    "attributes of another operator": (_node(I8, "add.0", attrs=Attrs()), "'add.0'", "attributes are Add, not Attrs"),
    "real weights in stage int8": (replace(FL, stage=Stage.INT8), "'conv.0'", "is s8 in stage int8"),
    "integers in stage float": (replace(I8, stage=Stage.FLOAT), "'input'", "everything is f32"),
    # names, order, kinds
    "two nodes of one name": (_node(I8, "conv.1", name="conv.0"), "'conv.0'", "name of a node is unique"),
    "one layer for two convolutions": (_node(I8, "conv.1", layer="stem"), "layer 'stem'", "'conv.0' has it too"),
    "value under a wrong name": (_value(I8, "conv.0.y", name="other"), "'other'", "under its own name"),
    "input that nobody defined": (_node(I8, "pool", inputs=("ghost",)), "'pool'", "'ghost' is a value"),
    "used before it is made": (_order(I8, "conv.1", "conv.0"), "'conv.1'", "'conv.0.y' is made by an earlier node"),
    "made twice": (_node(I8, "conv.2", outputs=("conv.1.y",)), "'conv.2'", "is made by no other node"),
    "made by nobody": (replace(I8, nodes=I8.nodes[:-1]), "'logits'", "made by a node"),
    "output that is a constant": (_node(I8, "head", outputs=("head.bias",)), "'head'", "is an activation"),
    "graph without outputs": (I8.with_interface(outputs=()), "'int8_chain'", "at least one output"),
    "output that does not exist": (I8.with_interface(outputs=("ghost",)), "'int8_chain'", "'ghost' is a value"),
    "output listed twice": (I8.with_interface(outputs=("logits", "logits")), "'int8_chain'", "listed once"),
    "input listed twice": (I8.with_interface(inputs=("input", "input")), "'int8_chain'", "listed once"),
    "output that no node makes": (I8.with_interface(outputs=("input",)), "'input'", "made by a node"),
    "input that is not listed": (I8.with_interface(inputs=()), "'input'", "only inputs are"),
    # states
    "write to a constant": (_node(TR, "conv.0.sgd", writes=("conv.0.scale",)), "'conv.0.sgd'", "writes only states"),
    "two writers": (
        _node(TR, "conv.0.sgd_bias", writes=("conv.0.trained",)),
        "'conv.0.sgd_bias'",
        "'conv.0.sgd' writes it too",
    ),
    "gradient with the weights after their update": (
        _order(_order(TR, "head.sgd", "head.dx"), "pool.enter", "head.sgd"),
        "'pool.enter'",
        "'gf' is made by an earlier node",
    ),
    "reader after the writer": (
        _operands(TR, "conv.0.db", g="head.bias"),
        "'conv.0.db'",
        "reads 'head.bias' before it is written, but 'head.sgd' has",
    ),
    "refusal after a write": (_order(TR, "head.sgd", "pool.enter"), "'pool.enter'", "may refuse the step"),
    # shapes and dtypes
    "wrong shape": (_value(I8, "conv.1.y", shape=(4, 4, 7)), "'conv.1'", "has the shape (4, 4, 6), not (4, 4, 7)"),
    "wrong dtype": (_value(I8, "logits", dtype="s32"), "'head'", "'logits' is f32, not s32"),
    "unknown dtype": (_value(I8, "logits", dtype="f64"), "'logits'", "dtype is one of"),
    "empty shape": (_value(I8, "logits", shape=()), "'logits'", "at least 1"),
    "dimension of 0": (_value(I8, "logits", shape=(0,)), "'logits'", "at least 1"),
    "too many rows": (_value(I8, "input", shape=(65536, 1, 1)), "'input'", "at most 65535"),
    "rule of the operator": (_attrs(I8, "conv.0", stride=(0, 1)), "'conv.0'", "at least 1"),
    "no inputs": (_node(I8, "conv.0", inputs=()), "'conv.0'", "its operand 'x' is missing"),
    "operand of another operator": (_operands(I8, "pool", a="add.0.y"), "'pool'", "no operand 'a'; its operands are x"),
    "two values where one stands": (_operands(I8, "pool", x=("add.0.y", "input")), "'pool'", "is one value, not 2"),
    "operands in another order": (_operands(I8, "add.0", b="conv.2.y", a="conv.0.y"), "'add.0'", "in the order a, b"),
    "state of another operator": (
        _node(TR, "conv.0.sgd", stores=Operands(rho="conv.0.trained")),
        "'conv.0.sgd'",
        "has no state 'rho'",
    ),
    "input of another rank": (_node(I8, "conv.0", inputs=("input", *["head.bias"] * 3)), "'conv.0'", "weight is"),
    "too few outputs": (_outputs(TR.with_interface(losses=()), "logits", loss="g"), "'loss'", "has 2 outputs, not 1"),
    "too many outputs": (_outputs(I8, "pool.y", pool="pool.y logits", head=""), "'pool'", "has 1 outputs, not 2"),
    # data
    "constant without data": (_data(I8, "conv.0.weight", None), "'conv.0.weight'", "has data"),
    "data of an activation": (_data(I8, "logits", np.zeros(4, np.float32)), "'logits'", "only constants and states"),
    "data of nothing": (_data(I8, "ghost", np.zeros(4, np.float32)), "'int8_chain'", "'ghost' belongs to a value"),
    "data of another shape": (_data(I8, "head.bias", np.zeros(5, np.float32)), "'head.bias'", "shape (4,), not (5,)"),
    "data of another type": (_data(I8, "head.bias", np.zeros(4)), "'head.bias'", "float32, not float64"),
    "weight of -128": (_changed(I8, "conv.0.weight", (0, 0, 0, 0), -128), "'conv.0'", "within -127..127"),
    "trained weight of -128": (_changed(TR, "conv.0.trained", (0, 0, 0, 1), -128), "'conv.0'", "within -127..127"),
    "fraction above 7": (_changed(TR, "conv.0.fraction", (0, 0, 0, 1), 8), "'conv.0.fraction'", "within -8..7"),
    "scale of 0": (_changed(I8, "conv.0.scale", 1, 0), "'conv.0'", "above 0"),
    "infinite scale": (_changed(I8, "conv.0.scale", 1, np.inf), "'conv.0.scale'", "finite"),
    "head that is not a number": (_changed(I8, "head.weight", (0, 0), np.nan), "'head.weight'", "finite"),
    "huge bias": (_changed(I8, "conv.0.bias", 3, 2**30 + 1), "'conv.0'", "|bias| is at most 1073741824"),
    "smallest bias": (_changed(I8, "conv.0.bias", 3, -(2**31)), "'conv.0'", "|bias| is at most 1073741824"),
    "channels out of range": (_changed(TR, "conv.0.channels", 1, 4), "'conv.0'", "stays below 4"),
    "channels that descend": (_data(TR, "conv.0.channels", np.array([3, 1], np.uint16)), "'conv.0'", "ascends"),
    "channel twice": (_data(TR, "conv.0.channels", np.array([1, 1], np.uint16)), "'conv.0'", "ascends"),
    "weights of a dead channel": (_deadly(I8), "'conv.0'", "dead channels are 0"),
    "dead channel that is not there": (_attrs(I8, "conv.0", dead=(6,)), "'conv.0'", "dead lists"),
    # quantization
    "scale of NaN": (_value(I8, "conv.0.y", q=QParams(float("nan"), 0)), "'conv.0.y'", "finite and above 0"),
    "scale below 0": (_value(I8, "conv.0.y", q=QParams(-0.5, 0)), "'conv.0.y'", "finite and above 0"),
    "zero point of 128": (_value(I8, "conv.0.y", q=QParams(0.5, 128)), "'conv.0.y'", "within -128..127"),
    "output without a scale": (_value(I8, "add.0.y", q=None), "'add.0'", "'add.0.y' is s8 and has a scale"),
    "scale of a real": (_value(I8, "logits", q=QParams(0.5, 0)), "'logits'", "only s8"),
    "clamp that is not whole": (_attrs(I8, "conv.0", clamp=(-127.5, 127)), "'conv.0'", "integers within"),
    "clamp upside down": (_attrs(FL, "conv.0", clamp=(6.0, 0.0)), "'conv.0'", "(low, high)"),
    "addition without a clamp": (_node(I8, "add.0", attrs=Add()), "'add.0'", "integers within"),
    "activation without a clamp": (_node(FL, "add.0", attrs=Add(None, True)), "'add.0'", "has clamp bounds"),
    "huge dilation": (_attrs(FL, "conv.2", dilation=(256, 1)), "'conv.2'", "at most 255"),
    # masks
    "mask without a source": (_attrs(TR, "mask", source="none"), "'mask'", "a source and bounds"),
    "mask with bounds upside down": (_attrs(TR, "mask", clamp=(127, -128)), "'mask'", "a source and bounds"),
    "bits that are a tensor": (_node(TR, "r.mask", inputs=("r", "conv.0.y")), "'r.mask'", "b1 exactly where"),
    "tensor that is bits": (_attrs(TR, "r.mask", source="value"), "'r.mask'", "b1 exactly where"),
    # gradients
    "gradient without an exponent": (_value(TR, "r", exponent=None), "'pool.enter'", "'r' has an exponent slot"),
    "sums with another exponent": (_value(TR, "db", exponent=1), "'conv.0.db'", "slot of 'r.masked', 0, not 1"),
    "masked gradient with another exponent": (_value(TR, "r.masked", exponent=1), "'r.mask'", "slot of 'r', 0, not 1"),
    "exponent of a real": (_value(TR, "gf", exponent=1), "'gf'", "only s8 and s32"),
    "negative exponent slot": (_value(TR, "r", exponent=-1), "'r'", "not negative"),
    "site used twice": (_attrs(TR, "conv.0.sgd_bias", site=32), "'conv.0.sgd_bias'", "'conv.0.sgd' has 32 too"),
    "site of the head": (_attrs(TR, "conv.0.sgd_bias", site=2**32 - 1), "'conv.0.sgd_bias'", "32-bit number"),
    "groups that do not divide": (_node(TR, "keep", attrs=SelectChannels(3)), "'keep'", "(2, 2, 6)"),
    "two entries": (_twice_entered(), "'again'", "the one place where gradients enter"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_named(fault: str) -> None:
    graph, where, rule = FAULTS[fault]
    with pytest.raises(VerifyError) as e:
        verify_graph(graph)
    assert where in e.value.where
    assert rule in e.value.rule
    assert str(e.value) == f"{e.value.where}: {e.value.rule}"


def test_error_names_node_operator_and_layer() -> None:
    with pytest.raises(UnsupportedError, match=r"^node 'conv.1' \(conv2d, layer 'block.depthwise'\): its output"):
        verify_graph(_value(I8, "conv.1.y", shape=(4, 4, 7)))


def test_dead_channels_with_weights_of_0_pass() -> None:
    weight = I8.data["conv.0.weight"].copy()
    weight[2] = 0
    verify_graph(_deadly(_data(_changed(I8, "conv.0.bias", 2, -(2**31)), "conv.0.weight", weight)))


def test_sums_that_might_not_fit_are_refused() -> None:
    """C_in/groups * kh * kw = 33,155 is the last that fits 32 bits."""
    wide = _wide_convolution(33155)
    verify_graph(wide)
    with pytest.raises(VerifyError, match="at most 33155"):
        verify_graph(_wide_convolution(33156))


def _wide_convolution(c: int) -> Graph:
    weight = np.zeros((1, 1, 1, c), np.int8)
    graph = _data(_value(TR, "conv.0.weight", shape=weight.shape), "conv.0.weight", weight)
    graph = _value(_value(graph, "input", shape=(1, 1, c)), "conv.0.y", shape=(1, 1, 1))
    for name in ("conv.0.bias", "conv.0.scale"):
        graph = _data(
            _value(graph, name, shape=(1,), kind=Kind.CONST), name, TR.data.get(name, np.zeros(5, np.int32))[:1]
        )
    node = graph.node("conv.0")
    graph = replace(graph, interface=Interface(("input",), ("conv.0.y",)), stage=Stage.INT8)
    return graph.with_nodes([node.reading(trained=None, channels=None)])


# --- plans --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Planned:
    """A plan as the verifier sees one."""

    offsets: Mapping[str, int]
    sizes: Mapping[str, int]
    scratch_offsets: Mapping[str, int]
    scratch_sizes: Mapping[str, int]
    arena_bytes: int
    lower_bound: int


# input 192 bytes; conv.0.y, conv.1.y, conv.2.y, add.0.y 96; pool.y 6; logits 16; conv.0 needs 108 bytes of scratch
GOOD = Planned(
    offsets={"input": 0, "conv.0.y": 192, "conv.1.y": 0, "conv.2.y": 96, "add.0.y": 0, "pool.y": 96, "logits": 104},
    sizes={"input": 192, "conv.0.y": 96, "conv.1.y": 96, "conv.2.y": 96, "add.0.y": 96, "pool.y": 6, "logits": 16},
    scratch_offsets={"conv.0": 288},
    scratch_sizes={"conv.0": 108},
    arena_bytes=396,
    lower_bound=396,
)


def _plan(**change: Any) -> Planned:
    return replace(GOOD, **{k: {**getattr(GOOD, k), **v} if isinstance(v, dict) else v for k, v in change.items()})


def test_valid_plan_passes() -> None:
    verify_plan(I8, GOOD)


def test_plan_with_a_buffer_each_passes() -> None:
    offsets = {name: 512 * i for i, name in enumerate(GOOD.offsets)}
    verify_plan(I8, _plan(offsets=offsets, scratch_offsets={"conv.0": 4096}, arena_bytes=8192))


PLAN_FAULTS: dict[str, tuple[Planned, str, str]] = {
    # the last byte of the input is the first of what conv.0 makes from it
    "one byte": (
        _plan(offsets={"conv.0.y": 188}, sizes={"conv.0.y": 96}),
        "value 'conv.0.y' and value 'input'",
        "node 'conv.0' (conv2d, layer 'stem') and share 4 bytes",
    ),
    "one byte of a larger buffer": (
        _plan(sizes={"input": 193}),
        "value 'conv.0.y' and value 'input'",
        "node 'conv.0' (conv2d, layer 'stem') and share 1 bytes",
    ),
    "residual overwritten": (
        _plan(offsets={"conv.2.y": 192}),
        "value 'conv.2.y' and value 'conv.0.y'",
        "node 'conv.2' (conv2d, layer 'block.project') and share 96 bytes",
    ),
    "output in place of its input": (_plan(offsets={"add.0.y": 96}), "value 'add.0.y' and value 'conv.2.y'", "'add.0'"),
    "scratch on a live value": (
        _plan(scratch_offsets={"conv.1": 180}, scratch_sizes={"conv.1": 16}),
        "scratch of node 'conv.1' and value 'conv.0.y'",
        "node 'conv.1' (conv2d, layer 'block.depthwise') and share 4 bytes",
    ),
    "scratch of the node on its output": (
        _plan(scratch_offsets={"head": 116}, scratch_sizes={"head": 8}),
        "scratch of node 'head' and value 'logits'",
        "'head'",
    ),
    "past the end": (_plan(arena_bytes=395), "scratch of node 'conv.0'", "inside the arena of 395 bytes"),
    "before the start": (_plan(offsets={"pool.y": -4}), "value 'pool.y'", "inside the arena"),
    "not aligned": (_plan(offsets={"logits": 106}), "value 'logits'", "multiple of 4, not 106"),
    "scratch not aligned": (_plan(scratch_offsets={"head": 130}, scratch_sizes={"head": 4}), "'head'", "multiple"),
    "size too small": (_plan(sizes={"add.0.y": 95}), "value 'add.0.y'", "room for its 96 bytes, not 95"),
    "value of another graph": (_plan(offsets={"ghost": 0}), "value 'ghost'", "only what lies in the arena"),
    "constant in the arena": (_plan(sizes={"head.bias": 16}), "value 'head.bias'", "only what lies in the arena"),
    "scratch of no node": (_plan(scratch_offsets={"x": 0}, scratch_sizes={"x": 4}), "'x'", "belongs to a node"),
    "scratch without a size": (_plan(scratch_offsets={"head": 0}), "'head'", "an offset and a size"),
    "negative scratch": (_plan(scratch_offsets={"head": 0}, scratch_sizes={"head": -4}), "'head'", "not negative"),
    "bound above the arena": (_plan(lower_bound=400), "'int8_chain'", "at least its lower bound"),
    "bound below what lives at once": (_plan(lower_bound=392), "'int8_chain'", "at least the 396 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("fault", PLAN_FAULTS)
def test_planted_plan_fault_is_named(fault: str) -> None:
    plan, where, rule = PLAN_FAULTS[fault]
    with pytest.raises(VerifyError) as e:
        verify_plan(I8, plan)
    assert where in e.value.where
    assert rule in e.value.rule


def test_value_without_a_place_is_named() -> None:
    plan = replace(GOOD, offsets={k: v for k, v in GOOD.offsets.items() if k != "pool.y"})
    with pytest.raises(VerifyError, match=r"value 'pool\.y': has a place"):
        verify_plan(I8, plan)


def test_label_and_learning_rate_are_not_in_the_arena() -> None:
    values = [v for v in TR.values.values() if v.kind is Kind.ACTIVATION or v.name == "input"]
    plan = Planned(
        {v.name: 64 * i for i, v in enumerate(values)}, {v.name: v.nbytes for v in values}, {}, {}, 4096, 4096
    )
    verify_plan(TR, plan)
    with pytest.raises(VerifyError, match="value 'lr': the plan places only"):
        verify_plan(TR, replace(plan, offsets={**plan.offsets, "lr": 2048}))


def test_outputs_live_to_the_end() -> None:
    """The logits are read early and returned late: nothing made in between may take their place."""
    values = [v for v in TR.values.values() if v.kind is Kind.ACTIVATION or v.name == "input"]
    offsets = {v.name: 64 * i for i, v in enumerate(values)} | {"db": 4096}
    plan = Planned(offsets, {v.name: v.nbytes for v in values}, {}, {}, 8192, 8192)
    verify_plan(TR, plan)
    with pytest.raises(VerifyError, match="'logits'") as e:
        verify_plan(TR, replace(plan, offsets={**offsets, "db": offsets["logits"]}))
    assert "value 'db'" in e.value.where


def test_every_pair_that_shares_a_byte_and_a_moment_is_caught() -> None:
    """Against a brute-force model: bytes of the arena, moment by moment, on random plans."""
    rng = np.random.default_rng(3)
    names = list(GOOD.offsets)
    caught = 0
    for _ in range(300):
        offsets = {name: 4 * int(rng.integers(0, 120)) for name in names}
        plan = _plan(offsets=offsets, scratch_offsets={"conv.0": 4 * int(rng.integers(0, 120))}, arena_bytes=1024,
                     lower_bound=1024)  # fmt: skip
        clash = _clashes(I8, plan)
        caught += clash
        try:
            verify_plan(I8, plan)
        except VerifyError:
            assert clash
        else:
            assert not clash
    assert 50 < caught < 300


def _clashes(graph: Graph, plan: Planned) -> bool:
    for i, node in enumerate(graph.nodes):
        alive = {
            v
            for v in plan.offsets
            if (v == "input" or any(v in n.outputs for n in graph.nodes[: i + 1]))
            and (v in graph.outputs or any(v in (*n.inputs, *n.outputs) for n in graph.nodes[i:]))
        }
        used: list[int] = []
        for v in alive:
            used += range(plan.offsets[v], plan.offsets[v] + plan.sizes[v])
        if node.name in plan.scratch_offsets:
            begin = plan.scratch_offsets[node.name]
            used += range(begin, begin + plan.scratch_sizes[node.name])
        if len(used) != len(set(used)):
            return True
    return False
