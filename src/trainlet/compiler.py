# SPDX-License-Identifier: Apache-2.0
"""The whole way in one function: model -> training step -> lowered -> planned -> C. Data flows top to bottom."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path

from trainlet.autodiff.scheme import UpdateScheme, resolve
from trainlet.autodiff.walk import differentiate
from trainlet.emit import Compiled as Compiled
from trainlet.emit import emit, graph_hash
from trainlet.errors import UsageError
from trainlet.ir import Graph, Stage
from trainlet.ops.op import Core
from trainlet.passes.choose_kernels import choose_kernels
from trainlet.passes.depth_first import depth_first
from trainlet.passes.fuse import fuse
from trainlet.passes.inplace import inplace
from trainlet.passes.reorder import reorder
from trainlet.plan.arena import MemoryPlan, make_plan
from trainlet.plan.state import StateLayout, state_layout
from trainlet.toolchain.targets import HOST, Host, Target
from trainlet.verify import verify_compilable, verify_graph, verify_plan


@dataclass(frozen=True, slots=True)
class Passes:
    """Which passes run; each only moves, merges or places work, so the bytes are the same with any of them.
    ``by_rows``: the image is delivered row by row and never exists whole, which takes ``depth_first``; otherwise it
    lies in the arena."""

    fuse: bool = True
    reorder: bool = True
    inplace: bool = True
    depth_first: bool = True
    by_rows: bool = True

    @classmethod
    def without(cls, *names: str) -> Passes:
        """All passes but those of these names; without ``depth_first`` the image cannot come by rows either. UsageError
        for a name that no pass has."""
        known = [f.name for f in fields(cls)]
        unknown = next((n for n in names if n not in known), None)
        if unknown is not None:
            raise UsageError(f"pass {unknown!r}: there is none of that name; the passes are {', '.join(known)}")
        off = {*names, *(("by_rows",) if "depth_first" in names else ())}
        return cls(**dict.fromkeys(off, False))

    @property
    def off(self) -> tuple[str, ...]:
        """The names of those that do not run."""
        return tuple(f.name for f in fields(self) if not getattr(self, f.name))


ALL = Passes()
Scheme = UpdateScheme | str | Path
"""A scheme, or what ``resolve`` reads: a word such as ``full`` or the path of a JSON file."""


@dataclass(frozen=True)
class Planned:
    """A model on the way to C, up to its memory: what of ``Compiled`` needs no code to be written."""

    train: Graph
    graph: Graph
    plan: MemoryPlan
    layout: StateLayout


def need_model(graph: object) -> Graph:
    """The argument; UsageError where it is no graph of stage INT8."""
    if not isinstance(graph, Graph):
        raise UsageError(f"a model is a graph, as trainlet.load gives it, not {_shown(graph)}")
    if graph.stage is not Stage.INT8:
        hint = "; trainlet.quantize makes one of it" if graph.stage is Stage.FLOAT else ", from before it was compiled"
        raise UsageError(f"{graph.name}: a graph of stage {graph.stage}; give one of stage int8{hint}")
    return graph


def need_scheme(scheme: object, graph: Graph, bits: int | None = None) -> UpdateScheme:
    """The scheme, resolved where it is a word or a path; ``bits`` is then as in ``resolve``. UsageError otherwise."""
    if isinstance(scheme, str | Path):
        return resolve(scheme, graph, bits)
    if not isinstance(scheme, UpdateScheme):
        raise UsageError(f"a scheme is an UpdateScheme, a word such as 'full' or a path, not {_shown(scheme)}")
    return scheme if bits is None else replace(scheme, bits=bits)


def _need_options(target: object, passes: object) -> None:
    """UsageError unless they are a target and passes."""
    if not isinstance(passes, Passes):
        raise UsageError(f"passes are Passes(...) or Passes.without('fuse', ...), not {_shown(passes)}")
    if not isinstance(target, Host | Target):
        hint = "; give passes by name, as passes=Passes(...)" if isinstance(target, Passes) else ""
        raise UsageError(f"a target is one of trainlet.TARGETS, or HOST, not {_shown(target)}{hint}")


def _shown(value: object) -> str:
    return f"{type(value).__name__} {value!r:.60}"


def lower(graph: Graph, scheme: UpdateScheme, target: Core = HOST, passes: Passes = ALL) -> tuple[Graph, Graph]:
    """(the training step as differentiated, the same as kernels of ``target`` in an order); no memory has a place yet.
    Raises UnsupportedError naming the layer where it cannot be trained."""
    verify_graph(graph)
    verify_compilable(graph)
    train = differentiate(graph, scheme)
    lowered = fuse(train) if passes.fuse else train.with_nodes(train.nodes, stage=Stage.LOWERED)
    chosen = choose_kernels(lowered, target)
    return train, reorder(chosen, overwrites=passes.inplace) if passes.reorder else chosen


def plan_model(graph: Graph, scheme: UpdateScheme, target: Core = HOST, passes: Passes = ALL) -> Planned:
    """What ``compile_model`` does before it writes C, in a third of the time."""
    return _plan(*lower(graph, scheme, target, passes), passes)


def compile_model(graph: Graph, scheme: Scheme, target: Core = HOST, passes: Passes = ALL) -> Compiled:
    """Compiles a model with a head (``attach_head``) and a scheme for it, or what ``resolve`` reads, with the kernels
    of ``target``; those of HOST run anywhere. Raises UsageError for arguments of another kind or a graph of another
    stage than int8, UnsupportedError naming the layer where it cannot be trained."""
    _need_options(target, passes)
    chosen = need_scheme(scheme, need_model(graph))
    return _finish(plan_model(graph, chosen, target, passes=passes), chosen, target)


def compile_inference(graph: Graph, target: Core = HOST, passes: Passes = ALL) -> Compiled:
    """The same model without a training step: nothing of training is in its code, arena or state. Only the head stays
    in the state, since it is not part of the model file. ``graph`` is verified, of stage INT8 and has a head."""
    _need_options(target, passes)
    verify_graph(need_model(graph))
    verify_compilable(graph)
    lowered = choose_kernels(replace(graph, stage=Stage.LOWERED), target)
    verify_graph(lowered)
    return _finish(_plan(graph, lowered, passes), UpdateScheme("inference"), target)


def _plan(train: Graph, lowered: Graph, passes: Passes) -> Planned:
    if passes.inplace:
        lowered = inplace(lowered)
    if passes.depth_first:
        lowered = depth_first(lowered, passes.by_rows)
    plan = make_plan(lowered)
    verify_plan(lowered, plan)
    return Planned(train, lowered, plan, state_layout(lowered))


def _finish(p: Planned, scheme: UpdateScheme, target: Core) -> Compiled:
    model_hash = graph_hash(p.train)
    sources = emit(p.graph, p.plan, p.layout, model_hash)
    return Compiled(p.train, p.graph, scheme, target, p.plan, p.layout, sources, model_hash)
