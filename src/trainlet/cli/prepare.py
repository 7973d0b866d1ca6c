# SPDX-License-Identifier: Apache-2.0
"""What several commands do first: read the model, resolve the scheme, compile, compare with the memory limit."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainlet import frontends
from trainlet.autodiff.scheme import UpdateScheme, extra_memory_bytes, resolve
from trainlet.compiler import ALL, Passes, compile_model
from trainlet.emit import Compiled
from trainlet.errors import OverBudgetError, UsageError
from trainlet.ir.graph import Graph, Stage
from trainlet.plan.arena import largest_alive
from trainlet.toolchain.budget import Budget
from trainlet.toolchain.targets import DEFAULT_TARGET, Target, find_target

INPUTS = ("rows", "image")


@dataclass(frozen=True)
class Prepared:
    """A compiled model, with what it was compiled from."""

    model: Graph
    scheme: UpdateScheme
    compiled: Compiled
    extra_memory_bytes: int
    passes: Passes

    @property
    def input(self) -> str:
        """How the image comes: ``rows``, or ``image``."""
        return INPUTS[not self.passes.by_rows]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the image."""
        h, w, c = self.model.image.shape
        return h, w, c

    def facts(self) -> dict[str, Any]:
        """What plan, compile and train report alike; bytes."""
        return {
            "model": self.model.name,
            "scheme": self.scheme.name,
            "bits": self.scheme.bits,
            "input": self.input,
            "without": list(self.passes.off),
            "model_hash": self.compiled.model_hash,
            "arena_bytes": self.compiled.plan.arena_bytes,
            "lower_bound_bytes": self.compiled.plan.lower_bound,
            "state_bytes": self.compiled.state_bytes,
            "extra_memory_bytes": self.extra_memory_bytes,
        }

    def largest(self, count: int = 5) -> list[dict[str, Any]]:
        """The largest buffers that exist where the arena is fullest, with the layer that each comes from."""
        graph = self.compiled.graph
        layer = {o: n.layer for n in graph.nodes for o in n.outputs} | {
            f"scratch of {n.name}": n.layer for n in graph.nodes
        }
        found = largest_alive(graph, self.compiled.plan, count)
        return [{"tensor": name, "layer": layer.get(name, "input"), "bytes": nbytes} for name, nbytes in found]


def load_model(path: Path) -> Graph:
    """The INT8 graph of a model file, or of a graph that `trainlet import --out` wrote."""
    graph = frontends.load(path)
    if graph.stage is not Stage.INT8:
        raise UsageError(
            f"{path}: a graph of stage {graph.stage}; give one of stage int8, as `trainlet import` writes it"
        )
    return graph


def find_passes(image: str, without: Sequence[str] = ()) -> Passes:
    """The passes for ``--input``, rows or image, and ``--without``. UsageError where they are none."""
    if image not in INPUTS:
        raise UsageError(f"--input {image!r}: the image comes as {' or '.join(INPUTS)}; give one of them")
    return Passes.without(*without, *(("by_rows",) if image == "image" else ()))


def prepare(model: Graph, scheme: UpdateScheme, classes: int, passes: Passes = ALL) -> Prepared:
    """Attaches the head and compiles."""
    graph = frontends.attach_head(model, classes)
    compiled = compile_model(graph, scheme, passes=passes)
    return Prepared(model, scheme, compiled, extra_memory_bytes(graph, scheme), passes)


def resolve_scheme(spec: str, model: Graph, bits: int | None) -> UpdateScheme:
    """The scheme that a word or a file names for ``model``."""
    return resolve(spec, model, bits)


def choose_target(on: str, name: str | None, sram: str | None, flash: str | None) -> Target | None:
    """The chip of ``--on`` with its memory cut to ``--sram`` and ``--flash``; None for the host. UsageError where they
    contradict each other."""
    budget = Budget.parse(sram, flash)
    if on == "host":
        given = "--target" if name is not None else "--flash" if flash is not None else ""
        if given:
            raise UsageError(f"{given}: --on host has no chip; give --on {' or '.join(DEFAULT_TARGET)} too")
        return None
    if on not in DEFAULT_TARGET:
        raise UsageError(f"--on {on!r}: training runs on host, {', '.join(DEFAULT_TARGET)}; give one of them")
    target = find_target(name or DEFAULT_TARGET[on])
    if target.core != on:
        raise UsageError(f"--on {on} --target {target.name}: that is a {target.core}; give --on {target.core}")
    return budget.cut(target)


def check_sram(p: Prepared, sram: str | None) -> list[str]:
    """What there is to say of ``sram`` where no chip is named: it can be compared with arena and state alone.
    OverBudgetError where they exceed it."""
    limit = Budget.parse(sram).sram
    if limit is None:
        return []
    arena, state = p.compiled.plan.arena_bytes, p.compiled.state_bytes
    if arena + state > limit:
        largest = ", ".join(f"{t['tensor']} of {t['layer']} ({t['bytes']})" for t in p.largest(3))
        raise OverBudgetError(
            f"{p.model.name}, scheme {p.scheme.name}: arena {arena} + state {state} = {arena + state} bytes exceed the "
            f"{limit} bytes of --sram by {arena + state - limit}; largest at the peak: {largest}. Choose a scheme that "
            "updates less, fewer --bits, or more memory"
        )
    return [
        f"--sram: no chip is named, so arena and state alone were counted, {arena + state} of {limit} bytes; the stack "
        "and what else a program has there come on top"
    ]


def prepare_out(out: Path) -> Path:
    """Makes the folder and tries to write there, before any long work. UsageError where that fails."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            return out
    except OSError as e:
        raise UsageError(f"--out {out}: cannot be written ({e.strerror}); give a folder that can") from None


def write_picture(path: Path, svg: str) -> None:
    """Writes an SVG. UsageError where that fails."""
    try:
        path.write_text(svg)
    except OSError as e:
        raise UsageError(f"--picture {path}: cannot be written ({e.strerror}); give another file") from None


def summary(graph: Graph) -> dict[str, Any]:
    """Counts of a model: layers, weights, multiply-accumulates, dead channels."""
    from trainlet.ops import OPS, Add, Conv2d

    values = graph.values
    attrs = [n.attrs for n in graph.nodes if isinstance(n.attrs, Conv2d)]
    macs = sum(OPS[n.op].macs(n, n.bind(values)) for n in graph.nodes)
    shape = values[graph.inputs[0]].shape
    return {
        "model": graph.name,
        "input": list(shape),
        "nodes": len(graph.nodes),
        "convolutions": len(attrs),
        "depthwise": sum(a.depthwise for a in attrs),
        "additions": sum(isinstance(n.attrs, Add) for n in graph.nodes),
        "weights": sum(values[n["weight"]].size for n in graph.nodes if "weight" in n.operands),
        "macs": macs,
        "dead_channels": sum(len(a.dead) for a in attrs),
        "outputs": values[graph.outputs[0]].size,
    }
