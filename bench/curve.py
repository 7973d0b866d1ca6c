# SPDX-License-Identifier: Apache-2.0
"""Validation accuracy over epochs, sparse update against head only, as README shows it: JSON and a picture.

TRAINLET_ASSETS=... python bench/curve.py [--runs DIR] [--picture docs/sign_digits.svg]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from trainlet.svg import Curve, accuracy_svg

COLORS = {"99kb": "#0b6e4f", "head": "#b04a00"}
LABELS = {"99kb": "sparse update, 99kb scheme", "head": "head only"}
LOW = 0.5


def train(scheme: str, args: argparse.Namespace) -> dict[str, Any]:
    """One run; returns its final JSON object and the accuracy after each epoch."""
    assets = Path(os.environ["TRAINLET_ASSETS"])
    out = args.runs / scheme
    model, data = assets / "models/mcunet-5fps.pkl", assets / "data/sign_digits"
    words = ["--model", model, "--data", data, "--scheme", scheme, "--epochs", args.epochs, "--seed", args.seed]
    command = [sys.executable, "-m", "trainlet", "train", *map(str, words), "--out", str(out)]
    command += ["--overwrite", "--json"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    final: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    keep = ("val_accuracy", "val_loss", "arena_bytes", "state_bytes", "state_sha256", "images_per_second", "seconds")
    curve = [line["val_accuracy"] for line in lines if line.get("type") == "epoch"]
    return {"curve": curve, **{k: final[k] for k in keep}}


def picture(results: dict[str, dict[str, Any]], epochs: int) -> str:
    """The SVG."""
    curves = [Curve(LABELS[k], COLORS[k], list(enumerate(r["curve"], 1))) for k, r in results.items()]
    return accuracy_svg(curves, "epoch", range(1, epochs + 1), LOW)


def main() -> None:
    """Runs both schemes and writes the JSON and the picture."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--runs", type=Path, default=Path("runs/curve"))
    p.add_argument("--epochs", type=int, default=8)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "curve.json")
    p.add_argument("--picture", type=Path, default=Path(__file__).parent.parent / "docs" / "sign_digits.svg")
    args = p.parse_args()
    results = {scheme: train(scheme, args) for scheme in COLORS}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"epochs": args.epochs, "seed": args.seed, "runs": results}, indent=2) + "\n")
    args.picture.write_text(picture(results, args.epochs))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
