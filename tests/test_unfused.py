# SPDX-License-Identifier: Apache-2.0
"""Training steps whose gradients are tensors of sums: the C of graphs that were not fused gives the bytes of the
reference, and so of the fused ones. And the rules of the nodes that apply such sums."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from graphs import named, train_tail
from hypothesis import HealthCheck, given, settings
from random_nets import NAMED, PLAIN, Case, cases, named_case
from test_exact import SANITIZE, _cc, difference, expected_bytes, run_sanitized
from test_stream import planned

from trainlet.autodiff.walk import differentiate
from trainlet.compiler import Compiled, Passes, compile_model
from trainlet.emit import emit
from trainlet.ir import Bound, Graph, Node, Stage, Value
from trainlet.ops import OPS, Conv2d, Conv2dDw, FusedDb, FusedDw, RuleError, SgdBias, SgdWeight
from trainlet.passes.choose_kernels import choose_kernels
from trainlet.passes.depth_first import depth_first
from trainlet.passes.fuse import fuse
from trainlet.passes.inplace import inplace
from trainlet.passes.reorder import reorder
from trainlet.session.host import HostSession
from trainlet.toolchain import host as build
from trainlet.toolchain.targets import HOST

STEPS = 4
SUMS = ("conv2d_dx", "conv2d_dw", "conv2d_db")


def unfused(train: Graph) -> Graph:
    """The classical step: every gradient is a tensor, all updates come last."""
    return choose_kernels(train.with_nodes(train.nodes, stage=Stage.LOWERED), HOST)


def chosen(graph: Graph) -> Graph:
    """The same graph with the kernels of the nodes that it has now."""
    return choose_kernels(graph, HOST)


def with_graph(case: Case, graph: Graph) -> Compiled:
    """The case compiled from another lowered graph of its step."""
    return planned(compile_model(case.model, case.scheme, passes=Passes(depth_first=False)), graph)


def bits_of(name: str) -> int:
    return (8, 12, 16)[list(NAMED).index(name) % 3]


# --- the same bytes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMED)
def test_sums_as_tensors_change_no_byte(name: str) -> None:
    case = named_case(name, bits_of(name))
    graph = unfused(differentiate(case.model, case.scheme))
    assert graph.find("sgd_weight")
    assert difference(case, with_graph(case, graph), STEPS) == ""


@pytest.mark.parametrize("name", ["shared_later", "dead_channels", "dilated_groups", "strided_depthwise"])
def test_sums_as_tensors_from_unusual_states(name: str) -> None:
    """rho at its ends, so that shifts of sums and updates reach theirs; 8 and 12 bits, whole and partial layers."""
    case = replace(named_case(name, 12, lrs=(0.02, 1e-30, 0.5, 1e4)), rho=(-60, 60, 4), head_bias=(-41.5, 0.0, -35.0))
    assert difference(case, with_graph(case, unfused(differentiate(case.model, case.scheme))), STEPS) == ""


@given(case=cases())
@settings(max_examples=8, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_no_choice_of_passes_changes_a_byte_of_random_models(case: Case) -> None:
    """Reference = classical = reordered = reordered, then fused = fused, then reordered."""
    case = replace(case, flags=PLAIN)
    classical = unfused(differentiate(case.model, case.scheme))
    moved = reorder(classical)
    for graph in (classical, moved, chosen(fuse(moved)), reorder(chosen(fuse(classical)))):
        assert difference(case, with_graph(case, graph), STEPS) == ""


@pytest.mark.parametrize("name", ["shared_later", "pool_in_prefix"])
def test_later_passes_take_graphs_that_were_not_fused(name: str) -> None:
    case = named_case(name)
    classical = unfused(differentiate(case.model, case.scheme))
    for graph in (inplace(classical), depth_first(inplace(reorder(classical)), by_rows=True)):
        assert difference(case, with_graph(case, graph), STEPS) == ""


def test_the_emitted_c_calls_the_kernels_for_sums() -> None:
    """Nothing fused is left by accident: each of the new calls is there, and each sum has memory of its own."""
    case = named_case("shared_later")
    compiled = with_graph(case, unfused(differentiate(case.model, case.scheme)))
    text = compiled.sources.files[f"{compiled.sources.prefix}.c"]
    gradients = ("conv2d_dx", "depthwise_dx", "round_grad", "conv2d_dw", "depthwise_dw", "bias_grad")
    assert [k for k in (*gradients, "weight_sgd", "bias_sgd") if f"tl_{k}_s32(" not in text] == []
    assert "_dw_s8(" not in text
    assert "_dx_s8(" not in text
    for node in (n for op in SUMS for n in compiled.graph.find(op)):
        v = compiled.graph.values[node.outputs[0]]
        assert v.dtype == "s32"
        assert compiled.plan.sizes[v.name] == 4 * v.size


def test_all_gradients_come_before_the_first_update() -> None:
    for name in NAMED:
        case = named_case(name)
        ops = [n.op for n in differentiate(case.model, case.scheme).nodes]
        updates = {"sgd_weight", "sgd_bias"}
        first = next(i for i, op in enumerate(ops) if op in updates)
        assert set(ops[first:]) <= updates
        assert "dense_sgd" in ops[:first]


# --- memory ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """What a step without streams needs, made with the sanitizers."""
    folder = tmp_path_factory.mktemp("sanitized-sums")
    sources = build.kernel_sources()
    for name, text in sources.items():
        (folder / name).write_text(text)
    flags = [f for f in SANITIZE if not f.startswith("-O")]
    names = sorted(n for n in sources if n.endswith(".c"))
    for name in names:
        _cc(*flags, "-O0", "-DTL_PLAIN_TILE", "-c", folder / name, "-o", folder / f"{name}.o")
    return folder, [folder / f"{n}.o" for n in names]


def test_sums_as_tensors_under_sanitizers(kernels: tuple[Path, list[Path]], tmp_path: Path) -> None:
    for name in ("shared_later", "dead_channels", "strided_depthwise"):
        case = named_case(name, 12)
        graph = unfused(differentiate(case.model, case.scheme))
        compiled = with_graph(case, reorder(graph))
        got = run_sanitized(compiled, kernels, tmp_path, 3, 0.5)
        fused = compile_model(case.model, case.scheme)
        assert got == expected_bytes(fused, HostSession(fused, flags=PLAIN), 3, 0.5)


# --- planted faults -------------------------------------------------------------------------------------------

FAULTS = {
    "a tap too early": ("sums.c", "in + pad - k * dil", "in + pad - k * dil + 1", "shared_later"),
    "a stride is forgotten": ("sums.c", "at < 0 || at % stride != 0 ||", "at < 0 ||", "dilated_groups"),
    "padding is not left out": ("sums.c", "at >= size ? -1 : at;", "at >= size ? 0 : at;", "shared_later"),
    "frozen weights shift": ("sums.c", "+ i - below]", "+ i - below - (below > 0)]", "shared_later"),
    "the zero point is lost": ("sums.c", "kept + j] - c->x_zero", "kept + j]", "shared_later"),
    "another channel's gradient": ("sums.c", "ch = channels ? channels[j] : j", "ch = j", "strided_depthwise"),
    "scales of other channels": ("sums.c", "from[o] * mt[o]", "from[o] * mt[0]", "shared_later"),
    "sums of the pixel before": ("unfused.c", "acc[p * channels + c + j]", "acc[c + j]", "shared_later"),
    "the next random word": ("unfused.c", "* cg + in)", "* cg + in + 1)", "shared_later"),
    "another channel's rate": ("unfused.c", "d->rate[ch]", "d->rate[0]", "dead_channels"),
    "one exponent for all": ("bias.c", "tl_rate_of(v, e, pre, 0)", "tl_rate_of(v, e + 1, pre, 0)", "shared_later"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_kernel_is_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file, sound, faulty, model = FAULTS[fault]
    case = named_case(model, 12)
    compiled = with_graph(case, unfused(differentiate(case.model, case.scheme)))
    sources = build.kernel_sources()
    assert sound in sources[file], f"{file} has no {sound!r} any more; plant the fault anew"
    changed = {**sources, file: sources[file].replace(sound, faulty)}
    monkeypatch.setattr(build, "kernel_sources", lambda: changed)
    assert difference(case, compiled, STEPS) != ""


def test_sums_that_share_bytes_are_caught() -> None:
    """Two gradient tensors in one place: the C gives other bytes."""
    case = named_case("add_with_activation")
    sound = with_graph(case, unfused(differentiate(case.model, case.scheme)))
    first, second = (n.outputs[0] for n in sound.graph.find("conv2d_dw"))
    plan = replace(sound.plan, places={**sound.plan.places, first: sound.plan.places[second]})
    faulty = replace(sound, plan=plan, sources=emit(sound.graph, plan, sound.layout, sound.model_hash))
    assert difference(case, faulty, STEPS) != ""


# --- rules of updates -----------------------------------------------------------------------------------------

TAIL = train_tail()
LR, SCALE, CHANNELS = Value("lr", (1,), "f32"), Value("s", (5,), "f32"), Value("c", (2,), "u16")
DW, DB = Value("dw", (5, 1, 1, 2), "s32"), Value("db", (5,), "s32")
G, X = Value("g", (2, 2, 5), "s8"), Value("x", (2, 2, 2), "s8")
WEIGHT, BIAS = TAIL.node("conv.0.sgd"), TAIL.node("conv.0.sgd_bias")


def _fused(update: Node) -> Node:
    """The same update, fused with its sums."""
    a = update.attrs
    if isinstance(a, SgdBias):
        return replace(update, op="conv2d_db_sgd", attrs=FusedDb(a), operands=named("g=g lr=lr scale=s"))
    assert isinstance(a, SgdWeight)
    read = named("g=g x=x lr=lr scale=s channels=c")
    return replace(update, op="conv2d_dw_sgd", attrs=FusedDw(Conv2dDw(a.conv, 2, a.shape), a), operands=read)


def bound(node: Node, ins: Sequence[Value]) -> Bound[Value]:
    """``ins`` at the node's operands, in order; what they are too few for is left out: the scale."""
    names = [k for k in node.operands if len(ins) == len(node.operands) or k != "scale"]
    return Bound({k: (k,) for k in names}, dict(zip(names, ins, strict=True)))


def _depthwise(update: Node) -> Node:
    conv = Conv2d((3, 3), groups=7, depthwise=True)
    a = update.attrs
    assert isinstance(a, SgdWeight)
    return replace(update, attrs=replace(a, conv=conv))


@pytest.mark.parametrize(
    ("node", "ins"),
    [
        (WEIGHT, [DW, LR, SCALE, CHANNELS]),
        (WEIGHT, [replace(DW, dtype="f32"), LR, CHANNELS]),
        (_depthwise(WEIGHT), [Value("dw", (2, 3, 3, 1), "s32"), LR, Value("s", (7,), "f32"), CHANNELS]),
        (BIAS, [DB, LR, SCALE]),
        (BIAS, [replace(DB, dtype="f32"), LR]),
        (_fused(WEIGHT), [G, X, LR, SCALE, CHANNELS]),
        (_fused(BIAS), [G, LR, SCALE]),
    ],
)
def test_updates_take(node: Node, ins: Sequence[Value]) -> None:
    assert OPS[node.op].rule(node, bound(node, ins)) == ()


@pytest.mark.parametrize(
    ("node", "ins", "message"),
    [
        (WEIGHT, [DW, LR, CHANNELS], "a scale exactly where"),
        (WEIGHT, [replace(DW, dtype="f32"), LR, SCALE, CHANNELS], "a scale exactly where"),
        (WEIGHT, [replace(DW, dtype="s8"), LR, SCALE, CHANNELS], "s32 or f32"),
        (WEIGHT, [replace(DW, shape=(5, 2)), LR, SCALE, CHANNELS], "weights' shape"),
        (WEIGHT, [replace(DW, shape=(5, 1, 1, 3)), LR, SCALE, CHANNELS], r"of 2 channels is \(5, 1, 1, 2\)"),
        (WEIGHT, [replace(DW, shape=(5, 3, 3, 2)), LR, SCALE, CHANNELS], r"\(5, 1, 1, 2\), not \(5, 3, 3, 2\)"),
        (WEIGHT, [DW, replace(LR, shape=(2,)), SCALE, CHANNELS], "lr is one f32"),
        (WEIGHT, [DW, replace(LR, dtype="s32"), SCALE, CHANNELS], "lr is one f32"),
        (WEIGHT, [DW, LR, replace(SCALE, shape=(4,)), CHANNELS], "each of 5 output"),
        (WEIGHT, [DW, LR, replace(SCALE, dtype="s32"), CHANNELS], "scale is f32"),
        (WEIGHT, [DW, LR, SCALE, replace(CHANNELS, dtype="s32")], "table of u16"),
        (WEIGHT, [DW, LR, SCALE, replace(CHANNELS, shape=(2, 1))], "table of u16"),
        (_depthwise(WEIGHT), [Value("dw", (2, 3, 3, 1), "s32"), LR, SCALE, CHANNELS], "each of 7 output"),
        (replace(WEIGHT, stores=named("weight=conv.0.trained")), [DW, LR, SCALE, CHANNELS], "fraction bits"),
        (BIAS, [DB, LR], "a scale exactly where"),
        (BIAS, [replace(DB, dtype="f32"), LR, SCALE], "a scale exactly where"),
        (BIAS, [replace(DB, shape=(5, 1)), LR, SCALE], "one per output channel"),
        (BIAS, [replace(DB, dtype="s8"), LR, SCALE], "s32 or f32"),
        (BIAS, [DB, replace(LR, shape=(5,)), SCALE], "lr is one f32"),
        (BIAS, [DB, LR, replace(SCALE, shape=(6,))], "each of 5 output"),
        (_fused(WEIGHT), [G, X, LR, SCALE, replace(CHANNELS, shape=(3,))], "names the kept ones"),
        (_fused(WEIGHT), [G, replace(X, shape=(2, 2, 3)), LR, SCALE, CHANNELS], "kept channels"),
        (_fused(BIAS), [replace(G, shape=(2, 2, 4)), LR, SCALE], "each of 4 output"),
    ],
)  # fmt: skip
def test_updates_refuse(node: Node, ins: Sequence[Value], message: str) -> None:
    with pytest.raises(RuleError, match=message):
        OPS[node.op].rule(node, bound(node, ins))


@pytest.mark.parametrize("update", [WEIGHT, BIAS])
def test_an_update_has_a_layer_with_pixels(update: Node) -> None:
    ins = update.bind(TAIL.values)
    with pytest.raises(RuleError, match="at least one pixel"):
        OPS[update.op].rule(replace(update, attrs=replace(update.attrs, pixels=0)), ins)  # type: ignore[arg-type]
