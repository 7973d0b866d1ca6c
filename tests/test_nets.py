# SPDX-License-Identifier: Apache-2.0
"""Twenty training steps of the published checkpoints against the test vectors, bit for bit."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainlet.autodiff import scheme
from trainlet.autodiff.walk import differentiate
from trainlet.frontends import attach_head, load_checkpoint
from trainlet.ir.graph import Graph, Node
from trainlet.ops import OPS, Conv2d, RoundGrad, SgdWeight
from trainlet.reference import StepResult, TrainState, initial_state, rounding, train_step

LR = float(np.float32(0.1 / 256))
BITS = {0: 8, 4: 12, 8: 16}
NETS = 5


@cache
def net(assets: Path, index: int) -> tuple[dict[str, Any], Graph]:
    """One entry of nets.json and its TRAIN graph."""
    info = json.loads((assets / "vectors2" / "nets.json").read_text())[index]
    model = attach_head(load_checkpoint(assets / "models" / f"{info['model']}.pkl"), info["classes"])
    chosen = scheme.resolve(info["scheme"], model, bits=BITS[info["fraction_bits"]])
    return info, differentiate(model, chosen)


def image(shape: tuple[int, ...], t: int) -> np.ndarray:
    """The input of step t."""
    h, w, c = np.ogrid[: shape[0], : shape[1], : shape[2]]
    return ((7 * h + 13 * w + 29 * c + 31 * t + (h * w * t) // 64) % 256 - 128).astype(np.int8)


def steps(graph: Graph, state: TrainState, which: range) -> list[StepResult]:
    """These steps of a run of the vectors."""
    shape = graph.values["input"].shape
    return [train_step(graph, state, image(shape, t), t % 10, LR) for t in which]


# --- a state by the names of the vectors ----------------------------------------------------------------------


def _convs(graph: Graph) -> list[Node]:
    return [n for n in graph.nodes if n.op == "conv2d"]


def rhos(graph: Graph, state: TrainState) -> np.ndarray:
    """rho of the input gradient of convolution i; 4 where there is none."""
    model = [n for n in graph.nodes if "int8" in OPS[n.op].stages]
    numbers = {model.index(n): i for i, n in enumerate(_convs(graph))}
    out = np.full(len(numbers), 4, np.int8)
    for node in graph.find("round_grad"):
        assert isinstance(node.attrs, RoundGrad)
        out[numbers[node.attrs.site // 64]] = state.arrays[node.stores["rho"][0]][0]
    return out


def full_weight(graph: Graph, state: TrainState, conv: Node) -> np.ndarray:
    """F of all channels, OHWI."""
    update = next(n for n in graph.find("sgd_weight") if conv["trained"] in n.writes)
    assert isinstance(update.attrs, SgdWeight)
    assert isinstance(conv.attrs, Conv2d)
    trained, *fraction = (state.arrays[name].astype(np.int32) for name in update.writes)
    bits = update.attrs.fraction_bits
    whole = graph.data[conv["weight"]].astype(np.int32) << bits
    where = graph.data[conv["channels"]]
    whole[where if conv.attrs.depthwise else (..., where)] = (trained << bits) + (fraction[0] if fraction else 0)
    return whole


def named(graph: Graph, state: TrainState, results: list[StepResult], rho1: np.ndarray) -> dict[str, np.ndarray]:
    """What the vectors hold, from a finished run."""
    pooled = graph.find("dense")[0]["x"]
    found = {
        "logits": np.stack([r.logits for r in results]),
        "loss": np.array([r.loss for r in results], np.float32),
        "features0": results[0].values[pooled].reshape(-1),
        "rho1": rho1,
        "rho": rhos(graph, state),
        "head_w": state.arrays["head.weight"],
        "head_b": state.arrays["head.bias"],
    }
    for i, conv in enumerate(_convs(graph)):
        if conv["bias"] in state.arrays:
            found[f"b{i}"] = state.arrays[conv["bias"]]
        if "trained" in conv.operands:
            found[f"w{i}"] = full_weight(graph, state, conv)
            found[f"sel{i}"] = graph.data[conv["channels"]]
    return found


def wrong_arrays(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> list[str]:
    """The names of the arrays that differ in any bit, or that only one side has."""
    names = got.keys() | want.keys()
    return sorted(n for n in names if n not in got or n not in want or not _equal(got[n], want[n]))


def _equal(got: np.ndarray, want: np.ndarray) -> bool:
    if want.dtype == np.float32:
        return got.dtype == want.dtype and got.tobytes() == want.tobytes()
    return np.array_equal(got, want)


def _vectors(assets: Path, info: dict[str, Any]) -> dict[str, np.ndarray]:
    with np.load(assets / "vectors2" / info["file"], allow_pickle=False) as f:
        return dict(f)


@pytest.mark.parametrize("index", range(NETS))
def test_twenty_steps(assets: Path, index: int) -> None:
    info, graph = net(assets, index)
    want = _vectors(assets, info)
    digest = hashlib.sha256(b"".join(want[n].tobytes() for n in sorted(want))).hexdigest()
    assert digest == info["sha256_of_arrays_in_name_order"]
    state = initial_state(graph, info["seed"])
    results = steps(graph, state, range(1))
    rho1 = rhos(graph, state)
    results += steps(graph, state, range(1, info["steps"]))
    assert wrong_arrays(named(graph, state, results, rho1), want) == []


def test_a_lost_share_of_a_fan_out_is_caught(assets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info, graph = net(assets, 0)
    want = _vectors(assets, info)
    sound = rounding.add_further
    monkeypatch.setattr(rounding, "add_further", lambda h, r, k: sound(0 * h, r, k))
    state = initial_state(graph, info["seed"])
    results = steps(graph, state, range(2))
    assert results[0].logits.tobytes() == want["logits"][0].tobytes()
    assert results[1].logits.tobytes() != want["logits"][1].tobytes()
