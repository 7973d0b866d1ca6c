# SPDX-License-Identifier: Apache-2.0
"""Person or no person, learned on the chip: 100 photographs, MCUNet-5FPS, the scheme 99kb, on an emulated STM32F746 cut
to 256 KB of SRAM. Accuracy on all validation images before and after; memory and instructions measured; time estimated.
The demonstration of On-Device Training Under 256KB Memory (NeurIPS 2022).

    TRAINLET_ASSETS=... python bench/person.py [--epochs 10] [--limit 100] [--runs DIR]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from protocol import assets, describe_machine, open_data, open_engine

from trainlet.frontends import load
from trainlet.svg import Curve, accuracy_svg
from trainlet.train.loop import evaluate

SCHEMES = {"99kb": ("sparse update", "#0b6e4f"), "head": ("head only", "#b04a00")}
HERE = Path(__file__).parent


def trainlet(*words: object) -> dict[str, Any]:
    """Runs the command and returns its JSON."""
    command = [sys.executable, "-m", "trainlet", *map(str, words), "--json"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def curve(out: Path) -> list[float]:
    """Accuracy on the validation images after each epoch."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["val_accuracy"] for line in lines if line.get("type") == "epoch"]


def guesses(model: Path, seed: int) -> float:
    """Accuracy on the validation images before the model has seen one: that of the random head."""
    graph = load(model)
    session = open_engine(graph, "99kb", 2, 8)
    session.reset(seed)
    return evaluate(session, open_data("voc07_person", graph).val).accuracy


def main() -> None:
    """Trains both ways on the chip, and writes JSON and pictures."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--epochs", type=int, default=10)
    p.add_argument("--limit", type=int, default=100)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--runs", type=Path, default=Path("runs/person"))
    p.add_argument("--out", type=Path, default=HERE / "results" / "person.json")
    p.add_argument("--docs", type=Path, default=HERE.parent / "docs")
    args = p.parse_args()
    model, data = assets() / "models/mcunet-5fps.pkl", assets() / "data/voc07_person"
    chip = ("--sram", "256KB", "--target", "stm32f746")
    common = ("--model", model, "--data", data, "--resize", "squeeze", "--augment", "flip", "--seed", args.seed,
              "--overwrite")  # fmt: skip
    results: dict[str, Any] = {"before": guesses(model, args.seed)}
    for scheme in SCHEMES:
        out = args.runs / scheme
        words = (*common, "--scheme", scheme, "--epochs", args.epochs, "--limit", args.limit, "--out", out)
        device = trainlet("train", *words, "--on", "cortex-m7", *chip)
        host = trainlet("train", *words[:-1], args.runs / f"{scheme}-host")
        if device["state_sha256"] != host["state_sha256"]:
            sys.exit(f"{scheme}: the chip ended at {device['state_sha256']}, the host at {host['state_sha256']}")
        results[scheme] = {"curve": curve(out), **device}
    plan = trainlet("plan", "--model", model, "--scheme", "99kb", "--classes", 2, "--measure", *chip, "--picture",
                    args.docs / "person_memory.svg")  # fmt: skip
    results["plan"] = plan
    curves = [
        Curve(label, color, list(enumerate([results["before"], *results[s]["curve"]])))
        for s, (label, color) in SCHEMES.items()
    ]
    ticks = range(args.epochs + 1)
    (args.docs / "person.svg").write_text(accuracy_svg(curves, f"passes over {args.limit} images", ticks, 0.4))
    results["machine"] = describe_machine()
    args.out.write_text(json.dumps(results, indent=2) + "\n")
    steps = args.epochs * args.limit
    seconds = plan.get("estimated_seconds_per_step")
    print(json.dumps({
        "accuracy_before": results["before"],
        "accuracy_after": results["99kb"]["val_accuracy"],
        "accuracy_head_only": results["head"]["val_accuracy"],
        "ram_bytes": results["99kb"]["ram_bytes"],
        "flash_bytes": results["99kb"]["flash_bytes"],
        "instructions_per_step": results["99kb"]["instructions_per_step"],
        "estimated_minutes": None if seconds is None else seconds * steps / 60,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
