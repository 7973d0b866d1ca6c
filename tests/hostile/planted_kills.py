# SPDX-License-Identifier: Apache-2.0
"""``python -m hostile.planted_kills HOW``: a command that writes ``out/result``, rightly or not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

OUT = Path("out")
RESULT = OUT / "result"
AGAIN = OUT.with_name("home") / "again"
"""There from the second start on."""


def sound(again: bool) -> None:
    """Writes beside, and renames."""
    temporary = Path("tmp") / "result"
    temporary.write_text("done")
    temporary.replace(RESULT)


def differs(again: bool) -> None:
    """Goes on behind what it wrote before."""
    with RESULT.open("a") as f:
        f.write("done")


def refused(again: bool) -> None:
    """Does not go on at all."""
    sys.exit(2 if again else 0)


def files(again: bool) -> None:
    """Leaves the temporary file of each start."""
    (Path("tmp") / f"{os.getpid()}.tmp").write_text("") if again else None
    RESULT.write_text("done")


def processes(again: bool) -> None:
    """Leaves a process."""
    if not again:
        subprocess.Popen(["sleep", "30"])
    RESULT.write_text("done")


if __name__ == "__main__":
    OUT.mkdir(exist_ok=True)
    started_again = AGAIN.exists()
    AGAIN.write_text("")
    globals()[sys.argv[1]](started_again)
