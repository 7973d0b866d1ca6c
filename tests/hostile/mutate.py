# SPDX-License-Identifier: Apache-2.0
"""Changes to bytes, to trees of JSON and to arrays, drawn from a ``random.Random`` and nothing else."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

DEEP: Final = "\ue000deep"
"""Stands for a list nested deeper than any reader goes; ``to_text`` writes it."""
_DEPTH: Final = 20_000

NAMES: Final = (
    "", " ", "label", "logits", "lr", "loss", "head", "head.weight", "input", "../x", "../../../../x", "/abs/x", "a/b",
    "..", ".", "\ud800", "a\udfffb", "\x00", "x\ny", "\u202e", "é", "名", "int", "con", "NUL", "a" * 300, "a" * 100_000,
    "x;rm", "$(x)", "`x`", '"', "'", "\\", "%s%n", "{0}", "-o", "--out", "all", "test", "clean", "*/ x /*", "??/", "1x",
)  # fmt: skip

NUMBERS: Final = (
    0, -0.0, 1, -1, 2, 3, 7, 8, 127, 128, -127, -128, -129, 255, 256, 65535, 65536, 2**31 - 1, 2**31, -(2**31), 2**32,
    2**53, 2**63, -(2**63), 2**64, 10**400, 0.5, 1e-300, 5e-324, 1e-46, 1.2e-38, 1e-30, 1e-9, 1e9, 1e30, 3.5e38, 1e39,
    1e60, 1e300, 1.8e308, -1e300, float("nan"), float("inf"), float("-inf"), "inf", "-inf",
)  # fmt: skip

JUNK: Final = (
    None, True, False, [], {}, [[]], {"a": {}}, [0] * 9, [None, None], "x", "1", DEEP, {"class": "Attrs"}, [1] * 20_000,
)  # fmt: skip


def often(rng: random.Random, share: float) -> bool:
    """True in ``share`` of the draws."""
    return rng.random() < share


def edits(rng: random.Random, most: int = 4) -> int:
    """How many changes: one mostly, seldom more."""
    count = 1
    while count < most and often(rng, 0.35):
        count += 1
    return count


def generator(rng: random.Random) -> np.random.Generator:
    """A generator of numpy that follows from ``rng``."""
    return np.random.default_rng(rng.getrandbits(64))


# --- bytes ------------------------------------------------------------------------------------------------------


def _at(rng: random.Random, data: bytes) -> int:
    """A place; headers and ends are where formats are decided."""
    edge = min(len(data), 200)
    where = rng.choice((rng.randrange(len(data)), rng.randrange(edge), len(data) - 1 - rng.randrange(edge)))
    return max(0, where)


def _flip(rng: random.Random, data: bytes) -> bytes:
    i = _at(rng, data)
    return data[:i] + bytes([data[i] ^ 1 << rng.randrange(8)]) + data[i + 1 :]


def _set(rng: random.Random, data: bytes) -> bytes:
    i = _at(rng, data)
    return data[:i] + bytes([rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))]) + data[i + 1 :]


def _number(rng: random.Random, data: bytes) -> bytes:
    i, size = _at(rng, data), rng.choice((1, 2, 4, 8))
    value = rng.choice((0, 1, 2**7, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1, len(data)))
    raw = struct.pack("<Q", value)[:size]
    return data[:i] + (raw if often(rng, 0.5) else raw[::-1]) + data[i + size :]


def _cut(rng: random.Random, data: bytes) -> bytes:
    i = _at(rng, data)
    return data[:i] if often(rng, 0.5) else data[i:]


def _drop(rng: random.Random, data: bytes) -> bytes:
    i = _at(rng, data)
    return data[:i] + data[i + rng.randrange(1, 64) :]


def _repeat(rng: random.Random, data: bytes) -> bytes:
    i, n = _at(rng, data), rng.choice((1, 8, 100, 5000))
    return data[: i + n] + data[i : i + n] * rng.randrange(1, 4) + data[i + n :]


def _swap(rng: random.Random, data: bytes) -> bytes:
    i, j = sorted((_at(rng, data), _at(rng, data)))
    n = min(rng.randrange(1, 64), j - i)
    return data[:i] + data[j : j + n] + data[i + n : j] + data[i : i + n] + data[j + n :]


def _insert(rng: random.Random, data: bytes) -> bytes:
    i = _at(rng, data)
    return data[:i] + rng.randbytes(rng.randrange(1, 20)) + data[i:]


_BYTES: Final = (_flip, _flip, _set, _number, _number, _cut, _drop, _repeat, _swap, _insert)


def change_bytes(rng: random.Random, data: bytes) -> bytes:
    """One to four edits; seldom nothing is left of ``data`` at all."""
    if often(rng, 0.01):
        return rng.choice((b"", b"\0", rng.randbytes(300), data * 2))
    for _ in range(edits(rng)):
        data = rng.choice(_BYTES)(rng, data) if data else b""
    return data


# --- trees ------------------------------------------------------------------------------------------------------

Way = tuple[Any, ...]


def _paths(tree: Any, path: Way = ()) -> Iterator[Way]:
    yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from _paths(value, (*path, key))


def get(tree: Any, path: Sequence[Any]) -> Any:
    """The subtree at ``path``."""
    for key in path:
        tree = tree[key]
    return tree


def junk(rng: random.Random, was: Any = None) -> Any:
    """A value that does not belong there; of the type of ``was`` in half of the draws."""
    kinds: list[Sequence[Any]] = [NAMES, NUMBERS, JUNK]
    if often(rng, 0.5):
        kinds = [NAMES] if isinstance(was, str) else [NUMBERS] if isinstance(was, int | float) else kinds
    return copy.deepcopy(rng.choice(rng.choice(kinds)))


def _replace(rng: random.Random, parent: Any, key: Any, tree: Any) -> None:
    was = parent[key]
    keeps = isinstance(was, np.ndarray) and often(rng, 0.8)
    parent[key] = change_array(rng, was) if keeps else junk(rng, was)


def _scale(rng: random.Random, parent: Any, key: Any, tree: Any) -> None:
    value = parent[key]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    parent[key] = rng.choice(_around(value)) if number else junk(rng, value)


def _around(value: float) -> tuple[float, ...]:
    by = 1e30 if isinstance(value, float) else 10**30
    return -value, value + 1, value - 1, value * 2, value * by


def _remove(rng: random.Random, parent: Any, key: Any, tree: Any) -> None:
    del parent[key]


def _double(rng: random.Random, parent: Any, key: Any, tree: Any) -> None:
    if isinstance(parent, list):
        parent.insert(rng.randrange(len(parent) + 1), copy.deepcopy(parent[key]))
    else:
        parent[rng.choice(NAMES)] = copy.deepcopy(parent[key])


def _rename(rng: random.Random, parent: Any, key: Any, tree: Any) -> None:
    if isinstance(parent, dict):
        parent[rng.choice(NAMES)] = parent.pop(key)
    else:
        rng.shuffle(parent)


def _exchange(rng: random.Random, parent: Any, key: Any, tree: Any) -> None:
    parent[key] = copy.deepcopy(get(tree, rng.choice(list(_paths(tree)))))


_TREE: Final = (_replace, _replace, _replace, _scale, _remove, _double, _rename, _exchange)


def change_tree(rng: random.Random, tree: Any, inside: Callable[[Way], bool] = lambda path: True) -> Any:
    """A copy with one to four changes below its root, at paths that ``inside`` admits."""
    tree = copy.deepcopy(tree)
    for _ in range(edits(rng)):
        places = [p for p in _paths(tree) if p and inside(p)]
        if not places:
            break
        *path, key = rng.choice(places)
        rng.choice(_TREE)(rng, get(tree, path), key, tree)
    return tree


_FLOATS: Final = tuple(v for v in NUMBERS if isinstance(v, float) and v == v and abs(v) < 1e309)
_INTS: Final = (-129, -128, -127, -1, 0, 1, 2, 3, 5, 8, 16, 17, 100, 127, 128, 255, 256, 4096, 65535, 65536, 2**31 - 1)


def change_numbers(rng: random.Random, tree: Any, inside: Callable[[Way], bool] = lambda path: True) -> Any:
    """A copy in which one to four numbers are others of the same type."""
    tree = copy.deepcopy(tree)
    places = [p for p in _paths(tree) if p and type(get(tree, p)) in (int, float) and inside(p)]
    for _ in range(edits(rng) if places else 0):
        *path, key = rng.choice(places)
        parent = get(tree, path)
        parent[key] = _other_number(rng, parent[key])
    return tree


def _other_number(rng: random.Random, was: float) -> float:
    if isinstance(was, int):
        return rng.choice((*_INTS, was + 1, was - 1, 2 * was))
    return rng.choice((*_FLOATS, *(was * 2.0**k for k in (-140, -64, -31, -20, -8, -1, 1, 8, 20, 31, 64, 140))))


def rename_everywhere(tree: Any, old: str, new: str) -> Any:
    """A copy in which every text ``old`` is ``new``, so that a name stays one name."""
    if isinstance(tree, dict):
        return {k: rename_everywhere(v, old, new) for k, v in tree.items()}
    if isinstance(tree, list):
        return [rename_everywhere(v, old, new) for v in tree]
    return new if tree == old else tree


def to_text(tree: Any) -> str:
    """JSON, and what no JSON has: NaN, lone surrogates as escapes, nesting without end."""
    text = json.dumps(tree)
    return text.replace(json.dumps(DEEP), "[" * _DEPTH + "]" * _DEPTH)


def change_text(rng: random.Random, tree: Any) -> bytes:
    """A tree with changes, as the bytes of a file; seldom with changes to these as well."""
    raw = to_text(change_tree(rng, tree)).encode()
    return change_bytes(rng, raw) if often(rng, 0.1) else raw


# --- arrays -----------------------------------------------------------------------------------------------------

_DTYPES: Final = ("b1", "i1", "u1", "<i2", ">i2", "<u2", "<i4", ">i4", "<u4", "<i8", "<u8", "<f2", "<f4", ">f4", "<f8",
                  "<c8", "S3", "U2", "M8[s]", "O", "V4")  # fmt: skip


def _extreme(rng: random.Random, a: Array) -> Array:
    a = a.copy()
    if a.dtype.kind not in "iuf" or not a.size:
        return a
    if a.dtype.kind == "f":
        values: tuple[Any, ...] = (0.0, -0.0, 1e-45, 1e-38, 1e30, 3.4e38, np.inf, -np.inf, np.nan, -1.0)
    else:
        info = np.iinfo(a.dtype)
        values = (0, 1, info.min, info.max, info.max - 1, max(info.min, -127))
    count = rng.choice((1, 1, 2, a.size))
    with np.errstate(all="ignore"):
        a.reshape(-1)[generator(rng).integers(0, a.size, count)] = rng.choice(values)
    return a


def _retype(rng: random.Random, a: Array) -> Array:
    code = rng.choice(_DTYPES)
    with np.errstate(all="ignore"):
        return np.zeros(a.shape, code) if code[0] in "SUMOV" or a.dtype.kind == "U" else a.astype(code)


def _reshape(rng: random.Random, a: Array) -> Array:
    forms = (a.reshape(-1), a[None], a[..., None], a.T, a[:0], a.reshape(-1)[:1].reshape(()), np.repeat(a[None], 2, 0))
    return np.asarray(rng.choice(forms))


def _shorten(rng: random.Random, a: Array) -> Array:
    if not a.ndim or not a.shape[0]:
        return a
    return rng.choice((a[:-1], a[1:], np.concatenate([a, a[:1]]), a[::-1], a[:1]))


_ARRAY: Final = (_extreme, _extreme, _extreme, _retype, _reshape, _shorten)


def change_array(rng: random.Random, a: Array) -> Array:
    """The array with values, type or shape changed."""
    return rng.choice(_ARRAY)(rng, a)


def change_values(rng: random.Random, a: Array) -> Array:
    """The array with some values at the ends of its type."""
    return _extreme(rng, a)
