# SPDX-License-Identifier: Apache-2.0
"""LOWERED graph + memory plan -> C99: one kernel call per node, literal arguments, no logic."""

from trainlet.emit.compiled import Compiled
from trainlet.emit.emitter import Emitter, c_float, c_name
from trainlet.emit.model import Sources, emit, graph_hash
from trainlet.emit.rules import EMIT

__all__ = [
    "EMIT",
    "Compiled",
    "Emitter",
    "Sources",
    "c_float",
    "c_name",
    "emit",
    "graph_hash",
]
