# SPDX-License-Identifier: Apache-2.0
"""The command line: ``main`` turns every error into one message and one exit code."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence

import typer

from trainlet.cli import demo, device, plan, select  # noqa: F401  they register their commands
from trainlet.cli.commands import StoppedError, app
from trainlet.cli.output import Report
from trainlet.errors import TrainletError, UsageError

INTERRUPTED = 130
BROKEN_PIPE = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code (docs/layout.md has the list)."""
    args = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in args
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
    except (StoppedError, typer.Abort) as e:
        return _fail(str(e) or "interrupted", INTERRUPTED, as_json)
    except BrokenPipeError:  # whoever read our output has gone; python would complain once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except OSError as e:
        where = f"{e.filename}: " if e.filename else ""
        return _fail(f"{where}{e.strerror or e}; give a path that can be used", UsageError.exit_code, as_json)


def _fail(message: str, code: int, as_json: bool) -> int:
    print(f"error: {message}", file=sys.stderr)
    if as_json:
        print(json.dumps({"error": message, "exit_code": code}))
    return code
