# SPDX-License-Identifier: Apache-2.0
"""The arrows between the rooms of the package run one way, and no file is long."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import trainlet

SOURCE = Path(trainlet.__file__).parent
LONGEST = 500


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Everything that runs, blocks for type checkers left out."""
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        for child in ("body", "orelse", "finalbody"):
            yield from _statements([n for n in getattr(node, child, []) if isinstance(n, ast.stmt)])


def _imported(text: str) -> set[str]:
    """The top-level entries of trainlet that a file imports."""
    found = set()
    for node in _statements(ast.parse(text).body):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{a.name}" for a in node.names]
        found |= {n.split(".")[1] for n in names if n.startswith("trainlet.")}
    return found


def arrows(files: Mapping[str, str]) -> dict[str, set[str]]:
    """What each top-level entry imports of the others; ``files`` are their texts by path."""
    found: dict[str, set[str]] = {}
    for path, text in files.items():
        entry = path.split("/")[0].removesuffix(".py")
        if entry not in ("__init__", "__main__"):
            found.setdefault(entry, set()).update(_imported(text) - {entry})
    return {k: v & found.keys() for k, v in found.items()}


def test_imports_run_one_way() -> None:
    files = {str(p.relative_to(SOURCE)): p.read_text() for p in SOURCE.rglob("*.py")}
    tuple(TopologicalSorter(arrows(files)).static_order())


def test_a_circle_is_found() -> None:
    files = {"a/x.py": "from trainlet.b import y", "b/y.py": "def f():\n    from trainlet.a import x"}
    with pytest.raises(CycleError):
        tuple(TopologicalSorter(arrows(files)).static_order())


def test_no_file_is_long() -> None:
    assert [str(p) for p in SOURCE.rglob("*.py") if len(p.read_text().splitlines()) > LONGEST] == []
