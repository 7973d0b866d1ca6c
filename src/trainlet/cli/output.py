# SPDX-License-Identifier: Apache-2.0
"""What a command shows: a table for people or one JSON object, and progress on standard error."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, cast

Row = tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """``headers`` may be empty; columns from the second on are aligned to the right where ``numbers``."""

    title: str
    headers: Row
    rows: Sequence[Row]
    numbers: bool = True


@dataclass(frozen=True)
class Report:
    """The result of a command: ``data`` is its JSON object, ``tables`` and ``lines`` are for people."""

    data: Mapping[str, Any]
    tables: Sequence[Table] = ()
    lines: Sequence[str] = field(default=())

    def show(self, as_json: bool) -> None:
        """Prints to standard output."""
        if as_json:
            print(json.dumps(self.data, allow_nan=False))
            return
        from rich.console import Console

        class Output(Console):
            def on_broken_pipe(self) -> None:
                raise BrokenPipeError  # rich would end the program with the exit code of a bug

        console = Output(highlight=False)
        for t in self.tables:
            console.print(t.title, markup=False, soft_wrap=True)  # rich would break it to the width of the table
            console.print(_rich_table(t))
        for line in self.lines:
            console.print(line, markup=False, soft_wrap=True)


def _rich_table(t: Table) -> Any:
    from rich.box import SIMPLE
    from rich.markup import escape
    from rich.table import Table as RichTable

    table = RichTable(box=SIMPLE, show_header=bool(t.headers))
    width = len(t.rows[0]) if t.rows else len(t.headers)
    for i in range(width):
        header = escape(t.headers[i]) if t.headers else ""
        table.add_column(header, justify="right" if t.numbers and i else "left", overflow="fold")
    for row in t.rows:
        table.add_row(*map(escape, row))
    return table


def grouped(n: int) -> str:
    """1234567 as 1,234,567."""
    return f"{n:,}"


def size(n: int) -> str:
    """Bytes, and KiB beside them."""
    return f"{n:,} B ({n / 1024:.1f} KiB)"


class _Unheard:
    """A stream whose terminal or reader may go away: that must not end a run before it has saved what it reached."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class RichProgress:
    """Bars and lines on standard error; the bars only where that is a terminal."""

    def __init__(self, **options: Any) -> None:
        """``options`` go to rich's Console, over ours."""
        from rich.console import Console

        file = cast("IO[str]", _Unheard(options.pop("file", sys.stderr)))
        self._console = Console(**{"file": file, "highlight": False, **options})

    @contextlib.contextmanager
    def bar(self, title: str, total: int, done: int = 0) -> Iterator[Callable[[str], None]]:
        """A bar with the remaining time and the latest text; it disappears when it is done."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        if not self._console.is_terminal:
            yield lambda text: None
            return
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}", markup=False),
        )
        with Progress(*columns, console=self._console, transient=True) as progress:
            task = progress.add_task(title, total=total, completed=done, text="")
            yield lambda text: progress.update(task, advance=1, text=text)

    def line(self, text: str) -> None:
        """One line that stays."""
        self._console.print(text, markup=False, soft_wrap=True)
