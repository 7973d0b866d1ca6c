# SPDX-License-Identifier: Apache-2.0
"""Calls of the command line from within an attack."""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Sequence
from typing import Any, Final

from typer.main import get_command

from trainlet import cli

DOCUMENTED: Final = frozenset((0, 2, 3, 4, 5, 7, 130))
"""Exit codes of docs/layout.md, without that of a missing tool: here all of them are installed, and a compiler that
refuses what was generated is a fault."""


@functools.cache
def _command() -> Any:
    """The parser, which takes longer to make than most inputs to be refused."""
    return get_command(cli.app)


class UndocumentedError(Exception):
    """A command ended with a code that no input may lead to."""


def run_commands(*commands: Sequence[object]) -> str:
    """Runs commands until one fails; says how the last one ended."""
    code = 0
    for words in commands:
        code = _main([str(w) for w in words])
        if code not in DOCUMENTED:
            raise UndocumentedError(f"exit code {code} of trainlet {' '.join(map(str, words))}")
        if code:
            return f"{words[0]}: exit {code}"
    return f"{commands[-1][0]}: exit {code}"


def warm() -> None:
    """What every command needs is made here, before there are children."""
    with contextlib.redirect_stdout(io.StringIO()):
        assert _main(["targets", "--json"]) == 0


def _main(words: list[str]) -> int:
    cli.app = _command()
    return cli.main(words)
