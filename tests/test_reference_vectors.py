# SPDX-License-Identifier: Apache-2.0
"""The reference against the test vectors, bit for bit; planted faults must be caught by the same comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conv_cases import COUNT, ConvCase, conv_graph, load_case

from trainlet.frontends import canonicalize_dead
from trainlet.reference import arithmetic, executor, initial_state, rounding
from trainlet.reference.conv2d import factor_levels
from trainlet.reference.run import Run
from trainlet.verify import verify_graph


@pytest.fixture(scope="session")
def primitives(assets: Path) -> dict[str, Any]:
    with np.load(assets / "vectors2" / "primitives.npz", allow_pickle=False) as f:
        return dict(f)


def _same(got: Any, want: Any) -> None:
    np.testing.assert_array_equal(got, want, strict=False)


def test_quantize_multiplier(primitives: dict[str, Any]) -> None:
    m, sh = arithmetic.quantize_multiplier(primitives["qm_d"])
    _same(m, primitives["qm_m"])
    _same(sh, primitives["qm_sh"])


def test_mbqm(primitives: dict[str, Any]) -> None:
    p = primitives
    _same(arithmetic.mbqm(p["x"], p["m"], p["sh"]), p["mbqm"])


def test_keys_and_words(primitives: dict[str, Any]) -> None:
    keys = [arithmetic.key(*(int(v) for v in row)) for row in primitives["key_in"]]
    _same(keys, primitives["key"])
    _same(arithmetic.word(arithmetic.key(5, 9, 11), np.arange(primitives["word"].size)), primitives["word"])


def test_scaling_and_stochastic_rounding(primitives: dict[str, Any]) -> None:
    p = primitives
    _same(arithmetic.smmulr(p["h"], p["m"]), p["smmulr"])
    h, n = arithmetic.prescale(p["h"], p["n"])
    _same(h, p["pre_h"])
    _same(n, p["pre_n"])
    _same(arithmetic.sround(p["pre_h"], p["pre_n"], p["word"]), p["sround"])


def test_expf_and_logf(primitives: dict[str, Any]) -> None:
    for name, given in (("expf", "expf_x"), ("logf", "logf_z")):
        got = getattr(arithmetic, name)(primitives[given])
        assert got.dtype == np.float32
        _same(got.view(np.uint32), primitives[name].view(np.uint32))


# --- single convolutions ------------------------------------------------------------------------------------


def _run(case: ConvCase, *, fused: bool) -> Run:
    graph = conv_graph(case, fused=fused)
    i, a = case.info, case.arrays
    inputs = {"x": a["x"], "r": a["r"], "lr": np.array([i["lr"]], np.float32), "mask": a["mask"]}
    inputs |= {f"further.{n}": r for n, (r, _) in enumerate(case.residuals)}
    state = initial_state(graph, i["seed"])
    state.step = i["step"]
    run = executor.start(graph, {n: v for n, v in inputs.items() if n in graph.inputs}, state, exact=True)
    run.anchor = i["A"]
    run.exponents = {1: i["e_y"], **{2 + n: e for n, (_, e) in enumerate(case.residuals)}}
    executor.execute(run, graph.nodes)
    return run


def _check(case: ConvCase, run: Run) -> None:
    """Everything that a case pins."""
    i, a = case.info, case.arrays
    _same(run.values["y"], a["y"])
    _same(run.values["rx"], a["rx"])
    assert run.exponents[0] == i["e_x"]
    assert run.values["rho"][0] == i["rho_after"]
    _same(run.values["bias"], a["b_after"])
    bits = i["fraction_bits"]
    full = run.values["weight.trained"].astype(np.int64) << bits
    if bits:
        full = full + run.values["weight.fraction"]
    _same(full, case.kept(a["full"]))
    untouched = a["w"].astype(np.int64) << bits
    merged = untouched.copy()
    merged[case.channels if case.conv.depthwise else (..., case.channels)] = full
    _same(merged, a["full"])


@pytest.mark.parametrize("fused", [False, True], ids=["train", "lowered"])
@pytest.mark.parametrize("index", range(COUNT))
def test_convolution(assets: Path, index: int, fused: bool) -> None:
    case = load_case(assets, index)
    verify_graph(conv_graph(case, fused=fused))
    _check(case, _run(case, fused=fused))


@pytest.mark.parametrize("index", range(COUNT))
def test_constants(assets: Path, index: int) -> None:
    case = load_case(assets, index)
    i, a = case.info, case.arrays
    live = np.delete(np.arange(a["sw"].size), list(case.dead))
    one = np.ones(1, np.float32)
    _same(rounding.EXACT.rate(one, 1.0 / (a["sw"] * i["x_scale"]))[live], a["kb"][live])
    _same(rounding.EXACT.rate(one, i["x_scale"] / a["sw"])[live], a["kw"][live])
    levels = factor_levels(case.conv, a["sw"].size, "layer")
    assert levels == (1 if i["b"] is None else 2 ** i["b"] - 1)
    k = a["sw"].size // case.conv.groups * i["kernel"] ** 2
    assert arithmetic.headroom(127 * 127 * levels * k) == i["p"]


def test_dead_channels(assets: Path) -> None:
    seen = 0
    for index in range(COUNT):
        case = load_case(assets, index)
        a = case.arrays
        w, b, scale, dead = canonicalize_dead(a["file_w"], a["file_b"], a["file_sw"])
        _same(w, a["w"])
        _same(b, a["b"])
        _same(scale.astype(np.float64), a["sw"])
        assert dead == case.dead
        seen += len(dead)
    assert seen > 0


# --- the comparison itself is tested ------------------------------------------------------------------------


def _caught(assets: Path, indices: range) -> int:
    """How many of these cases a planted fault fails."""
    failed = 0
    for index in indices:
        case = load_case(assets, index)
        run = _run(case, fused=False)
        try:
            _check(case, run)
        except AssertionError:
            failed += 1
    return failed


SMALL = range(4, 8)


def test_sound_arithmetic_is_not_blamed(assets: Path) -> None:
    assert _caught(assets, SMALL) == 0


def test_wrong_random_word_is_caught(assets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "word", lambda site, index: arithmetic.word(site, np.asarray(index) + 1))
    assert _caught(assets, SMALL) == len(SMALL)


def test_fan_out_that_overwrites_is_caught(assets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = rounding.add_further
    monkeypatch.setattr(rounding, "add_further", lambda h, r, k: sound(0 * h, r, k))
    assert _caught(assets, SMALL) == 2  # those with a further gradient


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("scaled", lambda acc, v, bound: arithmetic.scaled(acc, 2 * np.asarray(v), bound)),
        ("sround", lambda h, n, w: arithmetic.sround(h, n, 0 * np.asarray(w))),
        ("mbqm", lambda x, m, sh: arithmetic.srdhm(x, m) >> np.maximum(-np.asarray(sh), 0)),
    ],
    ids=["exponent off by one", "truncation", "single rounding"],
)
def test_wrong_rounding_is_caught(assets: Path, monkeypatch: pytest.MonkeyPatch, name: str, fault: Any) -> None:
    monkeypatch.setattr(rounding, name, fault)
    assert _caught(assets, SMALL) == len(SMALL)
