# SPDX-License-Identifier: Apache-2.0
"""Independent checks: of a graph against its stage, and of a memory plan against its graph."""

from trainlet.verify.depth_first import verify_streams
from trainlet.verify.errors import VerifyError
from trainlet.verify.graph import verify_graph
from trainlet.verify.plan import verify_plan

__all__ = ["VerifyError", "verify_graph", "verify_plan", "verify_streams"]
