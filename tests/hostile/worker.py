# SPDX-License-Identifier: Apache-2.0
"""Runs cases one after the other, each in a child, and prints one JSON object: ``python -m hostile.worker --help``."""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from hostile.case import Kind
from hostile.commands import warm
from hostile.sandbox import run_cases
from hostile.tally import Tally

MODULES: Final = ("models", "data", "states", "calls", "kernels", "planted", "planted_calls")
SHARES: Final = {
    "graph": 6, "pickle": 4, "float": 2, "scheme": 2, "npz": 4, "npy": 1, "images": 3, "state": 2, "checkpoint": 1,
    "jobs": 3, "calls": 6, "numbers": 0.3, "chip": 0.15,
}  # fmt: skip
"""How many batches of each kind come in a long run, beside those of the others."""

WARM: Final = (
    "PIL.Image", "PIL.ImageOps", "numpy", "safetensors.numpy", "sqlite3", "trainlet.cli", "trainlet.cli.prepare",
    "trainlet.toolchain.package", "trainlet.select.store", "trainlet.session.host", "trainlet.train.loop",
    "rich.console", "rich.table", "rich.progress", "rich._emoji_codes", "trainlet.ir.text",
)  # fmt: skip
"""Imported before the first case, so that no child has to."""


def kinds() -> dict[str, Kind]:
    """All kinds by name."""
    modules = (importlib.import_module(f"hostile.{m}") for m in MODULES)
    return {k.name: k for m in modules for k in m.KINDS}


Batch = tuple[str, Sequence[int]]
"""A kind and its seeds."""


def each(names: Sequence[str], first: int, step: int, count: int) -> Iterator[Batch]:
    """``count`` seeds of every kind: first, first + step, ..."""
    return ((name, range(first, first + count * step, step)) for name in names)


def endless(names: Sequence[str], first: int, step: int) -> Iterator[Batch]:
    """Kinds as often as SHARES says, each with its own seeds first, first + step, ..."""
    rng = random.Random(first)
    seeds = dict.fromkeys(names, first)
    weights, known = [SHARES.get(n, 1) for n in names], kinds()
    while True:
        name = rng.choices(names, weights)[0]
        end = seeds[name] + known[name].batch * step
        yield name, range(seeds[name], end, step)
        seeds[name] = end


def prepared(names: Sequence[str], base: Path) -> dict[str, tuple[Kind, Path]]:
    """The kinds, and where the sound files of each are."""
    for module in WARM:
        importlib.import_module(module)
    warm()
    known, found = kinds(), {}
    folders: dict[Callable[[Path], None], Path] = {}
    for name in names:
        prepare = known[name].prepare
        if prepare not in folders:
            folders[prepare] = base / name
            folders[prepare].mkdir(parents=True)
            prepare(folders[prepare])
        found[name] = known[name], folders[prepare]
    gc.collect()
    gc.freeze()  # children share these pages as long as nobody touches them
    return found


def work(names: Sequence[str], batches: Iterator[Batch], seconds: float) -> dict[str, Any]:
    """Runs the batches that begin within ``seconds``."""
    tally = Tally()
    with tempfile.TemporaryDirectory(prefix="hostile-base-") as base:
        found = prepared(names, Path(base))
        deadline = time.monotonic() + seconds
        for name, seeds in batches:
            if time.monotonic() > deadline:
                break
            for verdict in run_cases(found[name][0], seeds, found[name][1]):
                tally.add(verdict)
    return tally.to_json()


def once(name: str, seed: int, keep: Path | None) -> dict[str, Any]:
    """Runs one case; ``keep`` is a folder that is made for its files."""
    tally = Tally()
    with tempfile.TemporaryDirectory(prefix="hostile-base-") as base:
        folder = Path(base) if keep is None else keep / "base"
        kind, place = prepared([name], folder)[name]
        for verdict in run_cases(kind, [seed], place, keep and keep.resolve()):
            tally.add(verdict)
    return tally.to_json()


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--kind", action="append", help=f"{', '.join(SHARES)}; all of these if not given")
    p.add_argument("--first", type=int, default=0, help="first seed")
    p.add_argument("--step", type=int, default=1, help="from one seed to the next")
    p.add_argument("--each", type=int, help="so many cases of each kind; without it, cases without end")
    p.add_argument("--seconds", type=float, default=1e9)
    return p.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the tally as the only line of standard output."""
    args = arguments(argv)
    said = os.dup(1)
    os.dup2(2, 1)  # commands print; their output is not ours
    names = args.kind or list(SHARES)
    batches = each(names, args.first, args.step, args.each) if args.each else endless(names, args.first, args.step)
    result = work(names, batches, args.seconds)
    with os.fdopen(said, "w") as out:
        out.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
