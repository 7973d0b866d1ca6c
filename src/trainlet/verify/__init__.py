# SPDX-License-Identifier: Apache-2.0
"""Checks of what the compiler makes: graphs, memory plans, nodes that run depth first, and what there is C for."""

from trainlet.verify.compilable import verify_compilable
from trainlet.verify.depth_first import verify_depth_first
from trainlet.verify.errors import VerifyError
from trainlet.verify.graph import verify_graph
from trainlet.verify.plan import verify_plan

__all__ = ["VerifyError", "verify_compilable", "verify_depth_first", "verify_graph", "verify_plan"]
