# SPDX-License-Identifier: Apache-2.0
"""A model that the C has no form for is refused by name, whoever compiles it, however it was given; none gives C that
computes something else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from graphs import ChainBuilder, int8_chain

from trainlet.autodiff.scheme import UpdateScheme
from trainlet.compiler import compile_inference, compile_model
from trainlet.errors import UsageError
from trainlet.frontends import graph_file
from trainlet.ir import Attrs, Graph, Kind, Node, Operands, QParams, Stage, Value
from trainlet.ops import Conv2d
from trainlet.verify import VerifyError, verify_graph

HEAD = UpdateScheme("head")


def _chain() -> ChainBuilder:
    return ChainBuilder("odd", integer=True)


def _two_dense_layers() -> Graph:
    """pool -> dense(8) -> dense(4): sound, and the reference has four classes."""
    c = _chain()
    _dense(c, "first", c.body(), 8)
    return c.g.build(Stage.INT8, [c.head("head", "first.y")])


def _dense(c: ChainBuilder, name: str, x: str, classes: int) -> str:
    w = c.g.const(f"{name}.weight", np.ones((classes, c.g.values[x].size), np.float32), "f32")
    b = c.g.const(f"{name}.bias", np.zeros(classes, np.float32), "f32")
    y = Value(f"{name}.y", (classes,), "f32")
    return c.g.emit(Node("dense", name, name, Operands(x=x, weight=w, bias=b), (y.name,), Attrs()), y)


def _two_heads() -> Graph:
    c = _chain()
    x = c.body()
    return c.g.build(Stage.INT8, [c.head("head", x), _dense(c, "other", x, 3)])


def _a_head_that_is_not_given() -> Graph:
    c = _chain()
    x = c.body()
    _dense(c, "other", x, 3)
    return c.g.build(Stage.INT8, [c.head("head", x)])


def _two_images() -> Graph:
    c = _chain()
    c.g.add(Value("second", (8, 8, 3), "s8", Kind.INPUT, QParams(1 / 64, 0)))
    other = c.conv("conv.9", "other", "second", Conv2d((8, 8)), 6)
    pooled = c.body()
    return c.g.build(Stage.INT8, [c.head("head", c.add("add.9", pooled, other))])


def _no_head() -> Graph:
    c = _chain()
    return c.g.build(Stage.INT8, [c.body()])


def _more_outputs() -> Graph:
    c = _chain()
    x = c.body()
    return c.g.build(Stage.INT8, [c.head("head", x), x])


def _a_vector() -> Graph:
    c = ChainBuilder("odd", integer=True)
    c.g.given.clear()
    c.g.values.clear()
    c.g.add(Value("input", (12,), "s8", Kind.INPUT, QParams(1 / 64, 0)))
    return c.g.build(Stage.INT8, [c.head("head", "input")])


REFUSED: dict[str, tuple[Callable[[], Graph], str]] = {
    "two dense layers": (_two_dense_layers, r"node 'head' .*'first.y' is f32"),
    "two heads": (_two_heads, r"node 'head' .*'other' is another"),
    "a head that is not given": (_a_head_that_is_not_given, r"is another"),
    "two images": (_two_images, r"one image, not input, second"),
    "no head": (_no_head, r"attach a head"),
    "more outputs": (_more_outputs, r"and nothing else"),
    "a vector": (_a_vector, r"value 'input': the C takes an int8 image \(H, W, C\), not s8 \(12,\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_there_is_no_c_for_is_refused_by_name(name: str) -> None:
    make, message = REFUSED[name]
    graph = make()
    verify_graph(graph)  # it is sound; there is no C for it
    for compile_it in (lambda: compile_model(graph, HEAD), lambda: compile_inference(graph)):
        with pytest.raises(VerifyError, match=message):
            compile_it()


@pytest.mark.parametrize("name", ["two dense layers", "two heads", "two images"])
def test_a_file_is_refused_like_a_graph(name: str, tmp_path: Path) -> None:
    make, message = REFUSED[name]
    graph_file.save(make(), tmp_path / "odd.json")
    with pytest.raises(VerifyError, match=message):
        compile_model(graph_file.load(tmp_path / "odd.json"), HEAD)


def test_a_lowered_graph_is_no_model() -> None:
    lowered = compile_model(int8_chain(), HEAD).graph
    with pytest.raises(UsageError):
        compile_inference(lowered.with_interface(outputs=()))
