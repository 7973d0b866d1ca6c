# SPDX-License-Identifier: Apache-2.0
"""docs/layout.md says what is on the disk: every file of the package is named there, and nothing else is."""

from __future__ import annotations

import re
from pathlib import Path

import trainlet

SOURCE = Path(trainlet.__file__).parent
PAGE = Path(__file__).parent.parent / "docs" / "layout.md"
_WITHOUT_NAMES = {"csrc", "assets", "schemes", "published"}  # folders whose files the page does not list


def tree() -> dict[str, str]:
    """The text of each entry below src/trainlet, by its name."""
    text = PAGE.read_text().split("src/trainlet/\n", 1)[1].split("\nexamples/", 1)[0]
    rows: dict[str, str] = {}
    for line in text.splitlines():
        name = re.match(r"  (\S+)\s", line)
        if name:
            rows[name[1]] = line
        else:
            rows[next(reversed(rows))] += line
    return rows


def test_every_entry_is_there_and_every_entry_is_named() -> None:
    named = {k.split("/")[0] for k in tree()}
    beside = {f for row in tree().values() for f in re.findall(r"[\w_]+\.py", row)}
    there = {p.name for p in SOURCE.iterdir() if p.name != "__pycache__" and (p.is_dir() or p.suffix == ".py")}
    assert named <= there
    assert there <= named | beside


def test_every_file_of_a_folder_is_named() -> None:
    rows = tree()
    for folder in (p for p in SOURCE.iterdir() if p.is_dir() and p.name not in {"__pycache__", *_WITHOUT_NAMES}):
        text = rows[f"{folder.name}/"]
        named = {n for part in re.findall(r"[\w_]+\.py", text) for n in [part]}
        there = {f.name for f in folder.glob("*.py")} - {"__init__.py"}
        families = there if folder.name in ("ops", "reference") else set()  # one file per family
        assert named <= there | {"depth_first.py"}, folder.name
        assert there - families <= named, f"{folder.name}: {sorted(there - families - named)}"


def test_the_order_is_that_of_the_data() -> None:
    order = [k.rstrip("/") for k in tree() if k.endswith("/")]
    assert order[:9] == ["ir", "ops", "reference", "verify", "frontends", "autodiff", "passes", "plan", "emit"]
