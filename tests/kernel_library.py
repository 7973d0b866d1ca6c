# SPDX-License-Identifier: Apache-2.0
"""The small kernels as a ctypes library, in several builds, for tests of single kernels.

Buffers passed to kernels come from ``block``: malloc of exactly their size, so that a sanitizer sees every byte beyond.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import subprocess
from collections.abc import Mapping
from ctypes import POINTER, Structure, c_float, c_int8, c_int16, c_int32, c_uint8, c_uint16, c_uint32, c_void_p
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, ClassVar

import numpy as np

from trainlet.toolchain.host import find_compiler, kernel_sources

FILES = (
    "add.c", "bias.c", "conv2d.c", "conv2d_dw.c", "conv2d_dx.c", "depthwise.c", "depthwise_dw.c",
    "mask.c", "pool.c", "round.c", "tile.c",
)  # fmt: skip
# head.c is compiled into this, so that its static functions can be called.
PROBE = """#include "head.c"
float probe_exp(float x);
float probe_log(float x);
float probe_exp(float x) { return exp_of(x); }
float probe_log(float x) { return log_of(x); }
"""
FLAGS = ("-std=c99", "-ffp-contract=off", "-fPIC")
WARNINGS = ("-Wall", "-Wextra", "-Werror")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
BUILDS = {
    "native": ("-O3", "-march=native"),
    "plain": ("-O1", "-DTL_PLAIN_TILE"),
    "sanitized": ("-O1", "-g", *SANITIZERS),
    "sanitized vectors": ("-O1", "-g", "-march=native", *SANITIZERS),
}
SANITIZED = os.environ.get("TRAINLET_TEST_SANITIZED") == "1"
RUNNABLE = ["sanitized", "sanitized vectors"] if SANITIZED else ["native", "plain"]

OBJECTS = "TRAINLET_TEST_OBJECTS"
"""Environment variable: the folder of the compiled kernels, which all processes of a test run share (conftest.py)."""

Changes = Mapping[str, tuple[str, str]]


# --- the structures of tl.h -----------------------------------------------------------------------------------


class View(Structure):
    _fields_: ClassVar = [("data", c_void_p), ("pixel", c_int32), ("row", c_int32), ("ring", c_int32)]


class Weights(Structure):
    _fields_: ClassVar = [("frozen", c_void_p), ("trained", c_void_p), ("channels", c_void_p), ("n", c_int32)]


class Conv(Structure):
    NAMES: ClassVar = (
        "in_h", "in_w", "in_c", "out_h", "out_w", "out_c", "kh", "kw", "stride_h", "stride_w", "dil_h", "dil_w",
        "pad_h", "pad_w", "groups", "x_zero",
    )  # fmt: skip
    _fields_: ClassVar = [(n, c_int32) for n in NAMES]


class Requant(Structure):
    _fields_: ClassVar = [
        ("mult", c_void_p), ("shift", c_void_p), ("y_zero", c_int32), ("lo", c_int32), ("hi", c_int32)
    ]  # fmt: skip


class Add(Structure):
    NAMES: ClassVar = (
        "a_zero", "b_zero", "y_zero", "lo", "hi", "a_mult", "b_mult", "y_mult", "a_shift", "b_shift", "y_shift",
    )  # fmt: skip
    _fields_: ClassVar = [(n, c_int32) for n in NAMES]


class Mask(Structure):
    _fields_: ClassVar = [("bits", c_void_p), ("y", c_void_p), ("lo", c_int32), ("hi", c_int32)]


class Step(Structure):
    _fields_: ClassVar = [("key", c_uint32), ("anchor", c_int32), ("saturated", c_uint32), ("rounded", c_uint32)]

    def tuple(self) -> tuple[int, int, int, int]:
        return self.key, self.anchor, self.saturated, self.rounded


class Grad(Structure):
    _fields_: ClassVar = [("r", View), ("e", c_int32)]


class Site(Structure):
    _fields_: ClassVar = [
        ("number", c_uint32), ("rho", c_void_p), ("e", c_void_p), ("further", POINTER(Grad)), ("n_further", c_int32),
        ("mask", Mask),
    ]  # fmt: skip


class DxScale(Structure):
    _fields_: ClassVar = [("mt", c_void_p), ("mult", c_void_p), ("exp", c_void_p), ("pre", c_int32)]


class Dw(Structure):
    _fields_: ClassVar = [
        ("site", c_uint32), ("channels", c_void_p), ("kept", c_int32), ("bits", c_int32), ("pre", c_int32),
        ("rate", c_void_p),
    ]  # fmt: skip


OK, ZERO_GRADIENT, BAD_ARGUMENT, BAD_SIZE, BAD_ALIGNMENT, BAD_LR, NOT_FINITE = range(7)

# --- building -------------------------------------------------------------------------------------------------


def write_sources(folder: Path, changes: Changes) -> list[str]:
    """The kernels, with ``changes`` (file -> (text, its replacement)), and the probe; returns what to compile."""
    for name, text in kernel_sources().items():
        if name in changes:
            old, new = changes[name]
            assert old in text, f"{name} has no {old!r} any more; plant the fault anew"
            text = text.replace(old, new)
        (folder / name).write_text(text)
    (folder / "probe.c").write_text(PROBE)
    return [str(folder / n) for n in (*FILES, "probe.c")]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@cache
def _objects(build: str) -> dict[str, Path]:
    """The unchanged kernels, compiled once a build by whichever process of a test run needs them first; a fault then
    costs one file."""
    folder = Path(os.environ[OBJECTS]) / build.replace(" ", "-")
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            for source in write_sources(folder, {}):
                _compiled(source, build, WARNINGS)
            (folder / "done").touch()
    return {name: (folder / name).with_suffix(".o") for name in (*FILES, "probe.c")}


def _compiled(source: str, build: str, warnings: tuple[str, ...]) -> Path:
    made = Path(source).with_suffix(".o")
    _run([*find_compiler(), *FLAGS, *warnings, *BUILDS[build], "-c", source, "-o", str(made)])
    return made


def _touched(source: str, changes: Changes) -> bool:
    """Whether a change reaches ``source``: it is changed, the probe of a changed file, or any header is."""
    name = Path(source).name
    return name in changes or (name == "probe.c" and "head.c" in changes) or any(n.endswith(".h") for n in changes)


@cache
def _library(build: str, changes: tuple[tuple[str, tuple[str, str]], ...]) -> ctypes.CDLL:
    folder = Path(mkdtemp(prefix="trainlet-kernels-"))
    try:
        objects = dict(_objects(build))
        for source in write_sources(folder, dict(changes)):
            if _touched(source, dict(changes)):  # a fault may leave a variable unused: no warnings
                objects[Path(source).name] = _compiled(source, build, ())
        made = folder / "kernels.so"
        _run([*find_compiler(), *BUILDS[build], "-shared", *map(str, objects.values()), "-o", str(made)])
        lib = ctypes.CDLL(str(made))
    finally:
        shutil.rmtree(folder)
    lib.probe_exp.restype = lib.probe_log.restype = c_float
    return lib


def library(build: str = RUNNABLE[0], changes: Changes | None = None) -> ctypes.CDLL:
    """The kernels in one of BUILDS, with warnings as errors."""
    return _library(build, tuple(sorted((changes or {}).items())))


# --- memory ---------------------------------------------------------------------------------------------------

_libc = ctypes.CDLL(None)
_libc.malloc.restype = c_void_p
_libc.malloc.argtypes = [ctypes.c_size_t]
_libc.free.argtypes = [c_void_p]

TYPES: Mapping[str, Any] = {
    "int8": c_int8, "uint8": c_uint8, "int16": c_int16, "uint16": c_uint16, "int32": c_int32, "uint32": c_uint32,
    "float32": c_float,
}  # fmt: skip


class Block(np.ndarray):
    """An array in memory of its own, of exactly its size."""

    owner: _Owner | None = None

    def __array_finalize__(self, obj: Any) -> None:
        self.owner = getattr(obj, "owner", None)

    @property
    def at(self) -> int:
        """Address of the first element."""
        return int(self.ctypes.data)


class _Owner:
    def __init__(self, n: int) -> None:
        self.address = _libc.malloc(n)

    def __del__(self) -> None:
        _libc.free(self.address)


def block(values: Any, dtype: Any = None) -> Block:
    """A copy of ``values``."""
    a = np.ascontiguousarray(values, dtype)
    owner = _Owner(a.nbytes)
    raw = (TYPES[a.dtype.name] * a.size).from_address(owner.address)
    made = np.ctypeslib.as_array(raw).reshape(a.shape).view(Block)
    made.owner = owner
    made[...] = a
    return made


def scratch(n: int, rng: np.random.Generator) -> Block:
    """``n`` bytes of junk."""
    assert n % 4 == 0
    return block(np.frombuffer(rng.bytes(n), np.uint8))


def plain(a: Block) -> View:
    """A view of an (H, W, C) buffer."""
    h, w, c = a.shape
    return View(a.at, c, w * c, h)


def vector(a: Block) -> View:
    """A view of (C,) that stands for every pixel."""
    return View(a.at, 0, 0, 1)
