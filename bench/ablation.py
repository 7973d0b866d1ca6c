# SPDX-License-Identifier: Apache-2.0
"""What each pass saves, measured: SRAM of a training step from updating everything to all passes, for one published
scheme of each checkpoint, on a chip that has room for all of it. JSON, and a picture of the first model.

    TRAINLET_ASSETS=... python bench/ablation.py
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from protocol import assets, describe_machine

JOBS = (("mcunet-5fps", "99kb"), ("mbv2-w0.35", "99kb"), ("proxyless-w0.3", "98kb"))
HERE = Path(__file__).parent


def main() -> None:
    """Runs `trainlet plan --ablate` for each job."""
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("--out", type=Path, default=HERE / "results" / "ablation.json")
    p.add_argument("--picture", type=Path, default=HERE.parent / "docs" / "ablation.svg")
    args = p.parse_args()
    found: list[dict[str, Any]] = []
    for model, scheme in JOBS:
        file = assets() / "models" / f"{model}.pkl"
        words = ["plan", "--model", file, "--scheme", scheme, "--classes", 10, "--ablate"]
        words += [] if found else ["--picture", args.picture]
        command = [sys.executable, "-m", "trainlet", *map(str, words), "--json"]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
        for step in found[-1]["steps"]:
            print(f"{model:15} {scheme:5} {step['name']:16} {step.get('ram_bytes', 0):>9,} B", flush=True)
    args.out.write_text(json.dumps({"machine": describe_machine(), "models": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
