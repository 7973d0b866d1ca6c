# SPDX-License-Identifier: Apache-2.0
"""Training steps per second on one core, without a prefix cache, beside PyTorch float32 doing the same sparse step.

Both run in this process, pinned to one core, in turns of a few steps; a ratio is taken within each turn, so that what
else the machine does falls on both. PyTorch cannot train part of a weight's channels: its step computes the whole
weight gradient of the layers that the scheme trains. It is given the better of two memory layouts, for each part anew.

    TRAINLET_ASSETS=... python bench/host.py [--json] [--out bench/results/host.json]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from float_model import make_steps
from protocol import assets, describe_machine, open_engine

from trainlet.autodiff.scheme import resolve
from trainlet.frontends import load
from trainlet.ir.graph import Graph
from trainlet.session.host import HostSession
from trainlet.toolchain.host import CACHE_VARIABLE

Job = Callable[[], object]
LR = float(np.float32(0.1 / 256))
LAYOUTS = {"channels first": torch.contiguous_format, "channels last": torch.channels_last}
PARTS = ("step", "forward")


def arguments() -> argparse.Namespace:
    """Command line."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", default="mcunet-5fps", help="name of a checkpoint in TRAINLET_ASSETS/models")
    p.add_argument("--scheme", default="99kb")
    p.add_argument("--bits", type=int, default=8, choices=(8, 12, 16))
    p.add_argument("--classes", type=int, default=10)
    p.add_argument("--steps", type=int, default=20, help="steps in a turn")
    p.add_argument("--turns", type=int, default=15)
    p.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)), help="the core to run on")
    p.add_argument("--pytorch-only", action="store_true", help="measure no engine")
    p.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    p.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "host.json")
    return p.parse_args()


def compiled(args: argparse.Namespace) -> tuple[HostSession, float]:
    """(session, seconds from checkpoint to loaded library), with nothing in the compiler's cache."""
    before = os.environ.get(CACHE_VARIABLE)
    with tempfile.TemporaryDirectory() as empty:
        os.environ[CACHE_VARIABLE] = empty
        start = time.perf_counter()
        session = open_engine(load(assets() / "models" / f"{args.model}.pkl"), args.scheme, args.classes, args.bits)
        seconds = time.perf_counter() - start
    if before is None:
        del os.environ[CACHE_VARIABLE]
    else:
        os.environ[CACHE_VARIABLE] = before
    return session, seconds


def engine_jobs(graph: Graph, session: HostSession, classes: int) -> dict[str, Job]:
    """A training step and a forward pass. Images and labels change from call to call."""
    session.reset(0)
    shape = graph.values[graph.inputs[0]].shape
    images = np.random.default_rng(0).integers(-128, 128, (8, *shape)).astype(np.int8)
    count = 0

    def step() -> object:
        nonlocal count
        count += 1
        return session.train_step(images[count % 8], count % classes, LR)

    def forward() -> object:
        nonlocal count
        count += 1
        return session.infer(images[count % 8])

    return {"step": step, "forward": forward}


def timed(job: Job, steps: int) -> float:
    """Milliseconds per call."""
    start = time.perf_counter()
    for _ in range(steps):
        job()
    return (time.perf_counter() - start) / steps * 1e3


def interleave(jobs: Mapping[str, Job], steps: int, turns: int) -> dict[str, list[float]]:
    """Milliseconds of each job in each turn; the order within a turn alternates. One turn before is not counted."""
    times: dict[str, list[float]] = {k: [] for k in jobs}
    for turn in range(turns + 1):
        names = list(jobs) if turn % 2 else list(jobs)[::-1]
        for k in names:
            ms = timed(jobs[k], steps)
            if turn:
                times[k].append(ms)
    return times


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summarize(times: Mapping[str, Sequence[float]]) -> dict[str, object]:
    """Milliseconds of everything; where there is an engine, how many times faster than the better PyTorch it is."""
    torches = {k: statistics.median(v) for k, v in times.items() if k != "engine"}
    best = min(torches, key=lambda k: torches[k])
    row: dict[str, object] = {"ms": {k: spread(v) for k, v in times.items()}, "best_pytorch": best}
    if "engine" in times:
        row["speedup"] = spread([p / e for p, e in zip(times[best], times["engine"], strict=True)])
    return row


def measure(args: argparse.Namespace) -> dict[str, object]:
    """The whole result."""
    session = None
    if not args.pytorch_only:
        session, seconds = compiled(args)  # on all cores; all that follows is on one
    os.sched_setaffinity(0, {args.core})
    torch.set_num_threads(1)
    graph = load(assets() / "models" / f"{args.model}.pkl")
    scheme = resolve(args.scheme, graph, args.bits)
    result: dict[str, object] = {
        "machine": describe_machine(),
        "settings": {k: getattr(args, k) for k in ("model", "scheme", "bits", "classes", "steps", "turns")},
        "torch": torch.__version__,
        "load_before": os.getloadavg()[0],  # other jobs on the machine widen the ranges
    }
    torches = {k: dict(zip(PARTS, make_steps(graph, scheme, args.classes, v), strict=True)) for k, v in LAYOUTS.items()}
    jobs = {part: {f"pytorch, {k}": v[part] for k, v in torches.items()} for part in PARTS}
    if session is not None:
        engine = engine_jobs(graph, session, args.classes)
        result |= {"compile_seconds": seconds, "arena_bytes": session.arena_bytes, "state_bytes": session.state_bytes}
        for part in PARTS:
            jobs[part]["engine"] = engine[part]
    for part in PARTS:
        result[part] = summarize(interleave(jobs[part], args.steps, args.turns))
    return result


def table(result: Mapping[str, object]) -> str:
    """The result for people."""
    machine, settings = result["machine"], result["settings"]
    assert isinstance(machine, dict)
    assert isinstance(settings, dict)
    lines = [
        f"{settings['model']}, {settings['scheme']}, {settings['bits']} bits; one core of {machine['cpu']}; "
        f"torch {result['torch']}; {machine['compiler']}; load {result['load_before']:.1f}"
    ]
    for part in PARTS:
        row = result[part]
        assert isinstance(row, dict)
        for name, s in row["ms"].items():
            lines.append(
                f"{part:8} {name:24} {s['median']:8.2f} ms ({s['min']:.2f} .. {s['max']:.2f})"
                f"{1000 / s['median']:9.1f} per second"
            )
        if "speedup" in row:
            s, best = row["speedup"], row["best_pytorch"]
            lines.append(f"{part:8} against {best}: {s['median']:.2f} times ({s['min']:.2f} .. {s['max']:.2f})")
    if "compile_seconds" in result:
        lines.append(f"from checkpoint to loaded library: {result['compile_seconds']:.1f} s")
    return "\n".join(lines)


def main() -> None:
    """Measures, prints, writes."""
    args = arguments()
    result = measure(args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result) if args.json else table(result))


if __name__ == "__main__":
    main()
