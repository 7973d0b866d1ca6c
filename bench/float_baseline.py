# SPDX-License-Identifier: Apache-2.0
"""An independent float32 training baseline in PyTorch, batch 1.

It answers one question: what do int8 gradients and int8 storage cost? So everything else is the same as in the engine:
the int8 forward pass of docs/arithmetic.md section 1 bit for bit, the head of section 5, the scheme, the order of
images and the learning rate. What differs is that gradients are float32 and never rounded, and that trained weights and
biases have float32 masters of which the forward pass sees the nearest integer.

Nothing of trainlet's arithmetic is imported: only the graph (``trainlet.frontends``), the scheme and its channels.

``bench/check_baseline.py`` compares it with test vectors and with PyTorch's own autograd.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from trainlet.autodiff.scheme import UpdateScheme, selected_channels
from trainlet.frontends import features, trunk
from trainlet.ir.graph import Graph, Node, QParams
from trainlet.ops import Add, Conv2d

EXACT = 1 << 24  # integers up to here are exact in float32, in any order of summation
Values = dict[str, Tensor]


# --- integer arithmetic, written from the page; int64 tensors ------------------------------------------------


def quantize_multiplier(d: float) -> tuple[int, int]:
    """d > 0 as m 2^(shift - 31)."""
    f, e = math.frexp(d)
    m = math.floor(f * 2.0**31 + 0.5)
    if m == 1 << 31:
        m, e = m >> 1, e + 1
    return (0, 0) if e < -31 else (m, e)


class Rescale:
    """TFLite's double rounding, acc m 2^(shift - 31), for (m, shift) pairs of one tensor or of each channel."""

    def __init__(self, pairs: Sequence[tuple[int, int]]) -> None:
        m, shift = (torch.tensor([p[i] for p in pairs]).view(1, -1, 1, 1) for i in range(2))
        self.m = m
        self.up = shift.clamp(min=0) if bool((shift > 0).any()) else None
        self.down = (-shift).clamp(min=0)
        self.half = torch.where(self.down > 0, (1 << self.down) >> 1, 0)
        self.tie = torch.where(self.down > 0, -1, 0)

    def __call__(self, acc: Tensor) -> Tensor:
        """int64 (N, C, H, W) sums of 32 bits -> int64. In 64 bits both roundings are an addition and a floor."""
        if self.up is not None:
            acc = (acc << self.up).clamp(-(1 << 31), (1 << 31) - 1)
        high = (acc * self.m + (1 << 30)) >> 31
        # half away from zero: below zero an exact half goes down, so one less is added
        return (high + self.half + ((high >> 63) & self.tie)) >> self.down


def mix(x: NDArray[Any]) -> NDArray[Any]:
    """The hash of section 2."""
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(0x7FEB352D)
    x = x ^ (x >> np.uint32(15))
    x = x * np.uint32(0x846CA68B)
    out: NDArray[Any] = x ^ (x >> np.uint32(16))
    return out


def random_head(seed: int, classes: int, features: int) -> Tensor:
    """Section 5: (classes, features), uniform within +-1/sqrt(features)."""
    with np.errstate(over="ignore"):
        key = mix(mix(np.array([seed], np.uint32)) + np.uint32(0xFFFFFFFF))
        word = mix(key + np.arange(classes * features, dtype=np.uint32))
    unit = (word >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-23) - np.float32(1)
    return torch.from_numpy((unit * np.float32(1 / math.sqrt(features))).reshape(classes, features))


# --- layers ----------------------------------------------------------------------------------------------------
# Activations travel as float32 tensors (N, C, H, W) that hold the integers q - z; a gradient is with respect to the
# *real* value s (q - z). So scales appear in backward functions only, and padding is 0.


def pad(x: Tensor, pads: tuple[int, int, int, int]) -> Tensor:
    """``pads`` is (top, bottom, left, right)."""
    top, bottom, left, right = pads
    return functional.pad(x, (left, right, top, bottom)) if any(pads) else x


def qparams(graph: Graph, value: str) -> QParams:
    """Scale and zero point; ValueError where a value has none."""
    q = graph.values[value].q
    if q is None:
        raise ValueError(f"{value} has no scale")
    return q


def _convolve(x: Tensor, w: Tensor, a: Conv2d) -> Tensor:
    """Exact sums of integers as int64."""
    fan_in = w[0].numel()
    exact = fan_in * 255 * 127 <= EXACT
    # dense kernels go through float64 as well: a Winograd kernel would not be exact
    if not exact or (a.kernel != (1, 1) and not a.depthwise):
        x, w = x.double(), w.double()
    return functional.conv2d(pad(x, a.pads), w, None, a.stride, 0, a.dilation, a.groups).long()


class _ConvStep(torch.autograd.Function):
    """y = int8 convolution; gradients of the real-valued one, passing straight through every rounding."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor, layer: ConvLayer) -> Tensor:
        a = layer.attrs
        acc = _convolve(x, w, a) + b.long().view(1, -1, 1, 1)
        y = (layer.rescale(acc) + layer.y.zero).clamp(*layer.clamp)
        out = (y - layer.y.zero).float()
        mask = ((y > layer.clamp[0]) & (y < layer.clamp[1])) if a.activation else None
        ctx.layer = layer
        ctx.save_for_backward(x, w, mask)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        g = grads[0]
        layer: ConvLayer = ctx.layer
        x, w, mask = ctx.saved_tensors
        a = layer.attrs
        if mask is not None:
            g = g * mask
        wants = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[2]]
        top, bottom, left, right = a.pads
        padded = pad(x, a.pads)
        dx, dw, db = torch.ops.aten.convolution_backward(
            g, padded * layer.x.scale, w * layer.scale.view(-1, 1, 1, 1), [w.shape[0]], a.stride, (0, 0), a.dilation,
            False, (0, 0), a.groups, wants,
        )  # fmt: skip
        if dx is not None:
            dx = dx[:, :, top : dx.shape[2] - bottom, left : dx.shape[3] - right]
        return dx, dw, db, None


class _AddStep(torch.autograd.Function):
    """TFLite's int8 ADD; the gradient goes to both inputs."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, layer: AddLayer) -> Tensor:
        total = layer.a(a.long() << 20) + layer.b(b.long() << 20)
        y = (layer.out(total) + layer.y.zero).clamp(*layer.clamp)
        mask = ((y > layer.clamp[0]) & (y < layer.clamp[1])) if layer.activation else None
        ctx.save_for_backward(mask)
        return (y - layer.y.zero).float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        g = grads[0] if mask is None else grads[0] * mask
        return g, g, None


class _PoolStep(torch.autograd.Function):
    """TFLite's int8 global average pool: half away from zero, of the raw integers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, zero: int) -> Tensor:
        ctx.shape = x.shape
        n = x.shape[2] * x.shape[3]
        total = (x.long() + zero).sum((2, 3), keepdim=True)
        half = torch.where(total > 0, n // 2, -(n // 2))
        y = torch.div(total + half, n, rounding_mode="trunc").clamp(-128, 127)
        return (y - zero).float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        n = ctx.shape[2] * ctx.shape[3]
        return (grads[0] / n).expand(ctx.shape), None


class _RealStep(torch.autograd.Function):
    """q - z -> real value; a gradient already is with respect to the real value."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        return x * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None


@dataclass(eq=False)
class ConvLayer:
    """A convolution: constants, and what trains. ``weight`` (O, I/g, kh, kw) and ``bias`` (O,) hold integers; masters
    are None where frozen. The bias master is the float32 offset to the imported integer, which may have 30 bits."""

    attrs: Conv2d
    x: QParams
    y: QParams
    scale: Tensor  # s_w, float32 (O,)
    rescale: Rescale
    weight: Tensor
    bias: Tensor  # float64 holding integers, so that 30 bits are exact
    live: Tensor  # 0.0 for dead channels
    channels: Tensor | None = None
    weight_master: Tensor | None = None
    bias_start: Tensor | None = None
    bias_master: Tensor | None = None

    @property
    def clamp(self) -> tuple[int, int]:
        """lo, hi."""
        assert self.attrs.clamp is not None
        return int(self.attrs.clamp[0]), int(self.attrs.clamp[1])

    def run(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, O, Ho, Wo)."""
        y = _ConvStep.apply(x, self.weight, self.bias, self)  # type: ignore[no-untyped-call]
        assert isinstance(y, Tensor)
        return y

    def _chosen(self, w: Tensor) -> Tensor:
        assert self.channels is not None
        return w[self.channels] if self.attrs.depthwise else w[:, self.channels]

    def train_weights(self, channels: NDArray[np.uint16]) -> None:
        """Makes the weights of these input channels (depthwise: channels) trainable."""
        self.channels = torch.from_numpy(channels.astype(np.int64))
        self.weight_master = self._chosen(self.weight).clone()
        self.weight.requires_grad_(True)

    def train_bias(self) -> None:
        """Makes the bias trainable."""
        self.bias_start = self.bias.detach().clone()
        self.bias_master = torch.zeros(self.bias.shape)
        self.bias.requires_grad_(True)

    @torch.no_grad()
    def update(self, lr: float) -> None:
        """One step of SGD on the real weights s_w W and biases s_w s_x b."""
        if self.weight_master is not None and self.weight.grad is not None:
            rate = (lr * self.live / self.scale).view(-1, 1, 1, 1).expand(self.weight.shape)
            step = self._chosen(rate) * self._chosen(self.weight.grad)
            self.weight_master.sub_(step).clamp_(-127, 127)
            rounded = torch.floor(self.weight_master + 0.5)
            if self.attrs.depthwise:
                self.weight[self.channels] = rounded
            else:
                self.weight[:, self.channels] = rounded
            self.weight.grad = None
        if self.bias_master is not None and self.bias.grad is not None:
            assert self.bias_start is not None
            rate = lr * self.live / (self.scale * self.x.scale)
            self.bias_master.sub_(rate * self.bias.grad.float())
            self.bias.copy_((self.bias_start + torch.floor(self.bias_master + 0.5)).clamp(-(1 << 30), 1 << 30))
            self.bias.grad = None


@dataclass(frozen=True)
class AddLayer:
    """Multipliers of a residual addition."""

    a: Rescale
    b: Rescale
    out: Rescale
    y: QParams
    clamp: tuple[int, int]
    activation: bool

    def run(self, a: Tensor, b: Tensor) -> Tensor:
        """a + b."""
        y = _AddStep.apply(a, b, self)  # type: ignore[no-untyped-call]
        assert isinstance(y, Tensor)
        return y


@dataclass(frozen=True)
class PoolLayer:
    """Global average pool."""

    zero: int

    def run(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, 1, 1)."""
        y = _PoolStep.apply(x, self.zero)  # type: ignore[no-untyped-call]
        assert isinstance(y, Tensor)
        return y


def _conv_layer(graph: Graph, node: Node) -> ConvLayer:
    a = node.attrs
    assert isinstance(a, Conv2d)
    x, y = qparams(graph, node.inputs[0]), qparams(graph, node.outputs[0])
    w, b, s = (graph.data[node[k]] for k in ("weight", "bias", "scale"))
    pairs = [quantize_multiplier(x.scale * float(v) / y.scale) for v in s]
    weight = torch.from_numpy(np.ascontiguousarray(w.transpose(0, 3, 1, 2)).astype(np.float32))
    live = torch.ones(w.shape[0])
    live[list(a.dead)] = 0.0
    scale, bias = torch.from_numpy(s.astype(np.float32)), torch.from_numpy(b.astype(np.float64))
    return ConvLayer(a, x, y, scale, Rescale(pairs), weight, bias, live)


def _add_layer(graph: Graph, node: Node) -> AddLayer:
    attrs = node.attrs
    assert isinstance(attrs, Add)
    assert attrs.clamp is not None
    a, b = (qparams(graph, v) for v in node.inputs)
    y = qparams(graph, node.outputs[0])
    twice = 2 * max(a.scale, b.scale)
    return AddLayer(
        Rescale([quantize_multiplier(a.scale / twice)]),
        Rescale([quantize_multiplier(b.scale / twice)]),
        Rescale([quantize_multiplier(twice / (2.0**20 * y.scale))]),
        y,
        (int(attrs.clamp[0]), int(attrs.clamp[1])),
        attrs.activation,
    )


def _pool_layer(graph: Graph, node: Node) -> PoolLayer:
    if node.outputs[0] != features(graph):
        raise ValueError(f"{node.name}: the baseline knows global average pools at the end only")
    return PoolLayer(qparams(graph, node["x"]).zero)


Layer = ConvLayer | AddLayer | PoolLayer
_LAYERS: Mapping[str, Callable[[Graph, Node], Layer]] = {
    "conv2d": _conv_layer,
    "add": _add_layer,
    "avg_pool": _pool_layer,
}
_DATA_INPUTS = {"conv2d": 1, "add": 2, "avg_pool": 1}


# --- the trainer -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """Loss, prediction and logits before the update."""

    loss: float
    prediction: int
    logits: NDArray[np.float32] = field(repr=False)


class FloatTrainer:
    """Trains an INT8 graph with float gradients. Images are int8 (H, W, C), as a session takes them."""

    def __init__(self, graph: Graph, scheme: UpdateScheme, classes: int, seed: int) -> None:
        self.nodes = trunk(graph)
        self.layers = {n.name: _LAYERS[n.op](graph, n) for n in self.nodes}
        self.convs = [layer for layer in self.layers.values() if isinstance(layer, ConvLayer)]
        first = len(self.nodes) - 1  # where only the head trains, the pool alone is the tail
        for i, n in reversed([*enumerate(self.nodes)]):
            if n.layer in scheme.biases or n.layer in scheme.weights:
                first = i
                self._train(graph, n, scheme)
        self.head_nodes, self.tail_nodes = self.nodes[:first], self.nodes[first:]
        made = {v for n in self.head_nodes for v in n.outputs} | set(graph.inputs)
        self.cut = sorted({v for n in self.tail_nodes for v in self.data_inputs(n)} & made)
        self.features = features(graph)
        q = qparams(graph, self.features)
        self.feature_scale = float(np.float32(q.scale))
        self.input, self.input_zero = graph.inputs[0], qparams(graph, graph.inputs[0]).zero
        self.head = random_head(seed, classes, graph.values[self.features].size).requires_grad_(True)
        self.head_bias = torch.zeros(classes, requires_grad=True)

    def _train(self, graph: Graph, n: Node, scheme: UpdateScheme) -> None:
        layer = self.layers[n.name]
        assert isinstance(layer, ConvLayer)
        if n.layer in scheme.biases:
            layer.train_bias()
        if n.layer in scheme.weights:
            weight = graph.data[n["weight"]].astype(np.int8)
            axis = 0 if layer.attrs.depthwise else 3
            layer.train_weights(selected_channels(weight, scheme.weights[n.layer], axis=axis, layer=n.layer))

    @staticmethod
    def data_inputs(n: Node) -> tuple[str, ...]:
        """The inputs of a node that are activations."""
        return n.inputs[: _DATA_INPUTS[n.op]]

    def run(self, nodes: tuple[Node, ...], values: Values) -> Values:
        """Runs ``nodes`` in order and adds what they make to ``values``."""
        for n in nodes:
            run: Callable[..., Tensor] = self.layers[n.name].run
            values[n.outputs[0]] = run(*(values[v] for v in self.data_inputs(n)))
        return values

    @torch.no_grad()
    def prefix(self, images: NDArray[np.int8], batch: int = 32) -> Values:
        """What the frozen layers compute for images (N, H, W, C), as int16 (q - z has 9 bits)."""
        parts: dict[str, list[Tensor]] = {v: [] for v in self.cut}
        for i in range(0, len(images), batch):
            x = torch.from_numpy(np.ascontiguousarray(images[i : i + batch].transpose(0, 3, 1, 2)))
            values = self.run(self.head_nodes, {self.input: x.float() - self.input_zero})
            for v in self.cut:
                parts[v].append(values[v].to(torch.int16))
        return {v: torch.cat(p) for v, p in parts.items()}

    def logits(self, cached: Values) -> Tensor:
        """(N, classes), differentiable, from cached prefixes."""
        values = self.run(self.tail_nodes, {v: t.float() for v, t in cached.items()})
        f = values[self.features].flatten(1)
        real = _RealStep.apply(f, self.feature_scale)  # type: ignore[no-untyped-call]
        return functional.linear(real, self.head, self.head_bias)

    @torch.no_grad()
    def infer(self, cached: Values, batch: int = 128) -> NDArray[np.float32]:
        """Logits (N, classes) of cached prefixes."""
        n = len(next(iter(cached.values())))
        out = [self.logits({v: t[i : i + batch] for v, t in cached.items()}) for i in range(0, n, batch)]
        return torch.cat(out).numpy()

    def train_step(self, cached: Values, index: int, label: int, lr: float) -> Step:
        """One step of SGD on image ``index`` of the cached prefixes."""
        logits = self.logits({v: t[index : index + 1] for v, t in cached.items()})
        loss = functional.cross_entropy(logits, torch.tensor([label]))
        loss.backward()  # type: ignore[no-untyped-call]
        for layer in self.convs:
            layer.update(lr)
        with torch.no_grad():
            for p in (self.head, self.head_bias):
                assert p.grad is not None
                p.sub_(lr * p.grad)
                p.grad = None
        z = logits.detach()[0]
        return Step(float(loss.detach()), int(z.argmax()), z.numpy())
