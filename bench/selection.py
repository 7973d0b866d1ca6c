# SPDX-License-Identifier: Apache-2.0
"""What a selected scheme is worth: validation accuracy of the selected, the published, the last-k and the bias-only
scheme, each the largest or best that fits the SRAM of the published one, and of last-k schemes that need more.

Selection and the choice of each scheme's learning rate see training images alone; what they are judged by here, the
validation images, they never open. Every run is a job in --out: interrupt and start again as you like.

    TRAINLET_ASSETS=... python bench/selection.py [--data trashnet] [--seeds 0 1 2] [--quick] [--json]
    TRAINLET_ASSETS=... python bench/selection.py --sram 64KB       under another limit, without the published scheme
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from protocol import assets, resize_of

from trainlet.autodiff.scheme import UpdateScheme, extra_memory_bytes, resolve
from trainlet.cli.output import RichProgress
from trainlet.compiler import compile_model
from trainlet.errors import OverBudgetError
from trainlet.frontends import load
from trainlet.select.analyze import QUICK, STANDARD, Effort, Runner
from trainlet.select.baselines import BASELINES, bias_choice, last_choice
from trainlet.select.choose import Chosen, choose, pick
from trainlet.select.exact import exact
from trainlet.select.jobs import Clock, Executor, LocalExecutor, run_jobs
from trainlet.select.limits import PlannedLimit
from trainlet.select.problem import Choice, Contributions
from trainlet.select.report import points_json
from trainlet.select.runs import Length, Part, Place, feed, load_place, open_study, train, train_job
from trainlet.select.store import JobStore, Result, Spec
from trainlet.session.host import HostSession
from trainlet.toolchain.targets import TARGETS, parse_size
from trainlet.train.loop import evaluate

RESULTS: Final = Path(__file__).parent / "results"
SHARES: Final = (0.5, 0.7)
"""Of the limit, where a smaller scheme is selected too."""
LAST: Final = (3, 6, 9, 12)
WHOLE: Final = 1 << 31  # images: all there are
RATE_SEED: Final = 17  # of the runs that choose a rate


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


def tuned(runner: Runner, schemes: Sequence[UpdateScheme], args: argparse.Namespace) -> list[float]:
    """For each scheme the rate of ``--rates`` that ends at the lowest held-out loss; of the head alone, that of itself
    among them. A quarter of the training images judges."""
    length = Length(WHOLE, WHOLE, args.epochs)
    rates = [r / 256 for r in args.rates]
    specs = [runner.study.train_spec(s, length, RATE_SEED, rate) for s in schemes for rate in rates]
    work = partial(train_job, runner.study.place)
    found = run_jobs(
        runner.store, runner.executor, work, specs, title="rates", progress=runner.progress, clock=runner.clock
    )
    losses = [math.inf if r["loss"] is None else float(r["loss"]) for r in found]
    groups = [losses[i : i + len(rates)] for i in range(0, len(losses), len(rates))]
    return [rates[g.index(min(g))] for g in groups]


def variants(
    runner: Runner, effort: Effort, chosen: Chosen, limit: PlannedLimit, published: UpdateScheme | None
) -> list[Variant]:
    """Under the limit: selected, last-k, bias-only and the head. With a published scheme, that, what is selected under
    less, and last-k with more."""
    c = chosen.contributions

    def variant(name: str, choice: Choice) -> Variant:
        extra = extra_memory_bytes(limit.graph, choice.scheme(c.layers, name))
        return Variant(name, choice, limit.cost(choice), extra)

    found = [
        variant("selected", chosen.selection.choice),
        variant("last-k", BASELINES["last"](c, limit).choice),
        variant("bias-only", best_biases(c, limit)),
        variant("head", Choice(0)),
    ]
    if published is None:
        return found
    found.append(variant("published", choice_of(published)))
    for share in SHARES:
        smaller = limit.narrowed(int(share * limit.most))
        with contextlib.suppress(OverBudgetError):
            picked = pick(runner, effort, chosen.analyses, smaller, exact, 0)
            found.append(variant(f"selected, {share:.0%} of the SRAM", picked.selection.choice))
    return [*found, *(variant(f"last:{k}", last_choice(c, k)) for k in LAST)]


def best_biases(c: Contributions, limit: PlannedLimit) -> Choice:
    """Of the biases of the last k layers that fit, those that gained most in the analysis."""
    by_gain = sorted(c.biases, key=lambda k: -c.biases[k])
    return next(choice for k in by_gain if limit.fits(choice := bias_choice(c, k)))


def choice_of(scheme: UpdateScheme) -> Choice:
    """A published scheme trains the biases of its last layers, so it is a choice."""
    return Choice(len(scheme.biases), dict(scheme.weights), scheme.bits)


def bench(args: argparse.Namespace, data: str, effort: Effort, executor: Executor) -> dict[str, Any]:
    """All of one data set."""
    out = args.out / data
    out.mkdir(parents=True, exist_ok=True)
    model = load(assets() / "models" / f"{args.model}.pkl")
    study = open_study(model, assets() / "data" / data, resize_of(data), out / "cache")
    with JobStore(out / "jobs.sqlite") as store:
        runner = Runner(study, store, executor, RichProgress(), Clock(executor.workers))
        limit = PlannedLimit(study.graph, TARGETS["stm32f746"])
        published = None if args.sram else resolve(args.published, study.graph)
        most = limit.link(choice_of(published)).ram if published else parse_size(args.sram)
        limit = limit.narrowed(most)
        chosen = choose(runner, effort, [8], limit, exact, 0)
        rows = variants(runner, effort, chosen, limit, published)
        layers = chosen.contributions.layers
        schemes = [v.choice.scheme(layers, v.name) for v in rows]
        rates = tuned(runner, schemes, args)
        specs = [
            {**study.train_spec(s, Length(WHOLE, 1, args.epochs), seed, rate), "kind": "judge"}
            for s, rate in zip(schemes, rates, strict=True)
            for seed in args.seeds
        ]
        work = partial(judge, study.place)
        found = run_jobs(store, executor, work, specs, title=data, progress=runner.progress, clock=runner.clock)
    n = len(args.seeds)
    groups = [found[i : i + n] for i in range(0, len(found), n)]
    table = [row(*each) for each in zip(rows, rates, groups, strict=True)]
    return {
        "limit_bytes": most,
        "rank_correlation": chosen.analyses[0].agreement,
        "finalists": points_json(chosen.finalists),
        "rows": table,
        "saving": saving(table),
    }


def saving(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The best last-k scheme of any size, and the smallest selected one that is at least as accurate: how many times
    less extra memory it takes. None where no selected one is."""
    last = max((r for r in rows if r["name"].startswith("last:")), key=lambda r: r["accuracy_mean"], default=None)
    if last is None:
        return None
    good = [r for r in rows if r["name"].startswith("selected") and r["accuracy_mean"] >= last["accuracy_mean"]]
    if not good:
        return None
    least = min(good, key=lambda r: r["extra_memory_bytes"])
    times = last["extra_memory_bytes"] / least["extra_memory_bytes"]
    return {"last": last["name"], "selected": least["name"], "times_less_extra_memory": times}


def row(v: Variant, rate: float, results: Sequence[Result]) -> dict[str, Any]:
    """One line of the result; the spread is the standard deviation over seeds."""
    accuracy, loss = ([float(r[k]) for r in results] for k in ("accuracy", "loss"))
    return {
        "name": v.name,
        "depth": v.choice.depth,
        "weights": dict(v.choice.weights),
        "ram_bytes": v.ram_bytes,
        "extra_memory_bytes": v.extra_memory_bytes,
        "rate_x256": 256 * rate,
        "accuracy": accuracy,
        "accuracy_mean": float(np.mean(accuracy)),
        "accuracy_spread": float(np.std(accuracy, ddof=1)) if len(accuracy) > 1 else None,
        "loss": loss,
        "loss_mean": float(np.mean(loss)),
    }


def means(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows that all data sets have, as means over them; the spread is that of a mean over seeds."""
    kept = ("accuracy_mean", "loss_mean", "ram_bytes", "extra_memory_bytes")
    every = [{r["name"]: r for r in result["rows"]} for result in found.values()]
    rows = []
    for name in (n for n in every[0] if all(n in rows for rows in every)):
        mine = [rows[name] for rows in every]
        by_seed = np.mean([r["accuracy"] for r in mine], axis=0)
        spread = float(np.std(by_seed, ddof=1)) if len(by_seed) > 1 else None
        rows.append(
            {"name": name, **{k: float(np.mean([r[k] for r in mine])) for k in kept}, "accuracy_spread": spread}
        )
    return rows


def table(found: Mapping[str, Any], average: Sequence[Mapping[str, Any]]) -> str:
    """For people."""
    lines = ["validation accuracy in %: mean, spread over seeds; mean loss; SRAM and extra memory in KiB"]
    for data, result in found.items():
        lines += [f"{data}, under {result['limit_bytes']} bytes:", *map(line, result["rows"])]
        lines += less(result["saving"])
    return "\n".join([*lines, "mean of all data sets:", *map(line, average), *less(saving(average))])


def less(save: Mapping[str, Any] | None) -> list[str]:
    """What ``saving`` found, for people."""
    if save is None:
        return []
    times = save["times_less_extra_memory"]
    return [f"  {save['selected']}: as accurate as {save['last']} with {times:.1f}x less extra memory"]


def line(r: Mapping[str, Any]) -> str:
    """One row for people."""
    spread = "" if r["accuracy_spread"] is None else f"+- {100 * r['accuracy_spread']:.1f}"
    sizes = f"{r['ram_bytes'] / 1024:7.1f} {r['extra_memory_bytes'] / 1024:7.1f}"
    return f"  {r['name']:28} {100 * r['accuracy_mean']:5.1f} {spread:7} {r['loss_mean']:.3f} {sizes}"


def main() -> None:
    """Runs, prints, writes."""
    p = argparse.ArgumentParser(description="What a selected scheme is worth.")
    p.add_argument("--model", default="mcunet-5fps", help="name of a checkpoint in TRAINLET_ASSETS/models")
    p.add_argument("--published", default="99kb", help="the published scheme whose SRAM all others get")
    p.add_argument("--sram", help="the limit instead, such as 64KB")
    p.add_argument("--data", nargs="+", default=["trashnet", "sign_digits", "voc07_person"])
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    p.add_argument("--epochs", type=int, default=8)
    p.add_argument(
        "--rates", nargs="+", type=float, default=[0.5, 1.0, 2.0], help="times 1/256; each scheme has its own"
    )
    p.add_argument("--quick", action="store_true", help="a quick analysis")
    p.add_argument("--jobs", type=int, default=2, help="processes at a time")
    p.add_argument("--out", type=Path, default=Path("runs/selection"), help="folder of the runs")
    p.add_argument("--summary", type=Path, help="[default: results/selection.json, or by the limit of --sram]")
    p.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    args = p.parse_args()
    executor = LocalExecutor(args.jobs)
    try:
        effort = QUICK if args.quick else STANDARD
        found = {data: bench(args, data, effort, executor) for data in args.data}
    finally:
        executor.close()
    settings = {k: getattr(args, k) for k in ("model", "published", "sram", "seeds", "epochs", "rates")}
    average = means(found)
    summary = args.summary or RESULTS / f"selection{f'_{args.sram.lower()}' if args.sram else ''}.json"
    summary.parent.mkdir(parents=True, exist_ok=True)
    everything = {
        "settings": {**settings, "effort": effort.name},
        "data": found,
        "means": average,
        "saving": saving(average),
    }
    summary.write_text(json.dumps(everything, indent=1) + "\n")
    print(json.dumps(everything) if args.json else table(found, average))


if __name__ == "__main__":
    main()
