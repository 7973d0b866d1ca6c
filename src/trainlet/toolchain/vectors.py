# SPDX-License-Identifier: Apache-2.0
"""Test vectors: synthetic images, and what the reference executor, not the C that is compared with it, gets on them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from trainlet.emit import Compiled, c_float
from trainlet.plan.state import StateCodec
from trainlet.reference import initial_state, train_step

STEPS: Final = 2
SEED: Final = 17
LR: Final = float(np.float32(0.1 / 256))


@dataclass(frozen=True)
class Expected:
    """What the reference executor got on the synthetic images."""

    losses: tuple[float, ...]
    predictions: tuple[int, ...]
    logits: tuple[tuple[float, ...], ...]
    state: bytes


def synthetic_image(shape: tuple[int, ...], t: int) -> NDArray[np.int8]:
    """Image ``t`` of the test vectors, int8 (H, W, C), by a formula that C repeats."""
    h, w, c = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    return ((7 * h + 13 * w + 29 * c + 31 * t + h * w * t // 64) % 256 - 128).astype(np.int8)


def expected(compiled: Compiled) -> Expected:
    """Runs the training steps of the test vectors in the reference executor."""
    graph = compiled.train
    shape = graph.image.shape
    classes = graph.values[graph.outputs[0]].size
    state = initial_state(graph, SEED)
    results = [train_step(graph, state, synthetic_image(shape, t), t % classes, LR) for t in range(STEPS)]
    raw = StateCodec(compiled.graph, compiled.layout).pack_values(SEED, STEPS, state.arrays)
    return Expected(
        tuple(float(r.loss) for r in results),
        tuple(int(r.prediction) for r in results),
        tuple(tuple(float(v) for v in r.logits) for r in results),
        raw,
    )


def expected_header(e: Expected) -> str:
    """The test vectors for C."""
    rows = [e.state[i : i + 24] for i in range(0, len(e.state), 24)]
    body = "\n".join("    " + ", ".join(map(str, r)) + "," for r in rows)
    return (
        "/* SPDX-License-Identifier: Apache-2.0 */\n"
        "/* What the reference executor got: the same steps must leave these bytes. */\n"
        f"#define EXPECTED_STEPS {STEPS}\n#define EXPECTED_SEED {SEED}u\n#define EXPECTED_LR {c_float(LR)}\n\n"
        f"static const float expected_loss[] = {{{', '.join(map(c_float, e.losses))}}};\n"
        f"static const int expected_prediction[] = {{{', '.join(map(str, e.predictions))}}};\n"
        f"static const unsigned char expected_state[{len(e.state)}] = {{\n{body}\n}};\n"
    )


def expected_json(e: Expected) -> str:
    """The test vectors for people and other programs; the state is apart."""
    steps = {"loss": e.losses, "prediction": e.predictions, "logits": e.logits}
    return json.dumps({"seed": SEED, "lr": LR, "steps": STEPS, **steps}, indent=2) + "\n"
