# SPDX-License-Identifier: Apache-2.0
"""What tells a run that has diverged: loss and share of weights at the clamp, in windows of 100 steps, from rates that
are far too low to rates that are far too high. The limits of ``trainlet.train.watch`` stand between them.

    TRAINLET_ASSETS=... python bench/divergence.py [--steps 800] [--json]
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np
from protocol import assets, open_data

from trainlet.autodiff.scheme import resolve
from trainlet.compiler import compile_model
from trainlet.demo import run as demo
from trainlet.emit import Compiled
from trainlet.errors import MismatchError
from trainlet.frontends import attach_head, load
from trainlet.session.host import HostSession
from trainlet.train import watch
from trainlet.train.data import Dataset, load_data
from trainlet.train.loop import PrefixFeed, cross_entropy, default_lr, epoch_order, learning_rate

RESULTS: Final = Path(__file__).parent / "results"
FACTORS: Final = (0.01, 0.25, 1, 4, 16, 64, 512, 1e6)  # of the default rate, or of the demo's
PUBLISHED: Final = (
    ("mcunet-5fps", "trashnet", "99kb", 8),
    ("mcunet-5fps", "sign_digits", "last:3", 12),
    ("mbv2-w0.35", "voc07_person", "49kb", 8),
    ("proxyless-w0.3", "sign_digits", "98kb", 16),
    ("mbv2-w0.35", "trashnet", "head", 8),
)
PREFIXES: Final = 1 << 30


def cases() -> Iterator[tuple[str, Compiled, Dataset, float]]:
    """Name, compiled model, data and the rate that suits it."""
    with tempfile.TemporaryDirectory() as folder:
        demo.write_inputs(Path(folder))
        images = load_data(Path(folder) / demo.DATA_FILE, demo.TRANSFORM)
    yield "demo, its scheme and head", demo.compile_demo(), images, demo.LR
    shipped = demo.load_model()
    full = compile_model(attach_head(shipped, 10), resolve("full", shipped))
    yield "demo, full, new head", full, images, demo.LR
    for model, data, name, bits in PUBLISHED:
        graph = load(assets() / "models" / f"{model}.pkl")
        scheme, images = resolve(name, graph, bits), open_data(data, graph)
        compiled = compile_model(attach_head(graph, len(images.classes)), scheme)
        yield f"{model}, {data}, {name}, {bits} bits", compiled, images, default_lr(scheme)


def measure(session: HostSession, feed: PrefixFeed, images: Dataset, lr: float, steps: int) -> dict[str, Any]:
    """Two epochs of ``steps`` in all. ``risen``: the largest loss of a window, over ln(classes) or the loss at the
    start, if that is larger; ``clamped``: the largest share at the clamp, less that at the start; ``told``: the step
    at which the limits were passed, 0 if they were not."""
    labels, chance = images.train.labels, math.log(len(images.classes))
    bits = session.compiled.scheme.bits
    session.reset(0)
    order = epoch_order(labels, 0, 0, steps // 2).tolist()
    look = order[: watch.LOOK]
    logits = np.array([feed.logits(i) for i in look], np.float64)
    state = session.state()
    start = watch.Start(
        sum(cross_entropy(z, int(labels[i])) for z, i in zip(logits, look, strict=True)) / len(look),
        watch.clamped_share(state, bits),
        watch.mean_square(state, logits),
    )
    order += epoch_order(labels, 0, 1, steps // 2).tolist()
    found: dict[str, Any] = {
        "lr": lr,
        "risen": 0.0,
        "clamped": -1.0,
        "told": 0,
        "accuracy": 0.0,
        "start": asdict(start),
    }
    losses, right = [], []
    try:
        for t, i in enumerate(order):
            info = feed.step(i, learning_rate(t, len(order), lr), None)
            losses.append(info.loss)
            right.append(info.prediction == labels[i])
            if len(losses) % watch.WINDOW:
                continue
            loss, clamped = float(np.mean(losses[-watch.WINDOW :])), watch.clamped_share(session.state(), bits)
            found["risen"] = max(found["risen"], loss / max(chance, start.loss))
            found["clamped"] = max(found["clamped"], clamped - start.clamped)
            if not found["told"] and watch.divergence(start, chance, loss, clamped):
                found["told"] = t + 1
    except MismatchError as e:
        found["stopped"] = str(e)
    return {**found, "accuracy": float(np.mean(right[-watch.WINDOW :]))}


def main() -> None:
    """Measures, and prints a line for each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--json", action="store_true", help="write bench/results/divergence.json")
    args = parser.parse_args()
    rows = []
    for name, compiled, images, rate in cases():
        session = HostSession(compiled)
        feed = PrefixFeed(session, images.train, [PREFIXES])
        for factor in FACTORS:
            row = {"case": name, "factor": factor, **measure(session, feed, images, rate * factor, args.steps)}
            rows.append(row)
            shown = f"risen {row['risen']:9.3g}  clamped {row['clamped']:+.3f}  accuracy {row['accuracy']:.2f}"
            print(f"{name:42s} x {factor:<8g} {shown}  told at step {row['told']}", flush=True)
    if args.json:
        (RESULTS / "divergence.json").write_text(json.dumps({"steps": args.steps, "runs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
