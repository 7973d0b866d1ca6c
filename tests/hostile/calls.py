# SPDX-License-Identifier: Apache-2.0
"""Hostile callers of the compiled C: wrong sizes, wrong orders, null pointers, forged states, over memory of exactly
the size that was asked for. Each call has a status that the contracts of tl_model.h allow; a call that was refused has
changed no byte of the state; and whatever came before, a reset begins anew."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import random
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from hostile.case import Attack, Kind, Limits, MismatchFound, Place
from hostile.mutate import change_bytes, often
from trainlet.autodiff.scheme import UpdateScheme
from trainlet.compiler import compile_model
from trainlet.emit import Compiled
from trainlet.toolchain.host import NATIVE, build_library

OK, BAD_ARGUMENT, BAD_SIZE, BAD_ALIGNMENT, BAD_LR, NOT_FINITE, BAD_ORDER, BAD_BLOB = 0, 2, 3, 4, 5, 6, 7, 8
HEADER: Final = 20
SANITIZED: Final = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
"""A library built with these is loaded by a Python that was started with ``LD_PRELOAD`` of libasan."""

_CONTEXT: Final = 4096  # more than any context takes
_PAGE: Final = mmap.PAGESIZE
_CANARY: Final = 64
_LIBC: Final = ctypes.CDLL(None)


class Memory:
    """``size`` bytes of junk, from ``shift`` beyond an address that is a multiple of 4; the page behind them is
    nobody's. Under the address sanitizer they are what malloc gives."""

    def __init__(self, size: int, shift: int = 0) -> None:
        self.size = size
        if "LD_PRELOAD" in os.environ:
            _LIBC.malloc.restype = ctypes.c_void_p
            self.address = _LIBC.malloc(ctypes.c_size_t(size + shift)) + shift
            return
        room = -(-(size + shift + _CANARY) // _PAGE) * _PAGE
        self._map = mmap.mmap(-1, room + _PAGE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        assert _LIBC.mprotect(ctypes.c_void_p(start + room), ctypes.c_size_t(_PAGE), 0) == 0
        self.address = (start + room - size) // 4 * 4 - 4 * (shift > 0) + shift
        self._canary = (ctypes.c_char * _CANARY).from_address(self.address - _CANARY)
        self._before = bytes(self._canary)

    @property
    def bytes(self) -> bytes:
        return ctypes.string_at(self.address, self.size)

    def write(self, data: bytes) -> None:
        """Copies ``data`` to its begin."""
        ctypes.memmove(self.address, data, min(len(data), self.size))

    @property
    def touched(self) -> bool:
        """Whether what lies before it has changed."""
        return hasattr(self, "_canary") and bytes(self._canary) != self._before


@dataclass(frozen=True)
class Model:
    """A compiled model, its library, and the state after a reset to 7 and one step."""

    compiled: Compiled
    library: Path
    shape: tuple[int, int, int]
    classes: int
    after_a_step: bytes = field(repr=False)

    @property
    def state_bytes(self) -> int:
        return self.compiled.layout.nbytes

    @property
    def blob_bytes(self) -> int:
        return HEADER + self.state_bytes


def _forge(model: Model, payload: bytes, version: int = 1) -> bytes:
    """A saved state with a right checksum."""
    head = (0x54534C54, version, int(model.compiled.model_hash[:8], 16), len(payload), zlib.crc32(payload))
    return struct.pack("<5I", *head) + payload


@dataclass
class Caller:
    """Makes calls, and knows what each of them may return. ``rows``: fed so far, -1 outside an image."""

    model: Model
    rng: random.Random
    rows: int = -1

    def __post_init__(self) -> None:
        self.lib = ctypes.CDLL(str(self.model.library))
        self.context = Memory(_CONTEXT)
        self.arena = Memory(self.model.compiled.plan.arena_bytes)
        self.state = Memory(self.model.state_bytes)
        self.arena.write(self.rng.randbytes(self.arena.size))
        self.held = Memory(int(np.prod(self.model.shape)))
        self._init(self.context, 7)

    # -- calls

    def call(self, name: str, *args: Any, context: Memory | None = None) -> int:
        """The status of ``NAME_name``."""
        function = getattr(self.lib, f"{self.model.compiled.sources.prefix}_{name}")
        status: int = function(ctypes.c_void_p((context or self.context).address), *args)
        return status

    def expect(self, allowed: Sequence[int], name: str, *args: Any, keeps: bool = False) -> int:
        """``keeps``: the state may not change even where the call succeeds."""
        before = self.state.bytes
        status = self.call(name, *args)
        if status not in allowed:
            raise MismatchFound(f"{name}: status {status}, and {tuple(allowed)} were possible")
        if (status != OK or keeps) and self.state.bytes != before:
            raise MismatchFound(f"{name}: status {status}, but the state has changed")
        if any(m.touched for m in (self.context, self.arena, self.state)):
            raise MismatchFound(f"{name}: wrote before the begin of its memory")
        return status

    def _init(self, context: Memory, seed: int) -> None:
        sizes = (_pointer(self.arena), _size(self.arena.size), _pointer(self.state), _size(self.state.size))
        status = self.call("init", *sizes, ctypes.c_uint32(seed), context=context)
        if status != OK:
            raise MismatchFound(f"init: status {status} over the memory that was asked for")

    def image(self) -> ctypes.c_void_p:
        """A random one."""
        self.held.write(self.rng.randbytes(self.held.size))
        return _pointer(self.held)

    # -- what a hostile caller does

    def begins_wrongly(self) -> None:
        """Another context over memory that is too small, misaligned or nothing."""
        small, shift, nothing = (self.rng.randrange(3) for _ in range(3))
        which = self.rng.randrange(2)
        blocks = [Memory(m.size, shift if i == which else 0) for i, m in enumerate((self.arena, self.state))]
        sizes = [b.size - (small if i == which else 0) for i, b in enumerate(blocks)]
        pointers = [ctypes.c_void_p() if nothing == 2 and i == which else _pointer(b) for i, b in enumerate(blocks)]
        args = (pointers[0], _size(sizes[0]), pointers[1], _size(sizes[1]), ctypes.c_uint32(1))
        want = BAD_ARGUMENT if nothing == 2 else BAD_SIZE if small else BAD_ALIGNMENT if shift else OK
        status = self.call("init", *args, context=Memory(_CONTEXT))
        if status != want:
            raise MismatchFound(f"init: status {status} instead of {want}")

    def begins(self) -> None:
        self.expect([OK], "begin", keeps=True)
        self.rows = 0

    def feeds(self) -> None:
        """Some rows, seldom none at all, seldom too many."""
        h, w, c = self.model.shape
        row = Memory(w * c)
        for _ in range(self.rng.choice((1, 2, h, h, h + 1))):
            row.write(self.rng.randbytes(row.size))
            null = often(self.rng, 0.03)
            want = BAD_ARGUMENT if null else OK if 0 <= self.rows < h else BAD_ORDER
            self.expect([want], "feed_row", ctypes.c_void_p() if null else _pointer(row), keeps=True)
            self.rows += want == OK

    def finishes(self) -> None:
        whole = self.rows == self.model.shape[0]
        self.expect([OK if whole else BAD_ORDER], "finish", self._logits(), keeps=True)
        self.rows = -1 if whole else self.rows

    def finishes_training(self) -> None:
        whole = self.rows == self.model.shape[0]
        label, lr, allowed = self._step()
        self.expect(allowed if whole else [BAD_ORDER], "finish_train", label, lr, self._info())
        self.rows = -1 if whole else self.rows

    def infers(self) -> None:
        null = often(self.rng, 0.1)
        image = ctypes.c_void_p() if null else self.image()
        self.expect([BAD_ARGUMENT if null else OK], "infer", image, self._logits(), keeps=True)
        self.rows = self.rows if null else -1

    def trains(self) -> None:
        null = often(self.rng, 0.1)
        label, lr, allowed = self._step()
        image = ctypes.c_void_p() if null else self.image()
        self.expect([BAD_ARGUMENT] if null else allowed, "train", image, label, lr, self._info())
        self.rows = self.rows if null else -1

    def _step(self) -> tuple[ctypes.c_int32, ctypes.c_float, list[int]]:
        """Label, rate, and the statuses that they may lead to."""
        k = self.model.classes
        label = self.rng.choice((*range(k), *range(k), -1, k, 2**31 - 1, -(2**31)))
        lr = self.rng.choice((0.0, 1e-38, 1e-3, 0.02, 0.5, 1e30, 3e38, -1e-3, float("nan"), float("inf")))
        if not 0 <= label < k:
            return ctypes.c_int32(label), ctypes.c_float(lr), [BAD_ARGUMENT]
        allowed = [OK, NOT_FINITE] if 0 <= lr < 1 else [OK, NOT_FINITE, BAD_LR] if lr > 0 else [BAD_LR]
        allowed = [BAD_LR, NOT_FINITE] if lr == float("inf") or lr != lr else allowed
        return ctypes.c_int32(label), ctypes.c_float(lr), allowed

    def saves(self) -> None:
        """Into too little, into nothing, or rightly."""
        null, short = often(self.rng, 0.1), often(self.rng, 0.2)
        size = self.model.blob_bytes - (self.rng.choice((1, HEADER, self.model.blob_bytes)) if short else 0)
        into = Memory(size)
        want = BAD_ARGUMENT if null else BAD_SIZE if short else OK
        self.expect([want], "save", ctypes.c_void_p() if null else _pointer(into), _size(size), keeps=True)
        if want == OK and into.bytes != _forge(self.model, self.state.bytes):
            raise MismatchFound("save: not the bytes that the contract says")

    def loads(self) -> None:
        """What was saved, what is damaged, and what is forged."""
        payload = self.state.bytes
        how = self.rng.choice(("sound", "damaged", "forged", "forged", "random", "extreme", "version", "short"))
        blob = _forge(self.model, payload)
        if how == "damaged":
            changed = change_bytes(self.rng, blob)
            blob = changed if len(changed) >= len(blob) else blob[:-1] + bytes([blob[-1] ^ 1])
        if how in _FORGED:
            blob = _forge(self.model, _FORGED[how](self.rng, payload))
        if how == "version":
            blob = _forge(self.model, payload, 2)
        if how == "short":
            blob = blob[: -self.rng.randrange(1, len(blob))]
        allowed = {"sound": [OK], "short": [BAD_SIZE], "version": [BAD_BLOB]}.get(how, [OK, BAD_BLOB])
        if how == "damaged":
            allowed = [OK] if blob[: self.model.blob_bytes] == _forge(self.model, payload) else [BAD_BLOB]
        held = Memory(len(blob))
        held.write(blob)
        status = self.expect(allowed, "load", _pointer(held), _size(len(blob)))
        if status == OK and self.state.bytes != blob[HEADER : self.model.blob_bytes]:
            raise MismatchFound("load: the state is not what the blob holds")

    def resets(self) -> None:
        """Whatever came before, a reset and a step give the bytes of a fresh start."""
        function = getattr(self.lib, f"{self.model.compiled.sources.prefix}_reset")
        function.restype = None
        function(ctypes.c_void_p(self.context.address), ctypes.c_uint32(7))
        if one_step(self, self.held) != self.model.after_a_step:
            raise MismatchFound("reset: a step behind it does not give the bytes of a fresh start")
        self.rows = -1

    def _logits(self) -> Any:
        return ctypes.c_void_p() if often(self.rng, 0.2) else ctypes.byref(ctypes.c_void_p())

    def _info(self) -> Any:
        return ctypes.c_void_p() if often(self.rng, 0.2) else ctypes.byref((ctypes.c_uint8 * 64)())


def _pointer(m: Memory) -> ctypes.c_void_p:
    return ctypes.c_void_p(m.address)


def _size(n: int) -> ctypes.c_size_t:
    return ctypes.c_size_t(n)


def one_step(caller: Caller, image: Memory) -> bytes:
    """The state after a step on a fixed image."""
    image.write(bytes((37 * i + i // 7) % 256 for i in range(image.size)))
    status = caller.call("train", _pointer(image), ctypes.c_int32(0), ctypes.c_float(0.02), ctypes.c_void_p())
    if status != OK:
        raise MismatchFound(f"train: status {status} after a reset")
    return caller.state.bytes


def _some_words(rng: random.Random, payload: bytes) -> bytes:
    """Words at the ends of their types; the first two are seed and step, and may be anything."""
    data = bytearray(payload)
    for _ in range(rng.choice((1, 3, 30))):
        at = rng.randrange(max(1, len(data) - 3))
        word = rng.choice(
            (b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff" * 4, b"\x80" * 4)
        )
        data[at : at + 4] = word[: len(data) - at]
    return bytes(data)


_FORGED: Final[dict[str, Callable[[random.Random, bytes], bytes]]] = {
    "forged": _some_words,
    "random": lambda rng, payload: rng.randbytes(len(payload)),
    "extreme": lambda rng, payload: rng.choice((b"\x7f", b"\x80", b"\xff", b"\0")) * len(payload),
}

_ACTIONS: Final = (
    Caller.begins_wrongly, Caller.begins, Caller.feeds, Caller.feeds, Caller.finishes, Caller.finishes_training,
    Caller.infers, Caller.trains, Caller.trains, Caller.trains, Caller.saves, Caller.loads, Caller.loads, Caller.resets,
)  # fmt: skip


# --- the kinds --------------------------------------------------------------------------------------------------

_MODELS: list[Model] = []
"""Of the worker; its children have them too."""


def _compiled() -> list[Compiled]:
    from graphs import int8_chain
    from random_nets import named_case

    from trainlet.frontends import attach_head

    chain = attach_head(int8_chain(), 4)
    partly = UpdateScheme("partly", ("block.depthwise", "block.project"), {"block.project": 0.5}, 12)
    cases = [named_case(n, bits) for n, bits in (("dead_channels", 16), ("shared_later", 8), ("one_pixel", 12))]
    return [compile_model(chain, partly), *(compile_model(c.model, c.scheme) for c in cases)]


def with_library(model: Model, flags: Sequence[str]) -> Model:
    """The model with a library that is built with ``flags``."""
    preload = os.environ.pop("LD_PRELOAD", None)  # not into the compiler
    library = build_library(model.compiled.sources.files, extra=flags)
    if preload is not None:
        os.environ["LD_PRELOAD"] = preload
    return replace(model, library=library)


def models(flags: Sequence[str]) -> list[Model]:
    """Four, of one and of several layers, with 8, 12 and 16 bits."""
    found = []
    for compiled in _compiled():
        h, w, c = compiled.graph.image.shape
        classes = compiled.graph.values[compiled.graph.outputs[0]].size
        model = with_library(Model(compiled, Path(), (h, w, c), classes, b""), flags)
        fresh = Caller(model, random.Random(0))
        found.append(replace(model, after_a_step=one_step(fresh, fresh.held)))
    return found


def attack(model: Model, rng: random.Random, count: int) -> str:
    """Makes ``count`` calls of a hostile caller. MismatchFound where the contract is broken."""
    caller = Caller(model, rng)
    for _ in range(count):
        rng.choice(_ACTIONS)(caller)
    caller.resets()
    return "as the contract says"


def _prepare(flags: Sequence[str], base: Path) -> None:
    _MODELS[:] = models(flags)


def _make(rng: random.Random, place: Place) -> Attack:
    model, count = rng.choice(_MODELS), rng.choice((5, 20, 60))
    return lambda: attack(model, rng, count)


KINDS: Final = (
    Kind("calls", functools.partial(_prepare, NATIVE), _make, compiles=True),
    Kind(
        "calls-sanitized",
        functools.partial(_prepare, SANITIZED),
        _make,
        compiles=True,
        limits=Limits(60.0, resident=True),
    ),
)
