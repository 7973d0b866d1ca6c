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

SCHEMES = {"99kb": "#0b6e4f", "head": "#b04a00"}
LABELS = {"99kb": "sparse update, 99kb scheme", "head": "head only"}
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 640, 300, 56, 16, 190, 44
LOW, HIGH = 0.5, 1.0


def train(scheme: str, args: argparse.Namespace) -> dict[str, Any]:
    """One run; returns its final JSON object and the accuracy after each epoch."""
    assets = Path(os.environ["TRAINLET_ASSETS"])
    out = args.runs / scheme
    model, data = assets / "models/mcunet-5fps.pkl", assets / "data/sign_digits"
    words = ["--model", model, "--data", data, "--scheme", scheme, "--epochs", args.epochs, "--seed", args.seed]
    command = [sys.executable, "-m", "trainlet.cli", "train", *map(str, words), "--out", str(out)]
    command += ["--overwrite", "--json"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    final: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    keep = ("val_accuracy", "val_loss", "arena_bytes", "state_bytes", "state_sha256", "images_per_second", "seconds")
    curve = [line["val_accuracy"] for line in lines if line.get("type") == "epoch"]
    return {"curve": curve, **{k: final[k] for k in keep}}


def place(epoch: int, accuracy: float, epochs: int) -> tuple[float, float]:
    """Picture coordinates of a point."""
    x = LEFT + (WIDTH - LEFT - RIGHT) * (epoch - 1) / max(epochs - 1, 1)
    y = TOP + (HEIGHT - TOP - BOTTOM) * (HIGH - max(accuracy, LOW)) / (HIGH - LOW)
    return round(x, 1), round(y, 1)


def picture(results: dict[str, dict[str, Any]], epochs: int) -> str:
    """The SVG."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif"'
        ' font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for percent in range(50, 101, 10):
        x0, y = place(1, percent / 100, epochs)
        parts.append(f'<line x1="{x0}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}" stroke="#ddd"/>')
        parts.append(f'<text x="{x0 - 8}" y="{y + 4}" text-anchor="end" fill="#555">{percent} %</text>')
    for epoch in range(1, epochs + 1):
        x, y = place(epoch, LOW, epochs)
        parts.append(f'<text x="{x}" y="{y + 18}" text-anchor="middle" fill="#555">{epoch}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle" fill="#555">epoch</text>')
    for scheme, run in results.items():
        points = [place(i + 1, a, epochs) for i, a in enumerate(run["curve"])]
        path = " ".join(f"{x},{y}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{SCHEMES[scheme]}" stroke-width="2.5"/>')
        x, y = points[-1]
        label = f"{100 * run['curve'][-1]:.1f} %  {LABELS[scheme]}"
        parts.append(f'<text x="{x + 8}" y="{y + 4}" fill="{SCHEMES[scheme]}">{label}</text>')
    return "\n".join([*parts, "</svg>\n"])


def main() -> None:
    """Runs both schemes and writes the JSON and the picture."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--runs", type=Path, default=Path("runs/curve"))
    p.add_argument("--epochs", type=int, default=8)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "curve.json")
    p.add_argument("--picture", type=Path, default=Path(__file__).parent.parent / "docs" / "sign_digits.svg")
    args = p.parse_args()
    results = {scheme: train(scheme, args) for scheme in SCHEMES}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"epochs": args.epochs, "seed": args.seed, "runs": results}, indent=2) + "\n")
    args.picture.write_text(picture(results, args.epochs))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
