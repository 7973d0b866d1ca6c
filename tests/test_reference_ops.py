# SPDX-License-Identifier: Apache-2.0
"""The reference against formulas written a second time: plain Python integers, loops, finite differences, float SGD."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from graphs import ChainBuilder, float_chain, int8_chain, train_tail
from hypothesis import given
from hypothesis import strategies as st

from trainlet.autodiff.scheme import UpdateScheme, resolve
from trainlet.autodiff.walk import differentiate
from trainlet.errors import MismatchError, UsageError
from trainlet.ir.graph import Graph, Stage
from trainlet.ops import OPS, Conv2d, conv_out_hw, is_depthwise
from trainlet.reference import REFERENCE, Status, infer, initial_state, random_head, run, train_step
from trainlet.reference import arithmetic as ar
from trainlet.reference.executor import execute, start
from trainlet.reference.linear import carrier, conv_dw_sum, conv_dx_sum, conv_sum
from trainlet.reference.rounding import EXACT, Site, Sums, add_further

INT32 = st.integers(-(2**31), 2**31 - 1)
H = st.integers(-(2**30), 2**30)
WORD = st.integers(0, 2**32 - 1)


def test_every_row_has_a_meaning() -> None:
    assert set(REFERENCE) == set(OPS) - {"depth_first"}  # which is the nodes that it holds


# --- primitives ---------------------------------------------------------------------------------------------


@given(INT32, st.integers(0, 2**31 - 1))
def test_srdhm_is_the_truncating_division(a: int, b: int) -> None:
    product = a * b + (2**30 if a * b >= 0 else 1 - 2**30)
    assert int(ar.srdhm(a, b)) == abs(product) // 2**31 * (1 if product >= 0 else -1)


@given(INT32, st.integers(0, 31))
def test_rdbpot_rounds_half_away_from_zero(x: int, n: int) -> None:
    exact = Fraction(abs(x), 2**n)
    assert int(ar.rdbpot(x, n)) == math.floor(exact + Fraction(1, 2)) * (1 if x >= 0 else -1)


@pytest.mark.parametrize(
    ("x", "m", "sh", "want"),
    [
        (3, 1 << 30, 1, 3),
        (3, 1 << 30, 5, 48),
        (1 << 29, 1 << 30, 4, 1 << 30),  # the left shift saturates at 2^31 - 1, halved and rounded
        (-(1 << 29), 1 << 30, 4, -(1 << 30)),
        (2**31 - 1, 0, 0, 0),
    ],
)
def test_mbqm_with_a_left_shift(x: int, m: int, sh: int, want: int) -> None:
    assert int(ar.mbqm(x, m, sh)) == want


def test_quantize_multiplier_gives_up_below_its_range() -> None:
    for d, want in [(2.0**-32, (1 << 30, -31)), (2.0**-33, (0, 0)), (0.0, (0, 0)), (1 - 2.0**-40, (1 << 30, 1))]:
        m, sh = ar.quantize_multiplier(d)
        assert (int(m), int(sh)) == want


@given(H, st.integers(-40, 200), WORD)
def test_prescale_and_sround(h: int, n: int, w: int) -> None:
    want_h, want_n = h, min(n, 20)
    if n > 20:
        want_h = 0 if n - 20 > 30 else (h + (1 << (n - 21))) >> (n - 20)
    got_h, got_n = ar.prescale(h, n)
    assert (int(got_h), int(got_n)) == (want_h, want_n)
    want = (h + (w >> (32 - n))) >> n if 0 < n <= 20 else None
    if n <= 0:
        want = max(-(2**31), min(2**31 - 1, h << min(-n, 31)))
    if want is not None:
        assert int(ar.sround(h, n, w)) == want


@given(H, st.integers(-127, 127), st.integers(-40, 40))
def test_further_gradient(h: int, r: int, k: int) -> None:
    limit = 2**30
    if k >= 0:
        share = max(-limit, min(limit, r * 2 ** min(k, 24)))
    else:
        share = 0 if k < -7 else math.floor(Fraction(r, 2**-k) + Fraction(1, 2))
    assert int(add_further(np.asarray(h), np.asarray(r), np.asarray(k))) == max(-limit, min(limit, h + share))


@given(st.integers(-(2**20), 2**20), st.floats(2.0**-60, 2.0**30))
def test_scaled_is_the_product(acc: int, v: float) -> None:
    h, x = ar.scaled(acc, v, 2**20)
    assert abs(int(h)) <= 2**30
    error = abs(Fraction(int(h)) * Fraction(2) ** int(x) - acc * Fraction(v))
    assert error <= Fraction(2) ** int(x) / 2 + abs(acc) * Fraction(v) / 2**31


def test_expf_and_logf_follow_the_functions() -> None:
    x = np.linspace(-80, 0, 1001).astype(np.float32)
    np.testing.assert_allclose(ar.expf(x), np.exp(x.astype(np.float64)), rtol=1e-6)
    assert ar.expf(np.float32(-80)) > 0
    assert ar.expf(np.nextafter(np.float32(-80), np.float32(-81))) == 0
    assert ar.expf(np.float32(-np.inf)) == 0
    z = np.geomspace(1, 65535, 1001).astype(np.float32)
    np.testing.assert_allclose(ar.logf(z), np.log(z.astype(np.float64)), rtol=1e-6, atol=1e-7)


# --- linear algebra -----------------------------------------------------------------------------------------

GEOMETRIES = [
    Conv2d((1, 1)),
    Conv2d((3, 2), (2, 1), (1, 0, 2, 1)),
    Conv2d((3, 3), (1, 2), (2, 2, 2, 2), dilation=(2, 1)),
    Conv2d((2, 2), groups=2),
    Conv2d((3, 3), pads=(1, 1, 1, 1), groups=4, depthwise=True),
]


def _naive(x: np.ndarray, zero: int, w: np.ndarray, conv: Conv2d) -> np.ndarray:
    """The definition of a convolution, element by element, in Python integers."""
    oh, ow = conv_out_hw(conv, *x.shape[:2])
    out_c, cg = w.shape[0], x.shape[2] // conv.groups
    y = np.zeros((oh, ow, out_c), np.int64)
    for p, q, o, i, j, c in np.ndindex(oh, ow, out_c, *conv.kernel, cg):
        row = p * conv.stride[0] - conv.pads[0] + i * conv.dilation[0]
        col = q * conv.stride[1] - conv.pads[2] + j * conv.dilation[1]
        if 0 <= row < x.shape[0] and 0 <= col < x.shape[1]:
            y[p, q, o] += int(w[o, i, j, c]) * (int(x[row, col, o // (out_c // conv.groups) * cg + c]) - zero)
    return y


@pytest.mark.parametrize("conv", GEOMETRIES, ids=str)
def test_sums_of_a_convolution_and_its_gradients(conv: Conv2d) -> None:
    rng = np.random.default_rng(1)
    x = rng.integers(-128, 128, (6, 5, 4)).astype(np.int8)
    out_c = 4 if conv.depthwise else 6
    assert conv.depthwise == is_depthwise(conv.groups, 4, out_c)
    w = rng.integers(-127, 128, (out_c, *conv.kernel, 4 // conv.groups)).astype(np.int8)
    y = conv_sum(x, 7, w, conv)
    np.testing.assert_array_equal(y, _naive(x, 7, w, conv))
    np.testing.assert_array_equal(conv_sum(np.stack([x, x + 1]), 7, w, conv)[0], y)

    # the gradients are the adjoints: <conv(x), r> = <x, dx(r)> = <w, dw(r, x)>
    r = rng.integers(-127, 128, y.shape).astype(np.int8)
    inner = int((y * r).sum())
    dx = conv_dx_sum(r, w, conv, (6, 5), 127)
    dw = conv_dw_sum(r, x, 7, conv)
    assert dx.dtype == dw.dtype == np.int64
    assert int(((x.astype(np.int64) - 7) * dx).sum()) == inner
    assert int((w * dw).sum()) == inner


def test_sums_that_no_float_holds_are_refused() -> None:
    one = np.ones(1, np.int8)
    assert carrier(2**24 - 1, one) == np.float32
    assert carrier(2**24, one) == np.float64
    with pytest.raises(ValueError, match="not exact"):
        carrier(2**53, one)


# --- rounding of gradients ------------------------------------------------------------------------------------


def _sums(acc: np.ndarray) -> Sums:
    return Sums(acc, np.ones(1), 127 * 127, 0)


def test_rho_is_kept_where_nothing_arrives_and_has_limits() -> None:
    zero, some = np.zeros((1, 1, 2), np.int64), np.array([[[5, -3]]])
    assert EXACT.gradient((1, 1, 2), _sums(zero), [], None, Site(1, 0, 9)).rho == 9
    assert EXACT.gradient((1, 1, 2), _sums(some), [], np.zeros((1, 1, 2), bool), Site(1, 0, 9)).rho == 9
    assert EXACT.gradient((1, 1, 2), _sums(some), [], None, Site(1, 0, 9)).rho == 8  # falls by one at most
    assert EXACT.gradient((1, 1, 2), _sums(some), [], None, Site(1, -100, 9)).rho == 60
    assert EXACT.gradient((1, 1, 2), _sums(some), [], None, Site(1, 100, -60)).rho == -60
    # a magnitude just below 2^3 relative to the anchor
    assert EXACT.gradient((1, 1, 2), _sums(some), [], None, Site(1, 0, -5)).rho == 3


def test_a_site_that_no_consumer_computes_starts_at_16_bits() -> None:
    r = np.array([[[100, -127, 1]]], np.int8)
    done = EXACT.gradient(r.shape, None, [(r, -3), (r, -3)], None, Site(1, 0, 4))
    assert done.e == -2  # A + rho - 6, twice the unit of the two shares
    np.testing.assert_array_equal(done.r, r)
    fine = EXACT.gradient(r.shape, None, [(r, -3)], None, Site(5, 0, 4)).r
    assert np.abs(fine * 2.0 - r).max() <= 1  # half a unit is rounded up or down


def test_the_entry_truncates_and_is_clamped() -> None:
    v = np.array([1 - 2.0**-24, -(1 - 2.0**-24), 2.0**-28, -(2.0**-28)], np.float32)
    entry = EXACT.enter(v, 3)
    assert (entry.anchor, entry.e) == (0, -7)
    assert entry.r[0] == 127
    assert entry.r[1] == -127
    np.testing.assert_array_equal(entry.r[2:], 0)  # trunc: a floor would give -1 with some words
    assert all(EXACT.enter(v, k).r[3] == 0 for k in range(200))
    assert entry.saturated in (1, 2)
    assert EXACT.enter(np.zeros(3, np.float32), 3).zero


# --- whole steps ----------------------------------------------------------------------------------------------


def _full(graph: Graph) -> UpdateScheme:
    return resolve("full", graph)


def _image(graph: Graph, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-128, 128, graph.values["input"].shape).astype(np.int8)


def _unchanged(state: object, before: dict[str, np.ndarray], step: int) -> bool:
    arrays = state.arrays  # type: ignore[attr-defined]
    return state.step == step and all(np.array_equal(arrays[n], before[n]) for n in before)  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def chain() -> Graph:
    return differentiate(int8_chain(), _full(int8_chain()))


@pytest.mark.parametrize(
    ("label", "lr", "error", "text"),
    [
        (4, 0.1, UsageError, "label 4: the model has 4 classes"),
        (-1, 0.1, UsageError, "label -1"),
        (2**40, 0.1, UsageError, "label"),
        (0, -0.1, UsageError, "learning rate -0.1"),
        (0, math.nan, UsageError, "learning rate nan"),
        (0, math.inf, UsageError, "learning rate inf"),
        (0, 1e60, UsageError, "learning rate inf"),
        (0, 3e38, UsageError, "not finite"),
    ],
)
def test_a_refused_step_changes_nothing(chain: Graph, label: int, lr: float, error: type[Exception], text: str) -> None:
    state = initial_state(chain, 1)
    before = dict(state.arrays)
    with pytest.raises(error, match=text):
        train_step(chain, state, _image(chain), label, lr)
    assert _unchanged(state, before, 0)


@pytest.mark.parametrize(
    ("weight", "bias", "text"),
    [(0.0, math.inf, "a logit is not a finite number"), (3e38, 0.0, "is not a finite number")],
)
def test_numbers_that_are_not_finite_refuse_the_step(chain: Graph, weight: float, bias: float, text: str) -> None:
    state = initial_state(chain, 1)
    state.arrays["head.weight"] = np.full_like(state.arrays["head.weight"], weight)
    state.arrays["head.bias"] = np.full_like(state.arrays["head.bias"], bias)
    before = dict(state.arrays)
    with pytest.raises(MismatchError, match=text):
        train_step(chain, state, _image(chain), 0, 0.1)
    assert _unchanged(state, before, 0)


def test_images_of_another_shape_or_type_are_refused(chain: Graph) -> None:
    state = initial_state(chain, 1)
    with pytest.raises(UsageError, match="has the shape"):
        train_step(chain, state, np.zeros((7, 8, 3), np.int8), 0, 0.1)
    with pytest.raises(UsageError, match="does not fit"):
        train_step(chain, state, np.full((8, 8, 3), 200), 0, 0.1)


def test_an_all_zero_gradient_updates_the_head_only(chain: Graph) -> None:
    state = initial_state(chain, 1)
    state.arrays["head.weight"] = np.zeros_like(state.arrays["head.weight"])
    before = dict(state.arrays)
    result = train_step(chain, state, _image(chain), 2, 0.1)
    assert result.status is Status.ZERO_GRADIENT
    assert state.step == 1
    changed = {n for n in before if not np.array_equal(before[n], state.arrays[n])}
    assert changed == {"head.weight", "head.bias"}
    assert train_step(chain, state, _image(chain), 2, 0.1).status is Status.OK


def test_a_learning_rate_of_zero_changes_the_step_and_rho_only(chain: Graph) -> None:
    state = initial_state(chain, 1)
    before = dict(state.arrays)
    train_step(chain, state, _image(chain), 2, 0.0)
    changed = {n for n in before if not np.array_equal(before[n], state.arrays[n])}
    assert changed
    assert all(n.endswith(".rho") for n in changed)
    assert state.step == 1


def test_parameters_saturate_at_their_limits(chain: Graph) -> None:
    state = initial_state(chain, 1)
    train_step(chain, state, _image(chain), 2, 1e8)
    for conv in ("conv.0", "conv.1", "conv.2"):
        trained = state.arrays[f"{conv}.trained"]
        bias = np.abs(state.arrays[f"{conv}.bias"].astype(np.int64))
        assert np.abs(trained.astype(np.int64)).max() == 127
        assert bias.max() == 2**30


def test_dead_channels_take_no_part(chain: Graph) -> None:
    nodes = []
    for node in chain.nodes:
        if node.layer == "stem" and hasattr(node.attrs, "conv") and node.op.startswith("sgd"):
            node = replace(node, attrs=replace(node.attrs, conv=replace(node.attrs.conv, dead=(1,))))
        nodes.append(node)
    graph = chain.with_nodes(nodes)
    state = initial_state(graph, 1)
    before = dict(state.arrays)
    train_step(graph, state, _image(graph), 2, 10.0)
    same = [np.array_equal(before["conv.0.trained"][o], state.arrays["conv.0.trained"][o]) for o in range(6)]
    assert same[1]
    assert not all(same)
    assert before["conv.0.bias"][1] == state.arrays["conv.0.bias"][1]


def test_small_probabilities_and_steps_are_flushed(chain: Graph) -> None:
    state = initial_state(chain, 1)
    state.arrays["head.weight"] = np.zeros_like(state.arrays["head.weight"])
    state.arrays["head.bias"] = np.array([50, 0, 0, 0], np.float32)
    result = train_step(chain, state, _image(chain), 0, 0.1)
    np.testing.assert_array_equal(result.values["logits.grad"], 0)  # e^-50 < 2^-60
    assert result.loss == 0
    state.arrays["head.bias"] = np.array([35, 0, 0, 0], np.float32)
    before = state.arrays["head.bias"]
    result = train_step(chain, state, _image(chain), 0, 1e-30)
    assert result.values["logits.grad"][1] > 0
    np.testing.assert_array_equal(state.arrays["head.bias"], before)


def test_handwritten_step_runs() -> None:
    graph = train_tail()
    state = initial_state(graph, 3)
    before = dict(state.arrays)
    image = np.arange(16, dtype=np.int8).reshape(2, 2, 4)
    losses = [train_step(graph, state, image, 1, 0.05).loss for _ in range(20)]
    assert losses[-1] < losses[0]
    assert not np.array_equal(before["conv.0.trained"], state.arrays["conv.0.trained"])
    assert state.arrays["conv.0.fraction"].min() >= -8
    assert state.arrays["conv.0.fraction"].max() <= 7


def test_head_is_drawn_from_the_seed() -> None:
    head = random_head(5, 3, 64)
    assert head.dtype == np.float32
    assert np.abs(head).max() <= 1 / 8
    assert abs(float(head.mean())) < 0.02
    assert not np.array_equal(head, random_head(6, 3, 64))
    first = int(ar.word(ar.key(5, 0, 0xFFFFFFFF), 0))
    assert head[0, 0] == (np.float32(first >> 8) * np.float32(2.0**-23) - np.float32(1)) * np.float32(1 / 8)


def test_inference_of_a_batch_is_that_of_its_images(chain: Graph) -> None:
    images = np.stack([_image(chain, s) for s in range(5)])
    state = initial_state(chain, 1)
    logits = infer(chain, state, images)
    assert logits.shape == (5, 4)
    for one, x in zip(logits, images, strict=True):
        assert one.tobytes() == infer(chain, state, x[None])[0].tobytes()
        assert one.tobytes() == train_step(chain, state.copy(), x, 0, 0.1).logits.tobytes()
    pooled = infer(int8_chain(), None, images, output="pool.y")
    assert pooled.shape == (5, 1, 1, 6)
    assert pooled.dtype == np.int8


def test_running_again_gives_the_same_bytes(chain: Graph) -> None:
    states = [initial_state(chain, 7) for _ in range(2)]
    for state in states:
        for t in range(3):
            train_step(chain, state, _image(chain, t), t, 0.01)
    for name, a in states[0].arrays.items():
        assert a.tobytes() == states[1].arrays[name].tobytes()


# --- reals ----------------------------------------------------------------------------------------------------


def test_gradients_of_a_float_graph_are_finite_differences() -> None:
    model = float_chain()
    graph = differentiate(model, _full(model))
    rng = np.random.default_rng(3)
    x = rng.standard_normal(model.values["input"].shape)
    given = {"input": x, "label": np.array([2], np.int32), "lr": np.ones(1)}
    state = initial_state(graph, 0)
    state.arrays = {n: a.astype(np.float64) for n, a in state.arrays.items()}
    after = run(graph, given, state)
    slope = {n: a - after[n] for n, a in state.arrays.items()}  # lr is 1
    assert {n.split(".trained")[0] for n in slope} >= {"conv.0", "conv.1", "conv.2", "head.weight"}
    direction = {n: rng.standard_normal(a.shape) for n, a in slope.items()}
    eps = 1e-6

    def loss(sign: float) -> float:
        moved = state.copy()
        moved.arrays = {n: a + sign * eps * direction[n] for n, a in state.arrays.items()}
        return float(run(graph, given, moved)["loss"][0])

    numeric = (loss(1) - loss(-1)) / (2 * eps)
    analytic = sum(float((slope[n] * direction[n]).sum()) for n in slope)
    assert numeric == pytest.approx(analytic, rel=1e-6)


def _residual_model(fraction: bool) -> Graph:
    """1x1 with activation, 1x1 without, their sum, pool, head; every weight and bias trains."""
    c = ChainBuilder("residual", integer=True, seed=4, shape=(3, 2, 5))
    a = c.conv("conv.0", "first", c.input, Conv2d((1, 1), clamp=(0.0, 6.0), activation=True), 6)
    b = c.conv("conv.1", "second", a, Conv2d((1, 1)), 6)
    model = c.g.build(Stage.INT8, [c.head("head", c.pool("pool", c.add("add.0", a, b)))])
    scheme = _full(model)
    return differentiate(model, replace(scheme, bits=12) if fraction else scheme)


def _float_sgd(graph: Graph, image: np.ndarray, label: int, lr: float) -> dict[str, np.ndarray]:
    """One step of float SGD on the de-quantized parameters, written out by hand for ``_residual_model``."""
    d = {n: a.astype(np.float64) for n, a in graph.data.items()}
    q = {n: v.q for n, v in graph.values.items() if v.q}
    x = q["input"].scale * (image.reshape(6, 5).astype(np.float64) - q["input"].zero)
    w0 = d["conv.0.weight"][:, 0, 0] * d["conv.0.scale"][:, None]
    w1 = d["conv.1.weight"][:, 0, 0] * d["conv.1.scale"][:, None]
    b0 = d["conv.0.bias"] * d["conv.0.scale"] * q["input"].scale
    b1 = d["conv.1.bias"] * d["conv.1.scale"] * q["conv.0.y"].scale
    wh, bh = d["head.weight"], d["head.bias"]

    def saturate(name: str, y: np.ndarray) -> np.ndarray:
        return np.clip(y, q[name].scale * (-128 - q[name].zero), q[name].scale * (127 - q[name].zero))

    y0 = saturate("conv.0.y", x @ w0.T + b0)
    passes = (y0 > 0) & (y0 < 255 * q["conv.0.y"].scale)
    y1 = saturate("conv.1.y", y0 @ w1.T + b1)
    s = saturate("add.0.y", y0 + y1)
    f = s.mean(axis=0)
    z = wh @ f + bh
    g = np.exp(z) / np.exp(z).sum()
    g[label] -= 1
    gs = np.tile(wh.T @ g / 6, (6, 1))
    g0 = (gs @ w1 + gs) * passes
    assert 0.2 < passes.mean() < 0.95
    return {
        "head.weight": wh - lr * np.outer(g, f),
        "head.bias": bh - lr * g,
        "conv.1.trained": w1 - lr * gs.T @ y0,
        "conv.1.bias": b1 - lr * gs.sum(axis=0),
        "conv.0.trained": w0 - lr * g0.T @ x,
        "conv.0.bias": b0 - lr * g0.sum(axis=0),
    }


@pytest.mark.parametrize("fraction", [False, True])
def test_without_rounding_a_step_is_float_sgd(fraction: bool) -> None:
    graph = _residual_model(fraction)
    image, lr = _image(graph, 8), 0.25
    state = initial_state(graph, 5)
    train_step(graph, state, image, 1, lr, rounding=False)
    unit = {f"conv.{i}.trained": graph.data[f"conv.{i}.scale"].astype(np.float64)[:, None] for i in range(2)}
    for i, x in enumerate(("input", "conv.0.y")):
        q = graph.values[x].q
        assert q is not None
        unit[f"conv.{i}.bias"] = graph.data[f"conv.{i}.scale"].astype(np.float64) * q.scale
    start_of = initial_state(graph, 5).arrays
    for name, want in _float_sgd(graph, image, 1, lr).items():
        got = state.arrays[name]
        got = (got[:, 0, 0] if got.ndim == 4 else got) * unit.get(name, 1.0)
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)
        assert not np.allclose(state.arrays[name], start_of[name], rtol=1e-9, atol=0)  # it moved


def _tangled_model() -> Graph:
    """Every way in which gradients meet: a tensor that an addition reads first and a convolution later, one that two
    additions read, additions and a pooled tensor with an activation."""
    c = ChainBuilder("tangled", integer=True, seed=11, shape=(4, 4, 3))
    active = Conv2d((1, 1), clamp=(0.0, 6.0), activation=True)
    grouped = Conv2d((3, 3), pads=(1, 1, 1, 1), groups=2)
    a = c.conv("conv.0", "first", c.input, Conv2d((3, 3), (1, 1), (1, 1, 1, 1), clamp=(0.0, 6.0), activation=True), 6)
    b = c.conv("conv.1", "second", a, grouped, 6)
    s = c.add("add.0", a, b)
    t = c.add("add.1", s, a)
    d = c.conv("conv.2", "third", s, Conv2d((1, 1)), 6)
    u = c.add("add.2", t, d)
    y = c.conv("conv.3", "last", c.add("add.3", u, s), active, 8)
    for i, node in enumerate(c.g.nodes):
        if node.op == "add" and node.name != "add.2":
            c.g.nodes[i] = replace(node, attrs=replace(node.attrs, activation=True))
    for name, v in c.g.values.items():
        if v.q is not None and not name.startswith("input"):
            c.g.values[name] = replace(v, q=replace(v.q, scale=3 * v.q.scale))
    return c.g.build(Stage.INT8, [c.head("head", c.pool("pool", y))])


def test_without_rounding_gradients_are_finite_differences() -> None:
    model = _tangled_model()
    graph = differentiate(model, _full(model))
    assert any("acc" not in n.operands for n in graph.find("round_grad"))
    lr, eps, rng = 1e-9, 1e-5, np.random.default_rng(2)
    given = {"input": _image(graph, 3), "label": np.array([1], np.int32), "lr": np.array([lr])}
    state = initial_state(graph, 5)
    inside = 0.9  # no weight starts at its limit of 127, and lr is so small that none gets there
    state.arrays = {n: a * (inside if n.endswith(".trained") else 1.0) for n, a in state.arrays.items()}
    values = run(graph, given, state, rounding=False)
    for name in ("conv.1.y", "conv.2.y", "add.2.y"):  # saturation without an activation passes gradients
        assert np.abs(values[name]).max() < 127
    masked = [np.mean((values[n] <= -128) | (values[n] >= 127)) for n in ("conv.0.y", "conv.3.y", "add.0.y")]
    assert min(masked[:2]) > 0.05

    # the step of an integer is the gradient of that integer over the square of its unit
    unit = dict.fromkeys(("head.weight", "head.bias"), 1.0)
    for i, conv in enumerate(graph.find("conv2d")):
        w, q = graph.data[f"conv.{i}.scale"].astype(np.float64), graph.values[conv["x"]].q
        assert q is not None
        unit[f"conv.{i}.trained"], unit[f"conv.{i}.bias"] = w[:, None, None, None], w * q.scale
    for name, u in unit.items():
        direction = rng.standard_normal(state.arrays[name].shape)
        losses = []
        for sign in (1, -1):
            moved = state.copy()
            moved.arrays[name] = state.arrays[name] + sign * eps * direction
            losses.append(float(run(graph, given, moved, rounding=False)["loss"][0]))
        slope = (state.arrays[name] - values[name]) / lr * u**2
        assert (losses[0] - losses[1]) / (2 * eps) == pytest.approx(float((slope * direction).sum()), rel=1e-4), name


def test_exact_gradients_are_the_unrounded_ones() -> None:
    """The integers of every kind of junction, up to the noise of int8 activations and gradients."""
    model = _tangled_model()
    graph = differentiate(model, _full(model))
    given = {"input": _image(graph, 3), "label": np.array([1], np.int32), "lr": np.zeros(1, np.float32)}
    state = initial_state(graph, 5)
    for _ in range(3):  # rho settles
        train_step(graph, state, given["input"], 1, 0.0)
    exact, real = start(graph, given, state, True), run(graph, given, state, rounding=False)
    execute(exact, graph.nodes)
    gradients = [n for n, v in graph.values.items() if v.exponent is not None and v.dtype == "s8"]
    assert len(gradients) == 7
    for name in gradients:
        a = exact.values[name] * 2.0 ** exact.exponent(name)
        b = np.broadcast_to(real[name], a.shape)
        cosine = float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))
        assert cosine > 0.96, (name, cosine)
        assert 0.9 < np.linalg.norm(a) / np.linalg.norm(b) < 1.1, name


def test_rounding_is_unbiased_around_float_sgd() -> None:
    """The mean of exact updates over many seeds of the random words is the unrounded update."""
    graph = _residual_model(True)
    image, lr = _image(graph, 8), 0.25
    base = initial_state(graph, 5)
    bits, name = 4, "conv.0.trained"
    given = {"input": image, "label": np.array([1], np.int32), "lr": np.array([lr], np.float32)}
    want = run(graph, given, base, rounding=False)[name] - base.arrays[name]
    total = np.zeros(want.shape)
    count = 400
    for seed in range(count):
        state = base.copy()
        state.seed = seed
        after = run(graph, given, state)
        total += after[name].astype(float) + after["conv.0.fraction"] / 2.0**bits - base.arrays[name]
    cosine = float((total * want).sum() / np.linalg.norm(total) / np.linalg.norm(want))
    assert cosine > 0.98


def test_exact_steps_do_not_go_on_from_unrounded_ones(chain: Graph) -> None:
    state = initial_state(chain, 1)
    train_step(chain, state, _image(chain), 2, 0.1, rounding=False)
    assert train_step(chain, state, _image(chain), 2, 0.1, rounding=False).status is Status.OK
    with pytest.raises(ValueError, match="comes from steps without rounding"):
        train_step(chain, state, _image(chain), 2, 0.1)


def test_a_vector_for_all_pixels_counts_all_of_them() -> None:
    """The pooled gradient is stored once; sums over pixels count it H W times."""
    graph = _residual_model(False)
    state = initial_state(graph, 5)
    given = {"input": _image(graph), "label": np.array([1], np.int32), "lr": np.ones(1, np.float32)}
    r = start(graph, given, state, True)
    execute(r, graph.nodes)
    pooled = graph.find("enter_grad")[0].outputs[0]
    assert graph.values[pooled].shape == (1, 1, 6)
    np.testing.assert_array_equal(r.values["conv.1.db"], 6 * r.values[pooled][0, 0].astype(np.int64))
    assert run(graph, given, state)[pooled].shape == (1, 1, 6)
