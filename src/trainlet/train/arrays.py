# SPDX-License-Identifier: Apache-2.0
"""Reads arrays from an .npz that may come from anywhere. Headers are checked before a byte of an array is unpacked, so
what is allocated is what was asked for."""

from __future__ import annotations

import math
import os
import struct
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from trainlet.errors import UsageError
from trainlet.train.folder import open_regular

MAX_ARRAYS: Final = 8 << 30
MAX_FILE: Final = MAX_ARRAYS + (1 << 30)
_PIECE: Final = 1 << 20
_AGAIN: Final = "write it with numpy.savez"
MAX_DICTIONARY: Final = 64 << 20  # of LZMA, which allocates what the file says
_METHODS: Final = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA}  # bzip2 makes gigabytes of 4 KiB at once


@dataclass(frozen=True, slots=True)
class Header:
    """Type and shape of an array, in elements."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    fortran: bool
    offset: int

    @property
    def nbytes(self) -> int:
        """Of all elements."""
        return math.prod(self.shape) * self.dtype.itemsize


Check = Callable[[Mapping[str, Header]], None]


def read_npz(path: Path, names: tuple[str, ...], optional: tuple[str, ...], check: Check) -> dict[str, NDArray[Any]]:
    """The arrays of ``names``, and of ``optional`` where they are there. ``check`` sees all headers first and raises
    UsageError for what is not wanted. UsageError where an array is missing, damaged or of objects, and where all take
    more than ``MAX_ARRAYS`` or half of this machine's memory."""
    try:
        with open_regular(path) as f:
            _check_file(path, os.fstat(f.fileno()).st_size)
            with zipfile.ZipFile(f) as z:
                return _read(path, z, names, optional, check)
    except UsageError:
        raise
    except Exception as e:  # unpackers raise anything from zlib.error to MemoryError on damaged files
        raise UsageError(f"{path}: cannot be read ({e or type(e).__name__}); {_AGAIN}") from None


def _check_file(path: Path, size: int) -> None:
    if size > MAX_FILE:
        raise UsageError(f"{path}: {size} bytes; at most {MAX_FILE >> 30} GiB are read")


def _read(
    path: Path, z: zipfile.ZipFile, names: tuple[str, ...], optional: tuple[str, ...], check: Check
) -> dict[str, NDArray[Any]]:
    there = set(z.namelist())
    missing = next((n for n in names if f"{n}.npy" not in there), None)
    if missing:
        raise UsageError(f"{path}: the array {missing} is missing; give {', '.join(names)}")
    headers = {n: _header(path, z, n) for n in (*names, *optional) if f"{n}.npy" in there}
    check(headers)
    size, limit = sum(h.nbytes for h in headers.values()), min(MAX_ARRAYS, _memory() // 2)
    if size > limit:
        raise UsageError(f"{path}: {size} bytes of arrays; at most {limit >> 20} MiB are read on this machine")
    return {n: _array(z, n, h) for n, h in headers.items()}


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _header(path: Path, z: zipfile.ZipFile, name: str) -> Header:
    info = z.getinfo(f"{name}.npy")
    if info.compress_type not in _METHODS or _dictionary(z, info) > MAX_DICTIONARY:
        raise UsageError(f"{path}: {name}: packed in a way that is not read; {_AGAIN}")
    with z.open(info) as f, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # remarks on headers of old pythons
        if np.lib.format.read_magic(f) != (1, 0):  # a later version may ask for a header of any size
            raise UsageError(f"{path}: {name}: a header of another version than 1.0; {_AGAIN}")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(f)
        found = Header(dtype, shape, fortran, f.tell())
    if dtype.hasobject or not dtype.itemsize or min(shape, default=0) < 0:
        raise UsageError(f"{path}: {name}: cannot be read ({dtype} {shape} is no array of numbers); {_AGAIN}")
    if found.nbytes != info.file_size - found.offset:
        raise UsageError(f"{path}: {name}: cannot be read (its header tells of {found.nbytes} bytes); {_AGAIN}")
    return found


def _dictionary(z: zipfile.ZipFile, info: zipfile.ZipInfo) -> int:
    """Bytes that an array packed by LZMA asks for, from the raw file; 0 for another method."""
    if info.compress_type != zipfile.ZIP_LZMA:
        return 0
    assert z.fp is not None
    z.fp.seek(info.header_offset + 26)
    z.fp.seek(sum(struct.unpack("<HH", z.fp.read(4))), os.SEEK_CUR)  # name and extra field
    return int.from_bytes(z.fp.read(9)[5:], "little")  # behind version, length and one byte of parameters


def _array(z: zipfile.ZipFile, name: str, header: Header) -> NDArray[Any]:
    raw, at = np.empty(header.nbytes, np.uint8), 0
    with z.open(f"{name}.npy") as f:
        f.read(header.offset)
        while piece := f.read(_PIECE):  # to the end, where the checksum is compared
            raw[at : at + len(piece)] = np.frombuffer(piece, np.uint8)
            at += len(piece)
    if at != len(raw):
        raise ValueError(f"{name} ends early")
    return raw.view(header.dtype).reshape(header.shape, order="F" if header.fortran else "C")
