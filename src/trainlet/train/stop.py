# SPDX-License-Identifier: Apache-2.0
"""Signals that ask to stop: taken between two steps by a run, and as KeyboardInterrupt by everything else."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, Final

HANGUP: Final = (signal.SIGTERM, signal.SIGHUP)
SIGNALS: Final = (signal.SIGINT, *HANGUP)

Handler = Callable[[int, FrameType | None], Any]


@contextlib.contextmanager
def handling(signals: Sequence[signal.Signals], handler: Handler) -> Iterator[None]:
    """Has ``handler`` take ``signals``, but for those that the one who started us has us ignore (nohup). A thread other
    than the main one cannot take signals, and takes none."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {s: signal.getsignal(s) for s in signals}
    taken = {s: old for s, old in before.items() if old not in (signal.SIG_IGN, None)}
    for s in taken:
        signal.signal(s, handler)
    try:
        yield
    finally:
        for s, old in taken.items():
            signal.signal(s, old)


def interrupt(number: int, frame: FrameType | None) -> None:
    """Ends what is under way like Ctrl-C; further ones of its kind do not disturb the tidying up."""
    for s in HANGUP:
        signal.signal(s, signal.SIG_IGN)
    raise KeyboardInterrupt(f"stopped by {signal.Signals(number).name}")


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop; the text says what was saved and how to go on."""


class Stop:
    """Remembers that it was asked to stop. A second Ctrl-C stops at once; a terminal that closes sends SIGHUP more than
    once, and what was reached is to be saved."""

    def __init__(self) -> None:
        self.asked = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True

    def installed(self) -> contextlib.AbstractContextManager[None]:
        """While a run lasts."""
        return handling(SIGNALS, self._handle)

    def check(self) -> None:
        """Raises Interrupted if it was asked for."""
        if self.asked:
            raise Interrupted
