# SPDX-License-Identifier: Apache-2.0
"""What int8 training costs: accuracy of the engine at 8, 12 and 16 bits, and of the head alone, beside the independent
float32 baseline of bench/float_baseline.py, in pairs with the same head, the same images in the same order and the same
learning rates.

Each run is one JSON file in --out with the correctness of every validation image; a run that is there is not repeated.
Run it with an environment that has the extra ``bench``:

    TRAINLET_ASSETS=... python bench/accuracy.py [--only float32] [--json]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray
from protocol import Images, assets, open_data, open_engine, read_images, resize_of
from statistics_of_pairs import Pairs, compare

from trainlet.frontends import load
from trainlet.ir.graph import Graph
from trainlet.train.loop import epoch_order, learning_rate

RESULTS: Final = Path(__file__).parent / "results"
ENGINE_BITS: Final = {"8 bits": 8, "12 bits": 12, "16 bits": 16, "head only": 8}
VARIANTS: Final = ("float32", *ENGINE_BITS)
REFERENCE: Final = "float32"


@dataclass(frozen=True)
class Run:
    """Everything that decides a run's outcome; a file with other settings is not taken for it."""

    data: str
    seed: int
    variant: str
    model: str
    scheme: str
    epochs: int
    lr: float
    resize: str
    model_sha256: str
    data_fingerprint: str
    schedule: str

    @property
    def file(self) -> str:
        """Name of its file."""
        return f"{self.data}_{self.seed}_{self.variant.replace(' ', '_')}.json"


class Learner(Protocol):
    """One side: trains on image i of the training split, and predicts the validation split. ``build`` says what code
    ran: it is recorded, not compared, since every build must give the same bytes."""

    build: str

    def train(self, index: int, label: int, lr: float) -> float:
        """The loss before the update."""

    def logits(self) -> NDArray[np.float32]:
        """(N, classes) of the validation images."""


class FloatLearner:
    """The baseline."""

    def __init__(self, graph: Graph, run: Run, classes: int, train: Images, val: Images) -> None:
        import torch
        from float_baseline import FloatTrainer

        from trainlet.autodiff.scheme import resolve

        torch.set_num_threads(1)
        self.build = f"torch {torch.__version__}"
        self.trainer = FloatTrainer(graph, resolve(run.scheme, graph), classes, run.seed)
        self.train_images, self.val_images = self.trainer.prefix(train.images), self.trainer.prefix(val.images)

    def train(self, index: int, label: int, lr: float) -> float:
        """The loss before the update."""
        return self.trainer.train_step(self.train_images, index, label, lr).loss

    def logits(self) -> NDArray[np.float32]:
        """(N, classes) of the validation images."""
        return self.trainer.infer(self.val_images)


class EngineLearner:
    """The generated C, with the frozen prefix computed once."""

    def __init__(self, graph: Graph, run: Run, classes: int, train: Images, val: Images) -> None:
        scheme = "head" if run.variant == "head only" else run.scheme
        self.session = open_engine(graph, scheme, classes, ENGINE_BITS[run.variant])
        self.build = self.session.library_path.stem
        self.session.reset(run.seed)
        self.train_images, self.val_images = train.images, val.images
        self.cached = bool(self.session.prefix(train.images[0]))
        if self.cached:
            self.train_prefix = [self.session.prefix(x) for x in train.images]
            self.val_prefix = [self.session.prefix(x) for x in val.images]

    def train(self, index: int, label: int, lr: float) -> float:
        """The loss before the update."""
        if self.cached:
            return self.session.train_step_cached(self.train_prefix[index], label, lr).loss
        return self.session.train_step(self.train_images[index], label, lr).loss

    def logits(self) -> NDArray[np.float32]:
        """(N, classes) of the validation images."""
        if self.cached:
            return np.stack([self.session.infer_cached(p) for p in self.val_prefix])
        return np.stack([self.session.infer(x) for x in self.val_images])


def model_file(model: str) -> Path:
    """Path of a checkpoint."""
    return assets() / "models" / f"{model}.pkl"


def execute(run: Run, out: Path) -> str:
    """Trains, validates and writes one run; returns a line to print. Called in a process of its own."""
    start = time.perf_counter()
    graph = load(model_file(run.model))
    train, val = read_images(run.data, graph)
    classes = int(train.labels.max()) + 1
    learner: Learner = (FloatLearner if run.variant == REFERENCE else EngineLearner)(graph, run, classes, train, val)
    ready = time.perf_counter()
    count = len(train.labels)
    losses = []
    for epoch in range(run.epochs):
        total = 0.0
        for k, i in enumerate(epoch_order(train.labels, run.seed, epoch, None)):
            lr = learning_rate(epoch * count + k, run.epochs * count, run.lr)
            total += learner.train(int(i), int(train.labels[i]), lr)
        losses.append(total / count)
    trained = time.perf_counter()
    logits = learner.logits().astype(np.float64)
    correct = logits.argmax(1) == val.labels
    shifted = logits - logits.max(1, keepdims=True)
    loss = np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(logits)), val.labels]
    record = {
        "settings": asdict(run),
        "build": learner.build,
        "val_accuracy": float(correct.mean()),
        "val_loss": float(loss.mean()),
        "train_loss": losses,
        "correct": "".join("01"[int(c)] for c in correct),
        "steps_per_second": run.epochs * count / (trained - ready),
        "seconds": time.perf_counter() - start,
    }
    target = out / run.file
    partial = target.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(target)
    return (
        f"{run.data} seed {run.seed} {run.variant}: {100 * correct.mean():.1f} %, loss {loss.mean():.3f}, "
        f"{record['steps_per_second']:.0f} steps/s, {record['seconds']:.0f} s"
    )


def finished(run: Run, out: Path) -> dict[str, Any] | None:
    """The record of a run, or None where it is missing or of other settings."""
    path = out / run.file
    if not path.is_file():
        return None
    record: dict[str, Any] = json.loads(path.read_text())
    return record if record["settings"] == asdict(run) else None


def run_all(runs: Sequence[Run], out: Path, jobs: int) -> bool:
    """Executes what is missing; true where nothing failed. A failed run does not stop the others."""
    missing = [r for r in runs if finished(r, out) is None]
    print(f"{len(runs) - len(missing)} runs are there, {len(missing)} to do", file=sys.stderr)
    good = True
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(execute, r, out): r for r in missing}
        for future in as_completed(futures):
            error = future.exception()
            good &= error is None
            run = futures[future]
            line = f"FAILED {run.data} seed {run.seed} {run.variant}: {error!r}" if error else future.result()
            print(line, file=sys.stderr, flush=True)
    return good


def summarize(runs: Sequence[Run], out: Path) -> dict[str, Any]:
    """Accuracy of each run, and every variant against the float32 baseline over the pairs that both have."""
    records = {(r.data, r.seed, r.variant): rec for r in runs if (rec := finished(r, out)) is not None}
    correct = {k: np.array([c == "1" for c in rec["correct"]]) for k, rec in records.items()}
    summary: dict[str, Any] = {"runs": {}, "against_float32": {}}
    for (data, seed, variant), rec in records.items():
        row = {"seed": seed, "accuracy": rec["val_accuracy"], "loss": rec["val_loss"]}
        summary["runs"].setdefault(variant, {}).setdefault(data, []).append(row)
    for variant in dict.fromkeys(r.variant for r in runs):
        pairs: Pairs = {
            (data, seed): (correct[data, seed, v], correct[data, seed, REFERENCE])
            for data, seed, v in records
            if v == variant != REFERENCE and (data, seed, REFERENCE) in correct
        }
        if pairs:
            summary["against_float32"][variant] = compare(pairs)
    return summary


def table(summary: Mapping[str, Any]) -> str:
    """The summary for people."""
    lines = ["validation accuracy in %, a number for each seed; mean loss"]
    for variant, sets in summary["runs"].items():
        for data, rows in sets.items():
            rows = sorted(rows, key=lambda r: r["seed"])
            numbers = ", ".join(f"{100 * r['accuracy']:.1f}" for r in rows)
            loss = sum(r["loss"] for r in rows) / len(rows)
            lines.append(f"  {variant:10} {data:14} {numbers:24} {loss:.3f}")
    lines.append("points against float32 in pairs, pooled over validation images; 95 % intervals")
    for variant, c in summary["against_float32"].items():
        low, high = c["images_interval"]
        line = f"  {variant:10} {c['difference']:+.2f}  images {low:+.2f} .. {high:+.2f}"
        if c["runs_interval"] is not None:
            low, high = c["runs_interval"]
            line += f"  runs {low:+.2f} .. {high:+.2f}"
        lines.append(f"{line}  ({c['pairs']} pairs, {c['images']} images)")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    """Command line."""
    p = argparse.ArgumentParser(description="Accuracy of the engine beside float32 training.")
    p.add_argument("--model", default="mcunet-5fps", help="name of a checkpoint in TRAINLET_ASSETS/models")
    p.add_argument("--scheme", default="99kb")
    p.add_argument("--data", nargs="+", default=["sign_digits", "trashnet", "voc07_person"])
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    p.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="variants to run")
    p.add_argument("--epochs", type=int, default=4)
    p.add_argument("--lr", type=float, default=0.1 / 256)
    p.add_argument("--jobs", type=int, default=2, help="processes at a time")
    p.add_argument("--out", type=Path, default=RESULTS / "accuracy", help="folder of the runs")
    p.add_argument("--summary", type=Path, default=RESULTS / "accuracy.json")
    p.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    return p.parse_args()


def schedule_digest(seed: int) -> str:
    """Changes when the learning rate's rule or the order of images does, so that old runs are not paired with new."""
    rates = np.array([learning_rate(i, 100, 1.0) for i in range(100)], np.float32)
    order = epoch_order(np.arange(100) % 7, seed, 1, None)
    return hashlib.sha256(rates.tobytes() + order.astype("<i8").tobytes()).hexdigest()[:16]


def planned(args: argparse.Namespace) -> Iterable[Run]:
    """All runs, the baseline of a pair first."""
    path = model_file(args.model)
    graph, digest = load(path), hashlib.sha256(path.read_bytes()).hexdigest()
    prints = {data: open_data(data, graph).fingerprint for data in args.data}
    common = (args.model, args.scheme, args.epochs, args.lr)
    for variant in args.only:
        for data in args.data:
            for seed in args.seeds:
                facts = (resize_of(data), digest, prints[data], schedule_digest(seed))
                yield Run(data, seed, variant, *common, *facts)


def main() -> None:
    """Runs, prints, writes; exit code 1 where a run failed."""
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    runs = list(planned(args))
    good = run_all(runs, args.out, args.jobs)
    summary = {"settings": {"epochs": args.epochs, "lr": args.lr, "model": args.model, "scheme": args.scheme}}
    summary |= summarize(runs, args.out)
    args.summary.parent.mkdir(parents=True, exist_ok=True)
    args.summary.write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary) if args.json else table(summary))
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
