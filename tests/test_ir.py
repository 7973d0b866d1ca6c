# SPDX-License-Identifier: Apache-2.0
"""The graph, its text form and its files: what is saved loads again, and what is damaged is refused by name."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graphs import float_chain, int8_chain, same, train_tail
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from trainlet.errors import UsageError
from trainlet.frontends.graph_file import load, save
from trainlet.ir import Graph, GraphBuilder, Kind, Node, Operands, QParams, Stage, Value
from trainlet.ops import Add, Conv2d, Conv2dDx, FusedDx, RoundGrad
from trainlet.verify import VerifyError

MAKERS = [float_chain, int8_chain, train_tail]

# --- graph --------------------------------------------------------------------------------------------------


def test_graph_cannot_change() -> None:
    graph = int8_chain()
    with pytest.raises(FrozenInstanceError):
        graph.name = "other"  # type: ignore[misc]
    with pytest.raises(TypeError):
        graph.values["x"] = graph.values["input"]  # type: ignore[index]


def test_queries() -> None:
    graph = int8_chain()
    producer = graph.producer("conv.0.y")
    assert producer is not None
    assert producer.name == "conv.0"
    assert graph.producer("input") is None
    assert [n.name for n in graph.consumers("conv.0.y")] == ["conv.1", "add.0"]
    assert [n.name for n in graph.find("conv2d")] == ["conv.0", "conv.1", "conv.2"]
    with pytest.raises(KeyError):
        graph.node("conv.9")
    assert [v.name for v in train_tail().states()] == [
        "conv.0.bias", "conv.0.trained", "conv.0.fraction", "head.weight", "head.bias",
    ]  # fmt: skip


def test_with_nodes_drops_what_nothing_names() -> None:
    graph = int8_chain()
    cut = graph.with_interface(outputs=("conv.0.y",)).with_nodes(graph.nodes[:1])
    assert set(cut.values) == {"input", "conv.0.weight", "conv.0.bias", "conv.0.scale", "conv.0.y"}
    assert set(cut.data) == {"conv.0.weight", "conv.0.bias", "conv.0.scale"}


def test_builder_refuses_a_name_twice() -> None:
    g = GraphBuilder("g")
    g.add(Value("x", (1,), "f32", Kind.INPUT))
    with pytest.raises(ValueError, match="'x' is defined twice"):
        g.add(Value("x", (1,), "f32"))


# --- text ---------------------------------------------------------------------------------------------------


def test_text_form() -> None:
    g = GraphBuilder("tiny")
    x = g.add(Value("x", (2, 2, 1), "s8", Kind.INPUT, QParams(0.5, -128)))
    w = g.const("w", np.arange(4, dtype=np.int8).reshape(1, 2, 2, 1), "s8")
    b = g.add(Value("b", (1,), "s32", Kind.STATE), np.zeros(1, np.int32))
    s = g.const("s", np.array([0.1], np.float32), "f32")
    g.add(Value("rho", (1,), "s8", Kind.STATE))
    y = Value("y", (1, 1, 1), "s8", q=QParams(1 / 3, 0))
    conv, read = Conv2d((2, 2), clamp=(-128, 127), dead=(0,)), Operands(x=x, weight=w, bias=b, scale=s)
    g.emit(Node("conv2d", "conv.0", "blocks.1", read, ("y",), conv), y)
    site = RoundGrad(7, "bits", None, levels=15, bound=900)
    fused = FusedDx(Conv2dDx(Conv2d((2, 2)), (2, 2)), site)
    read = Operands(g="y", weight=w, further=("y", "y"))
    dx = Node("conv2d_dx_round", "dx", "dx", read, ("r",), fused, Operands(rho="rho"), kernel="tl_conv2d_dx_s8")
    g.emit(dx, Value("r", (2, 2, 1), "s8", exponent=3))
    assert str(g.build(Stage.LOWERED, ["y", "r"])) == (
        "graph tiny lowered\n"
        "input %x : s8[2,2,1] q(0.5, -128)\n"
        "const @w : s8[1,2,2,1] = 054edec1d0211f62\n"
        "const @s : f32[1] = fb360f7241a770dc\n"
        "state $b : s32[1] = df3f619804a92fdb\n"
        "state $rho : s8[1]\n"
        "%y : s8[1,1,1] q(0.3333333333333333, 0) = conv2d(x=%x, weight=@w, bias=$b, scale=@s) {kernel=(2, 2), "
        "clamp=(-128, 127), dead=(0,)}  # conv.0 of blocks.1\n"
        "%r : s8[2,2,1] e3 = conv2d_dx_round(g=%y, weight=@w, further=%y+%y) -> rho=$rho by tl_conv2d_dx_s8 "
        "{dx=Conv2dDx(conv=Conv2d(kernel=(2, 2)), in_hw=(2, 2)), "
        "round=RoundGrad(site=7, mask=bits, clamp=None, levels=15, bound=900)}  # dx\n"
        "return %y, %r\n"
    )


@pytest.mark.parametrize("make", MAKERS)
def test_text_is_one_line_per_node_and_stable(make: Callable[[], Graph]) -> None:
    text = str(make())
    assert text == str(make())
    free = [v for v in make().values.values() if v.kind is not Kind.ACTIVATION]
    assert len(text.splitlines()) == len(make().nodes) + len(free) + 2


def test_text_shows_every_change() -> None:
    graph = int8_chain()
    data = {**graph.data, "conv.0.bias": graph.data["conv.0.bias"] + np.int32(1)}
    scale = replace(graph.values["add.0.y"], q=QParams(0.25, 2))
    assert str(replace(graph, data=data)) != str(graph)
    assert str(replace(graph, values={**graph.values, "add.0.y": scale})) != str(graph)


def test_text_of_a_graph_that_is_not_valid() -> None:
    graph = int8_chain()
    broken = replace(graph, nodes=(replace(graph.node("pool"), operands=Operands(x="ghost"), outputs=("phantom",)),))
    assert "?phantom = avg_pool(x=?ghost)" in str(broken)


# --- files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", MAKERS)
def test_save_and_load_give_the_same_graph(make: Callable[[], Graph], tmp_path: Path) -> None:
    graph, path = make(), tmp_path / "g.json"
    save(graph, path)
    loaded = load(path)
    assert same(loaded, graph)
    assert str(loaded) == str(graph)
    first = path.read_bytes(), path.with_suffix(".safetensors").read_bytes()
    save(loaded, path)
    assert (path.read_bytes(), path.with_suffix(".safetensors").read_bytes()) == first


def test_open_bounds_and_numpy_numbers_survive(tmp_path: Path) -> None:
    graph = float_chain()
    attrs = Add((0.0, float("inf")), True)
    nodes = [replace(n, attrs=attrs) if n.name == "add.0" else n for n in graph.nodes]
    logits = replace(graph.values["logits"], shape=(np.int64(4),))
    graph = replace(graph, nodes=tuple(nodes), values={**graph.values, "logits": logits})
    save(graph, tmp_path / "g.json")
    loaded = load(tmp_path / "g.json")
    assert same(loaded, graph)
    assert loaded.node("add.0").attrs == attrs


def test_float_bytes_survive(tmp_path: Path) -> None:
    graph = int8_chain()
    q = QParams(0.1 + 0.2, 2)
    graph = replace(graph, values={**graph.values, "add.0.y": replace(graph.values["add.0.y"], q=q)})
    save(graph, tmp_path / "g.json")
    assert load(tmp_path / "g.json").values["add.0.y"].q == q


def test_an_invalid_graph_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(VerifyError, match="at least one output"):
        save(int8_chain().with_interface(outputs=()), tmp_path / "g.json")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The files of the hand-written TRAIN graph."""
    save(train_tail(), tmp_path / "g.json")
    return tmp_path / "g.json"


def _at(document: Any, *keys: str | int) -> Any:
    for key in keys:
        document = document[key]
    return document


def _put(*keys_and_value: Any) -> Callable[[dict[str, Any]], None]:
    *keys, last, value = keys_and_value

    def change(document: dict[str, Any]) -> None:
        _at(document, *keys)[last] = value

    return change


def _drop(*keys: str | int) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        del _at(document, *keys[:-1])[keys[-1]]

    return change


CONV = next(i for i, n in enumerate(train_tail().nodes) if n.op == "conv2d")
SGD = next(i for i, n in enumerate(train_tail().nodes) if n.op == "sgd_weight")
MASK = next(i for i, n in enumerate(train_tail().nodes) if n.op == "mask_grad")

DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "another format": (_put("format", "onnx"), "format: is 'trainlet-graph'"),
    "no format": (_drop("format"), "format: is 'trainlet-graph'"),
    "a later version": (_put("version", 3), "version: this trainlet reads versions 1 to 2, not 3"),
    "a version that is true": (_put("version", True), "version: this trainlet reads versions 1 to 2, not True"),
    "unknown field": (_put("comment", "hi"), "the file: the field 'comment' is unknown"),
    "missing field": (_drop("nodes"), "the file: the field 'nodes' is missing"),
    "unknown stage": (_put("stage", "done"), "stage: one of float, int8, train, lowered, not 'done'"),
    "stage that is a list": (_put("stage", []), "stage: one of float, int8, train, lowered, not list"),
    "nodes that are no list": (_put("nodes", {}), "nodes: a list, not dict"),
    "name that is no text": (_put("name", 5), "name: a printable text, not 5"),
    "name with a newline": (_put("name", "a\nb"), "name: a printable text"),
    "half a character": (_put("name", "\ud800"), "name: a printable text"),
    "value that is no object": (_put("values", 0, 7), r"values[0]: an object, not 7"),
    "value without a name": (_put("values", 0, "name", ""), "values[0].name: a printable text"),
    "value twice": (_put("values", 1, "name", "input"), "value 'input': is defined once"),
    "unknown field of a value": (_put("values", 0, "stride", 1), "values[0]: the field 'stride' is unknown"),
    "unknown dtype": (_put("values", 0, "dtype", "f64"), "value 'input'.dtype: one of b1, s4"),
    "dtype that is a list": (_put("values", 0, "dtype", []), "value 'input'.dtype: one of b1, s4"),
    "unknown kind": (_put("values", 0, "kind", "output"), "value 'input'.kind: one of input"),
    "shape with a fraction": (_put("values", 0, "shape", [2.0, 2, 4]), "value 'input'.shape: a whole number"),
    "shape with true": (_put("values", 0, "shape", [True, 2, 4]), "value 'input'.shape: a whole number"),
    "negative shape": (_put("values", 0, "shape", [-2, -2, 4]), "value 'input'.shape: 1 to 8 sizes of at least 1"),
    "huge shape": (_put("values", 0, "shape", [2**40, 2**40]), "value 'input'.shape: 1 to 8 sizes"),
    "shape of a thousand": (_put("values", 0, "shape", [1] * 1000), "value 'input'.shape: 1 to 8 sizes"),
    "huge exponent slot": (_put("values", 0, "exponent", 2**70), "value 'input'.exponent: a whole number of at most"),
    "scale that is text": (_put("values", 0, "q", "scale", "1"), "value 'input'.q.scale: a number, not '1'"),
    "scale without zero": (_drop("values", 0, "q", "zero"), "value 'input'.q: the field 'zero' is missing"),
    "infinite scale": (_put("values", 0, "q", "scale", "inf"), "value 'input': scale is finite"),
    "unknown operator": (_put("nodes", CONV, "op", "conv3d"), "not a valid graph: node 'conv.0'"),
    "unknown attributes": (_put("nodes", CONV, "attrs", "class", "Path"), "node 'conv.0'.attrs.class: one of Conv2d"),
    "attributes of no class": (_drop("nodes", CONV, "attrs", "class"), "node 'conv.0'.attrs.class: one of"),
    "attributes that are a list": (_put("nodes", CONV, "attrs", []), "node 'conv.0'.attrs: an object"),
    "attributes of another operator": (
        _put("nodes", CONV, "attrs", {"class": "Attrs"}),
        "not a valid graph: node 'conv.0' (conv2d, layer 'tail'): its attributes are Conv2d",
    ),
    "unknown attribute": (_put("nodes", CONV, "attrs", "padding", 1), "node 'conv.0'.attrs: the field 'padding'"),
    "missing attribute": (_drop("nodes", CONV, "attrs", "groups"), "node 'conv.0'.attrs: the field 'groups' is"),
    "kernel of three": (_put("nodes", CONV, "attrs", "kernel", [1, 1, 1]), ".attrs.kernel: 2 entries, not 3"),
    "kernel of text": (_put("nodes", CONV, "attrs", "kernel", [1, "1"]), "node 'conv.0'.attrs.kernel[1]: a whole"),
    "flag that is 1": (_put("nodes", CONV, "attrs", "depthwise", 1), "node 'conv.0'.attrs.depthwise: true or false"),
    "clamp of text": (_put("nodes", CONV, "attrs", "clamp", ["nan", 1]), "node 'conv.0'.attrs.clamp[0]: a number"),
    "inner attributes": (_put("nodes", SGD, "attrs", "conv", "dead", [1.5]), "node 'conv.0.sgd'.attrs.conv.dead[0]: a"),
    "inner attributes of no class": (_put("nodes", SGD, "attrs", "conv", None), "'conv.0.sgd'.attrs.conv: an object"),
    "unknown choice": (_put("nodes", MASK, "attrs", "source", "maybe"), "node 'r.mask'.attrs.source: one of none"),
    "input that is a number": (_put("nodes", CONV, "operands", "x", 0, 3), "'conv.0'.operands.x[0]: a printable text"),
    "operand that no operator has": (_put("nodes", CONV, "operands", "z", ["y"]), "'z' is an operand of no operator"),
    "operand of nothing": (_put("nodes", CONV, "operands", "x", []), "'conv.0'.operands.x: names at least one value"),
    "operands that are a list": (_put("nodes", CONV, "operands", []), "'conv.0'.operands: an object"),
    "input that does not exist": (_put("nodes", CONV, "operands", "x", 0, "ghost"), "not a valid graph: node 'conv.0'"),
    "other shape": (_put("values", 0, "shape", [2, 3, 4]), "not a valid graph: node 'conv.0'"),
    "tensor that is not there": (_put("tensors", "names", ["ghost"]), "the tensor 'ghost' is missing"),
    "tensor of no value": (_put("tensors", "names", ["head.bias"]), "belongs to no value of the graph"),
    "other bytes": (_put("tensors", "sha256", "0" * 64), "are not those that were saved with the graph"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_graph_is_refused_by_name(damage: str, saved: Path) -> None:
    change, message = DAMAGE[damage]
    document = json.loads(saved.read_text())
    change(document)
    saved.write_text(json.dumps(document))
    with pytest.raises(UsageError) as e:
        load(saved)
    assert message in str(e.value)
    assert str(e.value).startswith(str(saved.with_suffix("")))


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "null", "[]", "\x00", '{"format": "trainlet-graph", "version": 1, "version": 1}', "[" * 100_000,
        "9" * 5000,
        '{"format": NaN}', '{"format": "trainlet-graph", "version": 1e999}',
    ],
)  # fmt: skip
def test_text_that_is_no_graph_is_refused(text: str, saved: Path) -> None:
    saved.write_text(text)
    with pytest.raises(UsageError, match=r"g\.json"):
        load(saved)


def test_binary_and_cut_files_are_refused(saved: Path) -> None:
    raw = saved.read_bytes()
    for cut in (b"\xff\xfe\x00", raw[: len(raw) // 2], raw[:-3]):
        saved.write_bytes(cut)
        with pytest.raises(UsageError, match="not a JSON file of a graph"):
            load(saved)


def _retensor(saved: Path, blob: bytes, names: list[str] | None = None) -> None:
    """Replaces the tensor file and makes the graph agree with its hash, so that other checks are reached."""
    saved.with_suffix(".safetensors").write_bytes(blob)
    document = json.loads(saved.read_text())
    document["tensors"]["sha256"] = hashlib.sha256(blob).hexdigest()
    if names is not None:
        document["tensors"]["names"] = names
    saved.write_text(json.dumps(document))


def test_tensors_of_another_shape_or_type_or_none_are_refused(saved: Path) -> None:
    tensors = load_tensors(saved.with_suffix(".safetensors").read_bytes())
    cases: list[tuple[Any, str]] = [
        (np.zeros(6, np.float32), "value 'head.bias': data has the shape"),
        (np.zeros(4, np.float64), "value 'head.bias': data of f32 is float32"),
        (np.zeros(4, np.int32), "value 'head.bias': data of f32 is float32"),
        (np.full(4, np.nan, np.float32), "value 'head.bias': data is finite"),
    ]
    for array, message in cases:
        _retensor(saved, save_tensors({**tensors, "head.bias": array}))
        with pytest.raises(UsageError, match=message):
            load(saved)
    del tensors["conv.0.weight"]
    _retensor(saved, save_tensors(tensors), sorted(tensors))
    with pytest.raises(UsageError, match=r"value 'conv\.0\.weight': a constant has data"):
        load(saved)


def test_hostile_tensor_files_are_refused(saved: Path) -> None:
    path = saved.with_suffix(".safetensors")
    good = path.read_bytes()

    def header(text: str, body: bytes = b"") -> bytes:
        return len(text).to_bytes(8, "little") + text.encode() + body

    huge = '{"x": {"dtype": "F32", "shape": [1099511627776, 1099511627776], "data_offsets": [0, 4]}}'
    outside = '{"x": {"dtype": "F32", "shape": [1], "data_offsets": [4096, 4100]}}'
    half = '{"head.bias": {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}}'
    for blob in (
        b"", good[:7], good[:100], good[:-1], good + b"\0", (2**63).to_bytes(8, "little") + good[8:], header("{"),
        header(huge, bytes(4)), header(outside, bytes(4)), header(half, bytes(8)), header("[1]"),
    ):  # fmt: skip
        _retensor(saved, blob)
        with pytest.raises(UsageError, match=r"g\.safetensors"):
            load(saved)


def test_missing_files_and_names_are_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"ends in \.json"):
        load(tmp_path / "g.pkl")
    with pytest.raises(UsageError, match="cannot be read"):
        load(tmp_path / "none.json")
    with pytest.raises(UsageError, match="no regular file"):
        load(_folder(tmp_path / "folder.json"))
    saved.with_suffix(".safetensors").unlink()
    with pytest.raises(UsageError, match=r"g\.safetensors: cannot be read"):
        load(saved)


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def test_file_above_the_limit_is_refused_unread(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainlet.frontends.graph_file.MAX_JSON_BYTES", 1000)
    with pytest.raises(UsageError, match="larger than the 1000 bytes"):
        load(saved)


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 2**33), st.floats(), st.text(max_size=4), st.just([]), st.just({}),
    st.lists(st.integers(-1, 5), max_size=5), st.sampled_from(["input", "conv.0.weight", "s8", "f32", "state", "bits"]),
)  # fmt: skip
DOCUMENT_TEXT: list[str] = []


@given(path=st.lists(st.integers(0, 10_000), min_size=1, max_size=6), junk=JUNK)
def test_any_item_replaced_by_junk_loads_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, path: list[int], junk: Any
) -> None:
    """Nothing but UsageError may escape, whatever stands anywhere in the file."""
    saved = tmp_path_factory.getbasetemp() / "fuzz.json"
    if not DOCUMENT_TEXT:
        save(train_tail(), saved)
        DOCUMENT_TEXT.append(saved.read_text())
    document = json.loads(DOCUMENT_TEXT[0])
    item, key = document, None
    for step in path:
        if not isinstance(item, dict | list) or not item:
            break
        parent = item
        key = sorted(parent)[step % len(parent)] if isinstance(parent, dict) else step % len(parent)
        item = parent[key]
    parent[key] = junk
    saved.write_text(json.dumps(document))
    with contextlib.suppress(UsageError):
        assert isinstance(load(saved), Graph)
