# SPDX-License-Identifier: Apache-2.0
"""Attacks the project for as long as it is told to: hostile files of every kind and forged calls of the compiled C,
each in a child under limits, and kills at random moments. Exit code 0 only where every counter is 0.

    python bench/hostile.py --minutes 20 --json OUT            mutated inputs; --jobs processes, and one with sanitizers
    python bench/hostile.py --kills 200 --json OUT             kills of commands that write
    python bench/hostile.py --kind graph --seed 7 --keep DIR   one input again; its files and its log stay in DIR
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path.insert(0, str(TESTS))  # before this folder, whose hostile.py is this file

from hostile.kills import COMMANDS, kill_many  # noqa: E402
from hostile.tally import merged  # noqa: E402
from hostile.worker import SHARES, once  # noqa: E402
from protocol import describe_machine  # noqa: E402

SANITIZED = "calls-sanitized"


def arguments() -> argparse.Namespace:
    """Command line."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--minutes", type=float, help="how long inputs are tried")
    p.add_argument("--kills", type=int, help="how often commands are killed")
    p.add_argument("--kind", action="append", help=f"{', '.join(SHARES)}, {SANITIZED}; all of these if not given")
    p.add_argument("--command", action="append", choices=tuple(COMMANDS), help="to kill; all of these if not given")
    p.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that try inputs")
    p.add_argument("--first", type=int, default=0, help="first seed")
    p.add_argument("--seed", type=int, help="this case alone, of one --kind")
    p.add_argument("--keep", type=Path, help="with --seed: a folder that is made for the files of the case")
    p.add_argument("--json", type=Path, help="where the result is written")
    return p.parse_args()


def sanitizers() -> dict[str, str]:
    """What a Python needs that loads a sanitized library."""
    asked = ["gcc", "-print-file-name=libasan.so"]
    library = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    return {
        "LD_PRELOAD": library,
        "ASAN_OPTIONS": "detect_leaks=0:handle_segv=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def environment(kinds: Sequence[str]) -> dict[str, str]:
    """Of a worker for these kinds."""
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    return {**os.environ, **threads, "PYTHONPATH": path, **(sanitizers() if SANITIZED in kinds else {})}


def start(
    args: argparse.Namespace, kinds: Sequence[str], number: int, step: int, folder: Path
) -> subprocess.Popen[bytes]:
    """A worker; its result goes to NUMBER.json in ``folder``."""
    command = [sys.executable, "-m", "hostile.worker", "--first", str(args.first + number % step), "--step", str(step)]
    command += ["--seconds", str(60 * args.minutes), *(w for k in kinds for w in ("--kind", k))]
    with (folder / f"{number}.json").open("wb") as out, (folder / f"{number}.log").open("wb") as log:
        return subprocess.Popen(command, stdout=out, stderr=log, env=environment(kinds))


def attack(args: argparse.Namespace) -> dict[str, Any]:
    """The merged result of all workers. Exits where one of them failed itself."""
    asked = args.kind or [*SHARES, SANITIZED]
    plain = [k for k in asked if k != SANITIZED]
    with tempfile.TemporaryDirectory(prefix="hostile-bench-") as name:
        folder = Path(name)
        workers = [start(args, plain, i, args.jobs, folder) for i in range(args.jobs if plain else 0)]
        if SANITIZED in asked:
            workers.append(start(args, [SANITIZED], args.jobs, 1, folder))
        for process in workers:
            if process.wait():
                raise SystemExit("\n".join(f.read_text()[-4000:] for f in sorted(folder.glob("*.log"))))
        return merged(json.loads(f.read_text()) for f in sorted(folder.glob("*.json"))).to_json()


def repeat(args: argparse.Namespace) -> dict[str, Any]:
    """One case; the process begins anew where it needs the sanitizers."""
    (kind,) = args.kind or ["graph"]
    if kind == SANITIZED and "LD_PRELOAD" not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.argv], environment([kind]))
    return once(kind, args.seed, args.keep)


def kill(args: argparse.Namespace) -> dict[str, Any]:
    """Kills; the folders of what went wrong are kept."""
    folder = Path(tempfile.mkdtemp(prefix="hostile-kills-"))
    return kill_many(folder, args.kills, args.first, args.command or tuple(COMMANDS)).to_json()


def show(result: dict[str, Any]) -> None:
    """The result for people."""
    for f in result["failures"]:
        times = f", {f['times']} times" if "times" in f else ""
        print(f"{f['fault']}: {f.get('kind') or f['command']}{times}; {f['repeat']}\n{f['detail'].rstrip()}\n")
    for name, k in result.get("kinds", {}).items():
        print(
            f"{name:16} {k['inputs']:8,} inputs, slowest {k['slowest']:6.2f} s, most memory {k['largest'] >> 20:5} MiB"
        )
    for name, c in result.get("commands", {}).items():
        print(f"{name:16} {c['kills']:8,} kills in {c['lives']} runs")
    counts = ", ".join(f"{n} {name}" for name, n in result["faults"].items())
    print(f"{result.get('inputs', 0):,} inputs, {result.get('kills', 0)} kills: {counts}")


def main() -> None:
    """Attacks, prints, writes."""
    args, began = arguments(), time.monotonic()
    given = {"seed": repeat, "minutes": attack, "kills": kill}
    do = next((f for name, f in given.items() if getattr(args, name) is not None), None)
    if do is None:
        raise SystemExit("give --minutes, --kills or --seed")
    result = do(args)
    result = {"machine": describe_machine(), "seconds": round(time.monotonic() - began), **result}
    show(result)
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(any(result["faults"].values()))


if __name__ == "__main__":
    main()
