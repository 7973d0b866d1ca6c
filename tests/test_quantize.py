# SPDX-License-Identifier: Apache-2.0
"""FLOAT -> INT8: each layer within the bound that its scales give, and what cannot be quantized is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from graphs import ChainBuilder, float_chain, int8_chain
from numpy.typing import NDArray

from trainlet.autodiff.scheme import resolve
from trainlet.compiler import compile_model
from trainlet.errors import TrainletError, UnsupportedError, UsageError
from trainlet.frontends import attach_head
from trainlet.frontends.quantize import PIXELS, calibrate, fold_batch_norm, quantize, range_qparams
from trainlet.ir import Attrs, Operands
from trainlet.ir.graph import Graph, Kind, Node, Stage, Value
from trainlet.ops import Conv2d, Mask
from trainlet.reference import infer, run
from trainlet.reference.linear import conv_sum

RNG = np.random.default_rng(7)
IMAGES = RNG.integers(-128, 128, (24, 8, 8, 3)).astype(np.int8)
OTHERS = RNG.integers(-128, 128, (8, 8, 8, 3)).astype(np.int8)

CONV = Conv2d((1, 1))

Floats = NDArray[np.float64]


def with_data(graph: Graph, **changed: NDArray[np.generic]) -> Graph:
    """The graph with other arrays; ``conv_1_weight`` stands for conv.1.weight."""
    return replace(graph, data={**graph.data, **{_name(k): v for k, v in changed.items()}})


def _name(key: str) -> str:
    kind, number, what = key.split("_")
    return f"{kind}.{number}.{what}"


def reals(graph: Graph, values: dict[str, NDArray[np.generic]], name: str) -> Floats:
    q = graph.values[name].q
    assert q is not None
    return (values[name].astype(np.float64) - q.zero) * q.scale


def conv_excess(real: Graph, made: Graph, values: dict[str, NDArray[np.generic]], node: Node) -> float:
    """The largest error of one convolution beside what its own roundings may do: half a step of the output, of each
    weight times its input, and of the bias. TFLite's rule rounds twice, for which a thousandth is allowed."""
    conv = real.node(node.name).attrs
    assert isinstance(conv, Conv2d)
    x, y, q = reals(made, values, node.inputs[0]), reals(made, values, node.outputs[0]), made.values[node.outputs[0]].q
    assert q is not None
    w, b = (real.data[real.node(node.name)[o]].astype(np.float64) for o in ("weight", "bias"))
    scale = made.data[node["scale"]].astype(np.float64)
    x_q = made.values[node["x"]].q
    assert x_q is not None
    low, high = max((conv.clamp or (-np.inf,))[0], (-128 - q.zero) * q.scale), (127 - q.zero) * q.scale
    want = np.clip(conv_sum(x, 0, w, conv) + b, low, high)
    weights = scale.reshape(-1, 1, 1, 1) / 2 * np.ones_like(w)
    room = 0.502 * q.scale + conv_sum(np.abs(x), 0, weights, conv) + scale * x_q.scale / 2
    return float((np.abs(y - want) / room).max())


def excess(real: Graph, made: Graph, images: NDArray[np.int8]) -> float:
    """The worst layer's error beside its bound, over images that it was calibrated with; up to 1 is right."""
    found = []
    for image in images:
        values = run(made, {"input": image})
        found += [conv_excess(real, made, values, n) for n in made.find("conv2d")]
    return max(found)


# --- near the reals ---------------------------------------------------------------------------------------------


def test_every_layer_is_within_its_own_roundings() -> None:
    made = quantize(float_chain(), IMAGES)
    assert made.stage is Stage.INT8
    assert made.values["input"].q == PIXELS
    assert made.values["pool.y"].q == made.values["add.0.y"].q
    assert 0.2 < excess(float_chain(), made, IMAGES[:6]) <= 1


def _cut(graph: Graph, name: str, top: int) -> Graph:
    nodes = [replace(n, attrs=replace(n.attrs, clamp=(-128, top))) if n.name == name else n for n in graph.nodes]
    return graph.with_nodes(nodes)


FAULTS: dict[str, Callable[[Graph], Graph]] = {
    "a bias in the wrong unit": lambda g: with_data(g, conv_0_bias=g.data["conv.0.bias"] * 2),
    "a weight one step off": lambda g: with_data(g, conv_1_weight=_nudge(g.data["conv.1.weight"])),
    "a weight scale of the neighbor": lambda g: with_data(g, conv_2_scale=np.roll(g.data["conv.2.scale"], 1)),
    "a bound that cuts too much": lambda g: _cut(g, "conv.2", 60),
}


def _nudge(w: NDArray[np.generic]) -> NDArray[np.generic]:
    return (w + np.where(w > 0, -3, 3)).astype(np.int8)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_leaves_the_bound(fault: str) -> None:
    made = FAULTS[fault](quantize(float_chain(), IMAGES))
    assert excess(float_chain(), made, IMAGES[:6]) > 1


def test_the_whole_model_stays_near_on_images_it_has_not_seen() -> None:
    graph = float_chain()
    want = infer(graph, None, (OTHERS.astype(np.float64) + 128) / 255)
    got = infer(quantize(graph, IMAGES), None, OTHERS)
    assert got.dtype == np.float32
    assert np.abs(got - want).max() < 0.05 * np.abs(want).max()


def test_one_scale_for_all_channels_is_worse() -> None:
    graph = float_chain()
    factors = (2.0 ** -np.arange(6.0)).reshape(-1, 1, 1, 1).astype(np.float32)
    graph = with_data(graph, conv_2_weight=graph.data["conv.2.weight"] * factors)
    w, x = graph.data["conv.2.weight"].astype(np.float64), RNG.uniform(0, 6, (4, 4, 6))
    error = []
    for per_channel in (True, False):
        made = quantize(graph, IMAGES, per_channel=per_channel)
        near = made.data["conv.2.weight"] * made.data["conv.2.scale"].astype(np.float64).reshape(-1, 1, 1, 1)
        error.append(np.abs(conv_sum(x, 0, near - w, CONV)).mean(axis=(0, 1)))
        assert len(np.unique(made.data["conv.2.scale"])) == (6 if per_channel else 1)
    assert error[0][3:].max() < error[1][3:].min() / 2, "the smallest channels are left few steps"


def test_activations_hold_zero_exactly_and_use_all_steps() -> None:
    for low, high in ((0.0, 6.0), (-1.0, 3.0), (0.5, 2.0), (-4.0, -1.0)):
        q = range_qparams("layer", (low, high))
        reach = (-128 - q.zero) * q.scale, (127 - q.zero) * q.scale
        assert reach[0] <= min(low, 0) + q.scale / 2
        assert reach[1] >= max(high, 0) - q.scale / 2
        assert -128 <= q.zero <= 127
    made = quantize(float_chain(), IMAGES)
    relu = made.values["conv.0.y"].q
    assert relu is not None
    assert relu.zero == -128
    clamps = [n.attrs.clamp for n in made.find("conv2d") if isinstance(n.attrs, Conv2d)]
    assert clamps[0] == clamps[2] == (-128, 127)


def test_a_tighter_activation_keeps_its_bounds() -> None:
    """An activation from -1 to 1 in a layer that reaches further down than up: the upper bound lies within int8."""
    c = ChainBuilder("narrow", integer=False)
    conv = Conv2d((1, 1), clamp=(-1.0, 0.25), activation=True)
    graph = c.g.build(Stage.FLOAT, [c.conv("conv.0", "narrow", c.input, conv, 5)])
    made = quantize(graph, IMAGES)
    attrs, q = made.nodes[0].attrs, made.values["conv.0.y"].q
    assert isinstance(attrs, Conv2d)
    assert q is not None
    assert attrs.clamp is not None
    assert abs((attrs.clamp[1] - q.zero) * q.scale - 0.25) <= q.scale / 2


def test_a_model_from_here_compiles_for_training() -> None:
    made = quantize(float_chain(), IMAGES)
    graph = attach_head(made, 4, keep=True)
    assert np.array_equal(graph.data["head.weight"], float_chain().data["head.weight"])
    compiled = compile_model(graph, resolve("full", graph))
    assert compiled.state_bytes > 0


# --- channels out of the ordinary -------------------------------------------------------------------------------


def test_dead_channels_give_their_bias() -> None:
    graph = float_chain()
    w, b = graph.data["conv.2.weight"].copy(), graph.data["conv.2.bias"].copy()
    w[1], w[4], b[1], b[4] = 0, 1e-9, 0.75, -0.5
    graph = with_data(graph, conv_2_weight=w, conv_2_bias=b)
    made = quantize(graph, IMAGES)
    attrs = made.node("conv.2").attrs
    assert isinstance(attrs, Conv2d)
    assert attrs.dead == (1, 4)
    q = made.values["conv.2.y"].q
    assert q is not None
    got = (infer(made, None, OTHERS, output="conv.2.y").astype(np.float64) - q.zero) * q.scale
    assert np.abs(got[..., 1] - 0.75).max() <= q.scale
    assert np.abs(got[..., 4] + 0.5).max() <= q.scale
    assert excess(graph, made, IMAGES[:4]) <= 1


def test_a_bias_far_above_its_weights_stays_within_32_bits() -> None:
    graph = float_chain()
    w, b = graph.data["conv.2.weight"].copy(), graph.data["conv.2.bias"].copy()
    w[0] *= 1e-4
    b[0] = 3000.0
    made = quantize(with_data(graph, conv_2_weight=w, conv_2_bias=b), IMAGES)
    attrs = made.node("conv.2").attrs
    assert isinstance(attrs, Conv2d)
    assert attrs.dead == ()
    assert 1 << 28 < made.data["conv.2.bias"][0] <= 1 << 29


# --- batch norm -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [None, np.array([0.5, -1.0, 2.0, 0.0])])
def test_a_folded_batch_norm_is_the_same_function(bias: Floats | None) -> None:
    w, x = RNG.standard_normal((4, 3)), RNG.standard_normal(3)
    mean, gamma, beta = RNG.standard_normal((3, 4))
    variance, epsilon = RNG.uniform(0.1, 3, 4), 0.5
    plain = w @ x + (0 if bias is None else bias)
    want = (plain - mean) / np.sqrt(variance + epsilon) * gamma + beta
    folded, shift = fold_batch_norm(w.reshape(4, 3, 1, 1), bias, mean, variance, gamma, beta, epsilon)
    assert folded.shape == (4, 3, 1, 1)
    assert folded.dtype == shift.dtype == np.float32
    np.testing.assert_allclose(folded.reshape(4, 3) @ x + shift, want, rtol=1e-5, atol=1e-5)
    other, _ = fold_batch_norm(w.reshape(4, 3, 1, 1), bias, mean, variance, gamma, beta, 0.0)
    assert np.abs(other.reshape(4, 3) @ x + shift - want).max() > 1e-2, "an epsilon that is left out shows"


def test_a_batch_norm_that_does_not_fit_is_refused() -> None:
    w, ones = np.ones((4, 3, 1, 1)), np.ones(4)
    with pytest.raises(UsageError, match=r"gamma has the shape \(3,\); 4 channels"):
        fold_batch_norm(w, None, ones, ones, np.ones(3), ones, 1e-5)
    with pytest.raises(UsageError, match=r"bias has the shape"):
        fold_batch_norm(w, np.ones(5), ones, ones, ones, ones, 1e-5)
    with pytest.raises(UsageError, match="above 0 in every channel"):
        fold_batch_norm(w, None, ones, -ones, ones, ones, 1e-5)


# --- refusals ---------------------------------------------------------------------------------------------------


def _zero(name: str) -> Graph:
    graph = float_chain()
    return replace(graph, data={**graph.data, name: np.zeros_like(graph.data[name])})


def _silent() -> Graph:
    """A layer whose activation cuts everything."""
    graph = float_chain()
    return with_data(graph, conv_0_bias=np.full_like(graph.data["conv.0.bias"], -1000))


def _huge() -> Graph:
    return with_data(float_chain(), conv_1_bias=np.full((6,), 3e38, np.float32))


def _masked() -> Graph:
    graph = float_chain()
    node = Node("clip_mask", "mask", "mask", Operands(x="conv.0.y"), ("bits",), Mask((0, 6)))
    return replace(graph, nodes=(*graph.nodes, node), values={**graph.values, "bits": Value("bits", (4, 4, 6), "f32")})


def _trained() -> Graph:
    graph = float_chain()
    moved = replace(graph.values["conv.1.weight"], kind=Kind.STATE)
    return replace(graph, values={**graph.values, "conv.1.weight": moved})


def _dense_over_dense() -> Graph:
    graph = float_chain()
    weight = Value("second.weight", (4, 4), "f32", Kind.CONST)
    read = Operands(x="logits", weight=weight.name, bias="head.bias")
    node = Node("dense", "second", "second", read, ("second.y",), Attrs())
    values = {**graph.values, weight.name: weight, "second.y": Value("second.y", (4,), "f32")}
    data = {**graph.data, weight.name: np.ones((4, 4), np.float32)}
    return replace(graph, nodes=(*graph.nodes, node), values=values, data=data)


@pytest.mark.parametrize(
    ("graph", "error", "message"),
    [
        (int8_chain, UsageError, "int8_chain: a graph of stage int8; give one of stage float"),
        (_silent, UsageError, "stem: its output is 0 for all calibration images"),
        (lambda: _zero("conv.2.weight"), UsageError, "block.project: all its weights are 0"),
        (_huge, UsageError, "block.depthwise: its weights are so large that every output saturates"),
        (_masked, UnsupportedError, "node 'mask' .* belongs to stage train, lowered, not float"),
        (_trained, UnsupportedError, "block.depthwise: 'conv.1.weight' is no constant"),
        (_dense_over_dense, UnsupportedError, "second: a dense layer is supported at the end of a model only"),
    ],
)
def test_what_cannot_be_quantized_is_refused(
    graph: Callable[[], Graph], error: type[TrainletError], message: str
) -> None:
    with pytest.raises(error, match=message):
        quantize(graph(), IMAGES)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (IMAGES[:0], "float_chain: there is no image to calibrate with"),
        (IMAGES[0], r"calibration takes int8 images \(N, 8, 8, 3\)"),
        (IMAGES[:, :4], r"int8 \(24, 4, 8, 3\)"),
        (IMAGES.astype(np.float32), "not float32"),
    ],
)
def test_calibration_without_usable_images_is_refused(images: NDArray[np.int8], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        calibrate(float_chain(), images)


def test_an_activation_that_is_not_finite_is_refused() -> None:
    with pytest.raises(UsageError, match="stem: its output is not finite"):
        calibrate(with_data(float_chain(), conv_0_weight=np.full((6, 3, 3, 3), np.inf, np.float32)), IMAGES)


def test_calibration_sees_every_image() -> None:
    """The widest range comes from one image, wherever it stands."""
    dark = np.full((40, 8, 8, 3), -128, np.int8)
    alone = calibrate(float_chain(), dark)
    for at in (0, 31, 32, 39):
        mixed = dark.copy()
        mixed[at] = 127
        assert calibrate(float_chain(), mixed)["conv.0.y"] != alone["conv.0.y"]
