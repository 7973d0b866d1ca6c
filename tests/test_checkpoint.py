# SPDX-License-Identifier: Apache-2.0
"""The reader of published checkpoints: structure, checks, and files that want to do harm."""

from __future__ import annotations

import io
import json
import os
import pickle
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainlet.errors import TrainletError, UnsupportedError, UsageError
from trainlet.frontends import attach_head, canonicalize_dead, check_sums, load, load_checkpoint
from trainlet.ir.graph import Graph, Kind, QParams
from trainlet.ops import OPS, Add, AvgPool, Conv2d
from trainlet.verify import verify_graph

ASSETS = os.environ.get("TRAINLET_ASSETS")
needs_assets = pytest.mark.skipif(not ASSETS, reason="TRAINLET_ASSETS is not set")

# convs, weights, biases, MACs, MACs with classifier, blocks with an addition, dead channels by convolution
FACTS: dict[str, tuple[int, int, int, int, int, list[int], dict[int, int]]] = {
    "mcunet-5fps": (
        42, 463_216, 6_008, 22_453_504, 22_613_504, [2, 4, 6, 8, 9, 11, 12],
        {0: 2, 1: 2, 18: 1, 19: 1, 24: 1, 25: 1, 27: 7, 28: 7, 33: 6, 34: 6, 36: 14, 37: 14},
    ),
    "mbv2-w0.35": (
        51, 238_688, 5_760, 16_646_912, 16_758_912, [2, 4, 5, 7, 8, 9, 11, 12, 14, 15], {13: 1},
    ),
    "proxyless-w0.3": (
        60, 320_816, 5_416, 18_619_904, 18_715_904, [2, 4, 5, 6, 8, 9, 10, 12, 13, 14, 16, 17, 18],
        {0: 1, 1: 1, 27: 6, 28: 6, 30: 2, 31: 2, 48: 2, 49: 2, 51: 4, 52: 4, 54: 1, 55: 1},
    ),
}  # fmt: skip


def asset(name: str) -> Path:
    assert ASSETS is not None
    return Path(ASSETS) / "models" / f"{name}.pkl"


def macs(graph: Graph) -> list[int]:
    return [OPS[n.op].macs(n, n.bind(graph.values)) for n in graph.nodes]


# --- a small checkpoint, so that these tests need no assets -------------------------------------------------


def conv(in_c: int, out_c: int, side: int, k: int = 1, stride: int = 1, *, x: tuple[float, int], linear: bool = False,
         depthwise: bool = False) -> dict[str, Any]:  # fmt: skip
    rng = np.random.default_rng(in_c * 1000 + out_c * 10 + k)
    groups = in_c if depthwise else 1
    y = (0.05, 3) if linear else (6 / 255, -128)
    return {
        "in_channel": in_c, "in_shape": side, "out_channel": out_c, "out_shape": (side - 1) // stride + 1,
        "kernel_size": (k, k), "stride": stride, "groups": groups, "depthwise": depthwise, "act": None,
        "params": {
            "weight": rng.integers(-127, 128, (out_c, in_c // groups, k, k)).astype(np.int8),
            "bias": rng.integers(-1000, 1000, out_c).astype(np.int32),
            "x_scale": x[0], "x_zero": x[1], "y_scale": y[0], "y_zero": y[1],
            "w_scales": rng.uniform(0.001, 0.01, out_c).astype(np.float32),
        },
    }  # fmt: skip


RELU, LINEAR, SUM = (6 / 255, -128), (0.05, 3), (0.07, -5)


def checkpoint() -> dict[str, Any]:
    """Two blocks, the second with an addition, on 8 x 8 images."""
    residual = {"x_scale": 0.05, "x_zero": 3, "y_scale": 0.07, "y_zero": -5}
    classifier = conv(8, 6, 4, x=SUM, linear=True)
    return {
        "first_conv": conv(3, 4, 8, 3, 2, x=(2 / 255, 0)),
        "blocks": [
            {
                "pointwise1": None,
                "depthwise": conv(4, 4, 4, 3, x=RELU, depthwise=True),
                "pointwise2": conv(4, 8, 4, x=RELU, linear=True),
                "residual": None,
                "se": None,
            },
            {
                "pointwise1": conv(8, 12, 4, x=LINEAR),
                "depthwise": conv(12, 12, 4, 5, x=RELU, depthwise=True),
                "pointwise2": conv(12, 8, 4, x=RELU, linear=True),
                "residual": {"in_channel": 8, "in_shape": 4, "params": residual},
                "se": None,
            },
        ],
        "feature_mix": None,
        "classifier": {k: v for k, v in classifier.items() if k not in ("in_shape", "out_shape", "depthwise", "act")},
    }


def archive(data: bytes, *, name: str = "archive/data.pkl", compression: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as z:
        z.writestr(name, data)
        z.writestr("archive/version", "3\n")
    return out.getvalue()


def save(path: Path, content: object, protocol: int = 2) -> Path:
    path.write_bytes(archive(pickle.dumps(content, protocol)))
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "small.pkl"


# --- published checkpoints ----------------------------------------------------------------------------------


@needs_assets
@pytest.mark.parametrize("name", FACTS)
def test_published(name: str) -> None:
    start = time.perf_counter()
    graph = load_checkpoint(asset(name))
    assert time.perf_counter() - start < 1
    verify_graph(graph)
    n, weights, biases, trunk_macs, all_macs, additions, dead = FACTS[name]
    convs = [c for c in graph.find("conv2d") if c.layer != "classifier"]
    assert [c.name for c in convs] == [f"conv.{i}" for i in range(n)]
    assert sum(graph.values[c["weight"]].size for c in convs) == weights
    assert sum(graph.values[c["bias"]].size for c in convs) == biases
    assert sum(macs(graph)) == all_macs
    assert sum(macs(attach_head(graph, 1))[:-1]) == trunk_macs
    assert [a.layer for a in graph.find("add")] == [f"blocks.{b}.add" for b in additions]
    assert {i: len(c.attrs.dead) for i, c in enumerate(convs) if c.attrs.dead} == dead  # type: ignore[attr-defined]
    assert graph.values["input"].q == QParams(2 / 255, 0)
    assert graph.values["input"].shape == (128, 128, 3)
    assert graph.values["classifier.y"].shape == (1, 1, 1000)


@needs_assets
@pytest.mark.parametrize("name", FACTS)
def test_published_damaged(name: str, file: Path) -> None:
    data = asset(name).read_bytes()
    for cut in (0, 3, 4, 100, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:cut])
        with pytest.raises(UsageError, match=r"small\.pkl: "):
            load_checkpoint(file)
    file.write_bytes(data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :])
    with pytest.raises(UsageError, match="CRC"):
        load_checkpoint(file)


@needs_assets
def test_dead_channels_agree_with_vectors() -> None:
    assert ASSETS is not None
    folder = Path(ASSETS) / "vectors2"
    found = 0
    for entry in json.loads((folder / "conv.json").read_text()):
        with np.load(folder / entry["file"], allow_pickle=False) as z:
            w, b, scale, dead = canonicalize_dead(z["file_w"], z["file_b"], z["file_sw"])
            np.testing.assert_array_equal(w, z["w"])
            np.testing.assert_array_equal(b, z["b"])
            np.testing.assert_array_equal(scale, z["sw"])
            found += len(dead)
    assert found > 0


# --- structure ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_small(file: Path, protocol: int) -> None:
    content = checkpoint()
    graph = load(save(file, content, protocol))
    verify_graph(graph)
    assert graph.name == "small"
    assert [(n.name, n.layer) for n in graph.nodes] == [
        ("conv.0", "first_conv"),
        ("conv.1", "blocks.0.depthwise"),
        ("conv.2", "blocks.0.pointwise2"),
        ("conv.3", "blocks.1.pointwise1"),
        ("conv.4", "blocks.1.depthwise"),
        ("conv.5", "blocks.1.pointwise2"),
        ("add.1", "blocks.1.add"),
        ("pool", "pool"),
        ("classifier", "classifier"),
    ]
    masks = {n.name: n.attrs.activation for n in graph.find("conv2d")}  # type: ignore[attr-defined]
    assert masks == {f"conv.{i}": i not in (2, 5) for i in range(6)} | {"classifier": False}
    assert graph.node("conv.0").attrs == Conv2d((3, 3), (2, 2), (1, 1, 1, 1), clamp=(-128, 127), activation=True)
    assert graph.node("conv.4").attrs == Conv2d(
        (5, 5), pads=(2, 2, 2, 2), groups=12, clamp=(-128, 127), activation=True, depthwise=True
    )
    assert graph.node("add.1").inputs == ("conv.2.y", "conv.5.y")
    assert graph.node("add.1").attrs == Add((-128, 127))
    assert graph.node("pool").attrs == AvgPool((4, 4))
    assert graph.values["pool.y"].q == graph.values["add.1.y"].q == QParams(*SUM)
    weight = content["first_conv"]["params"]["weight"]
    np.testing.assert_array_equal(graph.data["conv.0.weight"], weight.transpose(0, 2, 3, 1))
    assert graph.data["conv.1.weight"].shape == (4, 3, 3, 1)
    assert all(graph.values[f"conv.3.{k}"].dtype == d for k, d in (("weight", "s8"), ("bias", "s32"), ("scale", "f32")))
    assert not graph.data["conv.3.weight"].flags.writeable


def test_numpy_scalars(file: Path) -> None:
    content = checkpoint()
    p = content["first_conv"]["params"]
    p["x_scale"], p["x_zero"] = np.float64(p["x_scale"]), np.int64(0)
    assert load(save(file, content)).values["input"].q == QParams(2 / 255, 0)


def test_dead_channel(file: Path) -> None:
    content = checkpoint()
    p = content["blocks"][1]["pointwise1"]["params"]
    p["w_scales"][3], p["bias"][3] = 1e-9, 2_000_000_000
    graph = load(save(file, content))
    largest = p["w_scales"].max()
    assert graph.node("conv.3").attrs.dead == (3,)  # type: ignore[attr-defined]
    assert not graph.data["conv.3.weight"][3].any()
    assert graph.data["conv.3.scale"][3] == largest
    assert graph.data["conv.3.bias"][3] == int(np.floor(2e9 * float(np.float32(1e-9)) / float(largest) + 0.5))


def test_dead_threshold() -> None:
    w, b = np.full((3, 1, 1, 2), 5, np.int8), np.array([10, -10, 10], np.int32)
    edge = np.float32(2.0**-16)
    scale = np.array([1, edge, np.nextafter(edge, np.float32(0))], np.float32)
    w2, b2, scale2, dead = canonicalize_dead(w, b, scale)
    assert dead == (2,)
    assert w2[:, 0, 0, 0].tolist() == [5, 5, 0]
    assert b2.tolist() == [10, -10, 0]
    assert scale2.tolist() == [1, edge, 1]
    assert w[2, 0, 0, 0] == 5  # the given arrays stay as they are


def test_limits_of_sums() -> None:
    check_sums("fc", np.array([1 << 30, -(1 << 30)], np.int32), 33_155)
    with pytest.raises(UnsupportedError, match=r"fc: a bias of 1073741825 .*2\^30"):
        check_sums("fc", np.array([-(1 << 30) - 1], np.int32), 1)
    with pytest.raises(UnsupportedError, match="fc: each output sums 33156 products, more than the 33155"):
        check_sums("fc", np.zeros(1, np.int32), 33_156)
    with pytest.raises(UnsupportedError, match="2147483648"):
        check_sums("fc", np.array([-(1 << 31)], np.int32), 1)


def test_attach_head(file: Path) -> None:
    graph = load(save(file, checkpoint()))
    head = attach_head(graph, 10)
    verify_graph(head)
    assert head.outputs == ("logits",)
    assert head.values["logits"].shape == (10,)
    assert head.values["head.weight"].shape == (10, 8)
    assert head.values["head.weight"].kind is Kind.STATE
    assert "head.weight" not in head.data
    assert head.data["head.bias"].tolist() == [0.0] * 10
    assert not [v for v in head.values if v.startswith("classifier")]
    assert head.nodes[:-1] == graph.nodes[:-1]
    assert attach_head(head, 3).values["head.weight"].shape == (3, 8)
    for classes in (0, 65_536, -1, True, 2.0):
        with pytest.raises(UsageError, match=r"head: .* classes; give a whole number from 1 to 65535"):
            attach_head(graph, classes)  # type: ignore[arg-type]
    assert attach_head(graph, 65_535).values["logits"].shape == (65_535,)


# --- rejected content ---------------------------------------------------------------------------------------


def at(*keys: str | int, value: object = None, drop: bool = False) -> Callable[[dict[str, Any]], None]:
    """A change of the checkpoint at a path of keys."""

    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        if drop:
            del content[keys[-1]]
            return
        content[keys[-1]] = value

    return change


PW1 = ("blocks", 1, "pointwise1")
P = (*PW1, "params")

REJECTED: list[tuple[Callable[[dict[str, Any]], None], str]] = [
    (at("blocks", value=[]), "blocks: a list of 1 to 512 blocks"),
    (at("blocks", value=None), "blocks: a list of 1 to 512 blocks is expected, not None"),
    (at("first_conv", value=3), "first_conv: a dict with .* not 3"),
    (at("classifier", drop=True), "checkpoint: field classifier is missing"),
    (at("extra", value=1), "checkpoint: unknown field 'extra'"),
    (at(*PW1, value=None), r"blocks\.1\.pointwise1: only the first block may lack it"),
    (at(*PW1, "in_channel", value=9), r"blocks\.1\.pointwise1: weight has shape"),
    (
        at(*PW1, "in_shape", value=5),
        r"blocks\.1\.pointwise1: it reads 5 x 5 pixels, but blocks\.0\.pointwise2 makes 4 x 4",
    ),
    (at(*PW1, "out_shape", value=5), r"blocks\.1\.pointwise1: its output is 4 x 4 pixels, not 5 x 5"),
    (at(*PW1, "stride", value=0), r"blocks\.1\.pointwise1: stride is a whole number"),
    (at(*PW1, "stride", value=True), r"blocks\.1\.pointwise1: stride is a whole number"),
    (at(*PW1, "groups", value=5), r"blocks\.1\.pointwise1: 5 groups do not divide 8 -> 12"),
    (at(*PW1, "kernel_size", value=3), r"blocks\.1\.pointwise1: kernel_size is a pair"),
    (at(*PW1, "depthwise", value=True), r"blocks\.1\.pointwise1: depthwise is True with 1 groups"),
    (at(*P, "weight", value=[1, 2]), r"blocks\.1\.pointwise1: weight is a numpy array, not list"),
    (at(*P, "weight", value=np.zeros((12, 8, 1, 1), np.int32)), r"blocks\.1\.pointwise1: weight is int8, not int32"),
    (at(*P, "weight", value=np.full((12, 8, 1, 1), -128, np.int8)), r"pointwise1: weights lie within -127\.\.127"),
    (at(*P, "bias", value=np.zeros(11, np.int32)), r"blocks\.1\.pointwise1: bias has shape \(12,\), not \(11,\)"),
    (at(*P, "w_scales", value=np.zeros(12, np.float32)), r"blocks\.1\.pointwise1: w_scales are finite and above 0"),
    (at(*P, "w_scales", value=np.full(12, np.nan, np.float32)), r"pointwise1: w_scales are finite"),
    (
        at(*P, "x_scale", value=0.051),
        r"pointwise1: x_scale and x_zero are \(0\.051, 3\), but blocks\.0\.pointwise2 makes",
    ),
    (at(*P, "x_zero", value=4), r"blocks\.1\.pointwise1: x_scale and x_zero"),
    (at(*P, "y_zero", value=128), r"blocks\.1\.pointwise1: y_zero is a whole number from -128 to 127, not 128"),
    (at(*P, "y_zero", value=-127), r"blocks\.1\.pointwise1: y_zero is -127; a layer with an activation has -128"),
    (at(*P, "y_scale", value=float("inf")), r"blocks\.1\.pointwise1: y_scale is a finite number above 0, not inf"),
    (at(*P, "y_scale", value=-1.0), r"blocks\.1\.pointwise1: y_scale is a finite number"),
    (at(*P, "y_scale", value=1), r"blocks\.1\.pointwise1: y_scale is a finite number"),
    (at("blocks", 1, "residual", "in_channel", value=4), r"blocks\.1\.add: it adds 4 x 4 x 4"),
    (at("blocks", 1, "residual", "params", "x_zero", value=4), r"blocks\.1\.add: x_scale and x_zero are \(0\.05, 4\)"),
    (at("blocks", 1, "residual", "params", "y_scale", value=1e-20), r"blocks\.1\.add: its scales ask for"),
    (at("classifier", "params", "x_zero", value=0), "classifier: x_scale and x_zero are .* but pool makes"),
    (at("classifier", "stride", value=2), "classifier: it is a plain 1x1 convolution"),
    (at("blocks", 1, "depthwise", "groups", value=6), r"blocks\.1\.depthwise: weight has shape"),
]


@pytest.mark.parametrize(("change", "message"), REJECTED)
def test_rejected(file: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    content = checkpoint()
    change(content)
    with pytest.raises(UsageError, match=message) as caught:
        load(save(file, content))
    assert str(caught.value).startswith(f"{file}: ")


UNSUPPORTED = [
    (at("blocks", 0, "se", value={}), r"blocks\.0\.se: it has squeeze-and-excitation"),
    (at("feature_mix", value={}), "feature_mix: it has a feature mixing layer"),
    (at(*PW1, "act", value="relu"), r"blocks\.1\.pointwise1: it has an explicit activation"),
    (at(*P, "bias", value=np.full(12, (1 << 30) + 1, np.int32)), r"blocks\.1\.pointwise1: a bias of 1073741825"),
]


@pytest.mark.parametrize(("change", "message"), UNSUPPORTED)
def test_unsupported(file: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    content = checkpoint()
    change(content)
    with pytest.raises(UnsupportedError, match=message):
        load(save(file, content))


# --- files that are none of ours ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data", "error", "message"),
    [
        ("a.tflite", b"", UnsupportedError, "TFLite model, which no front end reads"),
        ("a.bin", b"\0\0\0\0TFL3", UnsupportedError, "TFLite model"),
        ("a.onnx", b"", UnsupportedError, "ONNX"),
        ("a.txt", b"hello", UnsupportedError, "unknown type"),
        ("a.pkl", b"", UsageError, "no zip archive"),
        ("a.pkl", pickle.dumps({}), UsageError, "no zip archive"),
        ("a.bin", b"PK\x03\x04", UsageError, "damaged or truncated"),
        ("a.pkl", archive(b"", name="data.pkl"), UsageError, "has one NAME/data.pkl, this one has 0"),
        ("a.pkl", archive(bytes(10_000), compression=zipfile.ZIP_DEFLATED), UsageError, "is compressed"),
        ("a.pkl", archive(b""), UsageError, "ends in the middle"),
        ("a.pkl", archive(pickle.dumps([1])), UsageError, "checkpoint: a dict with first_conv, .*, not list"),
    ],
)
def test_foreign(tmp_path: Path, name: str, data: bytes, error: type[TrainletError], message: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(error, match=message) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        load(tmp_path / "none.pkl")
    with pytest.raises(UsageError, match="cannot be read"):
        load_checkpoint(tmp_path / "none.pkl")
    with pytest.raises(UsageError, match="is a folder"):
        load(tmp_path)


def test_too_large(file: Path) -> None:
    with file.open("wb") as f:
        f.truncate((32 << 20) + 1)
    with pytest.raises(UsageError, match="more than 32 MiB"):
        load_checkpoint(file)


# --- fuzzing ----------------------------------------------------------------------------------------------


SMALL = pickle.dumps(checkpoint(), 2)
EDITS = st.lists(
    st.tuples(st.integers(0, len(SMALL) - 1), st.sampled_from(["set", "cut", "insert", "end"]), st.binary(max_size=6)),
    min_size=1,
    max_size=8,
)


def edited(data: bytes, edits: list[tuple[int, str, bytes]]) -> bytes:
    for where, how, new in edits:
        rest = {"set": where + len(new), "cut": where + 1 + len(new), "insert": where, "end": len(data)}[how]
        data = data[:where] + (b"" if how in ("cut", "end") else new) + data[rest:]
    return data


def loads_or_says_why(file: Path, data: bytes) -> None:
    """Either a sound graph or an error that names the file; anything else fails the test."""
    file.write_bytes(data)
    said = f"{file}: "
    try:
        verify_graph(load_checkpoint(file))
    except (UsageError, UnsupportedError) as e:
        said = str(e)
    assert said.startswith(f"{file}: ")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=EDITS)
def test_edited_pickles_raise_nothing_else(file: Path, edits: list[tuple[int, str, bytes]]) -> None:
    data = archive(edited(SMALL, edits))
    tracemalloc.start()
    try:
        loads_or_says_why(file, data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=EDITS)
def test_edited_archives_raise_nothing_else(file: Path, edits: list[tuple[int, str, bytes]]) -> None:
    data = archive(SMALL)
    near_end = [(len(data) - 1 - where % 300, how, new) for where, how, new in edits]
    loads_or_says_why(file, edited(data, near_end))
