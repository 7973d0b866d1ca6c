# SPDX-License-Identifier: Apache-2.0
"""Safetensors files written by hand, so that they can be wrong in any way."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from hostile.mutate import Array, change_array, change_bytes, change_tree, often, to_text

_CODES: Final = {
    "int8": "I8", "uint8": "U8", "int16": "I16", "uint16": "U16", "int32": "I32", "uint32": "U32", "int64": "I64",
    "uint64": "U64", "float16": "F16", "float32": "F32", "float64": "F64", "bool": "BOOL",
}  # fmt: skip


def read(raw: bytes) -> tuple[dict[str, Any], dict[str, Array]]:
    """Header and arrays of a sound file."""
    import json

    from safetensors.numpy import load

    size = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + size]), load(raw)


def write(arrays: Mapping[str, Array], metadata: Any = None, rng: random.Random | None = None) -> bytes:
    """The bytes of a file; with ``rng`` its header is changed here and there."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    body, at = b"", 0
    for name, a in sorted(arrays.items()):
        raw = np.ascontiguousarray(a).tobytes()
        code = _CODES.get(a.dtype.name, "I8")
        header[name] = {"dtype": code, "shape": list(a.shape), "data_offsets": [at, at + len(raw)]}
        body, at = body + raw, at + len(raw)
    text = to_text(header if rng is None else change_tree(rng, header)).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


def change(rng: random.Random, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Arrays, some of which are changed, missing, doubled or under another's name."""
    found = dict(arrays)
    names = sorted(found)
    for name in rng.sample(names, min(len(names), rng.choice((1, 1, 2)))):
        how = rng.choice(("change", "change", "change", "change", "drop", "double", "exchange"))
        if how == "change":
            found[name] = change_array(rng, found[name])
        elif how == "drop":
            found.pop(name, None)
        elif how == "double":
            found[f"{name}.copy"] = found[name]
        else:
            found[name] = found[rng.choice(sorted(found))]
    return found


def damage(rng: random.Random, raw: bytes) -> bytes:
    """The bytes as they are, or changed in a tenth of the draws."""
    return change_bytes(rng, raw) if often(rng, 0.1) else raw
