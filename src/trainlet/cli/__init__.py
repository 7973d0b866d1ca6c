# SPDX-License-Identifier: Apache-2.0
"""The command line: ``main`` turns every error into one message and one exit code."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
from collections.abc import Sequence
from typing import TextIO

import typer

from trainlet.cli import demo, device, plan, select  # noqa: F401  they register their commands
from trainlet.cli.commands import StoppedError, app
from trainlet.cli.output import Report
from trainlet.errors import TrainletError, UsageError
from trainlet.train.stop import HANGUP, handling, interrupt

INTERRUPTED = 130
BROKEN_PIPE = 141
_FULL = (errno.ENOSPC, errno.EDQUOT)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code (docs/layout.md has the list)."""
    args = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in args
    for stream in (sys.stdout, sys.stderr):  # a path need not be text, and a terminal not know all of it
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    with handling(HANGUP, interrupt):
        code = _run(args, as_json)
    _say(sys.stdout, "")
    return code


def _run(args: list[str], as_json: bool) -> int:
    try:
        found = app(args=args or ["--help"], prog_name="trainlet", standalone_mode=False)
        if isinstance(found, Report):
            found.show(as_json)
            sys.stdout.flush()
        return found if isinstance(found, int) else 0
    except TrainletError as e:
        return _fail(str(e), e.exit_code, as_json)
    except typer.TyperException as e:
        return _fail(e.format_message(), UsageError.exit_code, as_json)
    except (StoppedError, KeyboardInterrupt, typer.Abort) as e:
        return _fail(str(e) or "interrupted", INTERRUPTED, as_json)
    except BrokenPipeError:
        _close(sys.stdout)
        return BROKEN_PIPE
    except OSError as e:
        where = f"{e.filename}: " if e.filename else ""
        advice = "make room and start again" if e.errno in _FULL else "give a path that can be used"
        return _fail(f"{where}{e.strerror or e}; {advice}", UsageError.exit_code, as_json)


def _fail(message: str, code: int, as_json: bool) -> int:
    _say(sys.stderr, f"error: {message}")
    if as_json:
        _say(sys.stdout, json.dumps({"error": message, "exit_code": code}))
    return code


def _say(stream: TextIO, text: str) -> None:
    """Writes all that is due, or nothing where nobody can read it any more: the exit code stays."""
    try:
        print(text, end="\n" if text else "", file=stream, flush=True)
    except OSError:
        _close(stream)


def _close(stream: TextIO) -> None:
    """Whoever read our output has gone; python would complain once more at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
