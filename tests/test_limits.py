# SPDX-License-Identifier: Apache-2.0
"""What a model file may not ask for: each refusal names the file, the item and the rule."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from graphs import float_chain, int8_chain, train_tail
from random_nets import NAMED, Net, named_case
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors
from test_checkpoint import archive, checkpoint

from trainlet import files
from trainlet.compiler import Passes, compile_model
from trainlet.errors import UnsupportedError, UsageError
from trainlet.frontends import at_size, attach_head, limits, load_checkpoint
from trainlet.frontends.graph_file import load, save
from trainlet.frontends.limits import check_limits, names_of_step
from trainlet.ir.graph import Graph, QParams, Stage, Value

Change = Callable[[dict[str, Any], dict[str, Any]], None]


def _file(tmp_path: Path, graph: Graph, change: Change) -> Path:
    """The files of ``graph`` with a change to document and tensors, and the checksum that fits."""
    path = tmp_path / "g.json"
    save(graph, path)
    document, tensors = json.loads(path.read_text()), load_tensors(path.with_suffix(".safetensors").read_bytes())
    change(document, tensors)
    blob = save_tensors(tensors)
    document["tensors"] = {"sha256": hashlib.sha256(blob).hexdigest(), "names": sorted(tensors)}
    path.write_text(json.dumps(document))
    path.with_suffix(".safetensors").write_bytes(blob)
    return path


def _value(document: dict[str, Any], name: str) -> dict[str, Any]:
    return next(v for v in document["values"] if v["name"] == name)


def _scale(name: str, scale: float) -> Change:
    def change(document: dict[str, Any], tensors: dict[str, Any]) -> None:
        _value(document, name)["q"]["scale"] = scale

    return change


def _weight_scale(name: str, scale: float) -> Change:
    def change(document: dict[str, Any], tensors: dict[str, Any]) -> None:
        tensors[f"{name}.scale"] = np.full_like(tensors[f"{name}.scale"], scale)

    return change


def _rename(old: str, new: str) -> Change:
    def change(document: dict[str, Any], tensors: dict[str, Any]) -> None:
        renamed = json.loads(json.dumps(document).replace(json.dumps(old), json.dumps(new)))
        document.update(renamed)
        if old in tensors:
            tensors[new] = tensors.pop(old)

    return change


def _both(*changes: Change) -> Change:
    def change(document: dict[str, Any], tensors: dict[str, Any]) -> None:
        for c in changes:
            c(document, tensors)

    return change


def _exponent(document: dict[str, Any], tensors: dict[str, Any]) -> None:
    _value(document, "conv.0.y")["exponent"] = 3


def _state(document: dict[str, Any], tensors: dict[str, Any]) -> None:
    _value(document, "conv.0.weight")["kind"] = "state"


def _label(document: dict[str, Any], tensors: dict[str, Any]) -> None:
    document["values"].append({**_value(document, "input"), "name": "y", "shape": [1], "dtype": "s32", "q": None})
    document["interface"]["targets"] = ["y"]


SCALE = "its scale lies within 2^-126 .. 2^126"
REFUSED: dict[str, tuple[Change, str]] = {
    "a scale of 1e300": (_scale("conv.0.y", 1e300), f"value 'conv.0.y': {SCALE}"),
    "a scale of 1e60": (_scale("conv.0.y", 1e60), f"value 'conv.0.y': {SCALE}"),
    "a scale of 1e-60": (_scale("input", 1e-60), f"value 'input': {SCALE}"),
    "a scale that is no normal float32": (_scale("add.0.y", 2.0**-127), f"value 'add.0.y': {SCALE}"),
    "a weight scale of 1e38": (_weight_scale("conv.1", 1e38), "node 'conv.1': its weight scales lie within 2^-126"),
    "a weight scale of 1e-40": (_weight_scale("conv.1", 1e-40), "node 'conv.1': its weight scales lie within 2^-126"),
    "sums that saturate": (_scale("conv.1.y", 1e-13), "node 'conv.1': its scales make outputs"),
    "an addition that saturates": (
        _both(_scale("add.0.y", 2.0**-40), _scale("pool.y", 2.0**-40)),
        "node 'add.0': its scales make outputs",
    ),
    "a rate above float32": (
        _both(_scale("input", 2.0**100), _scale("conv.0.y", 2.0**100), _weight_scale("conv.0", 2.0**-40)),
        "node 'conv.0': its scales give an update rate of",
    ),
    "a rate below float32": (
        _both(_scale("input", 2.0**100), _scale("conv.0.y", 2.0**120), _weight_scale("conv.0", 2.0**40)),
        "node 'conv.0': its scales give an update rate of",
    ),
    "a zero point of 1000": (
        lambda d, t: _value(d, "conv.0.y")["q"].update(zero=1000),
        "not a valid graph: value 'conv.0.y': zero point lies within -128..127, not 1000",
    ),
    "a value called label": (_rename("conv.1.y", "label"), "value 'label': a training step has a value of this name"),
    "a value called lr": (_rename("conv.0.weight", "lr"), "value 'lr': a training step has"),
    "a value called loss": (_rename("conv.2.y", "loss"), "value 'loss': a training step has"),
    "a gradient's name": (_rename("conv.1.y", "conv.0.y.grad"), "value 'conv.0.y.grad': a training step has"),
    "a mask's name": (_rename("conv.1.y", "conv.0.y.mask"), "value 'conv.0.y.mask': a training step has"),
    "a table's name": (_rename("conv.1.bias", "conv.0.dx.mult"), "value 'conv.0.dx.mult': a training step has"),
    "an addition's table": (_rename("conv.1.bias", "add.0.scale"), "value 'add.0.scale': a training step has"),
    "a function's name": (_rename("conv.1.bias", "row.conv.0"), "value 'row.conv.0': a training step has"),
    "half a character": (_rename("conv.1.y", "\ud800"), ".name: a printable text"),
    "a name that goes on": (_rename("conv.1.y", "x" * 201), ".name: a text of at most 200 characters, not 201"),
    "an exponent slot": (_exponent, "value 'conv.0.y': a model has no gradient"),
    "a state": (_state, "value 'conv.0.weight': a model has no state but its head"),
    "a label": (_label, "interface: a model has no targets, rate or losses"),
    "many values": (
        lambda d, t: d["values"].extend([d["values"][0]] * limits.MAX_VALUES),
        f"values: there are {limits.MAX_VALUES + 18}, and at most {limits.MAX_VALUES} are read",
    ),
    "many nodes": (
        lambda d, t: d["nodes"].extend([d["nodes"][0]] * limits.MAX_NODES),
        f"nodes: there are {limits.MAX_NODES + 6}, and at most {limits.MAX_NODES} are read",
    ),
    "deep nesting": (lambda d, t: d.update(nodes=_nested(500)), "nodes[0]: an object, not list"),
}


def _nested(depth: int) -> list[Any]:
    found: list[Any] = []
    for _ in range(depth):
        found = [found]
    return found


@pytest.mark.parametrize("case", REFUSED)
def test_a_graph_file_is_refused_by_name(case: str, tmp_path: Path) -> None:
    change, message = REFUSED[case]
    path = _file(tmp_path, int8_chain(), change)
    with pytest.raises(UsageError) as e:
        load(path)
    assert str(e.value).startswith(f"{path}: ")
    assert message in str(e.value)


@pytest.mark.parametrize("depth", [1000, 100_000, 4_000_000])
def test_nesting_without_end_is_refused(depth: int, tmp_path: Path) -> None:
    path = _file(tmp_path, int8_chain(), lambda d, t: None)
    path.write_text(path.read_text().replace('"outputs"', f'"deep": {"[" * depth}{"]" * depth}, "outputs"', 1))
    with pytest.raises(UsageError, match=r"not a JSON file of a graph: .*recursion|'deep' is unknown"):
        load(path)


@pytest.mark.parametrize("stage", ["float", "int8", "train"])
def test_what_is_sound_is_loaded(stage: str, tmp_path: Path) -> None:
    graph = {"float": float_chain, "int8": int8_chain, "train": train_tail}[stage]()
    save(graph, tmp_path / "g.json")
    assert str(load(tmp_path / "g.json")) == str(graph)
    if stage == "int8":
        save(attach_head(graph, 7), tmp_path / "head.json")
        assert load(tmp_path / "head.json").values["head.weight"].shape == (7, 6)


def test_what_would_not_be_loaded_is_not_saved(tmp_path: Path) -> None:
    graph = int8_chain()
    values = {**graph.values, "conv.0.y": replace(graph.values["conv.0.y"], q=QParams(1e60, -128))}
    with pytest.raises(UnsupportedError, match=r"value 'conv\.0\.y'"):
        save(replace(graph, values=values), tmp_path / "g.json")
    assert not list(tmp_path.iterdir())


# --- names ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("passes", [Passes(), Passes(False, False, False, False, False)], ids=["all", "none"])
@pytest.mark.parametrize("name", NAMED)
def test_every_name_of_a_step_is_kept_for_it(name: str, passes: Passes) -> None:
    """Whatever a step and its C call something, no model may call a value so; and no name of a model is kept."""
    for bits in (8, 12, 16):
        case = named_case(name, bits)
        compiled = compile_model(case.model, case.scheme, passes=passes)
        taken = names_of_step(case.model)
        made = {*compiled.train.values, *compiled.graph.flat().values, *compiled.sources.symbols}
        assert [n for n in made - case.model.values.keys() if not taken(n)] == []
        assert not [n for n in case.model.values if taken(n)]


@pytest.mark.parametrize("name", ["head.weight", "head.bias", "logits"])
def test_a_name_of_the_new_head_is_refused(name: str) -> None:
    """Of a value that stays; what a head brings goes with it."""
    net = Net((4, 4, 3))
    net.pool(net.conv(net.input, 5), (4, 4))
    graph = net.g.build(Stage.INT8, ["pool.1.y"])
    assert attach_head(attach_head(graph, 3), 2).values["logits"].shape == (2,)
    net.g.values[name] = Value(name, (1, 1, 5), "s8", q=graph.values["pool.1.y"].q)
    net.g.nodes[-1] = replace(net.g.nodes[-1], outputs=(name,))
    with pytest.raises(UnsupportedError, match=rf"net: value '{name}': a new head has a value of this name"):
        attach_head(net.g.build(Stage.INT8, [name]), 3)


# --- sizes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(4097, 8), (8, 32768), (2**40, 2**40)])
def test_sizes_that_no_plan_ends_for(size: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match=rf"--size {size[0]}x{size[1]}: at most 4096 are possible"):
        at_size(int8_chain(), *size)


def test_activations_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_ELEMENTS", 8 * 8 * 3)
    check_limits(int8_chain())
    with pytest.raises(UsageError, match=r"--size 8x9: value 'input': an activation has at most 192 elements"):
        at_size(int8_chain(), 8, 9)


def test_rows_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_ROWS", 30)
    check_limits(int8_chain())
    with pytest.raises(UsageError, match=r"--size 16x8: rows of all activations: there are \d+, and at most 30"):
        at_size(int8_chain(), 16, 8)


def test_models_have_a_limit_of_nodes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(limits, "MAX_MODEL_NODES", 5)
    with pytest.raises(UnsupportedError, match="nodes: there are 6, and at most 5 are read"):
        save(int8_chain(), tmp_path / "g.json")
    save(train_tail(), tmp_path / "g.json")


def test_a_checkpoint_obeys_the_same_limits(tmp_path: Path) -> None:
    content = checkpoint()
    content["first_conv"]["params"]["w_scales"] *= np.float32(1e-35)
    path = tmp_path / "small.pkl"
    path.write_bytes(archive(pickle.dumps(content, 2)))
    with pytest.raises(UnsupportedError, match=r"small\.pkl: node 'conv\.0': its scales give an update rate of"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("stem", "name"), [(b"\xff", "_"), (b"a\nb", "a_b"), (b"x" * 240, "x" * 200), (b"\xc3\xa4", "ä")]
)
def test_the_name_of_a_checkpoint_can_be_printed(stem: bytes, name: str, tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + stem + b".pkl"))
    path.write_bytes(archive(pickle.dumps(checkpoint(), 2)))
    graph = load_checkpoint(path)
    assert graph.name == name
    save(graph, tmp_path / "g.json")
    assert load(tmp_path / "g.json").name == name


# --- memory and waiting -----------------------------------------------------------------------------------------


class Counted:
    """A file that notes how many bytes it is asked for at once."""

    asked: ClassVar[list[int]] = []

    def __init__(self, path: Path) -> None:
        self.file = path.open("rb")

    def __enter__(self) -> Counted:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def fileno(self) -> int:
        return self.file.fileno()

    def read(self, n: int) -> bytes:
        self.asked.append(n)
        return self.file.read(n)


def test_reading_asks_for_no_more_than_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of graphs; states, checkpoints and images are read by the same function."""
    save(int8_chain(), tmp_path / "g.json")
    monkeypatch.setattr(files, "open_regular", Counted)
    Counted.asked.clear()
    load(tmp_path / "g.json")
    assert Counted.asked == [1 + (tmp_path / f"g.{s}").stat().st_size for s in ("json", "safetensors")]
    (tmp_path / "x").write_bytes(bytes(100))
    assert [len(files.read_regular(tmp_path / "x", n)) for n in (10, 99, 100, 1 << 40)] == [11, 100, 100, 100]


@pytest.mark.parametrize("which", ["g.json", "g.safetensors"])
def test_a_pipe_is_no_graph(which: str, tmp_path: Path) -> None:
    save(int8_chain(), tmp_path / "g.json")
    (tmp_path / which).unlink()
    os.mkfifo(tmp_path / which)
    with pytest.raises(UsageError, match=rf"{which}: this is no regular file"):
        load(tmp_path / "g.json")


def test_all_values_are_counted() -> None:
    graph = int8_chain()
    more = {f"v{i}": Value(f"v{i}", (1,), "s8") for i in range(limits.MAX_VALUES)}
    with pytest.raises(UnsupportedError, match="values: there are"):
        check_limits(replace(graph, values={**graph.values, **more}))
