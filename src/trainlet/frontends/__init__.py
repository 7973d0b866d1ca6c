# SPDX-License-Identifier: Apache-2.0
"""Front ends: model files -> Graph. ``load`` chooses one by the file's name and first bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

from trainlet.errors import UnsupportedError, UsageError
from trainlet.frontends import graph_file
from trainlet.frontends.common import attach_head, features, trunk
from trainlet.frontends.published.checkpoint import load_checkpoint
from trainlet.frontends.size import at_size
from trainlet.ir import Graph
from trainlet.ops.quantization import canonicalize_dead, check_sums

__all__ = [
    "at_size",
    "attach_head",
    "canonicalize_dead",
    "check_sums",
    "features",
    "load",
    "load_checkpoint",
    "need_path",
    "trunk",
]

_LOADERS: Final[dict[str, Callable[[Path], Graph]]] = {".pkl": load_checkpoint, ".json": graph_file.load}

# files that a user may well try, and what they are
_KNOWN: Final = {
    ".tflite": "a TFLite model",
    ".onnx": "an ONNX model",
    ".pt2": "a program of torch.export",
    ".pt": "a torch file",
    ".pth": "a torch file",
    ".safetensors": "a safetensors file without a graph",
    ".h5": "a Keras model",
    ".keras": "a Keras model",
}


def _kind(path: Path) -> str:
    """The extension by which a file is read: its own, or the one that its first bytes imply."""
    suffix = path.suffix.lower()
    if suffix in _LOADERS or suffix in _KNOWN:
        return suffix
    with path.open("rb") as f:
        start = f.read(8)
    if start[4:8] == b"TFL3":
        return ".tflite"
    return ".pkl" if start.startswith(b"PK\x03\x04") else suffix


def need_path(path: object) -> Path:
    """The path that a text or a Path gives; UsageError for anything else."""
    if not isinstance(path, str | Path):
        raise UsageError(f"a path is a text or a pathlib.Path, not {type(path).__name__} {path!r:.60}")
    return Path(path)


def load(path: str | Path) -> Graph:
    """Reads a model file: a published checkpoint (.pkl, stage int8), or a graph that ``save`` wrote (.json, of whatever
    stage it is). UsageError if the file is missing or damaged, UnsupportedError if no front end reads it."""
    path = need_path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UsageError(f"{path}: {what}; give the path of a model file ({', '.join(_LOADERS)})")
    try:
        kind = _kind(path)
    except OSError as e:
        raise UsageError(f"{path}: cannot be read ({e.strerror}); give the path of a model file") from None
    loader = _LOADERS.get(kind)
    if loader is None:
        what = _KNOWN.get(kind, "a file of unknown type")
        raise UnsupportedError(f"{path}: this is {what}, which no front end reads; readable are {', '.join(_LOADERS)}")
    return loader(path)
