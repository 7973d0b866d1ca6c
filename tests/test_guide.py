# SPDX-License-Identifier: Apache-2.0
"""The code of docs/adding-an-op.md is the code of the files that it names."""

from __future__ import annotations

import ast
import re
from dataclasses import fields
from pathlib import Path

import pytest

from trainlet.ops import OPS, Op

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "adding-an-op.md").read_text()


def blocks(page: str) -> list[tuple[str, str]]:
    """(file, code) of each block; the file is the last one named on a line of its own."""
    found, name = [], ""
    for m in re.finditer(r"^`([^`\n]+)`$|^```\w+\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        name = m[1] or name
        found += [(name, m[2])] if m[2] else []
    return found


def parts(code: str) -> set[str]:
    """Each statement of a block of Python; of a lone row of a table, the row."""
    found: list[ast.AST] = []
    for statement in ast.parse(code).body:
        lone = statement.value if isinstance(statement, ast.Expr) else statement
        found += lone.elts if isinstance(lone, ast.Tuple) else [lone]
    return {ast.dump(n) for n in found}


@pytest.mark.parametrize(("name", "code"), blocks(PAGE))
def test_code_is_that_of_the_file(name: str, code: str) -> None:
    text = (ROOT / name).read_text()
    stale = f"{name} has changed; bring docs/adding-an-op.md after it"
    if not name.endswith(".py"):
        assert code in text, stale
        return
    known = {ast.dump(n) for n in ast.walk(ast.parse(text)) if isinstance(n, ast.stmt | ast.expr)}
    assert parts(code) <= known, stale


def test_stale_code_is_found() -> None:
    name, code = blocks(PAGE)[0]
    with pytest.raises(AssertionError, match="has changed"):
        test_code_is_that_of_the_file(name, code.replace("kernel", "window"))


def test_blocks_are_found() -> None:
    assert len(blocks(PAGE)) == PAGE.count("```") // 2 >= 8


def test_every_fact_is_explained() -> None:
    said = {f.name for f in fields(Op) if f"`{f.name}`" in PAGE}
    assert {f.name for f in fields(Op)} - said == {"name", "attrs"}
    assert "max_pool" in OPS
