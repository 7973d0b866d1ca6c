# SPDX-License-Identifier: Apache-2.0
"""SRAM of a training step on a Cortex-M7, measured: all RAM, with the stack that was used, of the linked program
after it has trained, for the published checkpoints and schemes, with the image delivered by rows and kept in the arena.
With --sizes also how it grows with the image.

    TRAINLET_ASSETS=... python bench/memory.py [--sizes] [--out bench/results/memory.json] [--compare OLD.json]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from protocol import assets, describe_machine

from trainlet.autodiff.scheme import resolve
from trainlet.compiler import Passes, compile_model
from trainlet.errors import TrainletError
from trainlet.frontends import at_size, attach_head, load
from trainlet.ir.graph import Graph
from trainlet.session.emulator import EmulatorSession
from trainlet.toolchain.targets import find_target
from trainlet.toolchain.vectors import LR, synthetic_image

CLASSES = 10
SCHEMES = {
    "mcunet-5fps": ("49kb", "74kb", "99kb", "124kb", "148kb"),
    "mbv2-w0.35": ("49kb", "73kb", "99kb", "123kb", "138kb"),
    "proxyless-w0.3": ("49kb", "74kb", "98kb", "120kb", "148kb"),
}
SIZES = (96, 128, 160, 224)


def row(model: Graph, pixels: int, scheme: str, bits: int, image: str, target: str) -> dict[str, Any]:
    """One program, linked, and run for a training step."""
    chosen = resolve(scheme, model, bits)
    with_head = attach_head(at_size(model, pixels, pixels), CLASSES)
    compiled = compile_model(with_head, chosen, passes=Passes(by_rows=image == "rows"))
    shape = compiled.graph.values[compiled.graph.inputs[0]].shape
    found: dict[str, Any] = {
        "model": model.name, "scheme": scheme, "bits": bits, "input": image, "pixels": shape[0], "target": target,
        "arena_bytes": compiled.plan.arena_bytes, "lower_bound_bytes": compiled.plan.lower_bound,
        "state_bytes": compiled.state_bytes,
    }  # fmt: skip
    session = EmulatorSession(compiled, find_target(target), seed=0)
    session.train_step(synthetic_image(shape, 0), 0, LR)
    facts = session.facts()
    keys = ("ram_bytes", "ram_stack_bytes", "flash_bytes", "instructions_per_step")
    return found | {k: facts[k] for k in keys}


def show(r: dict[str, Any]) -> str:
    """A line of the table."""
    return (
        f"{r['model']:15} {r['scheme']:6} {r['bits']:2} bits {r['pixels']:3} px {r['input']:5} "
        f"RAM {r['ram_bytes']:7} B = {r['ram_bytes'] / 1024:6.1f} KiB  arena {r['arena_bytes']:7} "
        f"(bound {r['lower_bound_bytes']:7})  state {r['state_bytes']:7}  flash {r['flash_bytes']:7}  "
        f"{r['instructions_per_step'] / 1e6:6.1f} M instructions"
    )


PROGRAM = ("model", "scheme", "bits", "input", "pixels", "target")
COMPARED = ("ram_bytes", "arena_bytes", "state_bytes", "ram_stack_bytes", "flash_bytes", "instructions_per_step")


def differences(rows: list[dict[str, Any]], old: list[dict[str, Any]]) -> list[str]:
    """A line for each figure that is another than in ``old``, and for each program that only one of them has."""
    now, then = ({tuple(r[k] for k in PROGRAM): r for r in some} for some in (rows, old))
    lone = [f"{' '.join(map(str, k))}: only in {'this run' if k in now else 'the other'}" for k in now.keys() ^ then]
    pairs = ((" ".join(map(str, k)), f, then[k][f], now[k][f]) for k in now.keys() & then for f in COMPARED)
    return lone + [f"{program}: {figure} {a} -> {b} ({b - a:+})" for program, figure, a, b in pairs if a != b]


def main() -> None:
    """Measures, prints a line for each program, and writes the JSON."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--sizes", action="store_true", help="the scheme 49kb at 96 to 224 pixels, instead of all at 128")
    p.add_argument("--out", type=Path, help="default: results/memory.json, with --sizes results/memory_sizes.json")
    p.add_argument("--compare", type=Path, help="an earlier result: prints what differs, exit code 1 if RAM or work do")
    args = p.parse_args()
    old = json.loads(args.compare.read_text())["rows"] if args.compare else None
    name = "memory_sizes.json" if args.sizes else "memory.json"
    out = args.out or Path(__file__).parent / "results" / name
    rows = []
    for model, schemes in SCHEMES.items():
        graph = load(assets() / "models" / f"{model}.pkl")
        if args.sizes:
            jobs = [(s, "49kb", 8, i, "lab") for s in SIZES for i in ("rows", "image")]
        else:
            jobs = [(128, s, b, i, "stm32f746") for s in schemes for b in (8, 12) for i in ("rows", "image")]
        for job in jobs:
            try:
                rows.append(row(graph, *job))
            except TrainletError as e:
                print(f"{model} {job}: {e}")
                continue
            print(show(rows[-1]), flush=True)
    out.write_text(json.dumps({"machine": describe_machine(), "classes": CLASSES, "rows": rows}, indent=2) + "\n")
    if old is not None:
        found = sorted(differences(rows, old))
        print("\n".join(found) or "every figure is the same")
        sys.exit(any("flash_bytes" not in line for line in found))


if __name__ == "__main__":
    main()
