# SPDX-License-Identifier: Apache-2.0
"""The public API: each name is found, its example runs, and a slip of whoever uses it gets an error that says so."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graphs import float_chain, int8_chain

import trainlet
from trainlet.compiler import Passes
from trainlet.errors import UsageError
from trainlet.ops import AvgPool, Conv2d, MaxPool


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with model.json, the small chain, and images.npz, 3 classes; it is the current one."""
    trainlet.save(int8_chain(), str(tmp_path / "model.json"))
    x = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", x_train=x[:9], y_train=np.arange(9) % 3, x_val=x[9:], y_val=np.arange(3))
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- names --------------------------------------------------------------------------------------------------


def test_every_public_name_is_found_and_says_what_it_is() -> None:
    assert sorted(trainlet.__all__) == sorted([*trainlet._HOME, *trainlet._PACKAGES])
    assert set(trainlet.__all__) <= set(dir(trainlet))
    for name in trainlet.__all__:
        found = getattr(trainlet, name)
        assert inspect.getdoc(found), name
        assert callable(found) or name in ("HOST", "TARGETS"), name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        trainlet.nothing  # noqa: B018


SHARED = (("plan", "arena", "make_plan"), ("measure", "program", "measure"), ("select", "choose", "choose"))
FORMS = (
    "from trainlet.{0}.{1} import {2}",
    "import trainlet.{0}.{1} as m; {2} = m.{2}",
    "from trainlet import {0}; {2} = {0}.{1}.{2}",
)


def in_a_new_process(*lines: str) -> None:
    """What is imported first decides what a name in ``trainlet`` is bound to."""
    code = "\n".join(("import inspect, trainlet", *lines))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_package_that_is_imported_first_leaves_the_function() -> None:
    imports = [form.format(*names) for names in SHARED for form in FORMS]
    in_a_new_process(*imports, *(f"assert callable(trainlet.{name})" for name, _, _ in SHARED))


def test_a_function_that_is_called_first_leaves_the_package() -> None:
    lines = []
    for name, module, function in SHARED:
        lines += [
            f"try: trainlet.{name}(*[None] * (4 if {name!r} == 'select' else 2))\nexcept trainlet.UsageError: pass",
            f"from trainlet.api import {name} as wanted",
            f"assert inspect.signature(trainlet.{name}) == inspect.signature(wanted)",
            f"assert wanted.__doc__[:60] in trainlet.{name}.__doc__",
            *(form.format(name, module, function) for form in FORMS),
            f"assert callable({function}) and callable(trainlet.{name})",
        ]
    in_a_new_process(*lines)


def test_the_names_cost_nothing_before_they_are_used() -> None:
    code = "import sys, trainlet; dir(trainlet); sys.exit(sum(m in sys.modules for m in ('numpy', 'safetensors')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- what they do -------------------------------------------------------------------------------------------


def example() -> str:
    """The code in the module's own text."""
    assert trainlet.__doc__
    return "\n".join(re.findall(r"^    (\S.*)$", trainlet.__doc__, re.MULTILINE))


def test_the_example_of_the_module_runs(here: Path) -> None:
    text = example()
    assert text.count("\n") == 9, "ten lines"
    found: dict[str, Any] = {"trainlet": trainlet}
    exec(text, found)
    assert (here / "c" / "README.md").exists()
    assert found["result"]["epochs"] == 2
    image = np.zeros((8, 8, 3), np.int8)
    assert found["session"].infer(image).shape == (3,)
    assert found["session"].train_step(image, 1, 0.01).loss > 0


def test_the_plan_is_that_of_the_compiled_model() -> None:
    graph = trainlet.attach_head(int8_chain(), 3)
    memory = trainlet.plan(graph, "last:2", bits=12)
    compiled = trainlet.compile_model(graph, trainlet.resolve("last:2", graph, 12))
    assert (memory.arena, memory.state) == (compiled.plan.arena_bytes, compiled.state_bytes)
    assert memory.total == memory.arena + memory.state > memory.lower_bound > 0
    assert trainlet.plan(graph, "last:2", passes=Passes.without("fuse")).arena != memory.arena


def test_a_float_graph_is_quantized_and_saved(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(-128, 128, (4, 8, 8, 3), dtype=np.int8)
    made = trainlet.quantize(float_chain(), images)
    for where in (tmp_path / "a.json", str(tmp_path / "b.json")):
        trainlet.save(made, where)
        assert trainlet.load(where).stage == "int8"
    trainlet.save(float_chain(), tmp_path / "f.json")
    assert trainlet.load(tmp_path / "f.json").stage == "float"


def test_a_scheme_is_given_by_word_file_or_object(tmp_path: Path) -> None:
    graph = trainlet.attach_head(int8_chain(), 3)
    scheme = trainlet.resolve("last:2", graph)
    (tmp_path / "s.json").write_text(scheme.to_json())
    hashes = {trainlet.compile_model(graph, s).model_hash for s in (scheme, "last:2", tmp_path / "s.json")}
    assert len(hashes) == 1


def test_the_text_of_a_model_is_one_short_line(here: Path) -> None:
    graph = trainlet.attach_head(trainlet.load("model.json"), 3)
    for thing in (graph, trainlet.compile_model(graph, "full"), trainlet.load_data("images.npz", graph)):
        assert len(repr(thing)) < 300, repr(thing)
        assert "\n" not in repr(thing)
    assert "stage int8" in repr(graph)


# --- slips --------------------------------------------------------------------------------------------------

IMAGE = np.zeros((8, 8, 3), np.int8)
SLIPS: dict[str, tuple[Callable[[Any, Any], object], str]] = {
    "kernel": (lambda g, s: Conv2d(kernel=9), "kernel is a tuple of 2 whole numbers, not 9"),  # type: ignore[arg-type]
    "pads": (lambda g, s: Conv2d((3, 3), pads=(1, 1)), "pads is a tuple of 4"),  # type: ignore[arg-type]
    "stride": (lambda g, s: Conv2d((3, 3), stride=(1.5, 1)), "stride is a tuple of 2"),  # type: ignore[arg-type]
    "pool": (lambda g, s: AvgPool(2), "AvgPool: kernel is a tuple"),  # type: ignore[arg-type]
    "max pool": (lambda g, s: MaxPool([2, 2]), "MaxPool: kernel is a tuple"),  # type: ignore[arg-type]
    "no graph": (lambda g, s: trainlet.compile_model("m.pkl", "full"), "a model is a graph"),  # type: ignore[arg-type]
    "float": (lambda g, s: trainlet.compile_model(float_chain(), "full"), "stage float; give one of stage int8"),
    "inference": (lambda g, s: trainlet.compile_inference(float_chain()), "stage float; give one of stage int8"),
    "train": (lambda g, s: trainlet.plan(s.compiled.train, "full"), "stage train; give one of stage int8"),
    "word": (lambda g, s: trainlet.compile_model(g, "everything"), "scheme 'everything'"),
    "no scheme": (lambda g, s: trainlet.compile_model(g, None), "a scheme is an UpdateScheme"),
    "third": (lambda g, s: trainlet.compile_model(g, "full", Passes()), "give passes by name, as passes="),
    "passes": (lambda g, s: trainlet.compile_model(g, "full", passes="fuse"), "passes are Passes(...)"),
    "target": (lambda g, s: trainlet.compile_model(g, "full", "stm32f746"), "a target is one of trainlet.TARGETS"),
    "no pass": (lambda g, s: Passes.without("speed"), "the passes are fuse, reorder, inplace, depth_first, by_rows"),
    "one word": (lambda g, s: trainlet.plan(g, "full", passes=True), "passes are Passes(...)"),
    "session": (lambda g, s: trainlet.HostSession(g), "a session runs what compile_model gives"),
    "seed": (lambda g, s: s.reset(-1), "seed -1: give a whole number from 0"),
    "label": (lambda g, s: s.train_step(IMAGE, 3, 0.1), "label 3 is out of range: the head has classes 0 to 2"),
    "negative label": (lambda g, s: s.train_step(IMAGE, -1, 0.1), "label -1 is out of range"),
    "huge label": (lambda g, s: s.train_step(IMAGE, 1 << 40, 0.1), "is out of range"),
    "half a label": (lambda g, s: s.train_step(IMAGE, 1.5, 0.1), "one whole number, the class, not float 1.5"),
    "no label": (lambda g, s: s.train_step(IMAGE, "cat", 0.1), "one whole number, the class, not str 'cat'"),
    "labels": (lambda g, s: s.train_step(IMAGE, {"label": np.zeros(2, int)}, 0.1), "the target is one whole number"),
    "rate": (lambda g, s: s.train_step(IMAGE, 1, "fast"), "the learning rate is a number, not str 'fast'"),
    "huge rate": (lambda g, s: s.train_step(IMAGE, 1, 1e300), "the learning rate 1e+300"),
    "dtype": (lambda g, s: s.infer(IMAGE.view(np.uint8)), "the image is uint8 8x8x3; the model reads int8 8x8x3"),
    "shape": (lambda g, s: s.infer(IMAGE[None]), "the image is int8 1x8x8x3"),
    "list": (lambda g, s: s.infer([[0]]), "the image is an array, int8 8x8x3, or a mapping to one, not list"),
    "named": (lambda g, s: s.infer({"input": [0]}), "the image is an array"),
    "other name": (lambda g, s: s.infer({"picture": IMAGE}), "the inputs are input, not picture"),
    "path": (lambda g, s: trainlet.load(7), "a path is a text or a pathlib.Path"),  # type: ignore[arg-type]
    "no file": (lambda g, s: trainlet.load("nothing.json"), "nothing.json: does not exist"),
    "no graph to save": (lambda g, s: trainlet.save("x", "x.json"), "a graph, as trainlet.load"),  # type: ignore[arg-type]
    "no folder": (lambda g, s: trainlet.save(g, "no/such/x.json"), "cannot be written"),
    "ending": (lambda g, s: trainlet.save(g, "x.graph"), "ends in .json"),
    "data": (lambda g, s: trainlet.fit(g, "images", "full", "o"), "what load_data gives is wanted here"),  # type: ignore[arg-type]
    "classes": (lambda g, s: trainlet.fit(trainlet.attach_head(g, 5), _data(g), "full", "o"), "the compiled model 5"),
    "epochs": (lambda g, s: trainlet.fit(g, _data(g), "full", "o", epochs=0), "epochs 0"),
    "memory": (lambda g, s: trainlet.fit(g, _data(g), "full", "o", sram="64K"), "give target too"),
    "chip": (lambda g, s: trainlet.measure(g, "full", "avr"), "--target 'avr': unknown"),
    "size": (lambda g, s: trainlet.measure(g, "full", sram="lots"), "--sram 'lots'"),
    "emulator": (lambda g, s: trainlet.validate(g, "full", emulator="bochs"), "emulator 'bochs'"),
    "method": (lambda g, s: trainlet.select(g, "images.npz", "64K", "o", method="luck"), "luck"),
    "calibration": (lambda g, s: trainlet.quantize(float_chain(), IMAGE), "calibration takes int8 images (N"),
    "no quantization": (lambda g, s: trainlet.quantize(g, IMAGE[None]), "give one of stage float to quantize"),
}  # fmt: skip


def _data(graph: Any) -> Any:
    return trainlet.load_data("images.npz", graph)


@pytest.fixture(scope="module")
def session() -> trainlet.HostSession:
    return trainlet.HostSession(trainlet.compile_model(trainlet.attach_head(int8_chain(), 3), "full"))


@pytest.mark.parametrize("case", SLIPS)
def test_a_slip_gets_a_clear_error(here: Path, session: trainlet.HostSession, case: str) -> None:
    slip, message = SLIPS[case]
    with pytest.raises(UsageError) as e:
        slip(trainlet.attach_head(int8_chain(), 3), session)
    assert message in str(e.value)
    assert not (here / "o").exists() or not any((here / "o").iterdir())
