# SPDX-License-Identifier: Apache-2.0
"""A graph as two files: ``NAME.json`` says what it is, ``NAME.safetensors`` beside it holds its data.

Reading runs no code and takes memory in proportion to the files. Everything is checked: fields, types, versions,
names, shapes, and at last the graph itself.
"""

from __future__ import annotations

import hashlib
import json
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from trainlet.errors import UnsupportedError, UsageError
from trainlet.files import read_regular
from trainlet.frontends.limits import MAX_NAME, MAX_NODES, MAX_VALUES, check_count, check_limits
from trainlet.ir import DTYPES, Array, Attrs, DepthFirst, Graph, Interface, Kind, Node, Operands, QParams, Stage, Value
from trainlet.ops import OPS
from trainlet.verify import VerifyError, verify_graph

FORMAT = "trainlet-graph"
VERSION = 2
MAX_JSON_BYTES = 16 << 20  # parsed it takes up to 25 times its size
MAX_TENSOR_BYTES = 256 << 20
MAX_ELEMENTS = 1 << 30
MAX_RANK = 8

# depth-first runs hold nodes and belong to one plan of memory, which has no file
ATTRS: dict[str, type[Attrs]] = {op.attrs.__name__: op.attrs for op in OPS.values() if op.attrs is not DepthFirst}
"""The attribute classes that a file may name; nested ones are fixed by their field."""

T = TypeVar("T")
E = TypeVar("E", bound=StrEnum)


def save(graph: Graph, path: str | Path) -> None:
    """Writes ``graph`` to ``path`` (which ends in .json) and its data beside it. The same graph gives the same bytes.

    Raises VerifyError for a graph that ``load`` would refuse, UnsupportedError for one above a limit of files, or whose
    nodes have been placed (they run depth first, or write over inputs) or have kernels; nothing is written then."""
    path = Path(path)
    verify_graph(graph)
    check_limits(graph)
    placed = next((n for n in graph.nodes if n.overwrites or n.kernel or isinstance(n.attrs, DepthFirst)), None)
    if placed is not None:
        raise UnsupportedError(
            f"{graph.name}: {placed.name!r} ({placed.op}) is the work of a pass that chooses kernels or places memory, "
            "which has no file form; save the graph from before"
        )
    blob = save_tensors({name: np.ascontiguousarray(graph.data[name]) for name in sorted(graph.data)})
    document = {
        "format": FORMAT,
        "version": VERSION,
        "name": graph.name,
        "stage": graph.stage.value,
        "interface": _encode_interface(graph.interface),
        "tensors": {"sha256": hashlib.sha256(blob).hexdigest(), "names": sorted(graph.data)},
        "values": [_encode_value(v) for v in graph.values.values()],
        "nodes": [_encode_node(n) for n in graph.nodes],
    }
    tensors = _tensor_path(path)
    tensors.write_bytes(blob)
    path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def load(path: Path) -> Graph:
    """Reads what ``save`` wrote. Raises UsageError that names the file and the item at fault."""
    tensors = _tensor_path(path)
    document = _parse_json(path, _read(path, MAX_JSON_BYTES))
    blob = _read(tensors, MAX_TENSOR_BYTES)
    try:
        graph = _decode_graph(document, lambda names, sha: _parse_tensors(tensors, blob, names, sha))
        verify_graph(graph)
        check_limits(graph)
    except _FileError as e:
        raise UsageError(f"{path}: {e}") from None
    except VerifyError as e:
        raise UsageError(f"{path}: not a valid graph: {e}") from None
    except UnsupportedError as e:
        raise UsageError(f"{path}: {e}") from None
    return graph


class _FileError(Exception):
    """Names the item and the rule; ``load`` adds the file."""


def _fail(item: str, rule: str) -> NoReturn:
    raise _FileError(f"{item}: {rule}")


def _tensor_path(path: Path) -> Path:
    if path.suffix != ".json":
        raise UsageError(f"{path}: the file of a graph ends in .json, its data lies beside it in .safetensors")
    return path.with_suffix(".safetensors")


def _read(path: Path, limit: int) -> bytes:
    try:
        raw = read_regular(path, limit)
    except OSError as e:
        raise UsageError(f"{path}: cannot be read: {e.strerror}") from None
    if len(raw) > limit:
        raise UsageError(f"{path}: larger than the {limit} bytes that a graph may have")
    return raw


# --- JSON: what it may contain ------------------------------------------------------------------------------


def _parse_json(path: Path, raw: bytes) -> object:
    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a field is given twice")
        return found

    def no_constant(text: str) -> NoReturn:
        raise ValueError(f"{text} is no JSON number")

    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=no_constant)
    except (ValueError, RecursionError) as e:
        raise UsageError(f"{path}: not a JSON file of a graph: {e}") from None


def _record(item: str, value: object, names: tuple[str, ...]) -> dict[str, Any]:
    """An object with exactly these fields."""
    if not isinstance(value, dict):
        _fail(item, f"an object, not {_kind(value)}")
    for name in names:
        if name not in value:
            _fail(item, f"the field {name!r} is missing")
    for name in value:
        if name not in names:
            _fail(item, f"the field {name[:80]!r} is unknown")
    return value


def _list(item: str, value: object) -> list[Any]:
    if not isinstance(value, list):
        _fail(item, f"a list, not {_kind(value)}")
    return value


def _some(item: str, value: object, limit: int) -> list[Any]:
    found = _list(item, value)
    check_count(item, len(found), limit)
    return found


def _text(item: str, value: object) -> str:
    if not isinstance(value, str) or not value or not value.isprintable():
        _fail(item, f"a printable text, not {_kind(value)}")
    if len(value) > MAX_NAME:
        _fail(item, f"a text of at most {MAX_NAME} characters, not {len(value)}")
    return value


def _integer(item: str, value: object) -> int:
    if type(value) is not int or abs(value) >= 2**63:
        _fail(item, f"a whole number of at most 63 bits, not {_kind(value)}")
    return value


def _real(item: str, value: object) -> float:
    if value in ("inf", "-inf"):  # JSON has no infinity, and an open bound needs one
        return float(str(value))
    if type(value) is int:
        return _integer(item, value)
    if type(value) is not float or not math.isfinite(value):
        _fail(item, f"a number, not {_kind(value)}")
    return value


def _bool(item: str, value: object) -> bool:
    if type(value) is not bool:
        _fail(item, f"true or false, not {_kind(value)}")
    return value


def _names(item: str, value: object) -> tuple[str, ...]:
    return tuple(_text(f"{item}[{i}]", v) for i, v in enumerate(_list(item, value)))


def _member(item: str, value: object, enum: type[E]) -> E:
    if value not in [e.value for e in enum]:
        _fail(item, f"one of {', '.join(e.value for e in enum)}, not {_kind(value)}")
    return enum(value)


def _kind(value: object) -> str:
    text = repr(value) if isinstance(value, str | int | float | None) else type(value).__name__
    return text if len(text) <= 80 else text[:77] + "..."


# --- values and nodes ---------------------------------------------------------------------------------------


def _encode_value(v: Value) -> dict[str, object]:
    q = None if v.q is None else {"scale": float(v.q.scale), "zero": v.q.zero}
    return {
        "name": v.name,
        "shape": [int(n) for n in v.shape],
        "dtype": v.dtype,
        "kind": v.kind.value,
        "q": q,
        "exponent": v.exponent,
        "fan_in": v.fan_in,
    }


def _decode_value(item: str, raw: object, version: int) -> Value:
    names = ("name", "shape", "dtype", "kind", "q", "exponent")
    r = _record(item, raw, (*names, "fan_in") if version > 1 else names)
    item = f"value {_text(f'{item}.name', r['name'])!r}"
    shape = tuple(_integer(f"{item}.shape", n) for n in _list(f"{item}.shape", r["shape"]))
    if not 0 < len(shape) <= MAX_RANK or min(shape) < 1 or math.prod(shape) > MAX_ELEMENTS:
        _fail(f"{item}.shape", f"1 to {MAX_RANK} sizes of at least 1, at most {MAX_ELEMENTS} elements in all")
    if r["dtype"] not in list(DTYPES):
        _fail(f"{item}.dtype", f"one of {', '.join(DTYPES)}, not {_kind(r['dtype'])}")
    exponent = None if r["exponent"] is None else _integer(f"{item}.exponent", r["exponent"])
    q = None
    if r["q"] is not None:
        s = _record(f"{item}.q", r["q"], ("scale", "zero"))
        q = QParams(float(_real(f"{item}.q.scale", s["scale"])), _integer(f"{item}.q.zero", s["zero"]))
    fan_in = None if r.get("fan_in") is None else _integer(f"{item}.fan_in", r["fan_in"])
    return Value(r["name"], shape, r["dtype"], _member(f"{item}.kind", r["kind"], Kind), q, exponent, fan_in)


def _encode_node(n: Node) -> dict[str, object]:
    return {
        "name": n.name,
        "op": n.op,
        "layer": n.layer,
        "operands": {k: list(v) for k, v in n.operands.items()},
        "outputs": list(n.outputs),
        "stores": {k: list(v) for k, v in n.stores.items()},
        "attrs": {"class": type(n.attrs).__name__, **_encode_attrs(n.attrs)},
    }


def _encode_interface(face: Interface) -> dict[str, object]:
    many = {k: list(getattr(face, k)) for k in ("inputs", "targets", "outputs", "losses")}
    return {**many, "rate": face.rate or None}


def _decode_interface(r: Mapping[str, Any], version: int) -> Interface:
    if version == 1:
        return Interface(_names("inputs", r["inputs"]), _names("outputs", r["outputs"]))
    many = ("inputs", "outputs", "targets", "losses")
    raw = _record("interface", r["interface"], (*many, "rate"))
    rate = "" if raw["rate"] is None else _text("interface.rate", raw["rate"])
    return Interface(rate=rate, **{k: _names(f"interface.{k}", raw[k]) for k in many})


def _decode_node(item: str, raw: object, version: int) -> Node:
    named = ("operands", "stores") if version > 1 else ("inputs", "writes")
    r = _record(item, raw, ("name", "op", "layer", *named, "outputs", "attrs"))
    item = f"node {_text(f'{item}.name', r['name'])!r}"
    if not isinstance(r["attrs"], dict):
        _fail(f"{item}.attrs", f"an object, not {_kind(r['attrs'])}")
    attrs = dict(r["attrs"])
    name = attrs.pop("class", None)
    cls = ATTRS.get(name) if isinstance(name, str) else None
    if cls is None:
        _fail(f"{item}.attrs.class", f"one of {', '.join(ATTRS)}, not {_kind(name)}")
    return Node(
        op=_text(f"{item}.op", r["op"]),
        name=r["name"],
        layer=_text(f"{item}.layer", r["layer"]),
        operands=_operands(item, "operands", r) if version > 1 else _by_position(item, r),
        outputs=_names(f"{item}.outputs", r["outputs"]),
        attrs=_decode_attrs(f"{item}.attrs", attrs, cls),
        stores=_operands(item, "stores", r) if version > 1 else Operands(),
    )


def _operands(item: str, field: str, r: Mapping[str, Any]) -> Operands:
    raw = r[field]
    if not isinstance(raw, dict):
        _fail(f"{item}.{field}", f"an object, not {_kind(raw)}")
    known = {o.name for op in OPS.values() for o in (*op.operands, *op.stores)}
    for name in raw:
        if name not in known:
            _fail(f"{item}.{field}", f"{_kind(name)} is an operand of no operator")
    found = {name: _names(f"{item}.{field}.{name}", v) for name, v in raw.items()}
    empty = [name for name, v in found.items() if not v]
    if empty:
        _fail(f"{item}.{field}.{empty[0]}", "names at least one value; what an operand lacks is left out")
    return Operands(**found)


_CONV2D = ("x", "weight", "bias")
_POSITIONS: Mapping[str, Mapping[int, tuple[str, ...]]] = {
    "conv2d": {3: _CONV2D, 4: (*_CONV2D, "scale")},
    "add": {2: ("a", "b")},
    "avg_pool": {1: ("x",)},
    "dense": {3: ("x", "weight", "bias")},
}
"""Version 1 listed the inputs of a model's operators by position; it knew these."""


def _by_position(item: str, r: Mapping[str, Any]) -> Operands:
    names = _names(f"{item}.inputs", r["inputs"])
    by_count = _POSITIONS.get(str(r["op"]), {})
    if len(names) not in by_count or r["writes"] != []:
        _fail(item, "this trainlet reads models of version 1, not training steps; compile the model anew")
    return Operands(**dict(zip(by_count[len(names)], names, strict=True)))


# --- attributes: encoded and decoded along the annotations of their fields -----------------------------------


def _encode_attrs(attrs: Attrs) -> dict[str, object]:
    return {f.name: _encode(getattr(attrs, f.name)) for f in fields(attrs)}


def _encode(value: object) -> object:
    if isinstance(value, Attrs):
        return _encode_attrs(value)
    if isinstance(value, tuple):
        return [_encode(v) for v in value]
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    if isinstance(value, np.integer):
        return int(value)
    return value


def _decode_attrs(item: str, raw: object, cls: type[Attrs]) -> Attrs:
    hints = typing.get_type_hints(cls)
    r = _record(item, raw, tuple(f.name for f in fields(cls)))
    return cls(**{name: _decode(f"{item}.{name}", value, hints[name]) for name, value in r.items()})


def _decode(item: str, raw: object, hint: Any) -> object:
    simple = _SIMPLE.get(hint)
    if simple is not None:
        return simple(item, raw)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if raw not in args:
            _fail(item, f"one of {', '.join(map(str, args))}, not {_kind(raw)}")
        return raw
    if origin in (types.UnionType, typing.Union):  # the only unions are with None
        return None if raw is None else _decode(item, raw, next(a for a in args if a is not types.NoneType))
    if origin is tuple:
        return _decode_tuple(item, _list(item, raw), args)
    if is_dataclass(hint):
        return _decode_attrs(item, raw, typing.cast("type[Attrs]", hint))
    raise TypeError(f"attributes of type {hint} have no file form")


def _decode_tuple(item: str, raw: list[Any], args: tuple[Any, ...]) -> tuple[object, ...]:
    hints = (args[0],) * len(raw) if args[-1] is Ellipsis else args
    if len(raw) != len(hints):
        _fail(item, f"{len(hints)} entries, not {len(raw)}")
    return tuple(_decode(f"{item}[{i}]", v, h) for i, (v, h) in enumerate(zip(raw, hints, strict=True)))


_SIMPLE: Mapping[Any, Callable[[str, object], object]] = {int: _integer, float: _real, bool: _bool, str: _text}


# --- the graph ----------------------------------------------------------------------------------------------


def _decode_graph(document: object, tensors: Callable[[tuple[str, ...], str], dict[str, Array]]) -> Graph:
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        _fail("format", f"is {FORMAT!r} in the file of a graph")
    version = document.get("version")
    if type(version) is not int or not 1 <= version <= VERSION:
        _fail("version", f"this trainlet reads versions 1 to {VERSION}, not {_kind(version)}")
    face = ("interface",) if version > 1 else ("inputs", "outputs")
    r = _record("the file", document, ("format", "version", "name", "stage", *face, "tensors", "values", "nodes"))
    values: dict[str, Value] = {}
    for i, raw in enumerate(_some("values", r["values"], MAX_VALUES)):
        v = _decode_value(f"values[{i}]", raw, version)
        if v.name in values:
            _fail(f"value {v.name!r}", "is defined once")
        values[v.name] = v
    t = _record("tensors", r["tensors"], ("sha256", "names"))
    data = tensors(_names("tensors.names", t["names"]), _text("tensors.sha256", t["sha256"]))
    if version == 1:
        values = {k: _drawn(v, data) for k, v in values.items()}
    return Graph(
        name=_text("name", r["name"]),
        stage=_member("stage", r["stage"], Stage),
        interface=_decode_interface(r, version),
        values=values,
        nodes=tuple(
            _decode_node(f"nodes[{i}]", raw, version) for i, raw in enumerate(_some("nodes", r["nodes"], MAX_NODES))
        ),
        data=data,
    )


def _drawn(v: Value, data: Mapping[str, Array]) -> Value:
    """A state without data of version 1, which was the weight of a head: it is drawn."""
    return replace(v, fan_in=v.shape[-1]) if v.kind is Kind.STATE and v.name not in data else v


def _parse_tensors(path: Path, blob: bytes, names: tuple[str, ...], sha256: str) -> dict[str, Array]:
    try:
        found = load_tensors(blob)
    except (SafetensorError, ValueError, KeyError, TypeError) as e:
        raise UsageError(f"{path}: not a safetensors file: {e}") from None
    for name in names:
        if name not in found:
            raise UsageError(f"{path}: the tensor {name!r} is missing")
    for name in found:
        if name not in names:
            raise UsageError(f"{path}: the tensor {name[:80]!r} belongs to no value of the graph")
    if hashlib.sha256(blob).hexdigest() != sha256:
        raise UsageError(f"{path}: its bytes are not those that were saved with the graph; save both again")
    return {name: found[name] for name in names}
