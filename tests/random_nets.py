# SPDX-License-Identifier: Apache-2.0
"""Small integer models and schemes, drawn by hypothesis or written by hand, that go through every operator and every
way in which gradients meet."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
from hypothesis import strategies as st

from trainlet.autodiff.scheme import UpdateScheme
from trainlet.frontends import attach_head
from trainlet.ir import Attrs, Graph, GraphBuilder, Kind, Node, Operands, QParams, Stage, Value
from trainlet.ops import Add, AvgPool, Conv2d, MaxPool, conv_out_hw, is_depthwise
from trainlet.ops.quantization import canonicalize_dead

PLAIN = ("-O1",)
NATIVE = ("-O1", "-march=native")
Pads = tuple[int, int, int, int]
NO_PADS: Pads = (0, 0, 0, 0)


@dataclass(frozen=True)
class Case:
    """A model with its head, what trains, and the run: seed, learning rates (one per step, in turn), compiler flags.
    ``rho`` and ``head_bias`` are what the state starts with, in turn."""

    model: Graph
    scheme: UpdateScheme
    seed: int = 17
    lrs: tuple[float, ...] = (0.01,)
    flags: tuple[str, ...] = PLAIN
    rho: tuple[int, ...] = (4,)
    head_bias: tuple[float, ...] = (0.0,)

    @property
    def classes(self) -> int:
        return self.model.values["logits"].size

    def __repr__(self) -> str:
        text = f"{self.model.interface}\n" + "\n".join(
            f"  {n.name}: {n.op} {n.inputs[:2]} -> {self.model.values[n.outputs[0]].shape} {n.attrs}"
            for n in self.model.nodes
        )
        run = f"seed={self.seed}, lrs={self.lrs}, flags={self.flags}, rho={self.rho}, head_bias={self.head_bias}"
        return f"Case({text}\n  {self.scheme}, {run})"


class Net:
    """Builds one model. Data comes from ``seed``; ``wild`` spreads the scales of weights over several powers of two."""

    def __init__(self, shape: tuple[int, int, int], seed: int = 0, wild: bool = False, name: str = "net") -> None:
        self.g = GraphBuilder(name)
        self.rng = np.random.default_rng(seed)
        self.wild = wild
        zero = int(self.rng.integers(-128, 128))
        self.input = self.g.add(Value("input", shape, "s8", Kind.INPUT, QParams(1 / 64, zero)))
        self.layers: list[str] = []
        self._count = 0

    def shape(self, x: str) -> tuple[int, int, int]:
        h, w, c = self.g.values[x].shape
        return h, w, c

    def _name(self, what: str) -> str:
        self._count += 1
        return f"{what}.{self._count - 1}"

    def _q(self, activation: bool) -> QParams:
        zero = -128 if activation else int(self.rng.integers(-30, 30))
        return QParams(float(self.rng.uniform(0.02, 0.05)), zero)

    def _clamp(self, activation: bool, tight: bool) -> tuple[int, int]:
        if not tight:
            return -128, 127
        return (-128, int(self.rng.integers(-40, 100))) if activation else (-90, 100)

    def conv(
        self,
        x: str,
        out_c: int,
        kernel: tuple[int, int] = (1, 1),
        *,
        stride: tuple[int, int] = (1, 1),
        dilation: tuple[int, int] = (1, 1),
        pads: Pads = NO_PADS,
        groups: int = 1,
        activation: bool = False,
        tight: bool = False,
        dead: int = 0,
        huge_bias: bool = False,
    ) -> str:
        """A convolution; ``dead`` of its channels have no usable scale. Padding grows where the kernel does not fit."""
        h, w, c = self.shape(x)
        need = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
        short = (max(0, need[0] - h - pads[0] - pads[1]), max(0, need[1] - w - pads[2] - pads[3]))
        pads = (pads[0] + short[0], pads[1], pads[2], pads[3] + short[1])
        name = self._name("conv")
        shape = (out_c, *kernel, c // groups)
        k = math.prod(shape[1:])
        x_q, y_q = self.g.values[x].q, self._q(activation)
        assert x_q is not None
        scale = 0.01 / math.sqrt(k) * y_q.scale / x_q.scale * self.rng.uniform(0.5, 1.5, out_c)
        if self.wild:
            scale *= 2.0 ** self.rng.uniform(-5, 10, out_c)
        if dead and out_c > 1:
            scale[self.rng.permutation(out_c)[: min(dead, out_c - 1)]] *= 1e-9
        weight = self.rng.integers(-127, 128, shape).astype(np.int8)
        bias = self.rng.integers(-5000, 5000, out_c).astype(np.int32)
        if huge_bias:
            bias[self.rng.integers(out_c)] = (1 << 30) - int(self.rng.integers(0, 2))
            bias[self.rng.integers(out_c)] = -(1 << 30)
        weight, bias, scales, gone = canonicalize_dead(weight, bias, scale.astype(np.float32))
        ins = Operands(
            x=x,
            weight=self.g.const(f"{name}.weight", weight, "s8"),
            bias=self.g.const(f"{name}.bias", bias, "s32"),
            scale=self.g.const(f"{name}.scale", scales, "f32"),
        )
        attrs = Conv2d(kernel, stride, pads, dilation, groups, self._clamp(activation, tight), activation,
                       is_depthwise(groups, c, out_c), gone)  # fmt: skip
        y = Value(f"{name}.y", (*conv_out_hw(attrs, h, w), out_c), "s8", q=y_q)
        self.layers.append(f"layer.{name}")
        return self.g.emit(Node("conv2d", name, f"layer.{name}", ins, (y.name,), attrs), y)

    def same(
        self, x: str, kernel: int = 3, *, depthwise: bool = False, activation: bool = False, tight: bool = False
    ) -> str:
        """A convolution that keeps the shape."""
        c = self.shape(x)[2]
        pads = ((kernel - 1) // 2, kernel // 2, kernel // 2, (kernel - 1) // 2)
        groups = c if depthwise else 1
        return self.conv(x, c, (kernel, kernel), pads=pads, groups=groups, activation=activation, tight=tight)

    def add(self, a: str, b: str, *, activation: bool = False, tight: bool = False) -> str:
        """A residual addition."""
        name = self._name("add")
        y = Value(f"{name}.y", self.shape(a), "s8", q=self._q(activation))
        attrs = Add(self._clamp(activation, tight), activation)
        return self.g.emit(Node("add", name, name, Operands(a=a, b=b), (y.name,), attrs), y)

    def pool(self, x: str, kernel: tuple[int, int], stride: tuple[int, int] = (1, 1), pads: Pads = NO_PADS) -> str:
        """An average pool."""
        h, w, c = self.shape(x)
        name = self._name("pool")
        hw = conv_out_hw(Conv2d(kernel, stride, pads), h, w)
        y = Value(f"{name}.y", (*hw, c), "s8", q=self.g.values[x].q)
        return self.g.emit(Node("avg_pool", name, name, Operands(x=x), (y.name,), AvgPool(kernel, stride, pads)), y)

    def max_pool(self, x: str, kernel: tuple[int, int], stride: tuple[int, int] = (1, 1), pads: Pads = NO_PADS) -> str:
        """A maximum pool."""
        h, w, c = self.shape(x)
        name = self._name("max_pool")
        hw = conv_out_hw(Conv2d(kernel, stride, pads), h, w)
        y = Value(f"{name}.y", (*hw, c), "s8", q=self.g.values[x].q)
        return self.g.emit(Node("max_pool", name, name, Operands(x=x), (y.name,), MaxPool(kernel, stride, pads)), y)

    def finish(self, x: str, classes: int) -> Graph:
        """Global pool and head."""
        h, w, _ = self.shape(x)
        pooled = self.pool(x, (h, w))
        return attach_head(self.g.build(Stage.INT8, [pooled]), classes)


def flattened(net: Net, x: str, classes: int) -> Graph:
    """A head that reads the map ``x`` itself; no pool."""
    weight = net.g.add(
        Value("head.weight", (classes, net.g.values[x].size), "f32", Kind.STATE, fan_in=net.g.values[x].size)
    )
    bias = net.g.add(Value("head.bias", (classes,), "f32", Kind.STATE), np.zeros(classes, np.float32))
    head = Node("dense", "head", "head", Operands(x=x, weight=weight, bias=bias), ("logits",), Attrs())
    return net.g.build(Stage.INT8, [net.g.emit(head, Value("logits", (classes,), "f32"))])


def full(net: Net, bits: int = 8, ratio: float = 1.0, layers: list[str] | None = None) -> UpdateScheme:
    """Everything trains, of weights the share ``ratio``."""
    names = net.layers if layers is None else layers
    return UpdateScheme("full", tuple(names), dict.fromkeys(names, ratio), bits)


# --- drawn --------------------------------------------------------------------------------------------------

_EDGES = (1, 3, 5, 7)


@st.composite
def _conv(draw: st.DrawFn, net: Net, x: str) -> str:
    c = net.shape(x)[2]
    kind = draw(st.sampled_from(("general", "depthwise", "grouped")))
    out_c, groups = draw(st.sampled_from((1, 2, 3, 6, 16, 17, 33))), 1
    if kind == "depthwise":
        out_c = groups = c
    if kind == "grouped":
        groups = draw(st.sampled_from([g for g in range(1, c + 1) if c % g == 0]))
        out_c = groups * draw(st.integers(1, 3))
    two = st.tuples
    return net.conv(
        x,
        out_c,
        draw(two(*[st.sampled_from((1, 2, 3, 5))] * 2)),
        stride=draw(two(*[st.integers(1, 3)] * 2)),
        dilation=draw(two(*[st.integers(1, 2)] * 2)),
        pads=draw(two(*[st.integers(0, 2)] * 4)),
        groups=groups,
        activation=draw(st.booleans()),
        tight=draw(st.booleans()),
        dead=draw(st.sampled_from((0, 0, 0, 1, 2))),
        huge_bias=draw(st.sampled_from((False, False, False, True))),
    )


@st.composite
def _residual(draw: st.DrawFn, net: Net, x: str) -> str:
    y = net.same(x, draw(st.sampled_from((1, 2, 3))), depthwise=draw(st.booleans()), activation=draw(st.booleans()))
    pair = draw(st.permutations((x, y)))
    return net.add(*pair, activation=draw(st.booleans()), tight=draw(st.booleans()))


@st.composite
def _add_first(draw: st.DrawFn, net: Net, x: str) -> str:
    """``a`` is read first by an addition and then by a convolution."""
    a = net.same(x, 3, depthwise=draw(st.booleans()), activation=draw(st.booleans()), tight=draw(st.booleans()))
    b = net.same(x, 1)
    s = net.add(a, b, activation=draw(st.booleans()))
    return net.add(net.same(a, 1, activation=draw(st.booleans())), s)


@st.composite
def _shared(draw: st.DrawFn, net: Net, x: str) -> str:
    """``x`` is read by two convolutions and, where drawn, by an addition in between."""
    a = net.same(x, 3, activation=draw(st.booleans()))
    if draw(st.booleans()):
        a = net.add(a, x, activation=draw(st.booleans()))
    return net.add(a, net.same(x, draw(st.sampled_from((1, 2))), depthwise=draw(st.booleans())))


@st.composite
def _max_pool(draw: st.DrawFn, net: Net, x: str) -> str:
    """Windows apart, side by side, or overlapping; padding that is smaller than the window."""
    h, w, _ = net.shape(x)
    kernel = (draw(st.integers(1, min(3, h))), draw(st.integers(1, min(3, w))))
    top, left = (draw(st.integers(0, k - 1)) for k in kernel)
    bottom, right = (draw(st.integers(0, k - 1)) for k in kernel)
    return net.max_pool(x, kernel, draw(st.tuples(*[st.integers(1, 4)] * 2)), (top, bottom, left, right))


_BLOCKS = (_conv, _conv, _residual, _add_first, _shared, _max_pool)
_LRS = (0.0, 1e-38, 1e-30, 1e-9, 1e-3, 0.02, 0.5, 30.0, 1e4, 1e30)
_RHO = (-60, -59, -30, -6, 0, 4, 4, 12, 30, 59, 60)
_HEAD_BIAS = (0.0, 0.0, 0.0, -35.0, -41.5, -42.0, -55.0, -69.0, -75.0, -79.5, -80.5)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A random model of 1 to 4 blocks with a random scheme."""
    shape = draw(st.tuples(st.sampled_from(_EDGES), st.sampled_from(_EDGES), st.integers(1, 4)))
    net = Net(shape, draw(st.integers(0, 2**16)), wild=draw(st.booleans()))
    x = draw(_conv(net, net.input))
    for _ in range(draw(st.integers(0, 3))):
        x = draw(draw(st.sampled_from(_BLOCKS))(net, x))
    model = draw(st.sampled_from((net.finish, partial(flattened, net))))(x, draw(st.sampled_from((1, 2, 3, 10, 100))))
    scheme = draw(_schemes(net))
    lrs = tuple(float(np.float32(v)) for v in draw(st.lists(st.sampled_from(_LRS), min_size=1, max_size=5)))
    rho = draw(st.just((4,)) | st.lists(st.sampled_from(_RHO), min_size=1, max_size=5).map(tuple))
    bias = draw(st.just((0.0,)) | st.lists(st.sampled_from(_HEAD_BIAS), min_size=2, max_size=5).map(tuple))
    flags = draw(st.sampled_from((PLAIN, NATIVE)))
    return Case(model, scheme, draw(st.integers(0, 2**32 - 1)), lrs, flags, rho, bias)


@st.composite
def _schemes(draw: st.DrawFn, net: Net) -> UpdateScheme:
    every = draw(st.booleans())
    biases, weights = [], {}
    for layer in net.layers:
        if every or draw(st.booleans()):
            biases.append(layer)
        weight = net.g.data[f"{layer.removeprefix('layer.')}.weight"]
        conv = next(n.attrs for n in net.g.nodes if n.layer == layer)
        assert isinstance(conv, Conv2d)
        channels = weight.shape[0 if conv.depthwise else 3]
        if every or draw(st.booleans()):
            weights[layer] = draw(st.integers(1, channels)) / channels
    return UpdateScheme("drawn", tuple(biases), weights, draw(st.sampled_from((8, 12, 16))))


# --- by hand ------------------------------------------------------------------------------------------------


def _add_with_activation() -> tuple[Net, Graph]:
    net = Net((5, 5, 3), 1)
    x = net.conv(net.input, 6, (3, 3), pads=(1, 1, 1, 1), activation=True)
    return net, net.finish(net.add(x, net.same(x), activation=True, tight=True), 4)


def _add_is_first() -> tuple[Net, Graph]:
    net = Net((5, 7, 3), 2)
    x = net.conv(net.input, 5, (3, 3), activation=True)
    a = net.same(x, 3, activation=True)
    s = net.add(a, x)
    return net, net.finish(net.add(net.same(a, 1), s), 3)


def _shared_later() -> tuple[Net, Graph]:
    net = Net((7, 5, 2), 3)
    x = net.conv(net.input, 18, (2, 2), activation=True)
    a = net.same(x, 3, depthwise=True)
    b = net.same(x, 1)
    s = net.add(net.add(a, b), x)
    return net, net.finish(net.add(s, net.same(x, 2)), 5)


def _activation_before_pool() -> tuple[Net, Graph]:
    net = Net((7, 7, 3), 4)
    x = net.conv(net.input, 9, (5, 3), stride=(2, 1), pads=(2, 0, 1, 2))
    return net, net.finish(net.same(x, 3, activation=True, tight=True), 6)


def _dead_channels() -> tuple[Net, Graph]:
    net = Net((5, 5, 4), 5, wild=True)
    x = net.conv(net.input, 12, (3, 3), groups=2, pads=(1, 1, 1, 1), dead=4, activation=True)
    x = net.conv(x, 12, (3, 3), groups=12, pads=(1, 1, 1, 1), dead=2)
    return net, net.finish(net.conv(x, 8, dead=3), 4)


def _dilated_groups() -> tuple[Net, Graph]:
    net = Net((7, 7, 6), 6)
    x = net.conv(net.input, 9, (3, 2), groups=3, dilation=(2, 2), pads=(0, 2, 2, 1), activation=True)
    return net, net.finish(net.conv(x, 20, (2, 3), stride=(3, 2), pads=(1, 0, 0, 2)), 100)


def _one_pixel() -> tuple[Net, Graph]:
    net = Net((1, 1, 1), 7)
    x = net.conv(net.input, 1, activation=True)
    return net, net.finish(net.conv(x, 1), 2)


def _one_class() -> tuple[Net, Graph]:
    net = Net((3, 3, 2), 8)
    return net, net.finish(net.conv(net.input, 4, (3, 3), pads=(1, 1, 1, 1)), 1)


def _pool_in_prefix() -> tuple[Net, Graph]:
    net = Net((7, 7, 3), 9)
    x = net.conv(net.input, 6, (3, 3), activation=True)
    x = net.pool(x, (3, 3), (2, 2), (1, 1, 1, 1))
    x = net.same(x, 3, depthwise=True, activation=True)
    net.layers = net.layers[1:]  # nothing before the pool can train
    return net, net.finish(net.add(net.same(x, 1), x), 4)


def _wide() -> tuple[Net, Graph]:
    """Sums of 130 x 9 products reach an input (b = 6), more than 256 pixels, and several blocks of lanes."""
    net = Net((19, 15, 2), 11)
    x = net.conv(net.input, 33, (3, 3), pads=(1, 1, 1, 1), activation=True)
    x = net.conv(x, 33, (3, 3), stride=(3, 2), dilation=(2, 2), pads=(2, 2, 2, 2), groups=33, activation=True)
    x = net.conv(x, 130, (3, 3), stride=(2, 2), pads=(1, 1, 1, 1))
    return net, net.finish(net.conv(x, 17), 3)


def _strided_depthwise() -> tuple[Net, Graph]:
    """Kernels longer than the eight rows that a kernel takes at once; strides beyond the dilation."""
    net = Net((13, 11, 17), 12, wild=True)
    x = net.conv(net.input, 17, (11, 9), groups=17, stride=(2, 3), pads=(5, 5, 4, 4), activation=True)
    x = net.conv(x, 17, (3, 3), groups=17, stride=(3, 2), dilation=(2, 3), pads=(2, 1, 3, 3))
    return net, net.finish(net.conv(x, 17, (2, 2), groups=17, stride=(1, 1), pads=(1, 0, 0, 1)), 3)


def _twice() -> tuple[Net, Graph]:
    """Both inputs of an addition are the same tensor."""
    net = Net((3, 5, 3), 10)
    x = net.conv(net.input, 5, (3, 3), pads=(1, 1, 1, 1), activation=True)
    return net, net.finish(net.add(x, x), 3)


def _flattened() -> tuple[Net, Graph]:
    """No pool: the gradient enters at the head, over a map with an activation."""
    net = Net((5, 7, 3), 13)
    x = net.conv(net.input, 6, (3, 3), activation=True)
    return net, flattened(net, net.same(x, 3, depthwise=True, activation=True, tight=True), 4)


def _flattened_sum() -> tuple[Net, Graph]:
    """The map that the head reads is an addition's, and the addition's input is read twice."""
    net = Net((5, 5, 2), 14)
    x = net.conv(net.input, 17, (2, 2), activation=True)
    return net, flattened(net, net.add(net.same(x), x, activation=True), 3)


def _max_pools() -> tuple[Net, Graph]:
    """Windows that overlap, with an activation before them and another reader; then windows side by side, whose
    gradient is one vector for all pixels."""
    net = Net((9, 11, 3), 15)
    x = net.conv(net.input, 6, (3, 3), activation=True)
    y = net.max_pool(x, (3, 3), (1, 2), (1, 1, 0, 2))
    z = net.conv(x, 6, (1, 1), stride=(1, 2))
    h = net.shape(z)[0]
    y = net.add(net.same(y, 1), z) if net.shape(y) == net.shape(z) else net.conv(y, 6, (h, 1))
    y = net.same(y, 1, activation=True)
    return net, net.finish(net.max_pool(y, (2, 2), (2, 3)), 4)


NAMED = {
    f.__name__.removeprefix("_"): f
    for f in (_add_with_activation, _add_is_first, _shared_later, _activation_before_pool, _dead_channels,
              _dilated_groups, _one_pixel, _one_class, _pool_in_prefix, _wide, _strided_depthwise, _twice, _flattened,
              _flattened_sum, _max_pools)
}  # fmt: skip


def named_case(name: str, bits: int = 8, lrs: tuple[float, ...] = (0.02, 0.5, 30.0, 1e-3)) -> Case:
    """One of ``NAMED`` with everything trained: of weights all channels, or of every second layer the half; 12 bits
    begin with the half."""
    net, model = NAMED[name]()
    weights = {}
    for i, layer in enumerate(net.layers):
        conv = next(n for n in model.nodes if n.layer == layer)
        assert isinstance(conv.attrs, Conv2d)
        channels = model.values[conv["weight"]].shape[0 if conv.attrs.depthwise else 3]
        weights[layer] = 0.5 if i % 2 == (bits != 12) and channels > 1 else 1.0
    scheme = UpdateScheme(name, tuple(net.layers), weights, bits)
    return Case(model, scheme, lrs=tuple(float(np.float32(v)) for v in lrs))
