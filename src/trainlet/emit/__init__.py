# SPDX-License-Identifier: Apache-2.0
"""LOWERED graph + memory plan -> C99: one kernel call per node, literal arguments, no logic."""

from trainlet.emit.code import NodeLines, c_name
from trainlet.emit.compiled import Compiled
from trainlet.emit.emitter import Emitter
from trainlet.emit.model import Sources, emit, graph_hash
from trainlet.ops.op import c_float

__all__ = [
    "Compiled",
    "Emitter",
    "NodeLines",
    "Sources",
    "c_float",
    "c_name",
    "emit",
    "graph_hash",
]
