# SPDX-License-Identifier: Apache-2.0
"""A compiled model: what the compiler hands to everything that builds, runs or measures it."""

from __future__ import annotations

from dataclasses import dataclass

from trainlet.autodiff.scheme import UpdateScheme
from trainlet.emit.model import Sources
from trainlet.ir import Graph
from trainlet.ops.op import Core
from trainlet.plan.arena import MemoryPlan
from trainlet.plan.state import StateLayout


@dataclass(frozen=True)
class Compiled:
    """A compiled model: ``train`` is the step as differentiated (or the model, for inference alone), ``graph`` what is
    emitted, for ``target``. ``model_hash`` is the SHA-256 of ``train`` and its data, whatever passes ran."""

    train: Graph
    graph: Graph
    scheme: UpdateScheme
    target: Core
    plan: MemoryPlan
    layout: StateLayout
    sources: Sources
    model_hash: str

    @property
    def state_bytes(self) -> int:
        """SRAM that holds the trained state."""
        return self.layout.nbytes

    def __repr__(self) -> str:
        return (
            f"<Compiled {self.graph.name!r}: scheme {self.scheme.name!r}, {self.scheme.bits} bits, for "
            f"{self.target.core}, arena {self.plan.arena_bytes} B, state {self.state_bytes} B, {self.model_hash[:16]}>"
        )
