# SPDX-License-Identifier: Apache-2.0
"""Small hand-built graphs that several tests share. All have the same five layers:

input (8, 8, 3) - stem: 3x3 stride 2, activation - depthwise: 3x3, activation - project: 1x1 - add (stem + project)
- global pool - dense head of 4 classes.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from trainlet.ir import Array, Attrs, Graph, GraphBuilder, Kind, Node, Operands, QParams, Stage, Value
from trainlet.ops import (
    Add,
    AvgPool,
    CheckLr,
    Conv2d,
    Conv2dDb,
    Conv2dDw,
    EnterGrad,
    Mask,
    SelectChannels,
    SgdBias,
    SgdWeight,
    conv_out_hw,
    is_depthwise,
)

CLASSES = 4
STEM = Conv2d((3, 3), (2, 2), (0, 1, 0, 1), clamp=(0.0, 6.0), activation=True)
DEPTHWISE = Conv2d((3, 3), pads=(1, 1, 1, 1), groups=6, clamp=(0.0, 6.0), activation=True, depthwise=True)
PROJECT = Conv2d((1, 1))


def _integer(conv: Conv2d) -> Conv2d:
    """The same convolution over integers: an activation keeps what lies strictly above the zero point, -128."""
    clamp = (-128, 127)
    return replace(conv, clamp=clamp)


class ChainBuilder:
    """Adds model layers to a graph with random weights; ``integer`` chooses INT8 over FLOAT."""

    def __init__(self, name: str, integer: bool, seed: int = 0, shape: tuple[int, int, int] = (8, 8, 3)) -> None:
        self.g = GraphBuilder(name)
        self.rng = np.random.default_rng(seed)
        self.integer = integer
        q = QParams(1 / 64, -3) if integer else None
        self.input = self.g.add(Value("input", shape, self.dtype, Kind.INPUT, q))

    @property
    def dtype(self) -> str:
        """Of activations."""
        return "s8" if self.integer else "f32"

    def _q(self, zero: int) -> QParams | None:
        return QParams(float(self.rng.uniform(0.02, 0.05)), zero) if self.integer else None

    def conv(self, name: str, layer: str, x: str, conv: Conv2d, out_c: int) -> str:
        """A convolution with its constants ``name``.weight, .bias (and .scale); returns its output."""
        h, w, c = self.g.values[x].shape
        shape = (out_c, *conv.kernel, c // conv.groups)
        k = math.prod(shape[1:])
        assert conv.depthwise == is_depthwise(conv.groups, c, out_c)
        ins = {"x": x}
        if self.integer:
            weight = self.rng.integers(-127, 128, shape).astype(np.int8)
            ins["weight"] = self.g.const(f"{name}.weight", weight, "s8")
            bias = self.rng.integers(-2000, 2000, out_c).astype(np.int32)
            ins["bias"] = self.g.const(f"{name}.bias", bias, "s32")
            scale = (self.rng.uniform(0.5, 1.5, out_c) / (60 * math.sqrt(k))).astype(np.float32)
            ins["scale"] = self.g.const(f"{name}.scale", scale, "f32")
        else:
            ins["weight"] = self.g.const(f"{name}.weight", _normal(self.rng, shape, 1 / math.sqrt(k)), "f32")
            ins["bias"] = self.g.const(f"{name}.bias", _normal(self.rng, (out_c,), 0.1), "f32")
        oh, ow = conv_out_hw(conv, h, w)
        y = Value(f"{name}.y", (oh, ow, out_c), self.dtype, q=self._q(-128 if conv.activation else 5))
        attrs = _integer(conv) if self.integer else conv
        return self.g.emit(Node("conv2d", name, layer, Operands(**ins), (y.name,), attrs), y)

    def add(self, name: str, a: str, b: str) -> str:
        """A residual addition."""
        y = Value(f"{name}.y", self.g.values[a].shape, self.dtype, q=self._q(2))
        attrs = Add((-128, 127)) if self.integer else Add()
        return self.g.emit(Node("add", name, name, Operands(a=a, b=b), (y.name,), attrs), y)

    def pool(self, name: str, x: str) -> str:
        """A global average pool."""
        h, w, c = self.g.values[x].shape
        y = Value(f"{name}.y", (1, 1, c), self.dtype, q=self.g.values[x].q)
        return self.g.emit(Node("avg_pool", name, name, Operands(x=x), (y.name,), AvgPool((h, w))), y)

    def head(self, name: str, x: str, classes: int = CLASSES, kind: Kind = Kind.CONST) -> str:
        """The dense head; its weights are states where it is trained."""
        c = self.g.values[x].size
        weight = _normal(self.rng, (classes, c), 1 / math.sqrt(c))
        w = self.g.add(Value(f"{name}.weight", weight.shape, "f32", kind), weight)
        b = self.g.add(Value(f"{name}.bias", (classes,), "f32", kind), np.zeros(classes, np.float32))
        logits = Value("logits", (classes,), "f32")
        return self.g.emit(Node("dense", name, name, Operands(x=x, weight=w, bias=b), ("logits",), Attrs()), logits)

    def body(self) -> str:
        """Everything before the head; returns the pooled tensor."""
        stem = self.conv("conv.0", "stem", self.input, STEM, 6)
        depthwise = self.conv("conv.1", "block.depthwise", stem, DEPTHWISE, 6)
        project = self.conv("conv.2", "block.project", depthwise, PROJECT, 6)
        return self.pool("pool", self.add("add.0", stem, project))


def _normal(rng: np.random.Generator, shape: tuple[int, ...], sigma: float) -> Array:
    return (rng.standard_normal(shape) * sigma).astype(np.float32)


def float_chain(seed: int = 0) -> Graph:
    """The chain in real numbers, stage FLOAT."""
    c = ChainBuilder("float_chain", integer=False, seed=seed)
    return c.g.build(Stage.FLOAT, [c.head("head", c.body())])


def int8_chain(seed: int = 0) -> Graph:
    """The chain in integers, stage INT8."""
    c = ChainBuilder("int8_chain", integer=True, seed=seed)
    return c.g.build(Stage.INT8, [c.head("head", c.body())])


def named(text: str) -> Operands:
    """Operands from text such as ``x=input further=a,b``."""
    pairs = (word.split("=") for word in text.split())
    return Operands(**{k: tuple(v.split(",")) for k, v in pairs})


def train_tail() -> Graph:
    """A TRAIN graph written by hand: one 1x1 convolution over (2, 2, 4), pool and head. Trained are the head, biases
    and input channels 1 and 3 of the weights, with 4 fraction bits."""
    c = ChainBuilder("train_tail", integer=True, shape=(2, 2, 4))
    g = c.g
    x = c.input
    y = c.conv("conv.0", "tail", x, Conv2d((1, 1), clamp=(0.0, 6.0), activation=True), 5)
    conv = g.nodes.pop()
    attrs = conv.attrs
    assert isinstance(attrs, Conv2d)
    channels = np.array([1, 3], np.uint16)
    g.const("conv.0.channels", channels, "u16")
    compact = np.ascontiguousarray(g.data["conv.0.weight"][..., channels])
    g.add(Value("conv.0.trained", compact.shape, "s8", Kind.STATE), compact)
    g.add(Value("conv.0.fraction", compact.shape, "s4", Kind.STATE), np.zeros_like(compact))
    g.values["conv.0.bias"] = Value("conv.0.bias", (5,), "s32", Kind.STATE)
    g.add(Value("lr", (1,), "f32", Kind.INPUT))
    g.add(Value("label", (1,), "s32", Kind.INPUT))

    def emit(op: str, name: str, read: str, attrs: Attrs, *outs: Value, stores: str = "") -> None:
        node = Node(op, name, "tail", named(read), tuple(v.name for v in outs), attrs, named(stores))
        g.emit(node, *outs)

    emit("check_lr", "check", "lr=lr", CheckLr(8.0))
    g.nodes.append(replace(conv.reading(trained="conv.0.trained", channels="conv.0.channels"), layer="tail"))
    emit("clip_mask", "mask", f"x={y}", Mask((-128, 127)), Value("bits", (2, 2, 5), "b1"))
    emit(
        "select_channels",
        "keep",
        "x=input channels=conv.0.channels",
        SelectChannels(1),
        Value("x.kept", (2, 2, 2), "s8"),
    )
    c.head("head", c.pool("pool", y), kind=Kind.STATE)
    emit(
        "softmax_xent",
        "loss",
        "logits=logits label=label",
        Attrs(),
        Value("loss.y", (1,), "f32"),
        Value("g", (CLASSES,), "f32"),
    )
    emit("dense_dx", "head.dx", "g=g weight=head.weight", Attrs(), Value("gf", (5,), "f32"))
    emit(
        "enter_grad",
        "pool.enter",
        "g=gf",
        EnterGrad((2, 2, 5), 0.25, 64, "s8"),
        Value("r", (1, 1, 5), "s8", exponent=0),
    )
    masked = Value("r.masked", (2, 2, 5), "s8", exponent=0)
    emit("mask_grad", "r.mask", "g=r mask=bits", Mask((-128, 127), "bits"), masked)
    emit("dense_sgd", "head.sgd", "g=g x=pool.y lr=lr", Attrs(), stores="weight=head.weight bias=head.bias")
    dw = Conv2dDw(attrs, 2, (2, 2, 4))
    emit(
        "conv2d_dw",
        "conv.0.dw",
        "g=r.masked x=x.kept channels=conv.0.channels",
        dw,
        Value("dw", (5, 1, 1, 2), "s32", exponent=0),
    )
    sgd = SgdWeight(site=32, fraction_bits=4, x_scale=1 / 64, pixels=4, conv=attrs, shape=(2, 2, 4))
    read, stores = "dw=dw lr=lr scale=conv.0.scale channels=conv.0.channels", "weight=conv.0.trained"
    emit("sgd_weight", "conv.0.sgd", read, sgd, stores=f"{stores} fraction=conv.0.fraction")
    emit("conv2d_db", "conv.0.db", "g=r.masked", Conv2dDb(4), Value("db", (5,), "s32", exponent=0))
    emit(
        "sgd_bias",
        "conv.0.sgd_bias",
        "db=db lr=lr scale=conv.0.scale",
        SgdBias(33, 1 / 64, 4, attrs),
        stores="bias=conv.0.bias",
    )
    return g.build(Stage.TRAIN, ["logits"], targets=("label",), rate="lr", losses=("loss.y",))


def same(a: Graph, b: Graph) -> bool:
    """Whether two graphs are equal, data and order of values included."""
    head = (a.name, a.stage, a.interface, a.nodes) == (b.name, b.stage, b.interface, b.nodes)
    values = list(a.values.items()) == list(b.values.items())
    data = a.data.keys() == b.data.keys() and all(
        a.data[k].dtype == b.data[k].dtype and np.array_equal(a.data[k], b.data[k]) for k in a.data
    )
    return head and values and data
