# SPDX-License-Identifier: Apache-2.0
"""Hostile models and schemes: checkpoints, graph files, scheme files, through ``trainlet import`` and ``compile``."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import pickle
import random
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from hostile import tensors
from hostile.case import Attack, Kind, Place
from hostile.commands import run_commands
from hostile.mutate import (
    NAMES,
    change_bytes,
    change_numbers,
    change_text,
    change_tree,
    change_values,
    often,
    rename_everywhere,
    to_text,
)
from trainlet.errors import TrainletError

SCHEMES: Final = ("head", "bias:1", "bias:3", "last:1", "last:2", "full")
_STEMS: Final = ("model", "label", "a b", "x'\"", "-o", "int", "ä", "\udcff", "a" * 200, "con", "tl_model", "..", "%s")


def _compiled(model: Path, place: Place, scheme: object, classes: int = 3) -> Sequence[object]:
    out = ("--out", place.out / "c")
    return ("compile", "--model", model, "--scheme", scheme, "--classes", classes, *out)


def _import_and_compile(rng: random.Random, place: Place, model: Path) -> Attack:
    scheme = rng.choice(SCHEMES)
    name = model.relative_to(place.work)
    return lambda: run_commands(("import", name, "--out", place.out), _compiled(name, place, scheme))


# --- checkpoints ------------------------------------------------------------------------------------------------


class _Runs:
    """What is pickled runs a program where it is unpickled by the book."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.system, ("touch came-through",)


def _prepare_checkpoint(base: Path) -> None:
    from test_checkpoint import checkpoint

    (base / "checkpoint.pickle").write_bytes(pickle.dumps(checkpoint(), 2))


@functools.cache
def _checkpoint(base: Path) -> dict[str, Any]:
    found: dict[str, Any] = pickle.loads((base / "checkpoint.pickle").read_bytes())
    return found


def _pickled(rng: random.Random, sound: dict[str, Any]) -> bytes:
    how = rng.choice(("tree", "tree", "tree", "bytes", "bytes", "runs"))
    if how == "bytes":
        return change_bytes(rng, pickle.dumps(sound, rng.choice((2, 2, 3, 4))))
    content = change_tree(rng, sound)
    if how == "runs":
        content[rng.choice(sorted(map(str, content)))] = _Runs()
    return pickle.dumps(content, rng.choice((0, 1, 2, 2, 2, 3, 4, 5)))


def _archived(rng: random.Random, data: bytes) -> bytes:
    out = io.BytesIO()
    method = zipfile.ZIP_STORED if often(rng, 0.9) else zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(out, "w", method) as z:
        for name in rng.choice((("archive/data.pkl",),) * 8 + (("data.pkl",), ("a/data.pkl", "b/data.pkl"), ())):
            z.writestr(name, data)
        z.writestr("archive/version", "3\n")
    return change_bytes(rng, out.getvalue()) if often(rng, 0.3) else out.getvalue()


def _make_checkpoint(rng: random.Random, place: Place) -> Attack:
    raw = _archived(rng, _pickled(rng, _checkpoint(place.base)))
    model = place.work / (f"{rng.choice(_STEMS)}.pkl" if often(rng, 0.1) else "model.pkl")
    model.write_bytes(raw)
    return _import_and_compile(rng, place, model)


# --- graph files ------------------------------------------------------------------------------------------------


def prepare_graphs(base: Path) -> None:
    """Small models, and a few graphs of other stages."""
    from graphs import float_chain, int8_chain, train_tail
    from random_nets import NAMED

    from trainlet.frontends import graph_file

    graphs = [int8_chain(), float_chain(), train_tail()]
    graphs += [NAMED[n]()[1] for n in ("add_with_activation", "shared_later", "dilated_groups", "pool_in_prefix")]
    for i, graph in enumerate(graphs):
        graph_file.save(graph, base / f"graph{i}.json")


@functools.cache
def _graphs(base: Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    files = sorted(base.glob("graph*.json"))
    return [(json.loads(f.read_text()), tensors.read(f.with_suffix(".safetensors").read_bytes())[1]) for f in files]


def _renamed(rng: random.Random, document: dict[str, Any], arrays: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The name of the graph, or one name of a value, node or layer, changed wherever it stands."""
    new = rng.choice(NAMES)
    if often(rng, 0.25):
        return {**document, "name": new}, arrays
    item = rng.choice([*document["values"], *document["nodes"]])
    old = item.get("layer", item["name"]) if often(rng, 0.3) else item["name"]
    return rename_everywhere(document, old, new), {new if k == old else k: v for k, v in arrays.items()}


_NUMERIC: Final = ("q", "scale", "zero", "clamp", "exponent", "shape", "kernel", "stride", "pads", "dilation", "groups")


def _make_graph(rng: random.Random, place: Place) -> Attack:
    graphs = _graphs(place.base)
    document, arrays = graphs[rng.choice((0, 0, 0, *range(len(graphs))))]
    how = rng.choice(("tree", "tree", "numbers", "numbers", "numbers", "names", "values", "arrays", "bytes"))
    if how == "tree":
        document = change_tree(rng, document)
    if how == "numbers":
        document = change_numbers(rng, document, lambda path: any(k in _NUMERIC for k in path))
    if how == "values":
        name = rng.choice(sorted(arrays))
        arrays = {**arrays, name: change_values(rng, arrays[name])}
    if how == "names":
        document, arrays = _renamed(rng, document, arrays)
    if how == "arrays":
        arrays = tensors.change(rng, arrays)
    return _write_graph(rng, place, document, arrays, how)


def _make_float(rng: random.Random, place: Place) -> Attack:
    """A graph of stage float with other numbers, calibrated with random images and saved as integers."""
    document, arrays = rng.choice([g for g in _graphs(place.base) if g[0]["stage"] == "float"])
    if often(rng, 0.3):
        document = change_tree(rng, document)
    for name in rng.sample(sorted(arrays), rng.randrange(4)):
        arrays = {**arrays, name: change_values(rng, arrays[name])}
    model = _write(place, document, tensors.write(arrays))
    images, per_channel = rng.randbytes(5 * 8 * 8 * 3), often(rng, 0.5)

    def attack() -> str:
        from trainlet.frontends import graph_file
        from trainlet.frontends.quantize import quantize

        place.out.mkdir()
        try:
            x = np.frombuffer(images, np.int8).reshape(5, 8, 8, 3)
            made = quantize(graph_file.load(model), x, per_channel=per_channel)
            graph_file.save(made, place.out / "quantized.json")
            graph_file.load(place.out / "quantized.json")
        except TrainletError as e:
            return type(e).__name__
        return "quantized"

    return attack


def write_numbers(rng: random.Random, place: Place) -> Path:
    """A model of stage int8 with other numbers of the same types; its file."""
    document, arrays = rng.choice([g for g in _graphs(place.base) if g[0]["stage"] == "int8"])
    if often(rng, 0.7):
        document = change_numbers(rng, document, lambda path: any(k in ("q", "clamp") for k in path))
    for name in rng.sample(sorted(arrays), rng.randrange(3)):
        arrays = {**arrays, name: change_values(rng, arrays[name])}
    return _write(place, document, tensors.write(arrays))


def _write(place: Place, document: Any, blob: bytes) -> Path:
    if isinstance(document.get("tensors"), dict):
        document = {**document, "tensors": {**document["tensors"], "sha256": hashlib.sha256(blob).hexdigest()}}
    model = place.work / "graph.json"
    model.write_text(to_text(document))
    model.with_suffix(".safetensors").write_bytes(blob)
    return model


def _write_graph(rng: random.Random, place: Place, document: Any, arrays: dict[str, Any], how: str) -> Attack:
    blob = tensors.write(arrays, rng=rng if how == "arrays" and often(rng, 0.2) else None)
    blob = change_bytes(rng, blob) if how == "bytes" and often(rng, 0.5) else blob
    if isinstance(document.get("tensors"), dict) and often(rng, 0.95):
        document = {**document, "tensors": {**document["tensors"], "sha256": hashlib.sha256(blob).hexdigest()}}
        if how == "arrays":
            document["tensors"]["names"] = sorted(arrays)
    text = to_text(document).encode()
    model = place.work / "graph.json"
    model.write_bytes(change_bytes(rng, text) if how == "bytes" else text)
    model.with_suffix(".safetensors").write_bytes(blob)
    return _import_and_compile(rng, place, model)


# --- schemes ----------------------------------------------------------------------------------------------------


def _prepare_scheme(base: Path) -> None:
    from graphs import int8_chain

    from trainlet.autodiff.scheme import UpdateScheme
    from trainlet.frontends import graph_file

    graph_file.save(int8_chain(), base / "model.json")
    scheme = UpdateScheme("own", ("block.depthwise", "block.project"), {"stem": 1.0, "block.project": 0.5}, 12)
    (base / "scheme.json").write_text(scheme.to_json())


def _make_scheme(rng: random.Random, place: Place) -> Attack:
    scheme = place.work / "scheme.json"
    scheme.write_bytes(change_text(rng, json.loads((place.base / "scheme.json").read_text())))
    given: object = scheme
    if often(rng, 0.05):
        given = rng.choice(
            (*NAMES, "last:0", "last:99999999999999999999", "bias:-1", "last:٣", "99kb", "full:", "head:1")
        )
    classes = rng.choice((3, 3, 3, 1, 0, -1, 65536))
    return lambda: run_commands(_compiled(place.base / "model.json", place, given, classes))


KINDS: Final = (
    Kind("pickle", _prepare_checkpoint, _make_checkpoint),
    Kind("graph", prepare_graphs, _make_graph),
    Kind("float", prepare_graphs, _make_float),
    Kind("scheme", _prepare_scheme, _make_scheme),
)
