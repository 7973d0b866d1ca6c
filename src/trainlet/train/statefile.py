# SPDX-License-Identifier: Apache-2.0
"""The trained state as a safetensors file: the arrays of ``Session.state`` and, as its one metadata entry, what they
belong to. Reading is strict, writing is atomic; the same state gives the same bytes."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Final, NoReturn

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from trainlet.errors import UsageError
from trainlet.files import read_regular
from trainlet.train.folder import write_atomic as write_atomic

FORMAT: Final = "trainlet.state"
VERSION: Final = 1
MAX_BYTES: Final = 256 << 20

Arrays = Mapping[str, NDArray[np.generic]]

# safetensors writes several metadata entries in no fixed order; a single one keeps the bytes of a file fixed
_ENTRY: Final = "trainlet"
_AGAIN: Final = "give a state.safetensors that `trainlet train` wrote, or train again"


@dataclass(frozen=True, slots=True)
class StateMeta:
    """What a state belongs to. ``model`` is the name of the graph, ``scheme`` the JSON of the UpdateScheme, ``classes``
    the class names in the order of the logits, ``bits`` the width of a trained weight (8, 12 or 16), ``resize`` how the
    images were brought to size (``crop`` or ``squeeze``)."""

    model: str
    model_hash: str
    scheme: str
    classes: tuple[str, ...]
    bits: int
    resize: str


@dataclass(frozen=True)
class TrainedState:
    """A state file in memory. ``progress`` is where a run stands, in a checkpoint; None in a plain state."""

    meta: StateMeta
    arrays: Arrays = field(repr=False)
    progress: Mapping[str, Any] | None = None


def state_sha256(arrays: Arrays) -> str:
    """The sha256 over all arrays in the order of their sorted names: each name in UTF-8, a zero byte, then the
    elements, little-endian in C order."""
    h = hashlib.sha256()
    for name in sorted(arrays):
        a = arrays[name]
        h.update(name.encode() + b"\0")
        h.update(a.astype(a.dtype.newbyteorder("<")).tobytes())
    return h.hexdigest()


def save(state: TrainedState, path: Path) -> None:
    """Writes ``state`` to ``path``, atomically. Raises OSError."""
    document: dict[str, Any] = {"format": FORMAT, "version": VERSION, **asdict(state.meta)}
    if state.progress is not None:
        document["progress"] = dict(state.progress)
    document["checksum"] = _checksum(document, state.arrays)
    arrays = {name: np.asarray(a, order="C") for name, a in state.arrays.items()}
    write_atomic(path, save_tensors(arrays, {_ENTRY: json.dumps(document, allow_nan=False)}))


def load(path: Path) -> TrainedState:
    """Reads what ``save`` wrote. Raises UsageError naming the file where it is missing, damaged, of another kind or of
    another version. Whether it fits a model, ``check_model`` says and, array by array, ``Session.load_state``."""
    raw = _read(path)
    try:
        arrays = load_tensors(raw)
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise UsageError(f"{path}: damaged, or no safetensors file ({e}); {_AGAIN}") from None
    document = _document(path, header)
    if document.pop("checksum", None) != _checksum(document, arrays):
        raise UsageError(f"{path}: damaged, its content does not have the checksum that was saved with it; {_AGAIN}")
    meta = _meta(path, document)
    progress = document.get("progress")
    if progress is not None and not isinstance(progress, dict):
        raise UsageError(f"{path}: damaged, progress is no object; {_AGAIN}")
    return TrainedState(meta, arrays, progress)


def check_model(state: TrainedState, model_hash: str, path: Path) -> None:
    """UsageError unless ``state``, read from ``path``, belongs to the model with this hash."""
    if state.meta.model_hash != model_hash:
        raise UsageError(
            f"{path}: this is the state of another model, {state.meta.model} of hash {state.meta.model_hash[:12]}; "
            f"the one given has {model_hash[:12]}; give the model file that it was trained from"
        )


def _checksum(document: Mapping[str, Any], arrays: Arrays) -> str:
    """Over the metadata without its checksum, and the arrays."""
    text = json.dumps(document, sort_keys=True, allow_nan=False) + state_sha256(arrays)
    return hashlib.sha256(text.encode()).hexdigest()


def _read(path: Path) -> bytes:
    try:
        raw = read_regular(path, MAX_BYTES)
    except OSError as e:
        raise UsageError(f"{path}: cannot be read ({e.strerror}); {_AGAIN}") from None
    if len(raw) > MAX_BYTES:
        raise UsageError(f"{path}: more than {MAX_BYTES >> 20} MiB, which no state has; {_AGAIN}")
    return raw


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")


def _finite(text: str) -> float:
    return float(text) if math.isfinite(float(text)) else _no_number(text)


def _document(path: Path, header: Any) -> dict[str, Any]:
    """The metadata entry, of a version that is read."""
    text = (header.get("__metadata__") or {}).get(_ENTRY)
    try:
        document = json.loads(text, parse_constant=_no_number, parse_float=_finite) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise UsageError(f"{path}: a safetensors file, but not a trained state of trainlet; {_AGAIN}")
    if type(document.get("version")) is not int or document["version"] != VERSION:
        raise UsageError(f"{path}: version {document.get('version')!r:.20} is not read, version {VERSION} is; {_AGAIN}")
    return document


def _meta(path: Path, document: dict[str, Any]) -> StateMeta:
    types = {"classes": list, "bits": int}
    found: dict[str, Any] = {}
    for f in fields(StateMeta):
        value = document.get(f.name)
        if type(value) is not types.get(f.name, str):
            raise UsageError(f"{path}: damaged, the metadata has no usable {f.name!r}; {_AGAIN}")
        found[f.name] = value
    if not all(isinstance(c, str) for c in found["classes"]):
        raise UsageError(f"{path}: damaged, a class name is no text; {_AGAIN}")
    return StateMeta(**{**found, "classes": tuple(found["classes"])})
