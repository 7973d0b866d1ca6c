# SPDX-License-Identifier: Apache-2.0
"""The whole way in one function: model -> training step -> lowered -> planned -> C. Data flows top to bottom."""

from __future__ import annotations

from dataclasses import dataclass, replace

from trainlet.autodiff.scheme import UpdateScheme
from trainlet.autodiff.walk import differentiate
from trainlet.emit import Compiled as Compiled
from trainlet.emit import emit, graph_hash
from trainlet.ir import Graph, Stage
from trainlet.ops.op import Core
from trainlet.passes.choose_kernels import choose_kernels
from trainlet.passes.depth_first import depth_first
from trainlet.passes.fuse import fuse
from trainlet.passes.inplace import inplace
from trainlet.passes.reorder import reorder
from trainlet.plan.arena import MemoryPlan, make_plan
from trainlet.plan.state import StateLayout, state_layout
from trainlet.toolchain.targets import HOST
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


ALL = Passes()


@dataclass(frozen=True)
class Planned:
    """A model on the way to C, up to its memory: what of ``Compiled`` needs no code to be written."""

    train: Graph
    graph: Graph
    plan: MemoryPlan
    layout: StateLayout


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


def compile_model(graph: Graph, scheme: UpdateScheme, target: Core = HOST, passes: Passes = ALL) -> Compiled:
    """Compiles a model with a head (``frontends.attach_head``) and a scheme for it, with the kernels of ``target``;
    those of HOST run anywhere. Raises UnsupportedError naming the layer where it cannot be trained."""
    return _finish(plan_model(graph, scheme, target, passes=passes), scheme, target)


def compile_inference(graph: Graph, target: Core = HOST, passes: Passes = ALL) -> Compiled:
    """The same model without a training step: nothing of training is in its code, arena or state. Only the head stays
    in the state, since it is not part of the model file. ``graph`` is verified, of stage INT8 and has a head."""
    verify_graph(graph)
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
