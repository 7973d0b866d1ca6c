# SPDX-License-Identifier: Apache-2.0
"""Executed instructions of a training step and of an inference on emulated chips, and the functions that take most of
them. Cycles are an estimate by llvm-mca, where it is installed, for a Cortex-M7 only.

A model that does not fit its chip runs on one with the same core and more memory, and the table says so.

    TRAINLET_ASSETS=... python bench/device.py [--plain] [--json] [--out bench/results/device.json]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from protocol import assets, describe_machine

from trainlet.autodiff.scheme import resolve
from trainlet.compiler import Compiled, compile_inference, compile_model
from trainlet.errors import OverBudgetError
from trainlet.frontends import attach_head, load
from trainlet.measure.program import Measurement, Program, estimate_cycles, measure
from trainlet.toolchain.armcc import find_arm_compiler
from trainlet.toolchain.targets import Target, find_target

MODELS = ("mcunet-5fps", "mbv2-w0.35", "proxyless-w0.3")
CHIPS = ("stm32f746", "rp2040")
PLAIN = "-DTL_PLAIN_TILE"
TOP = 8


def arguments() -> argparse.Namespace:
    """Command line."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", action="append", help="a checkpoint in TRAINLET_ASSETS/models; all three if not given")
    p.add_argument("--target", action="append", help=f"of `trainlet targets`; {' and '.join(CHIPS)} if not given")
    p.add_argument("--scheme", default="49kb")
    p.add_argument("--bits", type=int, default=8, choices=(8, 12, 16))
    p.add_argument("--classes", type=int, default=10)
    p.add_argument("--plain", action="store_true", help="the portable inner loops instead of those for the core")
    p.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    p.add_argument("--out", type=Path, help="default: results/device.json, with --plain results/device_plain.json")
    return p.parse_args()


def roomy(target: Target) -> Target:
    """The same core with memory for what does not fit."""
    lab = find_target("lab")
    return replace(lab, name=f"{target.name}, more memory", core=target.core, flags=target.flags, fpu=target.fpu)


def measured(compiled: Compiled, inference: Compiled, target: Target) -> Measurement:
    """On the chip, else on one with more memory."""
    try:
        return measure(compiled, inference, target)
    except OverBudgetError:
        return measure(compiled, inference, roomy(target))


def work(program: Program) -> dict[str, object]:
    """Instructions, those of the costliest functions, and cycles if they can be estimated."""
    cycles, note = estimate_cycles(program)
    functions = sorted(program.work.functions.items(), key=lambda item: (-item[1], item[0]))
    return {
        "instructions": program.work.instructions,
        "functions": [
            {
                "function": name,
                "instructions": n,
                "share": n / program.work.instructions,
                "estimated_cycles": cycles.functions.get(name) if cycles else None,
            }
            for name, n in functions[:TOP]
        ],
        "estimated_cycles": cycles.cycles if cycles else None,
        "estimate": note,
        "ram_bytes": program.ram_bytes,
        "flash_bytes": program.flash_bytes,
        "flash_kernels_bytes": program.flash["kernels"],
    }


def rows(args: argparse.Namespace) -> list[dict[str, object]]:
    """One for each model and chip."""
    found: list[dict[str, object]] = []
    for model in args.model or MODELS:
        body = load(assets() / "models" / f"{model}.pkl")
        graph = attach_head(body, args.classes)
        compiled = compile_model(graph, resolve(args.scheme, body, args.bits))
        inference = compile_inference(graph)
        for chip in args.target or CHIPS:
            target = find_target(chip)
            target = replace(target, flags=(*target.flags, PLAIN)) if args.plain else target
            m = measured(compiled, inference, target)
            place = m.train.firmware.target
            where = {"model": model, "target": place.name, "core": place.core}
            found.append({**where, "step": work(m.train), "infer": work(m.infer)})
    return found


def table(result: Mapping[str, object]) -> str:
    """The result for people."""
    settings, measurements = result["settings"], result["rows"]
    assert isinstance(settings, dict)
    assert isinstance(measurements, list)
    lines = [f"{settings['scheme']}, {settings['bits']} bits; {result['compiler']}; {settings['form']} inner loops"]
    for r in measurements:
        for part in ("step", "infer"):
            w = r[part]
            cycles = f", {w['estimated_cycles'] / 1e6:.1f} M cycles (estimated)" if w["estimated_cycles"] else ""
            count = f"{w['instructions'] / 1e6:8.1f} M instructions{cycles}"
            lines.append(f"{r['model']:16} {r['target']:12} {part:6} {count}")
            top = (f"{f['function']} {f['share']:.1%}" for f in w["functions"][:5])
            lines.append(f"{'':16} {', '.join(top)}")
    return "\n".join(lines)


def main() -> None:
    """Measures, prints, writes."""
    args = arguments()
    settings = {k: getattr(args, k) for k in ("scheme", "bits", "classes")}
    result: dict[str, object] = {
        "machine": describe_machine(),
        "settings": {**settings, "form": "portable" if args.plain else "the core's"},
        "compiler": find_arm_compiler().version,
        "rows": rows(args),
    }
    out = args.out or Path(__file__).parent / "results" / f"device{'_plain' * args.plain}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result) if args.json else table(result))


if __name__ == "__main__":
    main()
