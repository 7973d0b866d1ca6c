# SPDX-License-Identifier: Apache-2.0
"""A program under a debugger's control: the part of GDB's remote protocol that running a chip needs, spoken through the
pipes of a child process. Every wait has a limit, and the child ends with the session."""

from __future__ import annotations

import os
import select
import struct
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Sequence
from typing import IO, Final

from trainlet.errors import DeviceError

ANSWER_SECONDS: Final = 20.0
"""How long a question to a stopped program may take."""

_CHUNK: Final = 1024  # bytes of memory per packet; servers refuse packets of more than some 4000 characters
_PC: Final = 15
_INTERRUPT: Final = b"\x03"


_GUARD: Final = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


def _guarded(command: Sequence[str]) -> list[str]:
    """The command behind a step that asks Linux to end it with this process, however that ends: an emulator does not
    mind that its debugger has gone. The request is of the thread that starts the child, which must live as long."""
    if sys.platform != "linux" or threading.current_thread() is not threading.main_thread():
        return list(command)
    return [sys.executable, "-I", "-S", "-c", _GUARD, str(os.getpid()), *command]


class GdbTimeoutError(Exception):
    """No answer in time."""


class Remote:
    """A debugger's connection to ``command``, a path and arguments: a program that speaks the remote protocol on its
    standard input and output and waits at its first instruction."""

    def __init__(self, command: Sequence[str]) -> None:
        self._name = command[0]
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  lives as long as the child
        self._child = subprocess.Popen(
            _guarded(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, bufsize=0
        )
        self._end = weakref.finalize(self, _end, self._child, self._log)
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._to, self._from = self._child.stdin.fileno(), self._child.stdout.fileno()
        self._held = b""
        # Single registers can be written only by who has asked which there are.
        self.ask("qXfer:features:read:target.xml:0,7ff")

    def close(self) -> None:
        """Ends the child."""
        self._end()

    def read(self, address: int, count: int) -> bytes:
        """``count`` bytes of memory."""
        parts = []
        for at in range(address, address + count, _CHUNK):
            n = min(_CHUNK, address + count - at)
            parts.append(self._memory(f"m{at:x},{n:x}", f"{n} bytes at {at:#010x} cannot be read"))
        return b"".join(parts)

    def _memory(self, question: str, problem: str) -> bytes:
        answer = self.ask(question)
        if answer.startswith("E"):
            raise DeviceError(f"{self._name}: {problem} (answer {answer})")
        return bytes.fromhex(answer)

    def write(self, address: int, data: bytes) -> None:
        """Writes memory."""
        for i in range(0, len(data), _CHUNK):
            part = data[i : i + _CHUNK]
            self._expect(f"M{address + i:x},{len(part):x}:{part.hex()}", "OK")

    def registers(self) -> tuple[int, ...]:
        """r0 to r15."""
        return struct.unpack("<16I", bytes.fromhex(self.ask("g"))[:64])

    def go_to(self, address: int) -> None:
        """Sets the program counter."""
        self._expect(f"P{_PC:x}={struct.pack('<I', address & ~1).hex()}", "OK")

    def break_at(self, address: int) -> None:
        """The program will stop before the instruction at ``address``."""
        self._expect(f"Z1,{address:x},2", "OK")

    def run(self, seconds: float) -> bool:
        """Runs until the program stops; False where it did not within ``seconds``, and has been interrupted."""
        self._send("c")
        try:
            self._stopped(self._receive(seconds))
        except GdbTimeoutError:
            os.write(self._to, _INTERRUPT)
            self._stopped(self._receive(ANSWER_SECONDS))
            return False
        return True

    def _stopped(self, answer: str) -> None:
        if answer[:1] not in ("S", "T"):
            raise DeviceError(f"{self._name}: ended instead of stopping (answer {answer!r}){self._tail()}")

    def ask(self, question: str) -> str:
        """The answer to a question; DeviceError where none comes."""
        self._send(question)
        try:
            return self._receive(ANSWER_SECONDS)
        except GdbTimeoutError:
            self.close()
            raise DeviceError(
                f"{self._name}: no answer to {question[:40]!r} within {ANSWER_SECONDS:g} s; it was ended"
            ) from None

    def _expect(self, question: str, want: str) -> None:
        answer = self.ask(question)
        if answer != want:
            raise DeviceError(f"{self._name}: {question[:40]!r} was answered {answer!r}, not {want!r}{self._tail()}")

    def _send(self, text: str) -> None:
        data = text.encode("ascii")
        packet = b"$%s#%02x" % (data, sum(data) & 0xFF)
        try:
            while packet:
                packet = packet[os.write(self._to, packet) :]
        except (BrokenPipeError, OSError):
            raise DeviceError(f"{self._name}: it has ended{self._tail()}") from None

    def _receive(self, seconds: float) -> str:
        """The next packet."""
        until = time.monotonic() + seconds
        while True:
            begin = self._held.find(b"$")
            end = self._held.find(b"#", begin)
            if begin >= 0 and end >= 0 and len(self._held) >= end + 3:
                data, check = self._held[begin + 1 : end], self._held[end + 1 : end + 3]
                self._held = self._held[end + 3 :]
                if int(check, 16) != sum(data) & 0xFF:
                    raise DeviceError(f"{self._name}: a damaged packet: {data[:40]!r}")
                os.write(self._to, b"+")
                return data.decode("ascii")
            self._fill(until)

    def _fill(self, until: float) -> None:
        left = until - time.monotonic()
        if left <= 0 or not select.select([self._from], [], [], left)[0]:
            raise GdbTimeoutError
        more = os.read(self._from, 65536)
        if not more:
            raise DeviceError(f"{self._name}: it has ended{self._tail()}")
        self._held += more

    def _tail(self) -> str:
        """What the child wrote to standard error, its first lines."""
        try:
            size = os.fstat(self._log.fileno()).st_size
            text = os.pread(self._log.fileno(), min(size, 1000), 0).decode(errors="replace").strip()
        except (OSError, ValueError):
            return ""
        return f": {text}" if text else ""


def _end(child: subprocess.Popen[bytes], log: IO[bytes]) -> None:
    child.kill()
    child.wait()
    for stream in (child.stdin, child.stdout, log):
        if stream:
            stream.close()
