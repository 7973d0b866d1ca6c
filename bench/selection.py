# SPDX-License-Identifier: Apache-2.0
"""What a selected scheme is worth: validation accuracy of the selected, the published, the last-k and the bias-only
scheme, each the largest or best that fits the SRAM of the published one, and of last-k schemes that need more.

Selection sees training images alone; what it is judged by here, the validation images, it never opens. Every run is a
job in --out: interrupt and start again as you like.

    TRAINLET_ASSETS=... python bench/selection.py [--data trashnet] [--seeds 0 1 2] [--quick] [--json]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from protocol import assets, resize_of

from trainlet.cli.output import RichProgress
from trainlet.compiler import compile_model
from trainlet.errors import OverBudgetError
from trainlet.frontends import load
from trainlet.scheme import UpdateScheme, extra_memory_bytes, resolve
from trainlet.select.analyze import QUICK, STANDARD, Effort, Runner
from trainlet.select.baselines import BASELINES, last_choice
from trainlet.select.choose import choose
from trainlet.select.exact import exact
from trainlet.select.jobs import Clock, Executor, JobStore, LocalExecutor, Result, Spec, run_jobs
from trainlet.select.limits import PlannedLimit
from trainlet.select.problem import Choice, Contributions
from trainlet.select.runs import Length, Part, Place, Study, feed, load_place, open_study, train
from trainlet.session.host import HostSession
from trainlet.targets import TARGETS
from trainlet.train import evaluate

RESULTS: Final = Path(__file__).parent / "results"
SHARES: Final = (0.5, 0.7)
"""Of the limit, where a smaller scheme is selected too."""
LAST: Final = (3, 6, 9, 12)


@dataclass(frozen=True)
class Variant:
    """A scheme to be judged; bytes of SRAM as linked (of the larger ones as planned), and of extra memory."""

    name: str
    choice: Choice
    ram_bytes: int
    extra_memory_bytes: int


def judge(place: Place, spec: Spec) -> Result:
    """Trains on all training images; accuracy and loss over all validation images."""
    graph, _, dataset = load_place(place)
    s = spec["scheme"]
    session = HostSession(compile_model(graph, UpdateScheme("run", tuple(s["biases"]), s["weights"], s["bits"])))
    parts = [
        Part(whole, np.arange(len(whole.labels)), name)
        for name, whole in (("train", dataset.train), ("val", dataset.val))
    ]
    train(feed(session, parts[0], place, spec), spec)
    found = evaluate(session, parts[1], feed=feed(session, parts[1], place, spec))
    return {"accuracy": found.accuracy, "loss": found.loss}


def spec_of(study: Study, scheme: UpdateScheme, epochs: int, seed: int) -> Spec:
    """A job of ``judge``."""
    return {**study.train_spec(scheme, Length(1 << 31, 1, epochs), seed), "kind": "judge"}


def variants(c: Contributions, limit: PlannedLimit, selected: Choice, published: str) -> list[Variant]:
    """Selected, published, last-k and bias-only under one limit; selected under less; last-k with more; the head."""

    def variant(name: str, choice: Choice) -> Variant:
        extra = extra_memory_bytes(limit.graph, choice.scheme(c.layers, name))
        return Variant(name, choice, limit.cost(choice), extra)

    scheme = resolve(published, limit.graph, c.bits)
    found = [
        variant("selected", selected),
        variant("published", Choice(len(scheme.biases), dict(scheme.weights), c.bits)),
        variant("last-k", BASELINES["last"](c, limit).choice),
        variant("bias-only", BASELINES["bias"](c, limit).choice),
        variant("head", Choice(0)),
    ]
    for share in SHARES:
        smaller = limit.narrowed(int(share * limit.most))
        try:
            found.append(variant(f"selected, {share:.0%} of the SRAM", exact(c, smaller).choice))
        except OverBudgetError:
            continue
    return [*found, *(variant(f"last:{k}", last_choice(c, k)) for k in LAST)]


def bench(args: argparse.Namespace, data: str, effort: Effort, executor: Executor) -> dict[str, Any]:
    """All of one data set."""
    out = args.out / data
    out.mkdir(parents=True, exist_ok=True)
    model = load(assets() / "models" / f"{args.model}.pkl")
    study = open_study(model, assets() / "data" / data, resize_of(data), out / "cache")
    progress = RichProgress()
    with JobStore(out / "jobs.sqlite") as store:
        runner = Runner(study, store, executor, progress, Clock(executor.workers))
        scheme = resolve(args.published, study.graph)
        chip = TARGETS["stm32f746"]
        same = PlannedLimit(study.graph, chip).link(Choice(len(scheme.biases), dict(scheme.weights))).ram
        limit = PlannedLimit(study.graph, chip, same)
        chosen = choose(runner, effort, [8], limit, exact, 0)
        rows = variants(chosen.contributions, limit, chosen.selection.choice, args.published)
        layers = chosen.contributions.layers
        schemes = [v.choice.scheme(layers, v.name) for v in rows]
        specs = [spec_of(study, s, args.epochs, seed) for s in schemes for seed in args.seeds]
        work = partial(judge, study.place)
        found = run_jobs(store, executor, work, specs, title=data, progress=progress, clock=runner.clock)
    n = len(args.seeds)
    groups = [found[i : i + n] for i in range(0, len(found), n)]
    return {
        "limit_bytes": same,
        "rank_correlation": chosen.analyses[0].agreement,
        "rows": [row(v, results) for v, results in zip(rows, groups, strict=True)],
    }


def row(v: Variant, results: Sequence[Result]) -> dict[str, Any]:
    """One line of the result; the spread is the standard deviation over seeds."""
    accuracy, loss = ([float(r[k]) for r in results] for k in ("accuracy", "loss"))
    return {
        "name": v.name,
        "depth": v.choice.depth,
        "weights": dict(v.choice.weights),
        "ram_bytes": v.ram_bytes,
        "extra_memory_bytes": v.extra_memory_bytes,
        "accuracy": accuracy,
        "accuracy_mean": float(np.mean(accuracy)),
        "accuracy_spread": float(np.std(accuracy, ddof=1)) if len(accuracy) > 1 else None,
        "loss": loss,
        "loss_mean": float(np.mean(loss)),
    }


def table(found: Mapping[str, Any]) -> str:
    """For people."""
    lines = ["validation accuracy in %: mean, spread over seeds; mean loss; SRAM and extra memory in KiB"]
    for data, result in found.items():
        lines.append(f"{data}, under {result['limit_bytes']} bytes:")
        for r in result["rows"]:
            spread = "" if r["accuracy_spread"] is None else f"+- {100 * r['accuracy_spread']:.1f}"
            lines.append(
                f"  {r['name']:28} {100 * r['accuracy_mean']:5.1f} {spread:7} {r['loss_mean']:.3f} "
                f"{r['ram_bytes'] / 1024:7.1f} {r['extra_memory_bytes'] / 1024:7.1f}"
            )
    return "\n".join(lines)


def main() -> None:
    """Runs, prints, writes."""
    p = argparse.ArgumentParser(description="What a selected scheme is worth.")
    p.add_argument("--model", default="mcunet-5fps", help="name of a checkpoint in TRAINLET_ASSETS/models")
    p.add_argument("--published", default="99kb", help="the published scheme whose SRAM all others get")
    p.add_argument("--data", nargs="+", default=["trashnet", "sign_digits", "voc07_person"])
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    p.add_argument("--epochs", type=int, default=8)
    p.add_argument("--quick", action="store_true", help="a quick analysis")
    p.add_argument("--jobs", type=int, default=2, help="processes at a time")
    p.add_argument("--out", type=Path, default=Path("runs/selection"), help="folder of the runs")
    p.add_argument("--summary", type=Path, default=RESULTS / "selection.json")
    p.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    args = p.parse_args()
    executor = LocalExecutor(args.jobs)
    try:
        effort = QUICK if args.quick else STANDARD
        found = {data: bench(args, data, effort, executor) for data in args.data}
    finally:
        executor.close()
    settings = {k: getattr(args, k) for k in ("model", "published", "seeds", "epochs")}
    args.summary.parent.mkdir(parents=True, exist_ok=True)
    everything = {"settings": {**settings, "effort": effort.name}, "data": found}
    args.summary.write_text(json.dumps(everything, indent=1) + "\n")
    print(json.dumps(found) if args.json else table(found))


if __name__ == "__main__":
    main()
