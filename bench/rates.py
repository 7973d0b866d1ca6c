# SPDX-License-Identifier: Apache-2.0
"""Which learning rate suits sparse updates: held-out loss and accuracy of the published schemes at several peak rates.

A quarter of the training images judges; the validation images are not opened. Every run is a job in --out: interrupt
and start again as you like.

    TRAINLET_ASSETS=... python bench/rates.py [--data trashnet sign_digits voc07_person] [--epochs 4] [--json]
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from protocol import assets, resize_of

from trainlet.autodiff.scheme import resolve
from trainlet.cli.output import RichProgress
from trainlet.frontends import load
from trainlet.select.jobs import Clock, Executor, LocalExecutor, run_jobs
from trainlet.select.runs import Length, open_study, train_job
from trainlet.select.store import JobStore

RESULTS: Final = Path(__file__).parent / "results"
SCHEMES: Final = {"mcunet-5fps": "99kb", "mbv2-w0.35": "99kb", "proxyless-w0.3": "98kb"}
ALL_IMAGES: Final = 1 << 31


def measure(args: argparse.Namespace, model: str, data: str, executor: Executor) -> list[dict[str, Any]]:
    """All rates of one model on one data set."""
    out = args.out / model / data
    out.mkdir(parents=True, exist_ok=True)
    graph = load(assets() / "models" / f"{model}.pkl")
    study = open_study(graph, assets() / "data" / data, resize_of(data), out / "cache")
    length = Length(ALL_IMAGES, ALL_IMAGES, args.epochs)
    scheme = resolve(SCHEMES[model], study.graph)
    specs = [study.train_spec(scheme, length, args.seed, rate / 256) for rate in args.rates]
    with JobStore(out / "jobs.sqlite") as store:
        work = partial(train_job, study.place)
        progress, clock = RichProgress(), Clock(executor.workers)
        found = run_jobs(store, executor, work, specs, title=f"{model}, {data}", progress=progress, clock=clock)
    kept = ("loss", "accuracy", "problem")
    names = {"model": model, "data": data, "scheme": scheme.name}
    return [{**names, "rate_x256": rate, **{k: r[k] for k in kept}} for rate, r in zip(args.rates, found, strict=True)]


def means(rows: list[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """By rate, over models and data; None where a run diverged."""
    found: dict[str, dict[str, float | None]] = {}
    for rate in dict.fromkeys(r["rate_x256"] for r in rows):
        mine = [r for r in rows if r["rate_x256"] == rate]
        whole = all(r["loss"] is not None for r in mine)
        found[str(rate)] = {k: float(np.mean([r[k] for r in mine])) if whole else None for k in ("loss", "accuracy")}
    return found


def table(found: dict[str, Any]) -> str:
    """For people."""
    lines = ["peak rate x 256; held-out loss and accuracy in %, mean over models and data sets"]
    for rate, v in found["means"].items():
        loss = v["loss"]
        lines.append(f"  {rate:6} " + ("diverged" if loss is None else f"{loss:.3f} {100 * v['accuracy']:5.1f}"))
    return "\n".join(lines)


def main() -> None:
    """Runs, prints, writes."""
    p = argparse.ArgumentParser(description="Which learning rate suits sparse updates.")
    p.add_argument("--models", nargs="+", default=list(SCHEMES), choices=list(SCHEMES))
    p.add_argument("--data", nargs="+", default=["trashnet", "sign_digits", "voc07_person"])
    p.add_argument("--rates", nargs="+", type=float, default=[0.1, 0.3, 0.5, 1.0, 2.0], help="times 1/256")
    p.add_argument("--epochs", type=int, default=4)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--jobs", type=int, default=2, help="processes at a time")
    p.add_argument("--out", type=Path, default=Path("runs/rates"), help="folder of the runs")
    p.add_argument("--summary", type=Path, default=RESULTS / "rates.json")
    p.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    args = p.parse_args()
    executor = LocalExecutor(args.jobs)
    try:
        rows = [row for m in args.models for d in args.data for row in measure(args, m, d, executor)]
    finally:
        executor.close()
    settings = {k: getattr(args, k) for k in ("epochs", "seed", "rates")}
    found = {"settings": settings, "means": means(rows), "rows": rows}
    args.summary.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found) if args.json else table(found))


if __name__ == "__main__":
    main()
