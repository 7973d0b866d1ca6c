# SPDX-License-Identifier: Apache-2.0
"""The whole way in one function: model -> training step -> lowered -> planned -> C. Data flows top to bottom."""

from __future__ import annotations

from dataclasses import dataclass

from trainlet.autodiff import differentiate
from trainlet.emit import Sources, emit, graph_hash
from trainlet.ir import Graph
from trainlet.layout import StateLayout, state_layout
from trainlet.passes.fuse import fuse
from trainlet.plan import MemoryPlan, make_plan
from trainlet.scheme import UpdateScheme
from trainlet.verify import verify_graph, verify_plan


@dataclass(frozen=True)
class Compiled:
    """A compiled model: ``train`` is the step as differentiated, ``graph`` what is emitted. ``model_hash`` is the
    SHA-256 of ``train`` and its data, whatever passes ran."""

    train: Graph
    graph: Graph
    scheme: UpdateScheme
    plan: MemoryPlan
    layout: StateLayout
    sources: Sources
    model_hash: str

    @property
    def state_bytes(self) -> int:
        """SRAM that holds the trained state."""
        return self.layout.nbytes


def compile_model(graph: Graph, scheme: UpdateScheme) -> Compiled:
    """Compiles a model with a head (``frontends.attach_head``) and a scheme for it. Raises UnsupportedError naming the
    layer where it cannot be trained."""
    verify_graph(graph)
    train = differentiate(graph, scheme)
    lowered = fuse(train)
    plan = make_plan(lowered)
    verify_plan(lowered, plan)
    layout = state_layout(lowered)
    model_hash = graph_hash(train)
    return Compiled(train, lowered, scheme, plan, layout, emit(lowered, plan, layout, model_hash), model_hash)
